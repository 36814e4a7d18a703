"""How good a model is that observers quantized: the cosines of its outputs to the float model's.

The outputs are all-MiniLM-L6-v2's mean-pooled embeddings of held-out sentences. Seconds are of a calibration: the first
one, with whatever is compiled for it, and the median of the others. Each repeat has other batches, and the model's
channels in another order (``permutation.py``): what is left of a difference over the repeats is not chance. "exact_mse
ahead by" is the mean of the differences to the cosine of exact_mse, with importance where the other one has it, and
"+-" that mean's standard error. Observers are those of weights + those of inputs, where these are static: W4A16 and
W3A16 quantize none, and NVFP4's are local, with global scales of min-max. What needs no data gets none.
"""

import argparse
import contextlib
import copy
import io
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from calibrate import Batches, Calibration, example, restart, start_pt2e
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from formats import INPUTS, WEIGHTS, Fields
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from minilm import load_batches, load_model
from permutation import permute_channels
from tables import Row, choose, note
from tabulate import tabulate
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils.data import DataLoader

import fxmse

__all__ = ["METHODS", "MODELS", "compare_models"]

Formats = tuple[Fields, Fields | None]  # of weights and of inputs; None stays in float
MODELS: dict[str, Formats] = {
    "W8A8": (WEIGHTS["int8 channel"], INPUTS["input int8 asymmetric"]),
    "W4A8 g32": (WEIGHTS["int4 g32"], INPUTS["input int8 asymmetric"]),
    "W4A16 g32": (WEIGHTS["int4 g32"], None),
    "W3A16 g64": (WEIGHTS["int3 g64"], None),
    "NVFP4": (WEIGHTS["nvfp4"], {**WEIGHTS["nvfp4"], "dynamic": "local"}),
}


class Method(NamedTuple):
    """Observers of a whole model, by name."""

    library: str
    weights: str
    inputs: str
    weights_kwargs: Fields = {}  # noqa: RUF012

    @property
    def needs_inputs(self) -> bool:
        """Whether weights wait for activations."""
        return "imatrix" in self.weights or self.weights == "output_mse" or bool(self.weights_kwargs.get("importance"))


OWN, OWN_WITH_IMPORTANCE = "fxmse exact_mse", "fxmse exact_mse, importance"
METHODS = {
    "fxmse min-max": Method("fxmse", "memoryless_minmax", "static_minmax"),
    "fxmse memoryless_mse + mse": Method("fxmse", "memoryless_mse", "mse"),
    "fxmse nvfp4_expanded_mse": Method("fxmse", "nvfp4_expanded_mse", "mse"),
    "fxmse imatrix_mse + mse": Method("fxmse", "imatrix_mse", "mse"),
    OWN: Method("fxmse", "exact_mse", "exact_mse"),
    OWN_WITH_IMPORTANCE: Method("fxmse", "exact_mse", "exact_mse", {"importance": True}),
    "fxmse output_mse": Method("fxmse", "output_mse", "exact_mse"),
    "llm-compressor memoryless_mse + mse": Method("llm-compressor", "memoryless_mse", "mse"),
    "llm-compressor nvfp4_expanded_mse": Method("llm-compressor", "nvfp4_expanded_mse", "mse"),
    "llm-compressor imatrix_mse + mse": Method("llm-compressor", "imatrix_mse", "mse"),
    "PT2E histogram": Method("PT2E", "per_channel", "histogram"),
}


def make_scheme(formats: Formats, method: Method) -> QuantizationScheme:
    """A scheme with a method's observers."""
    weights, inputs = formats
    is_local = inputs is not None and inputs.get("dynamic") == "local"
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights, observer=method.weights, observer_kwargs=dict(method.weights_kwargs)),
        input_activations=inputs
        and QuantizationArgs(**inputs, observer="static_minmax" if is_local else method.inputs),
    )


def start_llm_compressor(
    model: nn.Module, recipe: Modifier, batches: Batches | None, pipeline: str = "basic"
) -> Calibration:
    """llm-compressor's, on a copy of the model; without data where it needs none."""
    model = copy.deepcopy(model)
    data: Fields = {"pipeline": "datafree"}
    if batches is not None:
        loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        data = {"pipeline": pipeline, "dataset": loader}

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            oneshot(model=model, recipe=recipe, **data)  # type: ignore[arg-type]

    return Calibration(run, lambda: model)


