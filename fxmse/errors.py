"""The errors of many scales at once: sums of |fake_quantize(x) - x| ** norm over the groups of a tile.

Shape suffixes as in :mod:`fxmse.numerics`: O observations, Q qparams, C candidates, P parts of a group, G elements of a
group or of such a part.
"""

import functools
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fxmse.compiling import is_traced
from fxmse.layout import Layout
from fxmse.numerics import Format, Grid, keep
from fxmse.power import AbsolutePower

__all__ = [
    "Arithmetic",
    "Range",
    "Tile",
    "as_readable",
    "cut_groups",
    "holds_pairs",
    "measure",
    "split_pairs",
    "sum_powers_in_parts",
]

# Uncompiled, so many errors are held at a time.
_MAX_EAGER = 1 << 20
# Groups are cut into parts of one of these lengths. It is a constant of the graph: the innermost loop needs no check
# for its end then and is two to three times as fast, and float32 sums of so few errors are exact enough.
_PARTS = (128, 64, 32, 16)
# A value of one group is better cut into longer ones: each has an entry for every candidate.
_LONG_PARTS = (1024, *_PARTS)


@dataclass(frozen=True)
class Arithmetic:
    """What is summed up.

    Attributes:
        format: the format.
        power: |e| ** norm.
        reads_pairs: whether two bfloat16 are read as one float32.
    """

    format: Format
    power: AbsolutePower
    reads_pairs: bool


class Range(NamedTuple):
    """The range of each group, float32, in units of x; shape qparam_shape."""

    min: Tensor
    max: Tensor


class Tile(NamedTuple):
    """Groups of a value."""

    values_OQPG: Tensor
    weights_OQPG: Tensor | None  # of the elements' errors; O and Q may be 1


def cut_groups(values_OQG: Tensor, weights_QG: Tensor | None) -> Tile:
    """A tile with its groups cut into parts of one of the lengths that graphs are made for, if one divides them."""
    if weights_QG is None and values_OQG.shape[1:-1].numel() == 1 and values_OQG.is_contiguous():
        # One group's parts are observations as well.
        part = _choose_part(values_OQG.numel(), _LONG_PARTS, values_OQG.shape[-1])
        return Tile(values_OQG.reshape(-1, 1, 1, part), None)
    length = values_OQG.shape[-1]
    part = _choose_part(length, _PARTS, length)
    weights_OQPG = None if weights_QG is None else weights_QG[None].unflatten(-1, (-1, part))
    return Tile(values_OQG.unflatten(-1, (-1, part)), weights_OQPG)


def _choose_part(length: int, parts: tuple[int, ...], default: int) -> int:
    return next((part for part in parts if length % part == 0), default)


def holds_pairs(value: Tensor, layout: Layout) -> bool:
    """Whether the search can read two bfloat16 of a part as one float32.

    It spares a copy: Inductor does not vectorise bit casts next to half precision. A GPU's kernels need no such thing.
    """
    if value.dtype != torch.bfloat16 or value.device.type != "cpu":
        return False
    length = layout.block_structure[1] if layout.block_structure else layout.group_size or value.shape[-1]
    num_lanes = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    has_pairs = _choose_part(length, _PARTS, 0) >= 2 * num_lanes
    return has_pairs and value.is_contiguous() and value.storage_offset() % 2 == 0


def measure(_: None, values_OQPG: Tensor) -> Range:
    """The range [Q] of each group of a tile."""
    dims = (0, -2, -1)
    return Range(values_OQPG.amin(dims).flatten().float(), values_OQPG.amax(dims).flatten().float())


def as_readable(arithmetic: Arithmetic, values_OQPG: Tensor) -> Tensor:
    """What ``_sum_errors`` reads: a view of pairs, or float32."""
    if arithmetic.reads_pairs:
        return values_OQPG.view(torch.float32)
    return values_OQPG if is_traced(values_OQPG) else values_OQPG.float()


