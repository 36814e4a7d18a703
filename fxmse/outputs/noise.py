"""How much quantization changes a value: sums of squares, in blocks that stay in a cache."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from fxmse.formats.layout import Layout, enlarge
from fxmse.observers.base import Observer
from fxmse.observers.states import State
from fxmse.search.tiles import Range, cover_ranges, measure_range

__all__ = ["Noise", "find_scale", "measure_weight", "sum_noise"]

_BLOCK = 1 << 18
"""Elements of a block, for a CPU's caches: 1 MiB of float32. ``enlarge`` it."""
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
    value = value.to(dtype)
    error = quantized.to(dtype) - value
    return Noise(torch.dot(value, value).item(), torch.dot(error, error).item())


def measure_weight(
    weight: Tensor, qparams: Sequence[Tensor | None], args: QuantizationArgs, quantize: Callable[..., Tensor]
) -> tuple[Noise, Tensor]:
    """What quantization does to a weight, which is read once and never copied as a whole.

    Args:
        weight: shape (..., out, in), float.
        qparams: scale, zero point and global scale as they are stored; of one element, or of as many for each matrix.
        args: the format.
        quantize: from rows of the weight and their qparams to what they are quantized to.

    Returns:
        The sums, and the scale that the smallest and the largest value of each group would have, less the global one.
    """
    observer = Observer.load_from_registry("static_minmax", base_name="weight", args=args)
    layout, noise = observer.layout, Noise()
    by_matrix: list[Range] = []
    for matrix in _cut(weight, qparams, layout):
        ranges = []
        for rows, *cut_qparams in matrix:
            noise = noise.plus(sum_noise(rows, quantize(rows, *cut_qparams)))
            ranges.append(measure_range(rows, layout))
        by_matrix.append(_join(ranges))
    groups = _join(by_matrix)
    whole = [Range(range.min.amin().reshape(1), range.max.amax().reshape(1)) for range in by_matrix]
    state = State(like=weight.new_empty(0))
    if layout.strategy in ("tensor", "tensor_group"):
        shape = layout.as_one_group().qparam_shape(weight.shape)
        one = _join(whole) if math.prod(shape) == len(whole) else cover_ranges(whole)
        one = Range(one.min.reshape(shape), one.max.reshape(shape))
        state = state.with_range(one) if layout.strategy == "tensor" else state.with_global_range(one)
    if layout.strategy != "tensor":
        shape = layout.qparam_shape(weight.shape)
        state = state.with_range(Range(groups.min.reshape(shape), groups.max.reshape(shape)))
    observer.state = state
    return noise, find_scale(observer)


def _join(ranges: Sequence[Range]) -> Range:
    return Range(torch.cat([range.min for range in ranges]), torch.cat([range.max for range in ranges]))


def find_scale(observer: Observer) -> Tensor:
    """The scale that an observer has found, less the global one."""
    qparams = observer.get_qparams()
    scale, global_scale = qparams["scale"], qparams["global_scale"]
    assert scale is not None
    return scale if global_scale is None else scale / global_scale


def _cut(weight: Tensor, qparams: Sequence[Tensor | None], layout: Layout) -> Iterator[Iterator[tuple[Any, ...]]]:
    """Of each matrix of a weight its blocks of rows, each with its part of the qparams."""
    height = layout.block_structure[0] if layout.block_structure else 1
    matrices = _as_matrices(weight)
    num_rows = height * max(1, enlarge(_BLOCK, weight.device) // (height * matrices.shape[-1]))

    def cut(qparam: Tensor | None, place: int, start: int) -> Tensor | None:
        if qparam is None or qparam.numel() == 1:
            return qparam
        part = _as_matrices(qparam)[place]
        return part if len(part) == 1 else part[start // height : -(-(start + num_rows) // height)]

    for place, matrix in enumerate(matrices):
        yield (
            (matrix[start : start + num_rows], *(cut(qparam, place, start) for qparam in qparams))
            for start in range(0, len(matrix), num_rows)
        )


def _as_matrices(value: Tensor) -> Tensor:
    return value.reshape(-1, *value.shape[-2:]) if value.dim() > 1 else value.reshape(1, 1, -1)
