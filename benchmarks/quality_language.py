"""How good a language model is that observers quantized: SmolLM2-135M-Instruct, all Linears but its head.

Perplexity, and the KL divergence from the float model's next tokens (nats, the mean over tokens), on held-out windows
of Python's documentation (``examples/quantize_smollm2.py``). "s" is of everything from the float model to the quantized
one, export and compilation too: the first draw's and the median of the others. Each repeat is another draw of windows
for calibration; "+-" is the standard error of the mean over draws. "Ahead" is how much less log perplexity, or
divergence, a method has than --against on the same draw, the mean over draws; "+- draws" is that mean's standard error
over draws, "+- text" over held-out windows. What needs no data gets none.

Methods are those of the part model, without PT2E; ``output_mse`` through ``fxmse.quantize_checkpoint`` with
``propagate="quantized"``, whose seconds have the files, too; and llm-compressor's ``GPTQModifier`` in its own
sequential pipeline, with scales of min-max or ``memoryless_mse``. A Linear whose inputs the group does not divide stays
in float: of 128, which divides 1536 and not 576, all but the down projections.

The weights come from a file in 4 bits with groups of 32 (asymmetric): no scheme is that one.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from calibrate import Batches
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from formats import WEIGHTS, Fields
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from quality_models import METHODS as MODEL_METHODS
from quality_models import MODELS, Formats, Method, make_scheme, start_llm_compressor
from smollm2 import HEAD, draw_windows, example, load_model, load_windows
from tables import Row, choose, note
from tabulate import tabulate
from torch import Tensor, nn
from transformers import CompressedTensorsConfig

import fxmse

__all__ = ["LANGUAGE_METHODS", "LANGUAGE_SCHEMES", "compare_language"]

WINDOWS_A_BATCH = 6


def make_int4(group_size: int) -> Fields:
    """A format of weights."""
    return {"num_bits": 4, "strategy": "group", "group_size": group_size}


LANGUAGE_SCHEMES: dict[str, Formats] = {
    "W4A16 g192": (make_int4(192), None),
    "W4A16 g128": (make_int4(128), None),
    "W4A16 g64": (make_int4(64), None),
    "W4A16 g32": MODELS["W4A16 g32"],
    "W3A16 g64": MODELS["W3A16 g64"],
    "NVFP4A16": (WEIGHTS["nvfp4"], None),
    "MXFP4A16": (WEIGHTS["mxfp4"], None),
    "W8A8": MODELS["W8A8"],
    "W4A8 g64": (make_int4(64), MODELS["W8A8"][1]),
}
LANGUAGE_METHODS = {
    **{label: method for label, method in MODEL_METHODS.items() if method.library != "PT2E"},
    "fxmse output_mse, propagated": Method("fxmse, in parts", "output_mse", "exact_mse"),
    "llm-compressor GPTQ, min-max": Method("GPTQ", "memoryless_minmax", "mse"),
    "llm-compressor GPTQ, memoryless_mse": Method("GPTQ", "memoryless_mse", "mse"),
}


class Run(NamedTuple):
    """One calibration: means over each held-out window's tokens."""

    losses: list[float]  # negative log-likelihoods
    divergences: list[float]
    seconds: float

    @property
    def loss(self) -> float:
        """The log perplexity."""
        return statistics.fmean(self.losses)

    @property
    def divergence(self) -> float:
        """The mean over all tokens."""
        return statistics.fmean(self.divergences)


def list_methods(formats: Formats, chosen: list[str]) -> dict[str, Method]:
    """Those that make sense for a scheme."""
    is_tensor_group = formats[0]["strategy"] == "tensor_group"
    labels = choose(LANGUAGE_METHODS, chosen)
    methods = {label: LANGUAGE_METHODS[label] for label in labels}
    return {label: method for label, method in methods.items() if is_tensor_group or "nvfp4" not in method.weights}


