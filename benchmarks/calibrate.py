"""The whole calibration of all-MiniLM-L6-v2 (W8A8 static), in units of the float passes over the same batches.

    python benchmarks/calibrate.py [--batches 32] [--runs 3] [--methods ...]

Each method runs in a process of its own, float passes and calibrations in turn; medians. "First s" is the first
calibration, with whatever is compiled for it. The float passes are eager, those of the compiled calibration compiled.
Peers: PT2E (torchao, X86InductorQuantizer, with its histograms) and llm-compressor (``oneshot`` with ``mse``).
Needs the benchmarks extra.
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

import fxmse
from fxmse.observers.states import State
from fxmse.passes.probe import find_probes
from fxmse.search.compiling import compilation

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import quantize_minilm as example

Batches = list[dict[str, Tensor]]


class Calibration(NamedTuple):
    """A calibration that is about to start."""

    run: Callable[[], object]
    finish: Callable[[], Callable[..., Any]]  # the quantized model


def make_config(observer: str, **kwargs: Any) -> Any:
    """The example's config with another observer of inputs; the weights' is memoryless_mse."""
    config = example.CONFIG.model_copy(deep=True)
    inputs = config.config_groups["w8a8_static"].input_activations
    inputs.observer, inputs.observer_kwargs = observer, kwargs
    return config


def start_fxmse(program: ExportedProgram, batches: Batches, observer: str, **kwargs: Any) -> Calibration:
    """That of fxmse."""
    return restart(fxmse.prepare(program, make_config(observer, **kwargs)), batches, False)


@functools.cache
def prepare_once(program: ExportedProgram) -> GraphModule:
    """The example's observed graph: what is compiled of it goes with it."""
    return fxmse.prepare(program, example.CONFIG)


def restart(observed: GraphModule, batches: Batches, is_compiled: bool) -> Calibration:
    """A calibration from the beginning; the search is compiled from its first use on."""
    for _, probe in find_probes(observed):
        probe.state = State()

    def run() -> None:
        with compilation("always"):
            fxmse.calibrate(observed, batches, compile=is_compiled, progress=False)

    return Calibration(run, lambda: fxmse.convert(observed))


def start_pt2e(program: ExportedProgram, batches: Batches) -> Calibration:
    """PT2E's; its preparing and converting are not counted."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program.module(), quantizer)
    return Calibration(lambda: [prepared(**batch) for batch in batches], lambda: convert_pt2e(prepared))


def start_llm_compressor(model: nn.Module, batches: Batches) -> Calibration:
    """llm-compressor's, on a copy of the model."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from torch.utils.data import DataLoader

    model = copy.deepcopy(model)
    recipe = QuantizationModifier(config_groups=make_config("mse").config_groups)
    loader = DataLoader(batches, batch_size=None)

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            oneshot(model=model, dataset=loader, recipe=recipe, pipeline="basic")

    return Calibration(run, lambda: model)


METHODS: dict[str, Callable[[nn.Module, ExportedProgram, Batches], Calibration]] = {
    "fxmse mse, norm 2, averaging .1 (the example)": lambda _, program, batches: start_fxmse(
        program, batches, "mse", norm=2.0, averaging_constant=0.1
    ),
    "the same, compiled": lambda _, program, batches: restart(prepare_once(program), batches, True),
    "fxmse mse (defaults: norm 2.4, averaging .01)": lambda _, program, batches: start_fxmse(program, batches, "mse"),
    "fxmse static_minmax": lambda _, program, batches: start_fxmse(program, batches, "static_minmax"),
    "PT2E histogram": lambda _, program, batches: start_pt2e(program, batches),
    "llm-compressor mse": lambda model, _, batches: start_llm_compressor(model, batches),
}


@torch.no_grad()
def measure(method: str, num_batches: int, num_runs: int) -> dict[str, Any]:
    """One row of the table."""
    folder = example.find_model_folder()
    batches = example.load_batches(folder, num_batches * 3 // 2)
    calibration, held_out = batches[:num_batches], batches[num_batches:]
    model = example.AutoModel.from_pretrained(folder).eval()
    program = example.export(model, calibration[0])
    float_graph: Callable[..., Any] = program.module()
    expected = [example.embed(float_graph, batch) for batch in held_out]
    if method == "the same, compiled":
        float_graph = torch.compile(program.module(), dynamic=True)
        for batch in calibration[:3]:
            float_graph(**batch)
    start = METHODS[method]
    first = example.measure_seconds(start(model, program, calibration).run)
    float_seconds, seconds = [], []
    for _ in range(num_runs):
        started = start(model, program, calibration)
        float_seconds.append(example.measure_seconds(lambda: [float_graph(**batch) for batch in calibration]))
        seconds.append(example.measure_seconds(started.run))
    quantized = started.finish()
    cosines = torch.cat(
        [F.cosine_similarity(e, example.embed(quantized, b)) for e, b in zip(expected, held_out, strict=True)]
    )
    return {
        "method": method,
        "float s": statistics.median(float_seconds),
        "calibrate s": statistics.median(seconds),
        "ratio": statistics.median(s / f for s, f in zip(seconds, float_seconds, strict=True)),
        "first s": first,
        "cosine mean": cosines.mean().item(),
        "least": cosines.min().item(),
    }


def measure_all(methods: list[str], options: list[str]) -> Iterator[dict[str, Any]]:
    """The rows, each measured in a new process."""
    for method in methods:
        command = [sys.executable, __file__, *options, "--in-this-process", method]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        row = json.loads(output.splitlines()[-1])
        print(f"{method}: {row['ratio']:.2f}", file=sys.stderr)
        yield row


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--in-this-process", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        print(json.dumps(measure(options.in_this_process, options.batches, options.runs)))
        return
    rows = list(measure_all(options.methods, ["--batches", str(options.batches), "--runs", str(options.runs)]))
    print(f"{options.batches} batches, {torch.get_num_threads()} threads, {options.runs} runs, medians")
    print(tabulate(rows, headers="keys", floatfmt=("", ".2f", ".2f", ".2f", ".1f", ".4f", ".4f"), tablefmt="github"))


if __name__ == "__main__":
    main()
