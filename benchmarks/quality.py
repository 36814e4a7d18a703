"""How good the ranges that observers find are: against peers, min-max and a brute-force optimum.

    python benchmarks/quality.py [--part weights activations model] [--schemes "int4 g32" W8A8 ...] [--json out.json]
    python benchmarks/quality.py --part weights --size 128 1024 --compile always
    python benchmarks/quality.py --part activations --activation-batches 8
    python benchmarks/quality.py --part model --batches 8 --repeats 4 [--methods ...]

Errors are squared ones, added up in float64, with scales, zero points and global scales as they are stored and
compressed-tensors' own fake quantization in float32. Peers: llm-compressor, PT2E (torchao). Means of ratios and of
times are geometric where a cell stands for several tensors or sites, but those of ms a batch are arithmetic.

weights: rows are formats and data, columns observers. Three tables: the error over min-max's, the error over the
optimum's, and ms (median of three, after a first call). "brute force" is the optimum: for each group a dense grid of
scales (for asymmetric formats with every zero point, for symmetric integers of less than 8 bits of either sign), each
refitted by least squares; all powers of two; or all e4m3
scales with 128 global scales. It knows nothing of fxmse's search. It is no proof: a search that is exact may find less
where the grid passes the best scale by (for NVFP4, between two global scales, some 1e-4). MiniLM stands for four
weights of all-MiniLM-L6-v2.

activations: the inputs of all-MiniLM-L6-v2's Linears, one for all that read the same value. "calibration" and
"held-out" are errors over llm-compressor's ``mse``, on the batches that were observed and on half as many others;
"above any" counts the sites where another observer has less error on the calibration batches (by more than 1e-6),
"above peers" those where one of another library has, and "worst" is the largest ratio to the best of the others. "ms a
batch" is the median over batches of observing one, "ms to finish" what ``get_qparams`` takes; both are means over
sites. In bfloat16 the values and what is stored are rounded, the arithmetic of the error is not.

model: all-MiniLM-L6-v2, the cosines of its mean-pooled embeddings of held-out sentences to the float model's, and
seconds of a calibration: the first one, with whatever is compiled for it, and the median of the others. Each repeat
has other batches, and the model's channels in another order (``permutation.py``): what is left of a difference over
the repeats is not chance. "exact_mse ahead by" is the mean of the differences to the cosine of exact_mse, with
importance where the other one has it, and "+-" that mean's standard error. Observers are those of weights + those of
inputs, where these are static: W4A16 and W3A16 quantize none, and NVFP4's are local, with global scales of min-max.
What needs no data gets none. Needs the benchmarks extra.
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from calibrate import Batches, Calibration, example, restart, start_pt2e
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle import fake_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.observers import Observer as LLMCompressorObserver
from permutation import permute_channels
from search import WEIGHTS as SEARCHED_WEIGHTS
from search import measure_ms
from tabulate import tabulate
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils.data import DataLoader
from torchao.quantization.pt2e import HistogramObserver  # type: ignore[import-untyped]

import fxmse
from fxmse.compiling import compilation
from fxmse.observers import Observer

Fields = dict[str, Any]
Row = dict[str, Any]

MORE_WEIGHTS: dict[str, Fields] = {
    "int8 g128": {"num_bits": 8, "strategy": "group", "group_size": 128},
    "int4 channel": {"num_bits": 4, "strategy": "channel"},
    "int4 g32": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "int3 g64": {"num_bits": 3, "strategy": "group", "group_size": 64},
    "int2 g32": {"num_bits": 2, "strategy": "group", "group_size": 32},
    "fp8 tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "mxfp8": {**SEARCHED_WEIGHTS["mxfp4"], "num_bits": 8},
}
WEIGHTS = dict(sorted({**SEARCHED_WEIGHTS, **MORE_WEIGHTS}.items()))
INPUTS: dict[str, Fields] = {
    "input int8 asymmetric": {"num_bits": 8, "strategy": "tensor", "symmetric": False},
    "input int4 asymmetric": {"num_bits": 4, "strategy": "tensor", "symmetric": False},
    "input int8 symmetric": {"num_bits": 8, "strategy": "tensor"},
    "input fp8": {"num_bits": 8, "type": "float", "strategy": "tensor"},
}
MODELS: dict[str, tuple[Fields, Fields | None]] = {
    "W8A8": (WEIGHTS["int8 channel"], INPUTS["input int8 asymmetric"]),
    "W4A8 g32": (WEIGHTS["int4 g32"], INPUTS["input int8 asymmetric"]),
    "W4A16 g32": (WEIGHTS["int4 g32"], None),
    "W3A16 g64": (WEIGHTS["int3 g64"], None),
    "NVFP4": (WEIGHTS["nvfp4"], {**WEIGHTS["nvfp4"], "dynamic": "local"}),
}
MINILM_WEIGHTS = (
    "encoder.layer.0.attention.self.query",
    "encoder.layer.2.attention.output.dense",
    "encoder.layer.3.intermediate.dense",
    "encoder.layer.5.output.dense",
)
TIE = 1e-6

# Of the brute force: elements of a tile and candidates at a time, so that temporaries are of some MiB.
TILE, AT_A_TIME = 1 << 13, 32
NUM_BEST, NUM_NEARBY, NUM_REFITS = 32, 17, 3
MIN_STEPS, MIN_STEPS_A_ZERO_POINT = 3000, 1000
# (explicit mantissa bits, smallest normal exponent, largest value) by number of bits.
FLOATS = {8: (3, -6, 448.0), 4: (1, 0, 6.0)}


class Peer(NamedTuple):
    """An observer that is compared, and the formats that it is for."""

    make: functools.partial[Any]
    is_for: Callable[[QuantizationArgs], bool] = lambda args: True


class Found(NamedTuple):
    """What an observer found and how long it took."""

    qparams: Mapping[str, Tensor | None]
    observe_ms: list[float]  # of each value
    finish_ms: float


class Method(NamedTuple):
    """Observers of a whole model, by name."""

    library: str
    weights: str
    inputs: str
    weights_kwargs: Fields = {}  # noqa: RUF012

    @property
    def needs_importance(self) -> bool:
        """Whether weights wait for activations."""
        return "imatrix" in self.weights or bool(self.weights_kwargs.get("importance"))


class Histogram:
    """torchao's HistogramObserver with llm-compressor's interface.

    Args:
        base_name: not looked at.
        args: an integer format, strategy tensor.
        searches_num_bits: tell its search how many values the format has; by itself it takes 2 ** 8 whatever
            quant_min and quant_max are.
    """

    def __init__(self, base_name: str, args: QuantizationArgs, searches_num_bits: bool = False) -> None:
        half = 2 ** (args.num_bits - 1)
        self.observer = HistogramObserver(
            dtype=torch.int8,
            qscheme=torch.per_tensor_symmetric if args.symmetric else torch.per_tensor_affine,
            quant_min=-half,
            quant_max=half - 1,
        )
        if searches_num_bits:
            self.observer.dst_nbins = 2 * half

    def __call__(self, value: Tensor) -> None:
        """Observes ``value``."""
        self.observer(value)

    def get_qparams(self) -> dict[str, Tensor | None]:
        """By the names that compressed-tensors has for them."""
        scale, zero_point = self.observer.calculate_qparams()
        return {"scale": scale, "zero_point": zero_point, "global_scale": None}


def is_tensor_group(args: QuantizationArgs) -> bool:
    """Whether the format has a global scale."""
    return args.strategy == "tensor_group"


def has_scales_below_zero(args: QuantizationArgs) -> bool:
    """Whether exact_mse takes scales below 0, too."""
    return args.type == "int" and args.symmetric and args.num_bits < 8


def is_int_tensor(args: QuantizationArgs, max_bits: int = 8) -> bool:
    """Whether torchao's histogram can be used."""
    return args.type == "int" and args.strategy == "tensor" and args.num_bits <= max_bits


