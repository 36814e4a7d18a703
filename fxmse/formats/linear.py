"""Linear quantization as ONNX has it: the types that codes are stored in, and scales of one axis.

Codes are whole numbers or floats in units of the scale.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LINEAR_TYPES", "LinearScales", "LinearType", "find_linear_type", "spread_scales"]


@dataclass(frozen=True)
class LinearType:
    """A type that codes are stored in.

    Attributes:
        name: ONNX's.
        dtype: what holds its values in torch; one of fewer bits has a byte for each.
        bits: how many a value takes in a file.
        range: the smallest and the largest value.
        opset: the first in which QuantizeLinear and DequantizeLinear take it.
    """

    name: str
    dtype: torch.dtype
    bits: int
    range: tuple[float, float]
    opset: int


LINEAR_TYPES = {
    type.name: type
    for type in (
        LinearType("INT2", torch.int8, 2, (-2, 1), 25),
        LinearType("INT4", torch.int8, 4, (-8, 7), 21),
        LinearType("INT8", torch.int8, 8, (-128, 127), 19),
        LinearType("UINT8", torch.uint8, 8, (0, 255), 19),
        LinearType("INT16", torch.int16, 16, (-(2**15), 2**15 - 1), 21),
        LinearType("FLOAT4E2M1", torch.float8_e4m3fn, 4, (-6, 6), 23),
        LinearType("FLOAT8E4M3FN", torch.float8_e4m3fn, 8, (-448, 448), 19),
    )
}
"""By name. fp6 has no type: its values are among those of FLOAT8E4M3FN."""

_FLOATS = {4: "FLOAT4E2M1", 6: "FLOAT8E4M3FN", 8: "FLOAT8E4M3FN"}


def find_linear_type(num_bits: int, type: str) -> LinearType:
    """The smallest signed type that has all values of a :class:`fxmse.formats.grids.Grid`."""
    if type == "float":
        return LINEAR_TYPES[_FLOATS[num_bits]]
    integers = (own for own in LINEAR_TYPES.values() if own.name.startswith("INT"))
    return next(own for own in integers if own.bits >= num_bits)


@dataclass(frozen=True)
class LinearScales:
    """Which scale each element of a value has.

    Attributes:
        axis: what scales vary along; 0 where there is one.
        block_size: how many neighbours along ``axis`` share a scale; 0 where all that have an index of it do.
        places: int64, which scale stands where: no dimension for one, the axis alone without blocks, otherwise the
            value's dimensions, of which that of ``axis`` is divided by the block's size and rounded up.
    """

    axis: int
    block_size: int
    places: Tensor

    @classmethod
    def of(cls, places: Tensor) -> "LinearScales":
        """The scales of a value, where ``places`` has for each element which one is its own.

        One where one is enough; otherwise one for each index of an axis, where that is; otherwise the fewest blocks.
        """
        if not places.numel() or bool((places == places.flatten()[0]).all()):
            return cls(0, 0, places.flatten()[:1].sum())
        for axis in range(places.dim()):
            line = places[tuple(slice(None) if dim == axis else slice(1) for dim in range(places.dim()))]
            if torch.equal(line.expand_as(places), places):
                return cls(axis, 0, line.flatten())
        blocks = [cls._in_blocks(places, axis) for axis in range(places.dim())]
        return min(blocks, key=lambda scales: scales.places.numel())

    @classmethod
    def _in_blocks(cls, places: Tensor, axis: int) -> "LinearScales":
        """The largest blocks along an axis, the last of which may be cut off."""
        size = places.shape[axis]
        changes = places.narrow(axis, 1, size - 1) != places.narrow(axis, 0, size - 1)
        others = [dim for dim in range(places.dim()) if dim != axis]
        starts = changes.any(others).nonzero().flatten() + 1 if others else changes.nonzero().flatten() + 1
        block_size = math.gcd(*starts.tolist()) or size
        firsts = torch.arange(0, size, block_size, device=places.device)
        return cls(axis, block_size, places.index_select(axis, firsts))


def spread_scales(scales: Tensor, value: Tensor, axis: int, block_size: int) -> Tensor:
    """``scales`` in a shape that broadcasts to ``value``'s (:class:`LinearScales`)."""
    if scales.dim() == 0:
        return scales
    if block_size:
        return scales.repeat_interleave(block_size, axis).narrow(axis, 0, value.shape[axis])
    return scales.reshape([-1 if dim == axis % value.dim() else 1 for dim in range(value.dim())])
