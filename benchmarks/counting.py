"""What an activation's observer takes for each value, in units of one pass over it.

    python benchmarks/counting.py [--runs 25] [--device cpu] [--out counting.md]

A pass is ``value.aminmax()``. "Kernel" is what ``exact_mse`` counts with, "index" what it does where there is no
compiler (on a GPU both are the same), ``mse`` and ``static_minmax`` are those observers. Medians in ms, all in turn on
the same value, a GELU of normal ones. "Finish" is the search of what was counted, int8 asymmetric, which is done once.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs
from tabulate import tabulate

from fxmse.formats.layout import Layout
from fxmse.observers import Observer
from fxmse.observers.counting import count
from fxmse.search.compiling import compilation

SHAPES = {"8 x 512 x 1024": (8, 512, 1024), "16 x 64 x 384": (16, 64, 384)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def measure_ms(run: Callable[[], object], runs: int) -> float:
    """The median of some runs after two."""
    seconds = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[2:])


def measure_all(shape: tuple[int, ...], dtype: torch.dtype, device: str, runs: int) -> dict[str, float]:
    """The columns of a row, in ms."""
    value = torch.nn.functional.gelu(torch.randn(shape, device=device)).to(dtype)
    layout, args = Layout("input", "tensor"), QuantizationArgs(num_bits=8, symmetric=False)
    names = ("exact_mse", "mse", "static_minmax")
    observers = {name: Observer.load_from_registry(name, base_name="input", args=args) for name in names}
    row = {"pass": measure_ms(value.aminmax, runs)}
    with compilation("always"):
        counts = count(value, layout)
        row["kernel"] = measure_ms(lambda: count(value, layout, counts), runs)
        for name in names[1:]:
            row[name] = measure_ms(lambda name=name: observers[name].observe(value), runs)  # type: ignore[misc]
    with compilation("never"):
        row["index"] = measure_ms(lambda: count(value, layout, counts), max(3, runs // 5))
    observers["exact_mse"].observe(value)
    row["finish"] = measure_ms(observers["exact_mse"].get_qparams, 3)
    return row


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="a file for the table, written after each row")
    options = parser.parse_args()
    rows = []
    for name, shape in SHAPES.items():
        for dtype in DTYPES:
            ms = measure_all(shape, dtype, options.device, options.runs)
            rows.append({"value": name, "dtype": str(dtype)[6:], **ms, "kernel / pass": ms["kernel"] / ms["pass"]})
            table = tabulate(rows, headers="keys", floatfmt=".3f", tablefmt="github")
            if options.out:
                options.out.write_text(f"{table}\n")
    print(table)


if __name__ == "__main__":
    main()