def of_fxmse(name: str, **kwargs: Any) -> functools.partial[Any]:
    """Makes fxmse's observer of that name."""
    return functools.partial(Observer.load_from_registry, name, **kwargs)


def of_llm_compressor(name: str, **kwargs: Any) -> functools.partial[Any]:
    """Makes llm-compressor's observer of that name."""
    return functools.partial(LLMCompressorObserver.load_from_registry, name, **kwargs)


MINMAX, BRUTE_FORCE, REFERENCE = "min-max", "brute force", "llm-compressor mse"
WEIGHT_PEERS = {
    MINMAX: Peer(of_fxmse("memoryless_minmax")),
    "fxmse memoryless_mse": Peer(of_fxmse("memoryless_mse")),
    "fxmse memoryless_mse, norm 2": Peer(of_fxmse("memoryless_mse", norm=2.0)),
    "fxmse nvfp4_expanded_mse": Peer(of_fxmse("nvfp4_expanded_mse"), is_tensor_group),
    "fxmse exact_mse": Peer(of_fxmse("exact_mse")),
    "fxmse exact_mse, scales above 0": Peer(of_fxmse("exact_mse", negative_scale=False), has_scales_below_zero),
    "llm-compressor memoryless_mse": Peer(of_llm_compressor("memoryless_mse")),
    "llm-compressor nvfp4_expanded_mse": Peer(of_llm_compressor("nvfp4_expanded_mse"), is_tensor_group),
    "torchao histogram": Peer(functools.partial(Histogram), is_int_tensor),
}
INPUT_PEERS = {
    "fxmse mse": Peer(of_fxmse("mse")),
    "fxmse mse, norm 2, averaging .1": Peer(of_fxmse("mse", norm=2.0, averaging_constant=0.1)),
    "fxmse static_minmax": Peer(of_fxmse("static_minmax")),
    "fxmse minmax": Peer(of_fxmse("minmax")),
    "fxmse exact_mse": Peer(of_fxmse("exact_mse")),
    "fxmse exact_mse, norm 2": Peer(of_fxmse("exact_mse", norm=2.0)),
    REFERENCE: Peer(of_llm_compressor("mse")),
    "torchao histogram": Peer(functools.partial(Histogram), is_int_tensor),
    "torchao histogram, dst_nbins 16": Peer(
        functools.partial(Histogram, searches_num_bits=True), functools.partial(is_int_tensor, max_bits=4)
    ),
}
OWN, OWN_WITH_IMPORTANCE = "fxmse exact_mse", "fxmse exact_mse, importance"
METHODS = {
    "fxmse min-max": Method("fxmse", "memoryless_minmax", "static_minmax"),
    "fxmse memoryless_mse + mse": Method("fxmse", "memoryless_mse", "mse"),
    "fxmse nvfp4_expanded_mse": Method("fxmse", "nvfp4_expanded_mse", "mse"),
    "fxmse imatrix_mse + mse": Method("fxmse", "imatrix_mse", "mse"),
    OWN: Method("fxmse", "exact_mse", "exact_mse"),
    OWN_WITH_IMPORTANCE: Method("fxmse", "exact_mse", "exact_mse", {"importance": True}),
    "llm-compressor memoryless_mse + mse": Method("llm-compressor", "memoryless_mse", "mse"),
    "llm-compressor nvfp4_expanded_mse": Method("llm-compressor", "nvfp4_expanded_mse", "mse"),
    "llm-compressor imatrix_mse + mse": Method("llm-compressor", "imatrix_mse", "mse"),
    "PT2E histogram": Method("PT2E", "per_channel", "histogram"),
}


