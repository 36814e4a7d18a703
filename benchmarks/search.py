"""The search against llm-compressor's, in one process on the same tensors, in turn.

    python benchmarks/search.py [--size 2048 4096] [--runs 7] [--schemes nvfp4 ...] [--json results.json]
    python benchmarks/search.py --compile-time [--schemes nvfp4 ...]
    python benchmarks/search.py --device cuda --size 8192 --dtype bfloat16 [--out search.md]

Prints medians of both in ms, their ratio, the floor, both's peak extra memory in parts of the value, in how many groups
both took the same range, and fxmse's summed error over llm-compressor's, with scales as they are stored. On the CPU the
floor is the time of the same arithmetic on data that stays in cache: the compiled kernel on a part of the value,
scaled up to all candidates that the search evaluates. On a GPU it is the larger of the value's bytes over the measured
bandwidth and of four operations a candidate and element over the measured rate; times are between CUDA events, and
"peer" says whether llm-compressor takes its Triton kernel. A search that recompiles fails. What fails is said, and
--out has the table after each row: a run that is cut off has measured something. With --compile-time, the seconds that
the first search of a scheme takes in a new process, without and with Inductor's on-disk cache. Needs the test extra.
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle import fake_quantize
from tabulate import tabulate
from torch import Tensor
from torch._dynamo.utils import counters

from fxmse.observers import Observer
from fxmse.search import shrinking
from fxmse.search.compiling import compilation
from fxmse.search.shrunk_ranges import sum_errors as sum_candidate_errors

FP8 = torch.float8_e4m3fn
WEIGHTS: dict[str, dict[str, Any]] = {
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
INPUTS: dict[str, dict[str, Any]] = {
    "input int8 tensor": {"num_bits": 8, "strategy": "tensor", "symmetric": False},
    "input int8 g128": {"num_bits": 8, "strategy": "group", "group_size": 128},
}
INPUT_SHAPE = (8, 512, 1024)
COLUMNS = {  # and how many digits are printed behind the point
    "dtype": 0,
    "size": 0,
    "norm": 1,
    "scheme": 0,
    "fxmse ms": 2,
    "llm-compressor ms": 2,
    "ratio": 1,
    "floor ms": 2,
    "x floor": 1,
    "fxmse memory": 2,
    "llm-compressor memory": 1,
    "graphs": 0,
    "same range": 5,
    "error ratio": 4,
    "peer": 0,
}
CACHED = 1 << 17  # elements: half a megabyte in float32
COMPILE = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
from search import WEIGHTS, observe
from fxmse.observers.base import Observer
weight = torch.randn(1024, 1024)
torch.compile(lambda x: x + 1)(weight)  # torch's own start
start = time.perf_counter()
observe(Observer, weight, "weight", WEIGHTS[sys.argv[2]], "memoryless_mse", float(sys.argv[3]))
print(time.perf_counter() - start)
"""


def observe(
    observer_class: type, value: Tensor, base_name: str, fields: dict[str, Any], observer: str, norm: float
) -> torch.nn.Module:
    """An observer that has seen ``value``."""
    args = QuantizationArgs(**fields)
    with compilation("always"):
        return observer_class.load_from_registry(observer, base_name=base_name, args=args, norm=norm)(value)


def measure_ms(run: Callable[[], object], device: str) -> float:
    """Milliseconds of one call: on the wall, on a GPU between events."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def measure_extra_bytes(run: Callable[[], object], device: str) -> int:
    """Peak of the bytes allocated while ``run`` runs, above what was before."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    allocations = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for num_bytes in allocations:
        held += num_bytes
        peak = max(peak, held)
    return peak


@contextmanager
def record_stages() -> Iterator[list[tuple[Any, ...]]]:
    """The arguments of the search's stages that run inside."""
    stages: list[tuple[Any, ...]] = []
    run = shrinking.run

    def record(*args: Any) -> Any:
        stages.append(args)
        return run(*args)

    with mock.patch.object(shrinking, "run", record):
        yield stages