def sum_powers_in_parts(
    arithmetic: Arithmetic,
    values_OQPG: Tensor,
    scale_CQ: Tensor,
    zero_point_CQ: Tensor | None,
    weights_OQPG: Tensor | None,
) -> Tensor:
    """``_sum_powers``, uncompiled so many candidates at a time as may be copies of the data."""
    if torch.compiler.is_compiling():
        # There the candidates are a loop around a row that stays in cache.
        return _sum_powers(arithmetic, values_OQPG, scale_CQ, zero_point_CQ, weights_OQPG)
    at_a_time = max(1, min(len(scale_CQ), _MAX_EAGER // values_OQPG.numel()))
    parts = []
    for start in range(0, len(scale_CQ), at_a_time):
        some = slice(start, start + at_a_time)
        zero_point = None if zero_point_CQ is None else zero_point_CQ[some]
        parts.append(_sum_powers(arithmetic, values_OQPG, scale_CQ[some], zero_point, weights_OQPG))
    return torch.cat(parts)


def _sum_powers(
    arithmetic: Arithmetic,
    values_OQPG: Tensor,
    scale_CQ: Tensor,
    zero_point_CQ: Tensor | None,
    weights_OQPG: Tensor | None,
) -> Tensor:
    """sum(weight * |round_to_grid(x / scale) - x / scale| ** norm) over O and G, shape [C, Q].

    A row's errors are summed up in float32 while it is in cache, the rows' in float64.
    """
    # fake_quantize's error is continuous in x / scale, so that a reciprocal off by an ulp changes it by an ulp.
    shape_CQ11 = (len(scale_CQ), *values_OQPG.shape[1:-2], 1, 1)
    reciprocal = keep(scale_CQ.reciprocal()).reshape(shape_CQ11)
    zero_point = None if zero_point_CQ is None else zero_point_CQ.reshape(shape_CQ11)
    values = split_pairs(arithmetic, values_OQPG)
    powers = [arithmetic.power(_round(part[:, None], reciprocal, zero_point, arithmetic.format)) for part in values]
    powers_OCQPG = functools.reduce(torch.add, powers)
    if weights_OQPG is not None:
        powers_OCQPG = powers_OCQPG * weights_OQPG[:, None]
    sums_OCQP = powers_OCQPG.sum(-1)
    if sums_OCQP.shape[0] == sums_OCQP.shape[-1] == 1:
        return sums_OCQP[0, ..., 0].flatten(1)
    return sums_OCQP.sum((0, -1), dtype=torch.float64).flatten(1)


def split_pairs(arithmetic: Arithmetic, values_OQPG: Tensor) -> list[Tensor]:
    """The values, float32: all of them, or the even and the odd ones.

    A bfloat16 is the upper half of a float32. Loads of floats are fast, those of integers are not, and the negation
    has the load be one of floats without changing any other bit.
    """
    if not arithmetic.reads_pairs:
        return [values_OQPG.float()]
    bits = (-values_OQPG).view(torch.int32)
    return [(bits * (1 << 16)).view(torch.float32), -(bits & -(1 << 16)).view(torch.float32)]


def _round(values: Tensor, reciprocal: Tensor, zero_point: Tensor | None, format: Format) -> Tensor:
    """The error of rounding x / scale, in units of the scale; up to its sign."""
    grid = format.grid
    if grid.type == "int":
        return _round_to_integer(values, reciprocal, grid, zero_point)
    if zero_point is None:
        return _round_to_float(values, reciprocal, grid)
    scaled, zero_point = values * reciprocal, keep(zero_point)
    rounded = grid.round((scaled + zero_point).clamp(grid.qmin, grid.qmax))
    return (rounded - zero_point) - scaled


def _round_to_integer(values: Tensor, reciprocal: Tensor, grid: Grid, zero_point: Tensor | None) -> Tensor:
    """The error of rounding x / scale to an integer grid, in units of the scale.

    1.5 * 2 ** 23 has the adder round, half to even. Positive floats are ordered as their bits are, and negative ones
    below them, so that the clamp is one of integers: one instruction a bound, where one of floats that passes NaN on
    takes four. The last difference passes it on.
    """
    shift, shift_bits = 1.5 * 2.0**23, 0x4B40_0000
    bits = (values * reciprocal + shift).view(torch.int32)
    low, high = shift_bits + int(grid.qmin), shift_bits + int(grid.qmax)
    if zero_point is None:
        bits = bits.clamp(low, high)
    else:
        # A whole zero point moves the grid by whole steps: moving the bounds instead keeps x / scale exact.
        steps = zero_point.to(torch.int32)
        bits = torch.minimum(torch.maximum(bits, keep(low - steps)), keep(high - steps))
    return (bits.view(torch.float32) - shift) - values * reciprocal


def _round_to_float(values: Tensor, reciprocal: Tensor, grid: Grid) -> Tensor:
    """The error of rounding |x| / scale to a float grid, in units of the scale; both signs have the same.

    As ``Grid.round``, with the clamp one of integers: see ``_round_to_integer``.
    """
    magnitudes = values.abs()
    clamped = (magnitudes * reciprocal).view(torch.int32).clamp(max=_to_bits(grid.qmax))
    power = (clamped & 0x7F80_0000).clamp(min=_to_bits(2.0**grid.min_exponent)).view(torch.float32)
    shift = power * 2.0 ** (23 - grid.mantissa_bits)
    rounded = (clamped.view(torch.float32) + shift) - shift
    return rounded - magnitudes * reciprocal


def _to_bits(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")
