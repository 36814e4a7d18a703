"""What the search for the least error of outputs costs: beside the search for that of weights, and beside float passes.

    python benchmarks/output_error.py [--part search gather] [--size 2048] [--runs 3] [--batches 4]

search: ms of observers on one normal weight, compiled, medians after a first call, and over those of ``exact_mse``;
the inputs' channels go together. "error" is that of the outputs over ``exact_mse``'s.

gather: what it takes to add up the products of the inputs of all Linears of SmolLM2 while data runs through the graph,
in float passes over the same data: seconds of the observed graph over those of the float one, less 1. Medians over runs
of all batches, in turn. Needs the examples extra.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle import fake_quantize
from formats import WEIGHTS, Fields
from search import measure_ms
from tables import Row
from tabulate import tabulate
from torch import Tensor

import fxmse
from fxmse.observers import Observer
from fxmse.observers.input_aware import InputAwareObserver
from fxmse.search.compiling import compilation

SCHEMES: dict[str, Fields] = {
    "int4 g64": {**WEIGHTS["int4 g32"], "group_size": 64},
    "int4 g128": WEIGHTS["int4 g128"],
    "nvfp4": WEIGHTS["nvfp4"],
    "int8 channel": WEIGHTS["int8 channel"],
}
OBSERVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "exact_mse": ("exact_mse", {}),
    "exact_mse, importance": ("exact_mse", {"importance": True}),
    **{f"output_mse, sweeps {num}": ("output_mse", {"max_sweeps": num}) for num in (0, 1, 3, 16)},
}


def make_inputs(size: int) -> Tensor:
    """Tokens whose channels go together, with a decaying spectrum."""
    strength = torch.exp(-torch.arange(size) / (size / 8))
    mixed = torch.randn(2 * size, size) * strength @ torch.randn(size, size)
    return mixed / mixed.std() + 0.3 * torch.randn(2 * size, size)


def compare_searches(options: argparse.Namespace) -> list[Row]:
    """A row for each scheme and observer."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(options.size, options.size), make_inputs(options.size)
    products = inputs.T @ inputs
    rows: list[Row] = []
    for scheme, fields in SCHEMES.items():
        args = QuantizationArgs(**fields)
        first: dict[str, float] = {}
        for label, (name, kwargs) in OBSERVERS.items():
            observer = Observer.load_from_registry(name, base_name="weight", args=args, **kwargs)
            if isinstance(observer, InputAwareObserver) and observer.inputs is not None:
                observer.inputs(inputs)
            times = [measure_ms(lambda observer=observer: observer(weight), "cpu") for _ in range(options.runs + 1)]
            qparams = observer.get_qparams()
            scale, zero_point, global_scale = (qparams[key] for key in ("scale", "zero_point", "global_scale"))
            assert scale is not None
            change = fake_quantize(weight, scale, zero_point, args, global_scale=global_scale) - weight
            row = {"ms": statistics.median(times[1:]), "error": ((change @ products) * change).double().sum().item()}
            first = first or row
            ratios = {"/ exact_mse": row["ms"] / first["ms"], "error": row["error"] / first["error"]}
            rows.append({"scheme": scheme, "observer": label, "ms": row["ms"], **ratios})
    print(f"\nsearch, {options.size} x {options.size}, float32, {torch.get_num_threads()} threads\n")
    return rows


def compare_passes(options: argparse.Namespace) -> list[Row]:
    """A row for each statistic of inputs."""
    import smollm2

    batches = smollm2.example.make_batches(smollm2.draw_windows(4 * options.batches, 256, 0))[: options.batches]
    model = smollm2.load_model()
    model.config.use_cache = False
    graphs: dict[str, Callable[..., Any]] = {}
    for label, (name, kwargs) in OBSERVERS.items():
        if label in ("exact_mse, importance", "output_mse, sweeps 16"):
            weights = {**SCHEMES["int4 g64"], "observer": name, "observer_kwargs": kwargs}
            config = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": [smollm2.HEAD]}
            graphs[label] = fxmse.prepare(model, config, batches[0])
    runs = {"float": model, **graphs}

    def run_all(graph: Callable[..., Any]) -> float:
        return measure_ms(lambda: [graph(**batch) for batch in batches], "cpu") / 1e3

    times: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(options.runs + 1):
        for label, graph in runs.items():
            times[label].append(run_all(graph))
    seconds = {label: statistics.median(measured[1:]) for label, measured in times.items()}
    print(f"\ngather, SmolLM2, {len(batches)} batches, {torch.get_num_threads()} threads\n")
    return [{"graph": label, "s": s, "float passes": s / seconds["float"] - 1} for label, s in seconds.items()]


PARTS = {"search": compare_searches, "gather": compare_passes}


@torch.no_grad()
def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", action="extend", choices=PARTS, help="default: all")
    parser.add_argument("--size", type=int, default=2048, help="of the weight; a multiple of 128")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batches", type=int, default=4, help="of 4 windows of 256 tokens")
    options = parser.parse_args()
    with compilation("always"):
        for part in options.part or PARTS:
            print(tabulate(PARTS[part](options), headers="keys", floatfmt=".3f", tablefmt="github"))


if __name__ == "__main__":
    main()
