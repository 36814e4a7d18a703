"""How much error the outputs of Linears have whose weights observers quantized: of all of SmolLM2's and MiniLM's.

The error of a Linear's outputs is the mean over tokens of |x (q - w)| ** 2, with x the float model's inputs. It follows
from their second moments H = sum of x x^T, which are all that is kept of them: trace((q - w)^T H (q - w)). Printed are
errors over ``exact_mse``'s on held-out tokens, which no method has seen, and on those for calibration, and ms; cells
are geometric means over Linears. ``GPTQ`` is llm-compressor's ``quantize_weight`` with its modifier's defaults (damping
of 1 %, static activation order), on the same H, with scales that observers found. "Corrected" is of Linears that have a
bias, to which E[x] (w - q) is added, by the mean of x on the tokens for calibration.

A method is a function of a weight, the H of its inputs and the format, and gives the quantized weight. Linears that
are no whole groups wide are left out, and so are SmolLM2's head and MiniLM's pooler, which sees first tokens alone.
"""

import argparse
import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import minilm
import smollm2
import torch
import torch.nn.functional as F
from calibrate import Batches
from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
from compressed_tensors.quantization.lifecycle import fake_quantize
from formats import WEIGHTS, Fields
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.observers import Observer as LLMCompressorObserver
from tables import Row, choose, note, print_pivot
from torch import Tensor, nn

from fxmse.observers import Observer
from fxmse.observers.inputs import ImportanceState, ProductsState

__all__ = ["OUTPUT_METHODS", "OUTPUT_SCHEMES", "compare_outputs"]

OUTPUT_SCHEMES: dict[str, Fields] = {
    "int4 g128": WEIGHTS["int4 g128"],
    "int4 g64": {**WEIGHTS["int4 g32"], "group_size": 64},
    "int4 g32": WEIGHTS["int4 g32"],
    "int3 g64": WEIGHTS["int3 g64"],
    "nvfp4": WEIGHTS["nvfp4"],
    "mxfp4": WEIGHTS["mxfp4"],
}
BASELINE = "fxmse exact_mse"
Qparams = Mapping[str, Tensor | None]
FindQparams = Callable[[Tensor, Tensor, QuantizationArgs], Qparams]


def find_by_fxmse(weight: Tensor, moments: Tensor, args: QuantizationArgs, *, name: str, **kwargs: Any) -> Qparams:
    """What fxmse's observer of that name finds."""
    observer: Any = Observer.load_from_registry(name, base_name="weight", args=args, **kwargs)
    if getattr(observer, "needs_inputs", False):
        one = torch.ones((), dtype=torch.double)
        is_diagonal = observer.inputs.state_class is ImportanceState
        squares = moments.diagonal().double()
        observer.inputs.state = (
            ImportanceState(squares, one) if is_diagonal else ProductsState(moments[None, None], one)
        )
    return observer(weight).get_qparams()


def find_by_llm_compressor(weight: Tensor, moments: Tensor, args: QuantizationArgs, *, name: str) -> Qparams:
    """What llm-compressor's observer of that name finds; of those that need no data."""
    args = args.model_copy(deep=True)  # it is written into
    return LLMCompressorObserver.load_from_registry(name, base_name="weight", args=args)(weight).get_qparams()


def round_to_nearest(weight: Tensor, moments: Tensor, args: QuantizationArgs, *, find: FindQparams) -> Tensor:
    """The weight with each element at the nearest value."""
    qparams = find(weight, moments, args)
    scale = qparams["scale"]
    assert scale is not None
    return fake_quantize(weight, scale.float(), qparams["zero_point"], args, global_scale=qparams["global_scale"])


def round_by_gptq(weight: Tensor, moments: Tensor, args: QuantizationArgs, *, find: FindQparams) -> Tensor:
    """The weight as GPTQ rounds it, with the scales that ``find`` finds."""
    qparams = find(weight, moments, args)
    scale, zero_point, global_scale = (qparams[name] for name in ("scale", "zero_point", "global_scale"))
    assert scale is not None
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
    quantized, _, used_rounding = quantize_weight(
        weight[None].clone(),
        moments[None].clone(),
        scale[None],
        zero_point[None],
        None if global_scale is None else global_scale.reshape(1),
        args.model_copy(update={"actorder": ActivationOrdering.STATIC}),
    )
    if used_rounding.any():
        note("GPTQ could not factorize H, and rounded to the nearest")
    return quantized[0]


EXACT = functools.partial(find_by_fxmse, name="exact_mse")
WITH_IMPORTANCE = functools.partial(find_by_fxmse, name="exact_mse", importance=True)
BLOCK = functools.partial(find_by_fxmse, name="output_mse", max_sweeps=0)
OUTPUT = functools.partial(find_by_fxmse, name="output_mse")
PEER = functools.partial(find_by_llm_compressor, name="memoryless_mse")
OUTPUT_METHODS: dict[str, Callable[[Tensor, Tensor, QuantizationArgs], Tensor]] = {
    BASELINE: functools.partial(round_to_nearest, find=EXACT),
    "fxmse exact_mse, importance": functools.partial(round_to_nearest, find=WITH_IMPORTANCE),
    "fxmse output_mse, no sweeps": functools.partial(round_to_nearest, find=BLOCK),
    "fxmse output_mse": functools.partial(round_to_nearest, find=OUTPUT),
    "fxmse imatrix_mse": functools.partial(round_to_nearest, find=functools.partial(find_by_fxmse, name="imatrix_mse")),
    "llm-compressor memoryless_mse": functools.partial(round_to_nearest, find=PEER),
    "llm-compressor GPTQ, memoryless_mse": functools.partial(round_by_gptq, find=PEER),
    "GPTQ, exact_mse": functools.partial(round_by_gptq, find=EXACT),
    "GPTQ, exact_mse, importance": functools.partial(round_by_gptq, find=WITH_IMPORTANCE),
    "GPTQ, output_mse": functools.partial(round_by_gptq, find=OUTPUT),
}