def measure_floor_ms(observe_value: Callable[[], object]) -> float:
    """Time of the search's sums, each at the rate that its kernel has on data in cache."""
    with record_stages() as stages:
        observe_value()
    total = 0.0
    rates: dict[Any, float] = {}
    sums = sum_candidate_errors, shrinking._score_at_once
    for is_compiled, stage, problem, values, factors, *rest in (s for s in stages if s[1] in sums):
        if (stage, problem) not in rates:
            run = functools.partial(run_part, is_compiled, stage, problem, values, factors, rest)
            # The difference of two sizes leaves out what a call costs.
            (small, small_ms), (large, large_ms) = (run(num_elements) for num_elements in (CACHED // 2, CACHED))
            if small == large:  # two rows of blocks
                small = small_ms = 0
            rates[stage, problem] = (large_ms - small_ms) / ((large - small) * len(factors))
        total += values.numel() * len(factors) * rates[stage, problem]
    return total


def run_part(
    is_compiled: bool,
    stage: Callable[..., Any],
    problem: Any,
    values: Tensor,
    factors: Tensor,
    rest: list[Tensor | None],
    num_elements: int,
) -> tuple[int, float]:
    """About ``num_elements`` of a stage's values, and the least ms that the stage takes for them."""
    dim = 0 if problem.is_spread else 1
    size = max(2, values.shape[dim] * num_elements // values.numel())
    part = values.narrow(dim, 0, min(size, values.shape[dim]))
    if dim:
        part = part[0].unsqueeze(0) if len(part) == 1 else part  # as a tile of that size has its strides
        num_groups = part.shape[1:-2].numel()
        rest = [t[:num_groups] if t is not None and len(t) > 1 else t for t in rest]
    run = functools.partial(shrinking.run, is_compiled, stage, problem, part, factors, *rest)
    with torch.no_grad():
        run()
        return part.numel(), min(measure_ms(run, "cpu") for _ in range(25))


def measure_gpu_floor_ms(value: Tensor, num_steps: int) -> float:
    """The larger of reading the value once and of four operations a candidate and element."""
    byte_ms, operation_ms = measure_gpu_rates(value.device)
    return max(value.nbytes * byte_ms, 4 * num_steps * value.numel() * operation_ms)


@functools.cache
def measure_gpu_rates(device: torch.device) -> tuple[float, float]:
    """Milliseconds that a GPU takes for a byte of a copy, and for a product with a sum."""
    large = torch.rand(1 << 28, device=device)
    copied = torch.empty_like(large)
    copy_ms = min(measure_ms(lambda: copied.copy_(large), "cuda") for _ in range(5))
    num_operations = 64

    def chain(x: Tensor) -> Tensor:
        for _ in range(num_operations):
            x = x * 0.5 + 0.5  # x once: Inductor makes the code of each use anew, of two uses a step for minutes
        return x

    compiled, x = torch.compile(chain), large[: 1 << 24]
    compiled(x)
    chain_ms = min(measure_ms(lambda: compiled(x), "cuda") for _ in range(5))
    return copy_ms / (2 * large.nbytes), chain_ms / (num_operations * x.numel())


_Result = TypeVar("_Result")


def attempt(run: Callable[[], _Result]) -> _Result | None:
    """What ``run`` returns; None where it fails, with the reason beside the table."""
    try:
        return run()
    except Exception as error:
        print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def compare(
    value: Tensor, base_name: str, fields: dict[str, Any], observer: str, norm: float, runs: int
) -> dict[str, Any]:
    """One row of the table; where llm-compressor fails, without the columns that need it."""
    from llmcompressor.observers import Observer as ReferenceObserver
    from llmcompressor.observers.mse_quant import _mse_triton_req

    device = value.device.type
    classes: dict[str, type] = {"fxmse": Observer, "llm-compressor": ReferenceObserver}

    def run(name: str) -> torch.nn.Module:
        return observe(classes[name], value, base_name, fields, observer, norm)

    counters.clear()
    observed = run("fxmse")
    num_graphs = counters["stats"]["unique_graphs"]
    reference = attempt(lambda: run("llm-compressor"))
    names = list(classes) if reference else ["fxmse"]
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(runs):
        for name in names:
            times[name].append(measure_ms(lambda name=name: run(name), device))
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    num_steps = len(observed.options.factors)
    floor = measure_floor_ms(lambda: run("fxmse")) if device == "cpu" else measure_gpu_floor_ms(value, num_steps)
    row = {f"{name} ms": ms for name, ms in medians.items()}
    row |= {"floor ms": floor, "x floor": medians["fxmse"] / floor, "graphs": num_graphs}
    for name in names:
        row[f"{name} memory"] = measure_extra_bytes(lambda name=name: run(name), device) / value.nbytes
    if reference is None:
        return row
    row["ratio"] = medians["llm-compressor"] / medians["fxmse"]
    row["same range"] = (observed.max_vals == reference.max_vals).double().mean().item()
    if base_name == "weight":
        errors = (sum_errors(value, observer, fields, norm) for observer in (observed, reference))
        row["error ratio"] = next(errors) / next(errors)
    takes_triton = device != "cpu" and _mse_triton_req(value, QuantizationArgs(**fields))
    return {**row, "peer": "Triton" if takes_triton else "eager"}


def sum_errors(weight: Tensor, observed: torch.nn.Module, fields: dict[str, Any], norm: float) -> float:
    """The summed error with the qparams of ``observed`` as they are stored."""
    qparams = observed.get_qparams()
    stored = fake_quantize(
        weight,
        qparams["scale"],
        qparams["zero_point"],
        QuantizationArgs(**fields),
        global_scale=qparams["global_scale"],
    )
    return ((stored.double() - weight.double()).abs() ** norm).sum().item()


def compare_all(options: argparse.Namespace) -> None:
    """The table of times."""
    rows: list[dict[str, Any]] = []
    text = "nothing was measured"
    for dtype in options.dtype:
        cases = [(f"{size}", "weight", (size, size), WEIGHTS) for size in options.size]
        if options.device == "cpu":
            cases.append(("x".join(map(str, INPUT_SHAPE)), "input", INPUT_SHAPE, INPUTS))
        for shape_name, base_name, shape, schemes in cases:
            value = torch.randn(shape, device=options.device).to(getattr(torch, dtype))
            for norm, name in itertools.product(options.norm, schemes):
                if options.schemes and name not in options.schemes:
                    continue
                run = functools.partial(compare, value, base_name, schemes[name], options.observer, norm, options.runs)
                with torch._dynamo.config.patch(error_on_recompile=True):
                    row = attempt(run)
                print(f"{dtype} {shape_name} {norm} {name}: {row and row.get('ratio')}", file=sys.stderr, flush=True)
                if row is None:
                    continue
                rows.append({"dtype": dtype, "size": shape_name, "norm": norm, "scheme": name, **row})
                text = print_table(rows, options)
                if options.out:
                    options.out.write_text(f"{text}\n")
    print(text)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def print_table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The rows as a table in Markdown, and the means of their ratios."""
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    lines = [f"torch {torch.__version__}, {options.device}, {name}, {options.runs} runs each, medians", ""]
    columns = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    table = [[row.get(name) for name in columns] for row in rows]
    formats = [f".{COLUMNS[name]}f" for name in columns]
    lines += [tabulate(table, headers=columns, floatfmt=formats, tablefmt="github"), ""]
    for norm in (*options.norm, None):
        ratios = [row["ratio"] for row in rows if "ratio" in row and norm in (row["norm"], None)]
        if ratios:
            mean = statistics.geometric_mean(ratios)
            which = "all" if norm is None else f"norm {norm}"
            lines.append(f"{which}: ratio at least {min(ratios):.1f}, geometric mean {mean:.1f}")
    return "\n".join(lines)


def compare_compile_time(schemes: list[str]) -> None:
    """The table of first searches."""
    rows = []
    for norm in (2.4, 2.0):
        for name in schemes:
            with tempfile.TemporaryDirectory() as cache:
                command = [sys.executable, "-c", COMPILE, str(Path(__file__).parent), name, str(norm)]
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
                seconds = [
                    float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
                    for _ in range(2)
                ]
            rows.append({"norm": norm, "scheme": name, "cold s": seconds[0], "warm s": seconds[1]})
    print(tabulate(rows, headers="keys", floatfmt=".1f", tablefmt="github"))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--observer", default="memoryless_mse")
    parser.add_argument("--schemes", nargs="+", default=[], choices=[*WEIGHTS, *INPUTS])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--norm", type=float, nargs="+", default=[2.4, 2.0])
    parser.add_argument("--compile-time", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, help="a file for the table")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.compile_time:
        compare_compile_time(options.schemes or list(WEIGHTS))
    else:
        compare_all(options)


if __name__ == "__main__":
    main()
