"""What a report costs beside the search that it tells of: CPU seconds in turn in one process; medians.

    python benchmarks/report.py [--layers 8] [--hidden 1024] [--runs 3] [--schemes ...]

A stack of gated blocks with normal weights, by default 100 million parameters in bfloat16. "Before" is how fxmse 0.1.0
first had it: up to 4 batches through the folded graph, each weight in each of them added up in float64. W8A8 is static,
with data; its search is the whole calibration. The first search is not among the runs;
whether later ones are compiled is for the search to say.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxmse
from fxmse.ops import is_fake_quantize

W8A8 = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "strategy": "channel"},
    "input_activations": {"num_bits": 8, "symmetric": False},
}
SCHEMES: dict[str, Any] = {"W4A16": "W4A16", "NVFP4A16": "NVFP4A16", "W8A8": W8A8}


class Block(nn.Module):
    """A gated block, as language models have them."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, 4 * hidden, bias=False), nn.Linear(hidden, 4 * hidden, bias=False)
        self.down = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The residual sum."""
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class _Before(torch.fx.Interpreter):
    """The sums as they were made before."""

    def run_node(self, node: torch.fx.Node) -> Any:
        result = super().run_node(node)
        if is_fake_quantize(node):
            x = self.env[node.args[0]]
            x.double().square().sum().item()
            (result.double() - x.double()).square().sum().item()
            x.amin(), x.amax()
        return result


def measure(name: str, model: nn.Module, batches: list[Tensor], num_runs: int) -> dict[str, Any]:
    """A row of the table."""
    needs_data = name == "W8A8"
    data = batches if needs_data else []

    def search() -> Any:
        observed = fxmse.prepare(model, SCHEMES[name], batches[0])
        start = time.process_time()
        quantized = fxmse.convert(fxmse.calibrate(observed, data, progress=False), progress=False)
        return quantized, time.process_time() - start

    quantized, _ = search()
    jobs: dict[str, Callable[[], object]] = {
        "summary": lambda: fxmse.report(quantized),
        "full": lambda: fxmse.report(quantized, batches),
        "before": lambda: [_Before(quantized).run(batch) for batch in batches],
    }
    seconds: dict[str, list[float]] = {job: [] for job in ("search", *jobs)}
    for _ in range(num_runs):
        seconds["search"].append(search()[1])
        for job, run in jobs.items():
            start = time.process_time()
            run()
            seconds[job].append(time.process_time() - start)
    ratios = {job: [s / whole for s, whole in zip(seconds[job], seconds["search"], strict=True)] for job in jobs}
    print(f"{name}: {ratios}", file=sys.stderr)
    return {
        "scheme": name,
        **{f"{job} s": statistics.median(found) for job, found in seconds.items()},
        **{f"{job} / search": statistics.median(found) for job, found in ratios.items()},
    }


@torch.no_grad()
def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(options.hidden) for _ in range(options.layers))).eval().to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)  # as trained ones are distributed
    batches = [torch.randn(1, 256, options.hidden, dtype=torch.bfloat16) for _ in range(4)]
    rows = [measure(name, model, batches, options.runs) for name in options.schemes]
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{num_parameters / 1e6:.0f} million parameters, {torch.get_num_threads()} threads, {options.runs} runs")
    print(tabulate(rows, headers="keys", floatfmt=("", *[".2f"] * 4, *[".3f"] * 3), tablefmt="github"))


if __name__ == "__main__":
    main()
