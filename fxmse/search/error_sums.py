"""The errors of many scales at once: sums of |fake_quantize(x) - x| ** norm over the groups of a tile.

Shape suffixes as in :mod:`fxmse.formats.grids`: O observations, Q qparams, C candidates, P parts of a group, G elements
of a group or of such a part.
"""

import functools
import itertools
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fxmse.formats.grids import Format, Grid, keep
from fxmse.formats.layout import MAX_ELEMENTS, Layout
from fxmse.search.compiling import is_traced, run
from fxmse.search.power import AbsolutePower

__all__ = [
    "MAX_TABLE",
    "Arithmetic",
    "Range",
    "Tile",
    "as_readable",
    "count_parts",
    "cover_ranges",
    "cut_groups",
    "cut_tiles",
    "find_max_elements",
    "holds_pairs",
    "measure",
    "measure_pairs",
    "measure_tiles",
    "split_pairs",
    "sum_moments",
    "sum_powers",
]

# Uncompiled, so many errors are held at a time.
_MAX_EAGER = 1 << 20
MAX_TABLE = 1 << 18
"""Entries of a table [C, Q]: 1 MiB in float32, 2 MiB in float64, whatever the value's size."""
# Elements of half precision that are copied to float32 at a time, where they cannot be read as pairs.
_MAX_COPIED = 1 << 18
_HALF = (torch.bfloat16, torch.float16)
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
    """The range of each group, float32, in units of x; shape qparam_shape.

    One of a symmetric format whose ends are the other way round is that of a scale below 0.
    """

    min: Tensor
    max: Tensor


def cover_ranges(ranges: Sequence[Range]) -> Range:
    """The range that covers all of ``ranges``, which have one shape."""
    return Range(torch.stack([r.min for r in ranges]).amin(0), torch.stack([r.max for r in ranges]).amax(0))


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


def cut_tiles(value: Tensor, layout: Layout, max_groups: int, importance: Tensor | None) -> Iterator[Tile]:
    """A value's tiles, of at most about so many groups; the errors of channels count as ``importance`` says."""
    weights: Iterable[Tensor | None] = itertools.repeat(None)
    if importance is not None:
        weights = layout.channel_tiles(importance, value.shape, max_groups)
    return map(cut_groups, layout.tiles(value.detach(), max_groups), weights)


def find_max_elements(arithmetic: Arithmetic, dtype: torch.dtype) -> int:
    """How many elements of a value a tile may have, so that copies stay small."""
    return _MAX_COPIED if dtype in _HALF and not arithmetic.reads_pairs else MAX_ELEMENTS


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


def measure_pairs(arithmetic: Arithmetic, values_OQPG: Tensor) -> Range:
    """:func:`measure`, of what :func:`as_readable` gives."""
    ranges = [measure(None, part) for part in split_pairs(arithmetic, values_OQPG)]
    return Range(
        functools.reduce(torch.minimum, (part.min for part in ranges)),
        functools.reduce(torch.maximum, (part.max for part in ranges)),
    )


@torch.no_grad()
def measure_tiles(value: Tensor, layout: Layout, is_compiled: bool) -> Range:
    """The smallest and largest value of each group, [Q]."""
    tiles = (cut_groups(tile, None).values_OQPG for tile in layout.tiles(value.detach(), MAX_TABLE))
    parts = [run(is_compiled, measure, None, tile) for tile in tiles]
    return Range(torch.cat([part.min for part in parts]), torch.cat([part.max for part in parts]))