def start(method: Method, name: str, model: nn.Module, program: ExportedProgram, batches: Batches) -> Calibration:
    """A calibration of one scheme by one method."""
    if method.library == "PT2E":
        return start_pt2e(program, batches)
    scheme = make_scheme(MODELS[name], method)
    needs_data = scheme.input_activations is not None or method.needs_inputs
    if method.library == "llm-compressor":
        recipe = QuantizationModifier(config_groups={"all": scheme})
        return start_llm_compressor(model, recipe, batches if needs_data else None)
    return restart(fxmse.prepare(program, scheme), batches if needs_data else [], False)


def list_methods(name: str, chosen: list[str]) -> dict[str, Method]:
    """Those that are there and make sense for a scheme."""
    return {
        label: method
        for label, method in METHODS.items()
        if label in choose(METHODS, chosen)
        and (name == "W8A8" or method.library != "PT2E")
        and (name == "NVFP4" or "nvfp4" not in method.weights)
    }


class ModelRun(NamedTuple):
    """One calibration of a model."""

    cosines: Tensor  # of held-out sentences, to the float model's
    seconds: float


def measure_model(started: Calibration, held_out: Batches, expected: list[Tensor]) -> ModelRun:
    """Calibrates and compares outputs with the float model's."""
    seconds = example.measure_seconds(started.run)
    quantized = started.finish()
    pairs = zip(expected, held_out, strict=True)
    cosines = torch.cat([F.cosine_similarity(e, example.embed(quantized, b)) for e, b in pairs])
    return ModelRun(cosines, seconds)


def summarize_models(measured: Mapping[str, list[ModelRun]]) -> Iterator[Row]:
    """One row for each method of a scheme."""
    means = {label: torch.stack([run.cosines.mean() for run in runs]) for label, runs in measured.items()}
    for label, runs in measured.items():
        row: Row = {
            "observers": label,
            "cosine mean": means[label].mean().item(),
            "least": min(run.cosines.min().item() for run in runs),
            "exact_mse ahead by": None,
            "+-": None,
        }
        own = OWN_WITH_IMPORTANCE if METHODS[label].needs_inputs else OWN
        if own in means and own != label:
            ahead = means[own] - means[label]
            row["exact_mse ahead by"] = ahead.mean().item()
            if len(ahead) > 1:
                row["+-"] = (ahead.std() / math.sqrt(len(ahead))).item()
        yield {**row, "first s": runs[0].seconds, "s": statistics.median(run.seconds for run in runs[1:] or runs)}


@torch.no_grad()
def compare_models(options: argparse.Namespace) -> list[Row]:
    """The table of models."""
    calibration, held_out = load_batches(options.batches * options.repeats)
    held_out = held_out[: options.batches]
    measured: dict[str, dict[str, list[ModelRun]]] = defaultdict(lambda: defaultdict(list))
    for repeat in range(options.repeats):
        model = permute_channels(load_model(), repeat)
        batches = calibration[repeat * options.batches :][: options.batches]
        program = example.export(model, batches[0])
        float_graph = program.module()
        expected = [example.embed(float_graph, batch) for batch in held_out]
        for name in choose(MODELS, options.schemes):
            for label, method in list_methods(name, options.methods).items():
                started = start(method, name, model, program, batches)
                run = measure_model(started, held_out, expected)
                measured[name][label].append(run)
                note(f"{repeat}, {name}, {label}: {run.cosines.mean():.5f}, {run.seconds:.1f} s")
    rows = [{"scheme": name, **row} for name, by_label in measured.items() for row in summarize_models(by_label)]
    sizes = f"{options.repeats} repeats of {options.batches} batches, {len(held_out)} held out"
    print(f"\nmodel, {sizes}, {torch.get_num_threads()} threads\n")
    formats = ("", "", ".5f", ".5f", ".5f", ".5f", ".2f", ".2f")
    print(tabulate(rows, headers="keys", floatfmt=formats, tablefmt="github"))
    return rows