def note(text: str) -> None:
    """Says something beside the tables."""
    print(text, file=sys.stderr, flush=True)


@functools.cache
def is_registered(name: str) -> bool:
    """Whether fxmse has an observer of that name; says so once where it has not."""
    is_known = name.replace("_", "-") in Observer.registered_names()
    if not is_known:
        note(f"skipped: fxmse has no observer {name!r}")
    return is_known


def list_peers(peers: Mapping[str, Peer], args: QuantizationArgs) -> dict[str, Peer]:
    """Those that are there and can be used for a format."""
    return {
        label: peer
        for label, peer in peers.items()
        if peer.is_for(args) and (peer.make.func != Observer.load_from_registry or is_registered(peer.make.args[0]))
    }


def find_qparams(peer: Peer, values: Iterable[Tensor], base_name: str, args: QuantizationArgs) -> Found:
    """Shows a new observer all of ``values``."""
    observer = peer.make(base_name=base_name, args=copy.deepcopy(args))  # llm-compressor writes into args
    observe_ms = [measure_ms(functools.partial(observer, value), "cpu") for value in values]
    found: list[Mapping[str, Tensor | None]] = []
    finish_ms = measure_ms(lambda: found.append(observer.get_qparams()), "cpu")
    return Found(found[0], observe_ms, finish_ms)


