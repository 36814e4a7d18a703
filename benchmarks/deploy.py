"""all-MiniLM-L6-v2 as it is deployed: float and W8A8, compiled, in turn in one process.

    python benchmarks/deploy.py [--batches 16] [--length 128] [--runs 7]

Batches of 16 sentences, padded to one length; medians. "fxmse" is the example's graph after ``LowerToQDQ``, "PT2E"
torchao's (X86InductorQuantizer, by histograms or by fxmse's ``exact_mse``); all are compiled with freezing, as the
float model is. The cosine is that of the sentence embeddings to the float model's. Needs the benchmarks extra.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

import fxmse
from fxmse.passes import LowerToQDQ

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import quantize_minilm as example

Batches = list[dict[str, Tensor]]


def make_fxmse(program: ExportedProgram, batches: Batches) -> GraphModule:
    """The folded graph with pairs in place of its fake-quantize nodes."""
    quantized = fxmse.quantize(program, example.CONFIG, batches, progress=False)
    LowerToQDQ()(quantized)
    return quantized


def make_pt2e(program: ExportedProgram, batches: Batches, observer: str | None = None) -> GraphModule:
    """PT2E's, with its own observers or with one of fxmse's."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = x86.get_default_x86_inductor_quantization_config()
    if observer:
        from fxmse.pt2e import use_observer

        config = use_observer(config, observer)
    quantizer = x86.X86InductorQuantizer().set_global(config)
    prepared = prepare_pt2e(program.module(), quantizer)
    for batch in batches:
        prepared(**batch)
    return convert_pt2e(prepared)


MODELS: dict[str, Callable[[ExportedProgram, Batches], GraphModule]] = {
    "float": lambda program, _: program.module(),
    "fxmse": make_fxmse,
    "PT2E": make_pt2e,
    "PT2E, exact_mse": lambda program, batches: make_pt2e(program, batches, "exact_mse"),
}


def pad(batch: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """The batch with all sentences cut or padded to ``length`` tokens."""
    return {name: F.pad(tensor, (0, length - tensor.shape[1])) for name, tensor in batch.items()}


@torch.no_grad()
@torch._inductor.config.patch(freezing=True)
def compare(num_batches: int, length: int, num_runs: int) -> list[dict[str, Any]]:
    """The table's rows."""
    folder = example.find_model_folder()
    batches = example.load_batches(folder, 32 + num_batches)
    calibration, held_out = batches[:32], [pad(batch, length) for batch in batches[32:]]
    model = example.AutoModel.from_pretrained(folder).eval()
    program = example.export(model, calibration[0])
    compiled, first = {}, {}
    for name, make in MODELS.items():
        compiled[name] = torch.compile(make(program, calibration), dynamic=False)
        first[name] = example.measure_seconds(lambda name=name: compiled[name](**held_out[0]))
    return compare_runs(compiled, held_out, num_runs, "compile s", first)


def compare_runs(
    runs: Mapping[str, Callable[..., Any]], held_out: Batches, num_runs: int, column: str, facts: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row for each model: its seconds, in turn with the others', beside those of "float", and its cosine to that.

    Args:
        runs: the models by name.
        held_out: what each run is of.
        num_runs: of which medians are taken.
        column: what ``facts`` are.
        facts: one more of each model.
    """
    embeddings = {name: torch.cat([example.embed(run, batch) for batch in held_out]) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(num_runs):
        for name, run in runs.items():
            seconds[name].append(example.measure_seconds(lambda run=run: [run(**batch) for batch in held_out]))
    return [
        {
            "model": name,
            "s": statistics.median(seconds[name]),
            "times as fast": statistics.median(f / s for f, s in zip(seconds["float"], seconds[name], strict=True)),
            column: facts[name],
            "cosine": F.cosine_similarity(embeddings[name], embeddings["float"]).mean().item(),
        }
        for name in runs
    ]


def main(compare: Callable[[int, int, int], list[dict[str, Any]]], description: str | None) -> None:
    """Runs a benchmark, whose rows ``compare`` makes of a number of batches, their length and a number of runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    rows = compare(options.batches, options.length, options.runs)
    vnni = "with" if torch.cpu._is_vnni_supported() else "without"
    print(f"{options.batches} batches, {torch.get_num_threads()} threads, {vnni} VNNI, {options.runs} runs, medians")
    print(tabulate(rows, headers="keys", floatfmt=("", ".3f", ".2f", ".1f", ".4f"), tablefmt="github"))


if __name__ == "__main__":
    main(compare, __doc__)
