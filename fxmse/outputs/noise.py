"""How much quantization changes a value: sums of squares, in blocks that stay in a cache."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

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
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, args: QuantizationArgs, quantize: Callable[..., Tensor]
) -> tuple[Noise, Tensor]:
    """What quantization does to a weight, which is read once and never copied as a whole.

    Args:
        weight: shape (..., out, in), float.
        scale: shape qparam_shape, as it is stored.
        zero_point: the same shape, or None.
        args: the format.
        quantize: from rows of the weight, their scale and zero point to what they are quantized to.

    Returns:
        The sums, and the scale that the smallest and the largest value of each group would have, less the global one.
    """
    observer = Observer.load_from_registry("static_minmax", base_name="weight", args=args)
    layout, noise, ranges = observer.layout, Noise(), []
    for rows, row_scale, row_zero_point in _cut_rows(weight, scale, zero_point, layout):
        noise = noise.plus(sum_noise(rows, quantize(rows, row_scale, row_zero_point)))
        ranges.append(measure_range(rows, layout))
    if layout.strategy == "tensor":
        range = cover_ranges(ranges)
    else:
        shape = layout.qparam_shape(weight.shape)
        range = Range(*(torch.cat(parts).reshape(shape) for parts in zip(*ranges, strict=True)))
    state = State(like=weight.new_empty(0)).with_range(range)
    if layout.strategy == "tensor_group":
        state = state.with_global_range(Range(range.min.amin().reshape(1), range.max.amax().reshape(1)))
    observer.state = state
    return noise, find_scale(observer)


def find_scale(observer: Observer) -> Tensor:
    """The scale that an observer has found, less the global one."""
    qparams = observer.get_qparams()
    scale, global_scale = qparams["scale"], qparams["global_scale"]
    assert scale is not None
    return scale if global_scale is None else scale / global_scale


def _cut_rows(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, layout: Layout
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """A weight in blocks of rows, each with its part of scale and zero point."""
    height = layout.block_structure[0] if layout.block_structure else 1
    matrices = _as_matrices(weight)
    num_rows = height * max(1, enlarge(_BLOCK, weight.device) // (height * matrices.shape[-1]))

    def cut(qparam: Tensor | None) -> Iterator[Tensor | None]:
        for place in range(len(matrices)):
            for start in range(0, matrices.shape[1], num_rows):
                if qparam is None or layout.strategy == "tensor":
                    yield qparam
                else:
                    yield _as_matrices(qparam)[place, start // height : -(-(start + num_rows) // height)]

    rows = (part for matrix in matrices for part in matrix.split(num_rows))
    for part, part_scale, part_zero_point in zip(rows, cut(scale), cut(zero_point), strict=True):
        assert part_scale is not None
        yield part, part_scale, part_zero_point


def _as_matrices(value: Tensor) -> Tensor:
    return value.reshape(-1, *value.shape[-2:]) if value.dim() > 1 else value.reshape(1, 1, -1)