def sum_errors(values: Iterable[Tensor], qparams: Mapping[str, Tensor | None], args: QuantizationArgs) -> float:
    """The summed squared error with qparams as they are stored."""
    scale, zero_point, global_scale = (qparams[name] for name in ("scale", "zero_point", "global_scale"))
    assert scale is not None
    total = 0.0
    for value in (value.float() for value in values):
        stored = fake_quantize(value, scale.float(), zero_point, args, global_scale=global_scale)
        total += (stored.double() - value.double()).square().sum().item()
    return total


def cut_groups(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """The elements that share a scale as rows."""
    if args.strategy == "tensor":
        return weight.reshape(1, -1)
    if args.strategy == "block":
        height, width = args.block_structure
        blocks = weight.unflatten(0, (-1, height)).unflatten(2, (-1, width)).transpose(1, 2)
        return blocks.reshape(-1, height * width)
    return weight.reshape(-1, args.group_size or weight.shape[1])


def round_to_format(x: Tensor, args: QuantizationArgs, zero_point: int) -> Tensor:
    """The nearest values of a format less its zero point, in place; which of two that are as near does not matter."""
    if args.type == "int":
        half = 2 ** (args.num_bits - 1)
        return x.round_().clamp_(-half - zero_point, half - 1 - zero_point)
    mantissa_bits, min_exponent, largest = FLOATS[args.num_bits]
    x = x.clamp_(-largest, largest)
    power = (x.view(torch.int64) & 0x7FF0_0000_0000_0000).view(torch.float64)
    step = power.clamp_(min=2.0**min_exponent).mul_(2.0**-mantissa_bits)
    return x.div_(step).round_().mul_(step)


def list_zero_points(args: QuantizationArgs) -> Iterable[int]:
    """All that there are."""
    half = 2 ** (args.num_bits - 1)
    return (0,) if args.symmetric else range(-half, half)


def list_scales(groups: Tensor, args: QuantizationArgs) -> Tensor:
    """Candidates for the scale of each group, shape (candidates, groups)."""
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    absmax = torch.maximum(-low, high).clamp(min=torch.finfo(torch.float32).tiny)
    if args.scale_dtype == torch.uint8:
        return 2.0 ** (torch.arange(-14.0, 5.0, dtype=torch.float64)[:, None] + absmax.log2().floor())
    if args.type == "float":
        own, qmax, least, largest = absmax / 448, 1.0, 0.9, 2.05
    else:
        span = 2.0**args.num_bits - 1
        own, qmax, least, largest = (2 * absmax if args.symmetric else high - low) / span, span / 2, 0.02, 2.0
    # A step of a tenth of qmax moves no element by more than a tenth of the distance between two values.
    num_steps = max(
        math.ceil(math.log(largest / least) * 10 * qmax), MIN_STEPS if args.symmetric else MIN_STEPS_A_ZERO_POINT
    )
    ratios = torch.linspace(math.log(least), math.log(largest), num_steps, dtype=torch.float64).exp()
    return ratios[:, None] * own


def find_stored_errors(groups: Tensor, scales: Tensor, args: QuantizationArgs) -> Tensor:
    """The least error of each group with one of ``scales`` as they are."""
    scales = scales[..., None]
    errors = round_to_format(groups / scales, args, 0).mul_(scales).sub_(groups)
    return errors.square_().sum(-1).amin(0)


def fit(groups: Tensor, scales: Tensor, args: QuantizationArgs, zero_point: int) -> tuple[Tensor, Tensor]:
    """Scales fitted to what the groups round to with ``scales``, and the errors of both together."""
    energy, tiny = groups.square().sum(-1), torch.finfo(torch.float64).tiny
    errors, fitted = [], []
    for part in scales.split(AT_A_TIME):
        rounded = round_to_format(groups / part[..., None], args, zero_point)
        products = (rounded * groups).sum(-1)
        squares = rounded.square_().sum(-1).clamp_(min=tiny)
        errors.append(energy - products.square() / squares)
        fitted.append((products / squares).clamp_(min=tiny))
    return torch.cat(errors), torch.cat(fitted)


def find_fitted_errors(groups: Tensor, scales: Tensor, args: QuantizationArgs, zero_point: int) -> Tensor:
    """The least error of each group with one of ``scales`` or near the best of them, fitted again and again."""
    errors, _ = fit(groups, scales, args, zero_point)
    best = scales.gather(0, errors.topk(NUM_BEST, dim=0, largest=False).indices)
    nearby = (scales[1] / scales[0] - 1) * torch.linspace(-0.5, 0.5, NUM_NEARBY, dtype=torch.float64)[:, None, None] + 1
    errors, fitted = fit(groups, (best * nearby).flatten(0, 1), args, zero_point)
    for _ in range(NUM_REFITS):
        least, step = errors.min(0, keepdim=True)
        errors, fitted = fit(groups, fitted.gather(0, step), args, zero_point)
        errors = torch.minimum(errors, least)
    return errors[0]


def find_least_errors(groups: Tensor, args: QuantizationArgs) -> Tensor:
    """The least error of each group that any scale and zero point give."""
    scales = list_scales(groups, args)
    if args.scale_dtype is not None:
        return find_stored_errors(groups, scales, args)
    errors = [find_fitted_errors(groups, scales, args, zero_point) for zero_point in list_zero_points(args)]
    if has_scales_below_zero(args):
        errors.append(find_fitted_errors(-groups, scales, args, 0))
    return torch.stack(errors).amin(0)


def sum_least_global_errors(parts: list[Tensor], args: QuantizationArgs) -> float:
    """The least error with one global scale for all groups: two octaves of them, and all scales."""
    values = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    absmax = max(part.abs().max().item() for part in parts)
    totals = []
    for step in range(128):
        scales = values[:, None] / (448 * 6 / absmax * 2 ** (-step / 64))
        totals.append(sum(find_stored_errors(part, scales, args).sum().item() for part in parts))
    return min(totals)


def sum_least_errors(weight: Tensor, args: QuantizationArgs) -> float:
    """The least summed squared error that a format can have."""
    groups = cut_groups(weight.double(), args)
    parts = list(groups.split(max(1, TILE // groups.shape[1])))
    if is_tensor_group(args):
        return sum_least_global_errors(parts, args)
    return sum(find_least_errors(part, args).sum().item() for part in parts)


@functools.cache
def load_model() -> nn.Module:
    """all-MiniLM-L6-v2."""
    return example.AutoModel.from_pretrained(example.find_model_folder()).eval()


def load_batches(num_batches: int) -> tuple[Batches, Batches]:
    """Batches for calibration, and half as many held-out ones."""
    batches = example.load_batches(example.find_model_folder(), num_batches + max(1, num_batches // 2))
    return batches[:num_batches], batches[num_batches:]


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


def print_pivot(rows: list[Row], index: tuple[str, ...], value: str, floatfmt: str) -> None:
    """A column for each observer; where several rows meet in a cell, their geometric mean."""
    cells = defaultdict(list)
    for row in rows:
        cells[tuple(row[name] for name in index), row["observer"]].append(row[value])
    columns = [label for label in (*WEIGHT_PEERS, BRUTE_FORCE) if any(column == label for _, column in cells)]
    table = [
        [*key, *(statistics.geometric_mean(cells[key, c]) if (key, c) in cells else None for c in columns)]
        for key in dict.fromkeys(key for key, _ in cells)
    ]
    print(f"\n{value}\n")
    print(tabulate(table, headers=[*index, *columns], floatfmt=floatfmt, tablefmt="github"))


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


def collect_inputs(model: nn.Module, batches: Batches) -> dict[str, list[Tensor]]:
    """The inputs of all Linears, by the name of the first of those that read the same value."""
    collected: dict[str, list[Tensor]] = defaultdict(list)
    seen: set[tuple[int, torch.Size]] = set()

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # Whatever was collected is kept, so that no other value has its address.
        identity = inputs[0].data_ptr(), inputs[0].shape
        if identity not in seen:
            seen.add(identity)
            collected[name].append(inputs[0])

    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    hooks = [linear.register_forward_pre_hook(functools.partial(keep, name)) for name, linear in linears]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return collected


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


def make_scheme(name: str, method: Method) -> QuantizationScheme:
    """A scheme of :data:`MODELS` with a method's observers."""
    weights, inputs = MODELS[name]
    is_local = inputs is not None and inputs.get("dynamic") == "local"
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights, observer=method.weights, observer_kwargs=dict(method.weights_kwargs)),
        input_activations=inputs
        and QuantizationArgs(**inputs, observer="static_minmax" if is_local else method.inputs),
    )


def start_llm_compressor(model: nn.Module, scheme: QuantizationScheme, batches: Batches | None) -> Calibration:
    """llm-compressor's, on a copy of the model; without data where it needs none."""
    model = copy.deepcopy(model)
    recipe = QuantizationModifier(config_groups={"all": scheme})
    data: Fields = {"pipeline": "datafree"}
    if batches is not None:
        loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        data = {"pipeline": "basic", "dataset": loader}

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            oneshot(model=model, recipe=recipe, **data)  # type: ignore[arg-type]

    return Calibration(run, lambda: model)


def start(method: Method, name: str, model: nn.Module, program: ExportedProgram, batches: Batches) -> Calibration:
    """A calibration of one scheme by one method."""
    if method.library == "PT2E":
        return start_pt2e(program, batches)
    scheme = make_scheme(name, method)
    needs_data = scheme.input_activations is not None or method.needs_importance
    if method.library == "llm-compressor":
        return start_llm_compressor(model, scheme, batches if needs_data else None)
    return restart(fxmse.prepare(program, scheme), batches if needs_data else [], False)


def list_methods(name: str, chosen: list[str]) -> dict[str, Method]:
    """Those that are there and make sense for a scheme."""
    return {
        label: method
        for label, method in METHODS.items()
        if label in choose(METHODS, chosen)
        and (name == "W8A8" or method.library != "PT2E")
        and (name == "NVFP4" or "nvfp4" not in method.weights)
        and (method.library != "fxmse" or is_registered(method.weights))
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
        own = OWN_WITH_IMPORTANCE if METHODS[label].needs_importance else OWN
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


PARTS: dict[str, tuple[Mapping[str, Any], Callable[[argparse.Namespace], list[Row]]]] = {
    "weights": (WEIGHTS, compare_weights),
    "activations": (INPUTS, compare_activations),
    "model": (MODELS, compare_models),
}


def choose(names: Iterable[str], chosen: list[str]) -> list[str]:
    """Those of ``names`` that were asked for; all where nothing was."""
    return [name for name in names if not chosen or name in chosen]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", action="extend", choices=PARTS, help="default: all")
    parser.add_argument("--schemes", nargs="+", default=[], choices=[*WEIGHTS, *INPUTS, *MODELS])
    parser.add_argument("--size", type=int, nargs=2, default=[128, 1024], help="of weights; multiples of 128")
    parser.add_argument("--activation-batches", type=int, default=8)
    parser.add_argument("--batches", type=int, default=8, help="of the part model")
    parser.add_argument("--repeats", type=int, default=4, help="of the part model")
    parser.add_argument("--methods", nargs="+", default=[], choices=METHODS, help="of the part model")
    parser.add_argument("--compile", default="always", choices=["auto", "always", "never"], help="weights, activations")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    results = {}
    with compilation(options.compile):
        for part in options.part or PARTS:
            schemes, compare = PARTS[part]
            if choose(schemes, options.schemes):
                results[part] = compare(options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
