"""How much quantization changes a value: sums of squares, in blocks that stay in a cache."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from fxmse.formats.layout import Layout, enlarge
from fxmse.formats.scales import cast
from fxmse.observers.base import Observer
from fxmse.observers.states import State
from fxmse.ops import FAKE_QUANTIZE
from fxmse.search.compiling import pays_to_compile, run
from fxmse.search.tiles import Range, cover_ranges, cut_groups

__all__ = ["Noise", "find_scale", "measure_weight", "sum_noise"]

_BLOCK = 1 << 20
"""Elements of a block, for a CPU's caches: 1 MiB of float32. ``enlarge`` it."""
# What a sum takes uncompiled, in errors of the search, and more, as its graph is compiled sooner than those.
_WORK = 16
# Between these a sum of squares in float32 has all of its bits, and so have the squares that count in it.
_SMALLEST, _LARGEST = 2.0**-80, 2.0**120


class Noise(NamedTuple):
    """The sums of x ** 2 and of (fake_quantize(x) - x) ** 2."""

    signal: float = 0.0
    noise: float = 0.0

    @property
    def sqnr(self) -> float:
        """Signal to noise in dB."""
        return 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else math.inf

    def plus(self, other: "Noise") -> "Noise":
        """That of two values."""
        return Noise(self.signal + other.signal, self.noise + other.noise)


def sum_noise(value: Tensor, quantized: Tensor) -> Noise:
    """The sums of a value and what it was quantized to, of equal shapes and any float dtypes.

    A block's squares are summed up in float32, the blocks' sums in float64. Where squares leave float32, and of
    float64, a block is float64.
    """
    size = enlarge(_BLOCK, value.device)
    total = Noise()
    for x, q in zip(value.reshape(-1).split(size), quantized.reshape(-1).split(size), strict=True):
        wide = torch.promote_types(x.dtype, torch.float32)
        block = _sum_block(x, q, wide)
        if not all(_SMALLEST < part < _LARGEST for part in block):
            block = _sum_block(x, q, torch.float64)
        total = total.plus(block)
    return total


def _sum_block(value: Tensor, quantized: Tensor, dtype: torch.dtype) -> Noise:
    value, quantized = value.flatten().to(dtype), quantized.flatten().to(dtype)
    error = quantized - value
    return Noise(torch.dot(value, value).item(), torch.dot(error, error).item())


@dataclass(frozen=True)
class _Problem:
    """What a graph of the sums is made for.

    Attributes:
        num_bits: of a :class:`fxmse.formats.grids.Grid`.
        type: "int" or "float".
        keeps_dtype: whether what was quantized has the value's dtype, not the scale's.
    """

    num_bits: int
    type: str
    keeps_dtype: bool


def measure_weight(weight: Tensor, qparams: Sequence[Tensor | None], args: QuantizationArgs) -> tuple[Noise, Tensor]:
    """What quantization does to a weight, which is read once and never copied as a whole.

    Args:
        weight: shape (..., out, in), float.
        qparams: scale, zero point and global scale as they are stored; of one element, or of as many for each matrix.
        args: the format.

    Returns:
        The sums, and the scale that the smallest and the largest value of each group would have, less the global one.
    """
    observer = Observer.load_from_registry("static_minmax", base_name="weight", args=args)
    layout = observer.layout
    shape = layout.qparam_shape(weight.shape)
    assert args.num_bits
    problem = _Problem(args.num_bits, str(args.type), layout.strategy in ("group", "tensor_group"))
    is_compiled = pays_to_compile(problem, weight, _WORK)
    noise, ranges = Noise(), []
    for values_OQPG, own in _cut(weight, layout, qparams, shape):
        found = []
        for part in values_OQPG.split(_count_rows(values_OQPG)):
            sums, *ends = run(is_compiled, _measure_tile, problem, part, *own)
            block = Noise(*sums.tolist())
            if not all(_SMALLEST < part < _LARGEST for part in block):
                block = _sum_block(part, _quantize(problem, part, *own), torch.float64)
            noise = noise.plus(block)
            found.append(Range(*ends))
        ranges.append(cover_ranges(found))
    groups = Range(*(torch.cat(ends).reshape(shape) for ends in zip(*ranges, strict=True)))
    state = State(like=weight.new_empty(0)).with_range(groups)
    if layout.strategy == "tensor_group":
        global_shape = layout.as_one_group().qparam_shape(weight.shape)
        min, max = (end.reshape(math.prod(global_shape), -1) for end in groups)
        whole = Range(min.amin(1).reshape(global_shape), max.amax(1).reshape(global_shape))
        state = state.with_global_range(whole)
    observer.state = state
    return noise, find_scale(observer)


def _cut(
    weight: Tensor, layout: Layout, qparams: Sequence[Tensor | None], shape: tuple[int, ...]
) -> Iterator[tuple[Tensor, list[Tensor | None]]]:
    """A weight's tiles, and beside each the qparams of its groups, [Q, 1, 1], or of one element."""
    groups = [None if q is None else q if q.numel() == 1 else q.expand(shape).flatten() for q in qparams]
    group_size = weight.numel() // math.prod(shape)
    start = 0
    for tile in layout.tiles(weight, max(1, enlarge(_BLOCK, weight.device) // group_size)):
        values_OQPG = cut_groups(tile, None).values_OQPG
        shape_Q11 = (*values_OQPG.shape[1:-2], 1, 1)
        end = start + math.prod(shape_Q11)
        yield values_OQPG, [q if q is None or q.numel() == 1 else q[start:end].reshape(shape_Q11) for q in groups]
        start = end


def _count_rows(values_OQPG: Tensor) -> int:
    """Observations of a block."""
    return max(1, enlarge(_BLOCK, values_OQPG.device) // values_OQPG[0].numel())


def _measure_tile(
    problem: _Problem, values_OQPG: Tensor, scale: Tensor, zero_point: Tensor | None, global_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of a tile, [2] in float64, and the smallest and the largest value of each group, [Q] in float32.

    A row's are found in one pass, in float32.
    """
    quantized = _quantize(problem, values_OQPG, scale, zero_point, global_scale)
    value = values_OQPG.to(torch.promote_types(values_OQPG.dtype, torch.float32))
    error = quantized.to(value.dtype) - value
    sums = [(part * part).sum((-2, -1)).sum(dtype=torch.float64) for part in (value, error)]
    min, max = value.amin((-2, -1)).amin(0), value.amax((-2, -1)).amax(0)
    return torch.stack(sums), min.flatten().float(), max.flatten().float()


def _quantize(problem: _Problem, values_OQPG: Tensor, *qparams: Tensor | None) -> Tensor:
    # Of any value that the scale broadcasts to, a channel is the strategy.
    quantized = FAKE_QUANTIZE(values_OQPG, *qparams, problem.num_bits, problem.type, "channel")
    return cast(quantized, values_OQPG.dtype) if problem.keeps_dtype else quantized


def find_scale(observer: Observer) -> Tensor:
    """The scale that an observer has found, less the global one."""
    qparams = observer.get_qparams()
    scale, global_scale = qparams["scale"], qparams["global_scale"]
    assert scale is not None
    return scale if global_scale is None else scale / global_scale
