"""The search of a weight against llm-compressor's, in one process on the same tensors, in turn.

    python benchmarks/search.py [--size 2048] [--runs 7] [--observer memoryless_mse] [--schemes nvfp4 ...]

Prints the median ms of each, the ratio, the seconds the first search took (compilation), in how many groups both took
the same range, and fxmse's summed error over llm-compressor's, with scales as they are stored. Needs the test extra.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle import fake_quantize
from llmcompressor.observers import Observer as ReferenceObserver
from tabulate import tabulate

from fxmse.observers import Observer

FP8 = torch.float8_e4m3fn
SCHEMES = {
    "int8 tensor": {"num_bits": 8, "strategy": "tensor"},
    "int8 channel": {"num_bits": 8, "strategy": "channel"},
    "int4 g128": {"num_bits": 4, "strategy": "group", "group_size": 128},
    "int4 g128 asymmetric": {"num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": False},
    "fp8 channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "fp8 block 128": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    "mxfp4": {
        "num_bits": 4,
        "type": "float",
        "zp_dtype": torch.uint8,
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": torch.uint8,
    },
    "nvfp4": {
        "num_bits": 4,
        "type": "float",
        "zp_dtype": FP8,
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": FP8,
    },
}


def measure_ms(run: Callable[[], object]) -> float:
    """Wall-clock milliseconds of one call."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def compare(
    weight: torch.Tensor, args: QuantizationArgs, observer: str, norm: float, runs: int
) -> tuple[float, float, float, float, float]:
    """Median ms of fxmse and of llm-compressor, s of the first search, the part of equal ranges, the errors' ratio."""

    def observe(observer_class: type) -> torch.nn.Module:
        arguments = args.model_copy(deep=True)
        return observer_class.load_from_registry(observer, base_name="weight", args=arguments, norm=norm)(weight)

    def sum_errors(observed: torch.nn.Module) -> float:
        qparams = observed.get_qparams()
        stored = fake_quantize(
            weight, qparams["scale"], qparams["zero_point"], args, global_scale=qparams["global_scale"]
        )
        return ((stored.double() - weight.double()).abs() ** norm).sum().item()

    first = measure_ms(lambda: observe(Observer)) / 1e3
    times: dict[type, list[float]] = {Observer: [], ReferenceObserver: []}
    for _ in range(runs):
        for observer_class, measured in times.items():
            measured.append(measure_ms(lambda observer_class=observer_class: observe(observer_class)))
    ours, reference = observe(Observer), observe(ReferenceObserver)
    same = (ours.max_vals == reference.max_vals).double().mean().item()
    ratio = sum_errors(ours) / sum_errors(reference)
    return statistics.median(times[Observer]), statistics.median(times[ReferenceObserver]), first, same, ratio


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--observer", default="memoryless_mse")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(options.size, options.size).to(dtype)
        for norm in (2.4, 2.0):
            for name in options.schemes:
                args = QuantizationArgs(**SCHEMES[name])
                ours, reference, *rest = compare(weight, args, options.observer, norm, options.runs)
                rows.append((str(dtype)[6:], norm, name, ours, reference, reference / ours, *rest))
    headers = (
        "dtype",
        "norm",
        "scheme",
        "fxmse ms",
        "llm-compressor ms",
        "ratio",
        "first s",
        "same range",
        "error ratio",
    )
    formats = ("", ".1f", "", ".1f", ".0f", ".1f", ".1f", ".5f", ".4f")
    print(f"{options.size} x {options.size}, {torch.get_num_threads()} threads, {options.runs} runs each, medians")
    print(tabulate(rows, headers, floatfmt=formats, tablefmt="github"))


if __name__ == "__main__":
    main()