def count_parts(arithmetic: Arithmetic, values_OQPG: Tensor, num_candidates: int) -> int:
    """Into how many parts the observations are cut, so that copies and tables stay small."""
    if is_traced(values_OQPG):
        return 1
    num_parts = -(-values_OQPG.shape[:-1].numel() * num_candidates // MAX_TABLE)
    if values_OQPG.dtype in _HALF and not arithmetic.reads_pairs:
        num_parts = max(num_parts, -(-values_OQPG.numel() // _MAX_COPIED))
    return max(1, min(num_parts, len(values_OQPG)))


def as_readable(arithmetic: Arithmetic, values_OQPG: Tensor) -> Tensor:
    """What sums are made of: a view of pairs, or float32."""
    if arithmetic.reads_pairs:
        return values_OQPG.view(torch.float32)
    return values_OQPG if is_traced(values_OQPG) else values_OQPG.float()


def sum_powers(
    arithmetic: Arithmetic,
    values_OQPG: Tensor,
    scale_CQ: Tensor,
    zero_point_CQ: Tensor | None,
    weights_OQPG: Tensor | None,
) -> Tensor:
    """sum(weight * |e| ** norm) over O and G for each candidate, shape [C, Q].

    e is the error in units of the scale, round_to_grid(x / scale) - x / scale. A row's are summed up in float32 while
    it is in cache, the rows' in float64.
    """
    return _sum(_list_powers, arithmetic, values_OQPG, scale_CQ, zero_point_CQ, weights_OQPG)[0]


def sum_moments(
    arithmetic: Arithmetic,
    values_OQPG: Tensor,
    scale_CQ: Tensor,
    zero_point_CQ: Tensor | None,
    weights_OQPG: Tensor | None,
) -> Tensor:
    """The sums of weight * e ** 2, weight * e * q and weight * q ** 2, shape [3, C, Q], e as in :func:`sum_powers`.

    q is what x is quantized to, in units of the scale. While no x is quantized to something else, a scale that is
    1 + d times as large has the squared error sum(e ** 2) + 2 * d * sum(e * q) + d ** 2 * sum(q ** 2).
    """
    return torch.stack(_sum(_list_moments, arithmetic, values_OQPG, scale_CQ, zero_point_CQ, weights_OQPG))


_Terms = Callable[[Arithmetic, Tensor, Tensor], list[Tensor]]


def _list_powers(arithmetic: Arithmetic, error: Tensor, scaled: Tensor) -> list[Tensor]:
    return [arithmetic.power(error)]


def _list_moments(arithmetic: Arithmetic, error: Tensor, scaled: Tensor) -> list[Tensor]:
    quantized = scaled + error
    return [error * error, error * quantized, quantized * quantized]


def _sum(
    list_terms: _Terms,
    arithmetic: Arithmetic,
    values_OQPG: Tensor,
    scale_CQ: Tensor,
    zero_point_CQ: Tensor | None,
    weights_OQPG: Tensor | None,
) -> list[Tensor]:
    """The sums of terms, uncompiled of so many candidates at a time as may be copies of the data."""
    if torch.compiler.is_compiling():
        # There the candidates are a loop around a row that stays in cache.
        return _sum_at_once(list_terms, arithmetic, values_OQPG, scale_CQ, zero_point_CQ, weights_OQPG)
    at_a_time = max(1, min(len(scale_CQ), _MAX_EAGER // values_OQPG.numel()))
    parts = []
    for start in range(0, len(scale_CQ), at_a_time):
        some = slice(start, start + at_a_time)
        zero_point = None if zero_point_CQ is None else zero_point_CQ[some]
        parts.append(_sum_at_once(list_terms, arithmetic, values_OQPG, scale_CQ[some], zero_point, weights_OQPG))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def _sum_at_once(
    list_terms: _Terms,
    arithmetic: Arithmetic,
    values_OQPG: Tensor,
    scale_CQ: Tensor,
    zero_point_CQ: Tensor | None,
    weights_OQPG: Tensor | None,
) -> list[Tensor]:
    # fake_quantize's error is continuous in x / scale, so that a reciprocal off by an ulp changes it by an ulp.
    shape_CQ11 = (len(scale_CQ), *values_OQPG.shape[1:-2], 1, 1)
    reciprocal = keep(scale_CQ.reciprocal()).reshape(shape_CQ11)
    zero_point = None if zero_point_CQ is None else zero_point_CQ.reshape(shape_CQ11)
    terms = [
        list_terms(arithmetic, *_round(part[:, None], reciprocal, zero_point, arithmetic.format))
        for part in split_pairs(arithmetic, values_OQPG)
    ]
    weights_O1QPG = None if weights_OQPG is None else weights_OQPG[:, None]
    return [_sum_rows(functools.reduce(torch.add, term), weights_O1QPG) for term in zip(*terms, strict=True)]


def _sum_rows(terms_OCQPG: Tensor, weights_O1QPG: Tensor | None) -> Tensor:
    if weights_O1QPG is not None:
        terms_OCQPG = terms_OCQPG * weights_O1QPG
    sums_OCQP = terms_OCQPG.sum(-1)
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


def _round(values: Tensor, reciprocal: Tensor, zero_point: Tensor | None, format: Format) -> tuple[Tensor, Tensor]:
    """The error of rounding x / scale, in units of the scale, and x / scale; both of -x where that is the same."""
    grid = format.grid
    if grid.type == "int":
        return _round_to_integer(values, reciprocal, grid, zero_point)
    if zero_point is None:
        return _round_to_float(values, reciprocal, grid)
    scaled, zero_point = values * reciprocal, keep(zero_point)
    rounded = grid.round((scaled + zero_point).clamp(grid.qmin, grid.qmax))
    return (rounded - zero_point) - scaled, scaled


def _round_to_integer(
    values: Tensor, reciprocal: Tensor, grid: Grid, zero_point: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``_round`` for an integer grid.

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
    return (bits.view(torch.float32) - shift) - values * reciprocal, values * reciprocal


def _round_to_float(values: Tensor, reciprocal: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """``_round`` for a float grid, of |x|.

    As ``Grid.round``, with the clamp one of integers: see ``_round_to_integer``.
    """
    magnitudes = values.abs()
    clamped = (magnitudes * reciprocal).view(torch.int32).clamp(max=_to_bits(grid.qmax))
    power = (clamped & 0x7F80_0000).clamp(min=_to_bits(2.0**grid.min_exponent)).view(torch.float32)
    shift = power * 2.0 ** (23 - grid.mantissa_bits)
    rounded = (clamped.view(torch.float32) + shift) - shift
    return rounded - magnitudes * reciprocal, magnitudes * reciprocal


def _to_bits(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")