def list_ignored(model: nn.Module, args: QuantizationArgs) -> list[str]:
    """The head, and Linears whose inputs are no whole groups."""
    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    size = args.group_size or 1
    return [name for name, linear in linears if name == HEAD or linear.in_features % max(1, size)]


def quantize(method: Method, formats: Formats, model: nn.Module, batches: Batches) -> Callable[..., Any]:
    """The quantized model."""
    scheme = make_scheme(formats, method)
    assert scheme.weights is not None
    groups, ignore = {"all": scheme}, list_ignored(model, scheme.weights)
    data = batches if scheme.input_activations is not None or method.needs_inputs else None
    if method.library == "fxmse":
        config = QuantizationConfig(config_groups=groups, ignore=ignore)
        observed = fxmse.prepare(model, config, batches[0])
        return fxmse.convert(fxmse.calibrate(observed, data or [], progress=False))
    if method.library == "fxmse, in parts":
        return quantize_in_parts(QuantizationConfig(config_groups=groups, ignore=ignore), model, batches)
    if method.library == "GPTQ":
        started = start_llm_compressor(model, GPTQModifier(config_groups=groups, ignore=ignore), batches, "sequential")
    else:
        started = start_llm_compressor(model, QuantizationModifier(config_groups=groups, ignore=ignore), data)
    started.run()
    return started.finish()


def quantize_in_parts(config: QuantizationConfig, model: nn.Module, batches: Batches) -> Callable[..., Any]:
    """The quantized model, each part of which was calibrated on what those before it compute; from files to files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "float")
        out = folder / "quantized"
        fxmse.quantize_checkpoint(folder / "float", config, batches, out=out, propagate="quantized", progress=False)
        loading = CompressedTensorsConfig(run_compressed=False)
        # compressed-tensors decompresses fp4 to bfloat16, whatever the model is in.
        return type(model).from_pretrained(out, quantization_config=loading).to(model.dtype).eval()


def predict(model: Callable[..., Any], batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each window the log-probabilities of its next tokens, and what they are."""
    for batch in batches:
        logits = model(**batch).logits
        for window_logits, tokens in zip(logits, batch["input_ids"], strict=True):
            yield F.log_softmax(window_logits[:-1].float(), -1), tokens[1:]


def measure(model: Callable[..., Any], held_out: Batches, expected: list[Tensor], seconds: float = 0.0) -> Run:
    """Compares predictions with what follows, and with ``expected`` log-probabilities."""
    losses, divergences = [], []
    for own, (found, tokens) in zip(expected, predict(model, held_out), strict=True):
        losses.append(F.nll_loss(found, tokens).item())
        divergences.append(F.kl_div(found, own, log_target=True, reduction="batchmean").item())
    return Run(losses, divergences, seconds)