class Site(NamedTuple):
    """A Linear; moments are sums of (x, 1) (x, 1)^T, float32, and so have the inputs' sum and number, too."""

    model: str
    name: str
    weight: Tensor
    has_bias: bool
    calibration: Tensor
    held_out: Tensor


class MomentSums:
    """Adds up moments of the inputs of Linears while a model runs; those that read the same value share one.

    Attributes:
        sums: by the Linear's name, float32.
        mask: bool, which tokens of the batch count; None for all.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.mask: Tensor | None = None
        self._last_value: Tensor | None = None  # held, so that no other value is taken for it
        self._last_name = ""

    def add(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A forward pre-hook of the Linear of that name."""
        value = inputs[0]
        if value is not self._last_value:
            self._last_value, self._last_name = value, name
            rows = F.pad(value.flatten(0, -2) if self.mask is None else value[self.mask], (0, 1), value=1.0)
            self.sums.setdefault(name, rows.new_zeros(rows.shape[-1], rows.shape[-1])).addmm_(rows.T, rows)
        self.sums[name] = self.sums[self._last_name]


def sum_moments(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """The moments of the inputs of each Linear by name; without tokens that a batch's ``attention_mask`` leaves out."""
    moments = MomentSums()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(functools.partial(moments.add, name))
        for name in names
        if name != smollm2.HEAD and "pooler" not in name
    ]
    for batch in batches:
        mask = batch.get("attention_mask")
        moments.mask = None if mask is None else mask.bool()
        model(**batch)
    for hook in hooks:
        hook.remove()
    return moments.sums


def load_sites(options: argparse.Namespace) -> Iterator[Site]:
    """The Linears of both models."""
    (num_windows, length), (num_held_out, held_out_length) = options.windows, options.held_out
    calibration = smollm2.draw_windows(num_windows, length, 0)
    held_out = smollm2.example.spread(smollm2.load_windows(held_out_length, is_held_out=True), num_held_out)
    make_batches = smollm2.example.make_batches
    data = {
        "SmolLM2": (smollm2.load_model, (make_batches(calibration), make_batches(held_out))),
        "MiniLM": (minilm.load_model, minilm.load_batches(options.batches)),
    }
    for label, (load, (seen, unseen)) in data.items():
        model = load()
        seen_moments, unseen_moments = sum_moments(model, seen), sum_moments(model, unseen)
        for name, moments in seen_moments.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            has_bias = linear.bias is not None
            yield Site(label, name, linear.weight.detach(), has_bias, moments, unseen_moments[name])


def find_error(quantized: Tensor, weight: Tensor, moments: Tensor, mean: Tensor | None = None) -> float:
    """trace((q - w)^T H (q - w)), in float64; with a bias that is corrected by the inputs' mean, if that is given."""
    error = quantized.double() - weight.double()
    shift = error.new_zeros(len(error)) if mean is None else -(error @ mean.double())
    error = torch.cat([error, shift[:, None]], 1)
    return ((error @ moments.double()) * error).sum().item()


def compare_site(site: Site, args: QuantizationArgs, labels: list[str]) -> list[Row]:
    """One row for each method."""
    rows: list[Row] = []
    for label in labels:
        start = time.perf_counter()
        quantized = OUTPUT_METHODS[label](site.weight, site.calibration[:-1, :-1].contiguous(), args)
        ms = (time.perf_counter() - start) * 1e3
        held_out, calibration = (find_error(quantized, site.weight, h) for h in (site.held_out, site.calibration))
        row: Row = {"observer": label, "held-out": held_out, "calibration": calibration, "ms": ms}
        if site.has_bias:
            mean = site.calibration[-1, :-1] / site.calibration[-1, -1]
            row["corrected"] = find_error(quantized, site.weight, site.held_out, mean)
        rows.append(row)
    baseline = next(row for row in rows if row["observer"] == BASELINE)
    return [
        {
            **row,
            **{
                f"{kind} / exact_mse": row[kind] / baseline[base]
                for kind, base in (("held-out", "held-out"), ("calibration", "calibration"), ("corrected", "held-out"))
                if kind in row
            },
        }
        for row in rows
    ]


@torch.no_grad()
def compare_outputs(options: argparse.Namespace) -> list[Row]:
    """The tables of outputs."""
    rows = []
    schemes = {name: QuantizationArgs(**OUTPUT_SCHEMES[name]) for name in choose(OUTPUT_SCHEMES, options.schemes)}
    labels = choose(OUTPUT_METHODS, [BASELINE, *options.methods] if options.methods else [])
    for site in itertools.islice(load_sites(options), 0, None, options.every):
        for scheme, args in schemes.items():
            if site.weight.shape[-1] % (args.group_size or 1):
                continue
            compared = compare_site(site, args, labels)
            rows += [{"scheme": scheme, "model": site.model, "site": site.name, **row} for row in compared]
        note(f"{site.model}, {site.name}")
    print(f"\noutputs, {torch.get_num_threads()} threads; Linears by scheme and model:")
    print(Counter((row["scheme"], row["model"]) for row in rows if row["observer"] == BASELINE))
    for value in ("held-out / exact_mse", "calibration / exact_mse"):
        print_pivot(rows, ("scheme", "model"), value, ".3f")
        print_pivot(rows, ("scheme",), value, ".3f")
    corrected = [row for row in rows if "corrected" in row]
    if corrected:
        print_pivot(corrected, ("scheme", "model"), "corrected / exact_mse", ".3f")
    print_pivot(rows, ("scheme", "model"), "ms", ".1f")
    return rows
