"""A value's groups in tiles that fit a cache and a graph: how they are cut, read and measured.

Shape suffixes: O observations, Q qparams (one per group), P parts of a group, G elements of a group or of such a part.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fxmse.formats.grids import Format
from fxmse.formats.layout import MAX_ELEMENTS, Layout, enlarge
from fxmse.formats.tables import is_traced
from fxmse.search.compiling import run
from fxmse.search.power import AbsolutePower

__all__ = [
    "MAX_TABLE",
    "Arithmetic",
    "Range",
    "Tile",
    "as_readable",
    "count_lanes",
    "count_parts",
    "cover_ranges",
    "cut_groups",
    "cut_tiles",
    "find_max_elements",
    "find_row",
    "holds_pairs",
    "measure",
    "measure_pairs",
    "measure_range",
    "measure_tiles",
    "search_matrices",
    "split_pairs",
]

MAX_TABLE = 1 << 18
"""Entries of a table [C, Q]: 1 MiB in float32, 2 MiB in float64, whatever the value's size; ``enlarge`` it."""
# Elements of half precision that are copied to float32 at a time, where they cannot be read as pairs: as fit a CPU's
# cache.
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


def search_matrices(
    search: Callable[[Tensor, Tensor | None], Range], value: Tensor, layout: Layout, global_scale: Tensor | None = None
) -> Range:
    """The ranges that ``search`` gives, of each matrix for itself where ``layout`` has a (global) scale for each.

    Args:
        search: called with a value, or a matrix (out, in) of it, and the global scale of that.
        value: float.
        layout: that of the ranges.
        global_scale: float32, one element, or one for each matrix.
    """
    if not layout.is_by_matrix(value.shape):
        return search(value, global_scale)
    matrices = value.flatten(0, -3)
    scales: Iterable[Tensor | None] = itertools.repeat(None, len(matrices))
    if global_scale is not None:
        scales = global_scale.flatten().expand(len(matrices)).split(1)
    found = [search(matrix, scale) for matrix, scale in zip(matrices, scales, strict=True)]
    shape = layout.qparam_shape(value.shape)
    return Range(*(torch.cat([end.flatten() for end in ends]).reshape(shape) for ends in zip(*found, strict=True)))


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


def find_max_elements(arithmetic: Arithmetic, value: Tensor) -> int:
    """How many elements of a value a tile may have, so that copies stay small."""
    is_copied = value.dtype in _HALF and not arithmetic.reads_pairs
    return _MAX_COPIED if is_copied and value.device.type == "cpu" else enlarge(MAX_ELEMENTS, value.device)


def _choose_part(length: int, parts: tuple[int, ...], default: int) -> int:
    return next((part for part in parts if length % part == 0), default)


def holds_pairs(value: Tensor, layout: Layout) -> bool:
    """Whether the search can read two bfloat16 of a part as one float32.

    It spares a copy: Inductor does not vectorise bit casts next to half precision. A GPU's kernels need no such thing.
    """
    if value.dtype != torch.bfloat16 or value.device.type != "cpu":
        return False
    has_pairs = _choose_part(find_row(value, layout), _PARTS, 0) >= 2 * count_lanes()
    return has_pairs and value.is_contiguous() and value.storage_offset() % 2 == 0


def find_row(value: Tensor, layout: Layout) -> int:
    """How many elements of a group lie one after the other."""
    return layout.block_structure[1] if layout.block_structure else layout.group_size or value.shape[-1]


def count_lanes() -> int:
    """How many float32 a vector of the CPU holds."""
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


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
    max_groups = enlarge(MAX_TABLE, value.device)
    tiles = (cut_groups(tile, None).values_OQPG for tile in layout.tiles(value.detach(), max_groups))
    parts = [run(is_compiled, measure, None, tile) for tile in tiles]
    return Range(torch.cat([part.min for part in parts]), torch.cat([part.max for part in parts]))


def measure_range(value: Tensor, layout: Layout) -> Range:
    """The smallest and largest value of each group."""
    shape = layout.qparam_shape(value.shape)
    own = measure_tiles(value, layout, is_compiled=False)
    return Range(own.min.reshape(shape), own.max.reshape(shape))


def count_parts(arithmetic: Arithmetic, values_OQPG: Tensor, num_candidates: int) -> int:
    """Into how many parts the observations are cut, so that copies and tables stay small."""
    if is_traced(values_OQPG):
        return 1
    num_parts = -(-values_OQPG.shape[:-1].numel() * num_candidates // enlarge(MAX_TABLE, values_OQPG.device))
    if values_OQPG.dtype in _HALF and not arithmetic.reads_pairs:
        num_parts = max(num_parts, -(-values_OQPG.numel() // find_max_elements(arithmetic, values_OQPG)))
    return max(1, min(num_parts, len(values_OQPG)))


def as_readable(arithmetic: Arithmetic, values_OQPG: Tensor) -> Tensor:
    """What sums are made of: a view of pairs, or float32."""
    if arithmetic.reads_pairs:
        return values_OQPG.view(torch.float32)
    return values_OQPG if is_traced(values_OQPG) else values_OQPG.float()


def split_pairs(arithmetic: Arithmetic, values_OQPG: Tensor) -> list[Tensor]:
    """The values, float32: all of them, or the even and the odd ones.

    A bfloat16 is the upper half of a float32. Loads of floats are fast, those of integers are not, and the negation
    has the load be one of floats without changing any other bit.
    """
    if not arithmetic.reads_pairs:
        return [values_OQPG.float()]
    bits = (-values_OQPG).view(torch.int32)
    return [(bits * (1 << 16)).view(torch.float32), -(bits & -(1 << 16)).view(torch.float32)]