class Ledger:
    """Runs by scheme, method and draw: what a file has of the same sizes, and what is added to it.

    Args:
        path: of a file of JSON, a run a line; None keeps nothing.
        sizes: what runs of one table have in common.
    """

    def __init__(self, path: Path | None, sizes: Row) -> None:
        self.path, self.sizes = path, sizes
        self.runs: dict[tuple[str, str, int], Run] = {}
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        for row in map(json.loads, lines):
            if row["sizes"] == sizes:
                self.runs[row["scheme"], row["method"], row["draw"]] = Run(**row["run"])

    def add(self, scheme: str, method: str, draw: int, run: Run) -> None:
        """Keeps a run."""
        self.runs[scheme, method, draw] = run
        row = {"sizes": self.sizes, "scheme": scheme, "method": method, "draw": draw, "run": run._asdict()}
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def find_error(values: list[float]) -> float | None:
    """The standard error of their mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def compare(name: str, own: list[list[float]], other: list[list[float]]) -> Row:
    """By how much ``own`` is less; both have a list of windows for each draw."""
    ahead = [[b - a for a, b in zip(x, y, strict=True)] for x, y in zip(own, other, strict=True)]
    by_draw = [statistics.fmean(windows) for windows in ahead]
    by_window = [statistics.fmean(draws) for draws in zip(*ahead, strict=True)]
    return {
        f"{name} ahead": statistics.fmean(by_draw),
        f"{name} +- draws": find_error(by_draw),
        f"{name} +- text": find_error(by_window),
    }


def summarize(runs: Mapping[str, Mapping[int, Run]], against: str) -> Iterator[Row]:
    """One row for each method of a scheme."""
    for label, by_draw in runs.items():
        row: Row = {"observers": label, "draws": len(by_draw)}
        perplexities = [math.exp(run.loss) for run in by_draw.values()]
        divergences = [run.divergence for run in by_draw.values()]
        for column, values in (("perplexity", perplexities), ("KL", divergences)):
            row |= {column: statistics.fmean(values), f"{column} +-": find_error(values)}
        draws = sorted(by_draw.keys() & runs.get(against, {}).keys())
        if label != against and draws:
            pairs = [(by_draw[draw], runs[against][draw]) for draw in draws]
            row |= compare("log", [own.losses for own, _ in pairs], [other.losses for _, other in pairs])
            row |= compare("KL", [own.divergences for own, _ in pairs], [other.divergences for _, other in pairs])
        seconds = [run.seconds for run in by_draw.values()]
        yield {**row, "first s": seconds[0], "s": statistics.median(seconds[1:] or seconds)}


@torch.no_grad()
def compare_language(options: argparse.Namespace) -> list[Row]:
    """The table of language models."""
    model = load_model()
    (num_windows, length), (num_held_out, held_out_length) = options.windows, options.held_out
    sizes = {"windows": options.windows, "held-out": options.held_out}
    ledger = Ledger(options.resume, sizes)
    windows = example.spread(load_windows(held_out_length, is_held_out=True), num_held_out)
    held_out = [{"input_ids": part} for part in windows.split(WINDOWS_A_BATCH)]
    expected = [log_probabilities for log_probabilities, _ in predict(model, held_out)]
    float_run = measure(model, held_out, expected)
    note(f"float: perplexity {math.exp(float_run.loss):.3f}")
    shown: dict[str, dict[str, dict[int, Run]]] = defaultdict(lambda: defaultdict(dict))
    for draw in range(options.repeats):
        batches = example.make_batches(draw_windows(num_windows, length, draw))
        for name in choose(LANGUAGE_SCHEMES, options.schemes):
            formats = LANGUAGE_SCHEMES[name]
            for label, method in list_methods(formats, options.methods).items():
                if (name, label, draw) not in ledger.runs:
                    start = time.perf_counter()
                    quantized = quantize(method, formats, model, batches)
                    seconds = time.perf_counter() - start
                    ledger.add(name, label, draw, measure(quantized, held_out, expected, seconds))
                run = shown[name][label][draw] = ledger.runs[name, label, draw]
                note(f"{draw}, {name}, {label}: {math.exp(run.loss):.3f}, {run.divergence:.4f}, {run.seconds:.1f} s")
    rows = [{"scheme": name, **row} for name, runs in shown.items() for row in summarize(runs, options.against)]
    print(
        f"\nlanguage, {options.repeats} draws of {num_windows} windows of {length} tokens, {num_held_out} of "
        f"{held_out_length} held out, perplexity of the float model {math.exp(float_run.loss):.3f}, ahead of "
        f"{options.against}, {torch.get_num_threads()} threads\n"
    )
    filled = [column for row in rows for column, value in row.items() if value is not None]
    columns = sorted(dict.fromkeys(filled), key=lambda column: column in ("first s", "s"))
    digits = {"perplexity": ".3f", "perplexity +-": ".3f", "first s": ".1f", "s": ".1f", "draws": ""}
    table = [[row.get(column) for column in columns] for row in rows]
    print(tabulate(table, columns, floatfmt=[digits.get(c, ".4f") for c in columns], tablefmt="github"))
    return rows
