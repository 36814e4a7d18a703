"""The search for the optimum: of all ranges that a format can store the best, not the best of a list of shrunk ones.

Where few scales can be stored (e4m3, powers of two) all that can be best are evaluated. Elsewhere the error is a jagged
function of the scale: it falls and rises each time that large elements change the value they are rounded to, which
happens about each .5 / qmax of the scale, around a smooth trend. The search narrows that down: scales a third of an
octave apart, some more around the best of these, then so many around the best again that each valley is met, and a
last look at the best valley. At norm 2 any point of a valley tells how deep it is and where
(:func:`fxmse.search.error_sums.sum_moments`), so that a scale or two in each are enough.

The depths of valleys differ by about 1 / sqrt(G). In small groups the best one may be as far from the trend's minimum,
and also above the group's own range.

The grid of symmetric integers has one value more below 0 than above. With a scale below 0 that value is at the other
end: each group is searched twice, as if its range were the other way round, too, and has it where it is of more use.

Asymmetric formats have a second dimension, the place of their range within the group's. Only elements that are clamped
depend on it: a few places are tried with each scale, and single steps of the zero point at the end.

Shape suffixes as in :mod:`fxmse.search.error_sums`; J counts global scales, N different values.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fxmse.formats.grids import (
    Format,
    calculate_exact_scale,
    calculate_range_of_scale,
    list_stored_scales,
    round_scale,
)
from fxmse.formats.layout import Layout
from fxmse.search.compiling import pays_to_compile, run
from fxmse.search.error_sums import (
    MAX_TABLE,
    Arithmetic,
    Range,
    Tile,
    as_readable,
    count_parts,
    cover_ranges,
    cut_groups,
    cut_tiles,
    find_max_elements,
    holds_pairs,
    measure_pairs,
    sum_moments,
    sum_powers,
)
from fxmse.search.power import AbsolutePower

__all__ = ["Problem", "Sample", "find_optimum", "find_optimum_of_counts", "sum_least_errors"]

# Of integer grids, in parts of the scale of the group's own range. Widths and spacings were chosen so that errors stay
# within .4 % of the least for groups of 32 to 4096 normal, heavy-tailed, skewed and real values of 2 to 8 bits.
_MIDDLE = tuple(2.0 ** (i / 10.5) for i in range(-3, 4) if i)  # between the neighbours of the best of these
_MIN_WIDTH = 0.05  # of the fine part, to either side: half of what two scales of the middle part are apart
_WIDTH = 2.2  # and at least so many times 1 / sqrt(G)
_MAX_WIDTH = 0.4
_ABOVE = 1.13  # times 1 / sqrt(G): how far above the group's own range
_MIN_FINE = 8
# Of an asymmetric grid's range in the group's: from its lower end to its upper end.
_PLACES = (0.5, 0.0, 0.25, 0.75, 1.0)
_NEAR_PLACES = tuple(i / 32 for i in range(-5, 6) if i)
_NEAR_ZERO_POINTS = (0.0, -1.0, 1.0, -2.0, 2.0)
_NUM_POWERS_OF_TWO = 3  # the group's own, the one above and the one below
# Values that were counted, of which there may be many different ones: the first scales are tried on fewer.
_ROUGH = 1 << 11
_COUNTED = 1 << 10  # they are cut into parts of this length
# Much of an activation may be next to one value, as behind a GELU: the trend is as jagged as for a group of so few
# elements, but each valley is wide.
_COUNTED_AS = 128
_LAST = 9  # scales around the best, where its valley's bottom does not follow from moments

_MAX_AT_ONCE = 1 << 14  # groups that are tried with several global scales


class _Density(NamedTuple):
    """How many scales are evaluated."""

    coarse: tuple[float, ...]  # of an integer grid, in parts of the scale of the group's own range
    spacing: float  # between two scales of its fine part, in parts of 1 / qmax
    float_spacing: float  # of the logarithms of a float grid's scales, in parts of 2 ** -mantissa_bits
    changes: tuple[float, ...]  # of the best scale at the end, in parts of 1 / qmax


_OF_GROUPS = _Density(tuple(2.0 ** (-i / 3) for i in range(12)), 0.4, 0.09, ())  # down to a thirteenth
_OF_COUNTS = _Density(tuple(2.0 ** (-i / 12) for i in range(48)), 0.8, 0.03, tuple(0.7 * i for i in range(-4, 5) if i))


@dataclass(frozen=True)
class Problem(Arithmetic):
    """All that a compiled search depends on but tensors."""

    dtype: torch.dtype  # that scales are stored in, where the format names none
    both_signs: bool = False  # of scales

    @property
    def num_signs(self) -> int:
        """How often each group is searched."""
        return 2 if self.both_signs else 1

    @property
    def num_scales(self) -> int | None:
        """How many stored scales can be best, from ``top_ratio`` times the group's own downwards; None for many."""
        if self.format.is_mx:
            return _NUM_POWERS_OF_TWO
        if self.format.scale_dtype != torch.float8_e4m3fn or not self.format.symmetric:
            return None
        low = 0.25 if self.format.grid.type == "int" else 0.8
        return 2 + math.ceil(8 * math.log2(self.top_ratio / low))  # eight in each octave

    @property
    def top_ratio(self) -> float:
        """The largest scale that can be best, in parts of that of the group's own range."""
        grid = self.format.grid
        return 1.2 if grid.type == "int" else 2 - 2.0 ** (-1 - grid.mantissa_bits)


@dataclass(frozen=True)
class _Plan:
    """Which scales are evaluated, in parts of that of the group's own range.

    Of an integer grid the middle and fine ones are around the best before.
    """

    coarse: tuple[float, ...]
    middle: tuple[float, ...]
    fine: tuple[float, ...]
    limit: float
    last: tuple[float, ...]  # changes of the scale that are tried with several zero points at the end

    @classmethod
    @functools.cache
    def of(cls, format: Format, num_elements: int, density: _Density = _OF_GROUPS) -> "_Plan":
        """The plan for groups of so many elements."""
        grid = format.grid
        if grid.type == "float":
            # It has the same values at twice the scale but for its smallest, and its largest are then not used: less
            # than twice the group's own scale is enough. As errors are in proportion to the elements, there is no
            # trend to follow.
            low, high = 1 - 2.0**-grid.mantissa_bits, 1.97
            num_fine = math.ceil(math.log(high / low) / density.float_spacing * 2**grid.mantissa_bits)
            fine = tuple(low * (high / low) ** (i / (num_fine - 1)) for i in range(num_fine))
            return cls((1.0,), (), fine, 2.0, ())
        # All of a symmetric grid's range is used where the largest element is at its upper, smaller end.
        top = (grid.qmax - grid.qmin) / 2 / grid.qmax if format.symmetric else 1.0
        noise = 1 / math.sqrt(num_elements)
        width = min(max(_MIN_WIDTH, _WIDTH * noise), _MAX_WIDTH)
        num_fine = max(_MIN_FINE, math.ceil(2 * width * grid.qmax / density.spacing))
        fine = tuple(1 - width + 2 * width * i / (num_fine - 1) for i in range(num_fine))
        coarse = (1.0, *(top * ratio for ratio in density.coarse if top * ratio != 1))
        last = tuple(change / grid.qmax for change in density.changes)
        return cls(coarse, _MIDDLE, fine, top * (1 + _ABOVE * noise), last)

    @property
    def num_candidates(self) -> int:
        """How many are evaluated."""
        return len(self.coarse) + len(self.middle) + 2 * len(self.fine) + _LAST

    @property
    def work(self) -> int:
        """:func:`pays_to_compile`'s measure; less than the candidates, as this search takes longer to compile."""
        return max(1, self.num_candidates // 4)

    def make_tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        """The plan for a graph that is the same for all plans."""
        return _make_tensors(self, device)


@functools.cache
def _make_tensors(plan: _Plan, device: torch.device) -> tuple[Tensor, ...]:
    tables = (plan.coarse, plan.middle, plan.fine, (plan.limit,), plan.last)
    return tuple(torch.tensor(table, device=device) for table in tables)


class _Candidates(NamedTuple):
    """Scales as they will be stored, in units of x, and zero points."""

    scale_CQ: Tensor
    zero_point_CQ: Tensor | None

    def take(self, index_Q: Tensor) -> "_Candidates":
        """One for each group, [1, Q]."""
        zero_point_CQ = self.zero_point_CQ
        return _Candidates(
            _take(self.scale_CQ, index_Q), None if zero_point_CQ is None else _take(zero_point_CQ, index_Q)
        )


def _take(table_CQ: Tensor, index_Q: Tensor) -> Tensor:
    return table_CQ.gather(0, index_Q[None])


class _Found(NamedTuple):
    """The best of each group, [Q]: its range, and its error in units of ``base`` ** norm."""

    min: Tensor
    max: Tensor
    error: Tensor
    base: Tensor


class Sample(NamedTuple):
    """Some of a weight's groups, each for so many."""

    groups_QG: Tensor
    weights_QG: Tensor | None
    num_Q: Tensor


def find_optimum(
    value: Tensor,
    format: Format,
    layout: Layout,
    power: AbsolutePower,
    *,
    global_scale: Tensor | None = None,
    importance: Tensor | None = None,
    negative_scale: bool = False,
) -> Range:
    """Finds the range of each group whose quantization error is least, of all that the format can store.

    Minimises sum(importance * |fake_quantize(x) - x| ** norm) per group. NaN and Inf are not looked for: a group that
    has one gets a range that is not finite.

    Args:
        value: float, any shape and strides that ``layout`` takes, not empty.
        format: the format.
        layout: the groups.
        power: |e| ** norm.
        global_scale: float32, one element; scales are stored times it.
        importance: float32, one element a channel of ``value``'s last dimension: the weight of its errors. For the
            channel, group and tensor_group strategies of a weight.
        negative_scale: of symmetric integers whose scales are not e4m3, search scales below 0, too.

    Returns:
        Ranges that give the best scales and zero points by compressed-tensors' ``calculate_qparams``; that of a scale
        below 0 has its ends the other way round.
    """
    shape = layout.qparam_shape(value.shape)
    size = value.numel() // math.prod(shape)
    both_signs = negative_scale and format.symmetric and format.grid.type == "int"
    problem = Problem(format, power, False, value.dtype, both_signs)
    plan = _Plan.of(format, size)
    is_compiled = pays_to_compile(problem, value, problem.num_scales or plan.work * problem.num_signs)
    problem = replace(problem, reads_pairs=is_compiled and importance is None and holds_pairs(value, layout))
    max_elements = find_max_elements(problem, value.dtype)
    num_candidates = problem.num_scales or max(16, len(plan.fine)) * problem.num_signs
    max_groups = max(1, min(MAX_TABLE // num_candidates, max_elements // size))
    with torch.no_grad():
        tiles = cut_tiles(value, layout, max_groups, importance)
        found = [_search_tile(problem, plan, tile, global_scale, is_compiled) for tile in tiles]
    return Range(*(torch.cat(part).reshape(shape) for part in list(zip(*found, strict=True))[:2]))


def find_optimum_of_counts(
    values_N: Tensor,
    counts_QN: Tensor,
    format: Format,
    power: AbsolutePower,
    dtype: torch.dtype,
    *,
    global_scale: Tensor | None = None,
) -> Range:
    """:func:`find_optimum` of values that are given by how often each of them was seen.

    Args:
        values_N: finite, float32.
        counts_QN: of each group, any dtype.
        format: the format.
        power: |e| ** norm.
        dtype: of the values, and so of scales.
        global_scale: as for :func:`find_optimum`.

    Returns:
        The ranges, shape (Q,).
    """
    problem = Problem(format, power, False, dtype)
    has_any_QN = counts_QN > 0
    own = Range(
        torch.where(has_any_QN, values_N, math.inf).amin(1), torch.where(has_any_QN, values_N, -math.inf).amax(1)
    )
    tile = _make_tile(values_N, counts_QN)
    plan = _Plan.of(format, _COUNTED_AS, _OF_COUNTS)
    is_compiled = pays_to_compile(problem, counts_QN, problem.num_scales or plan.work)
    if problem.num_scales:
        found = _search_tile(problem, plan, tile, global_scale, is_compiled, own)
    else:
        rough = _make_tile(*_merge_neighbours(values_N, counts_QN)) if len(values_N) > 2 * _ROUGH else None
        found = _search_spread(problem, plan, tile, global_scale, is_compiled, own, rough)
    return Range(found.min, found.max)


def _make_tile(values_N: Tensor, counts_QN: Tensor) -> Tile:
    """A tile of groups that have the same values, each so often."""
    num_groups, padding = len(counts_QN), -len(values_N) % _COUNTED
    values_OG = torch.nn.functional.pad(values_N, (0, padding)).view(-1, _COUNTED)
    counts_QOG = torch.nn.functional.pad(counts_QN.float(), (0, padding)).view(num_groups, -1, _COUNTED)
    return Tile(
        values_OG[:, None, None].expand(-1, num_groups, 1, -1), counts_QOG.transpose(0, 1)[:, :, None].contiguous()
    )


def _merge_neighbours(values_N: Tensor, counts_QN: Tensor) -> tuple[Tensor, Tensor]:
    """Some ``_ROUGH`` values, each the mean of neighbouring ones."""
    order_N = values_N.argsort()
    place_N = torch.arange(len(order_N), device=order_N.device) // (len(order_N) // _ROUGH)
    size = int(len(order_N) // (len(order_N) // _ROUGH)) + 1
    counts_QN = counts_QN[:, order_N].double()
    total_N = counts_QN.sum(0)
    zeros = total_N.new_zeros(size)
    sums_M, totals_M = (zeros.index_add(0, place_N, t) for t in (total_N * values_N[order_N], total_N))
    merged_QM = counts_QN.new_zeros(len(counts_QN), size).index_add_(1, place_N, counts_QN)
    return (sums_M / totals_M.clamp(min=1)).float(), merged_QM


def sum_least_errors(problem: Problem, sample: Sample, global_scale_J: Tensor) -> Tensor:
    """The least error of a weight of tensor_group with each global scale, float64 [J]."""
    num_groups, size = sample.groups_QG.shape
    is_compiled = pays_to_compile(problem, sample.groups_QG, (problem.num_scales or 1) * len(global_scale_J))
    plan = _Plan.of(problem.format, size)
    totals = []
    for part_J in global_scale_J.split(max(1, _MAX_AT_ONCE // num_groups)):
        times = len(part_J)
        weights_QG = None if sample.weights_QG is None else sample.weights_QG.repeat(times, 1)
        tile = cut_groups(sample.groups_QG.repeat(times, 1)[None], weights_QG)
        global_scale_Q = part_J.repeat_interleave(num_groups)
        found = _search_tile(problem, plan, tile, global_scale_Q, is_compiled)
        errors_Q = found.error.double() * found.base.double() ** problem.power.exponent
        totals.append((errors_Q.view(times, -1) * sample.num_Q).sum(1))
    return torch.cat(totals)


def _search_tile(
    problem: Problem,
    plan: _Plan,
    tile: Tile,
    global_scale: Tensor | None,
    is_compiled: bool,
    own: Range | None = None,
) -> _Found:
    """The best of each group; ``own`` is the groups' range where it does not follow from the tile's values."""
    values_OQPG, weights_OQPG = tile
    num_groups = values_OQPG.shape[1:-2].numel()
    if global_scale is not None:
        # One for each group, so that one graph does for one and for several.
        global_scale = global_scale.expand(num_groups).contiguous()
    if not problem.num_scales and (own is not None or num_groups == 1):
        return _search_spread(problem, plan, tile, global_scale, is_compiled, own)
    readable = as_readable(problem, values_OQPG)
    if problem.num_scales:
        low, high = own or (None, None)
        return _Found(*run(is_compiled, _pick_stored, problem, readable, global_scale, weights_OQPG, low, high))
    tensors = plan.make_tensors(readable.device)
    return _Found(*run(is_compiled, _search_at_once, problem, readable, global_scale, weights_OQPG, *tensors))


def _pick_stored(
    problem: Problem,
    values_OQPG: Tensor,
    global_scale: Tensor | None,
    weights_OQPG: Tensor | None,
    low_Q: Tensor | None,
    high_Q: Tensor | None,
) -> _Found:
    """The best of the scales that can be stored and are worth trying."""
    assert problem.num_scales
    own = measure_pairs(problem, values_OQPG) if low_Q is None or high_Q is None else Range(low_Q, high_Q)
    exact_Q = calculate_exact_scale(own.min, own.max, problem.format, global_scale) * problem.top_ratio
    scale_KQ, _ = list_stored_scales(exact_Q, problem.format, problem.num_scales)
    if global_scale is not None:
        scale_KQ = scale_KQ / global_scale
    base_Q = scale_KQ[0]
    errors_KQ = sum_powers(problem, values_OQPG, scale_KQ, None, weights_OQPG)
    errors_KQ = errors_KQ * torch.pow(scale_KQ / base_Q, problem.power.exponent)
    error_Q, scale_Q = errors_KQ[0], base_Q
    for k in range(1, problem.num_scales):
        # Of equal errors the largest scale's is taken.
        scale_Q = torch.where(errors_KQ[k] < error_Q, scale_KQ[k], scale_Q)
        error_Q = torch.minimum(error_Q, errors_KQ[k])
    return _report(problem, own, error_Q, base_Q, scale_Q, None)


def _report(
    problem: Problem, own: Range, error_Q: Tensor, base_Q: Tensor, scale_Q: Tensor, zero_point_Q: Tensor | None
) -> _Found:
    low_Q, high_Q = calculate_range_of_scale(scale_Q, zero_point_Q, problem.format)
    # What is not finite stays so. Inductor makes zeros of products with the integer 0, not of those with a float.
    return _Found(low_Q + own.min * 0.0, high_Q + own.max * 0.0, error_Q, base_Q)


_Sum = Callable[[_Candidates], Tensor]


@dataclass(frozen=True)
class _Sums:
    """Sums over a tile's groups, of candidates; ``rough`` ones, where they are, are nearly the powers."""

    powers: _Sum
    moments: _Sum
    rough: _Sum | None = None


def _search_at_once(
    problem: Problem,
    values_OQPG: Tensor,
    global_scale: Tensor | None,
    weights_OQPG: Tensor | None,
    *plan: Tensor,
) -> _Found:
    """All of a tile's search in one graph."""

    def make(stage: Callable[..., Tensor]) -> _Sum:
        return lambda candidates: stage(problem, values_OQPG, *candidates, weights_OQPG)

    sums = _Sums(make(sum_powers), make(sum_moments))
    return _narrow_down(problem, sums, measure_pairs(problem, values_OQPG), global_scale, *plan)


def _search_spread(
    problem: Problem,
    plan: _Plan,
    tile: Tile,
    global_scale: Tensor | None,
    is_compiled: bool,
    own: Range | None,
    rough: Tile | None = None,
) -> _Found:
    """The search of groups that are spread over many observations, some of these at a time."""
    num_candidates = len(plan.coarse) * (1 if problem.format.symmetric else len(_PLACES))
    num_candidates = max(num_candidates, len(plan.fine)) * problem.num_signs
    parts = _split(problem, tile, num_candidates)
    is_counted = own is not None
    if own is None:
        own = cover_ranges([run(is_compiled, measure_pairs, problem, part.values_OQPG) for part in parts])

    def make(stage: Callable[..., Tensor], parts: list[Tile]) -> _Sum:
        def sum_parts(candidates: _Candidates) -> Tensor:
            values_and_weights = ((part.values_OQPG, *candidates, part.weights_OQPG) for part in parts)
            return functools.reduce(
                torch.add, (run(is_compiled, stage, problem, *tensors) for tensors in values_and_weights)
            )

        return sum_parts

    rough_sums = make(sum_powers, _split(problem, rough, num_candidates)) if rough else None
    sums = _Sums(make(sum_powers, parts), make(sum_moments, parts), rough_sums)
    tensors = plan.make_tensors(tile.values_OQPG.device)
    return _narrow_down(problem, sums, own, global_scale, *tensors, is_counted=is_counted)


def _split(problem: Problem, tile: Tile, num_candidates: int) -> list[Tile]:
    """The tile in parts for which copies and tables are small."""
    values_OQPG, weights_OQPG = tile
    num_parts = count_parts(problem, values_OQPG, num_candidates)
    values = [as_readable(problem, part) for part in values_OQPG.tensor_split(num_parts)]
    weights = [None] * num_parts if weights_OQPG is None else weights_OQPG.tensor_split(num_parts)
    return list(map(Tile, values, weights))


class _Places(NamedTuple):
    """Where candidates are: scales in parts of that of the group's own range, places of the range in the group's."""

    ratio_CQ: Tensor
    place_CQ: Tensor

    def take(self, index_Q: Tensor) -> "_Places":
        """One for each group, [1, Q]."""
        return _Places(_take(self.ratio_CQ, index_Q), _take(self.place_CQ, index_Q))


def _cross(table_CQ: Tensor, table_TQ: Tensor) -> tuple[Tensor, Tensor]:
    """Every entry of one table beside every one of the other."""
    size = (len(table_CQ), len(table_TQ), -1)
    return table_CQ[:, None].expand(size).flatten(0, 1), table_TQ[None].expand(size).flatten(0, 1)


def _narrow_down(
    problem: Problem,
    sums: _Sums,
    own: Range,
    global_scale: Tensor | None,
    coarse_C: Tensor,
    middle_C: Tensor,
    fine_C: Tensor,
    limit: Tensor,
    last_C: Tensor,
    *,
    is_counted: bool = False,
) -> _Found:
    """The best of more and more of the scales around the best ones so far."""
    listed = own
    if problem.both_signs:
        # Each group is listed twice, the second time with its ends the other way round.
        listed = Range(torch.cat([own.min, own.max]), torch.cat([own.max, own.min]))
        global_scale = None if global_scale is None else global_scale.repeat(2)
        sums = _Sums(_take_both_signs(sums.powers), _take_both_signs(sums.moments))
    search = _Search.of(problem, sums, listed, global_scale)
    best = search.look_around(coarse_C, middle_C, limit)
    ratio_1Q = best.places.ratio_CQ if problem.format.grid.type == "int" else torch.ones_like(best.places.ratio_CQ)
    candidates, places = search.list_valleys(best, torch.minimum(fine_C[:, None] * ratio_1Q, limit))
    # Much of what was counted may be rounded to something else at the next scale of a float grid.
    has_valleys = problem.power.exponent == 2 and not (is_counted and problem.format.grid.type == "float")
    best = search.look_closely(best, candidates, places, fine_C[1] - fine_C[0], last_C, has_valleys)
    if is_counted and not problem.format.symmetric:
        # The best one may be at the edge of what was looked at.
        best = search.look_beside(best, best.candidate, best.places, last_C)
    if problem.both_signs:
        best = best.choose_sign()
    scale_1Q, zero_point_1Q = best.candidate
    zero_point_Q = None if zero_point_1Q is None else zero_point_1Q[0]
    return _report(problem, own, best.error_Q, search.first.scale_CQ[0, : len(own.min)], scale_1Q[0], zero_point_Q)


def _take_both_signs(sum: _Sum) -> _Sum:
    """The sums of candidates of groups that are listed twice."""

    def sum_both(candidates: _Candidates) -> Tensor:
        scale_CQ = candidates.scale_CQ.unflatten(1, (2, -1)).flatten(0, 1)
        return sum(_Candidates(scale_CQ, None)).unflatten(-2, (-1, 2)).flatten(-2)

    return sum_both


@dataclass(frozen=True)
class _Search:
    """The search of one tile; ``first`` is the scale of each group's own range, which errors are in units of."""

    problem: Problem
    sums: _Sums
    own: Range
    global_scale: Tensor | None
    first: _Candidates

    @classmethod
    def of(cls, problem: Problem, sums: _Sums, own: Range, global_scale: Tensor | None) -> "_Search":
        """The search of groups of these ranges."""
        one_1Q = torch.ones_like(own.min)[None]
        first = _make_candidates(problem, own, global_scale, _Places(one_1Q, one_1Q * 0))
        return cls(problem, sums, own, global_scale, first)

    def look_around(self, coarse_C: Tensor, middle_C: Tensor, limit: Tensor) -> "_Best":
        """The best of some scales over all that may be best, with an asymmetric format at several places."""
        sums, places_TQ = self.sums, self._list_steps(_PLACES)
        places = _Places(*_cross(coarse_C[:, None].expand(-1, len(self.own.min)), places_TQ))
        candidates = self._make(places)
        best = _Best.of(self._score(candidates, sums.rough or sums.powers), candidates, places)
        if sums.rough:
            # What the group's own range gives is a candidate, too.
            exact = best._replace(error_Q=self._score(best.candidate)[0])
            best = exact.improve(self._score(self.first), self.first, best.places)
        if self.problem.format.grid.type == "float":
            return best
        ratio_CQ = torch.minimum(best.places.ratio_CQ * middle_C[:, None], limit)
        best = self._improve_at(best, _Places(*_cross(ratio_CQ, places_TQ)))
        if self.problem.format.symmetric:
            return best
        near_TQ = (best.places.place_CQ + self._list_steps(_NEAR_PLACES)).clamp(0, 1)
        return self._improve_at(best, _Places(*_cross(best.places.ratio_CQ, near_TQ)))

    def list_valleys(self, best: "_Best", ratio_CQ: Tensor) -> tuple[_Candidates, _Places]:
        """Candidates of these scales near the best one."""
        places = _Places(ratio_CQ, best.places.place_CQ.expand_as(ratio_CQ))
        candidates = self._make(places)
        if best.candidate.zero_point_CQ is None or candidates.zero_point_CQ is None:
            return candidates, places
        # Where little is clamped the place is arbitrary and may not do for other scales: with the zero point, too.
        zero_point_CQ = torch.cat([candidates.zero_point_CQ, best.candidate.zero_point_CQ.expand_as(ratio_CQ)])
        return _Candidates(candidates.scale_CQ.repeat(2, 1), zero_point_CQ), _Places(*(t.repeat(2, 1) for t in places))

    def look_closely(
        self,
        best: "_Best",
        candidates: _Candidates,
        places: _Places,
        spacing: Tensor,
        last_C: Tensor,
        has_valleys: bool,
    ) -> "_Best":
        """The best scale and zero point around the best candidate, or of the best valley that candidates are in."""
        if has_valleys:
            index_Q, change_1Q = self._follow_moments(candidates)
            # Where few scales can be stored those beside it are looked at.
            change = spacing * 0.05 + torch.finfo(self.problem.dtype).eps * 0.7
            near_C = torch.stack([change * 0, -change, change])
        else:
            errors_CQ = self._score(candidates)
            best = best.improve(errors_CQ, candidates, places)
            index_Q = errors_CQ.argmin(0)
            change_1Q = torch.ones_like(best.places.ratio_CQ)
            near_C = torch.linspace(-1, 1, _LAST, device=spacing.device) * spacing
        chosen, places = candidates.take(index_Q), places.take(index_Q)
        chosen = chosen._replace(scale_CQ=chosen.scale_CQ * change_1Q)
        return self.look_beside(best, chosen, places, torch.cat([near_C, last_C]))

    def look_beside(self, best: "_Best", chosen: _Candidates, places: _Places, change_C: Tensor) -> "_Best":
        """The best of these changes of a scale, with all steps of its zero point."""
        scale_CQ = (chosen.scale_CQ * (1 + change_C[:, None])).to(self.first.scale_CQ.dtype)
        scale_CQ = _store(self.problem, scale_CQ, self.global_scale)
        scale_CQ, steps_CQ = _cross(scale_CQ, self._list_steps(_NEAR_ZERO_POINTS))
        last = _Candidates(scale_CQ, None)
        if chosen.zero_point_CQ is not None:
            grid = self.problem.format.grid
            steps_CQ = steps_CQ if grid.type == "int" else torch.zeros_like(steps_CQ)
            last = _Candidates(scale_CQ, (chosen.zero_point_CQ + steps_CQ).clamp(grid.qmin, grid.qmax))
        return best.improve(self._score(last), last, places)

    def _follow_moments(self, candidates: _Candidates) -> tuple[Tensor, Tensor]:
        """Which candidate's valley is deepest, and how many times its scale the bottom is."""
        error_CQ, slope_CQ, curvature_CQ = self.sums.moments(candidates).unbind(0)
        ratio_CQ = candidates.scale_CQ / self.first.scale_CQ
        curvature_CQ = curvature_CQ.clamp(min=torch.finfo(torch.float32).tiny)
        depth_CQ = (error_CQ - slope_CQ * slope_CQ / curvature_CQ) * ratio_CQ * ratio_CQ
        index_Q = depth_CQ.argmin(0)
        return index_Q, 1 - _take(slope_CQ / curvature_CQ, index_Q)

    def _improve_at(self, best: "_Best", places: _Places) -> "_Best":
        candidates = self._make(places)
        return best.improve(self._score(candidates), candidates, places)

    def _make(self, places: _Places) -> _Candidates:
        return _make_candidates(self.problem, self.own, self.global_scale, places)

    def _score(self, candidates: _Candidates, sum_powers: _Sum | None = None) -> Tensor:
        """The errors, in units of the first scale ** norm."""
        sums_CQ = (sum_powers or self.sums.powers)(candidates)
        return sums_CQ * torch.pow(candidates.scale_CQ / self.first.scale_CQ, self.problem.power.exponent)

    def _list_steps(self, steps: tuple[float, ...]) -> Tensor:
        """Of an asymmetric format all of ``steps``, of a symmetric one the first, [T, Q]."""
        listed = steps[:1] if self.problem.format.symmetric else steps
        return torch.tensor(listed, device=self.own.min.device)[:, None].expand(-1, len(self.own.min))


class _Best(NamedTuple):
    """The best candidate of each group so far."""

    error_Q: Tensor
    candidate: _Candidates
    places: _Places

    @classmethod
    def of(cls, errors_CQ: Tensor, candidates: _Candidates, places: _Places) -> "_Best":
        """The best of some candidates."""
        index_Q = errors_CQ.argmin(0)
        return cls(_take(errors_CQ, index_Q)[0], candidates.take(index_Q), places.take(index_Q))

    def choose_sign(self) -> "_Best":
        """The better one of each group that is listed twice."""
        error_2Q, scale_2Q, ratio_2Q, place_2Q = (
            tensor.view(2, -1) for tensor in (self.error_Q, self.candidate.scale_CQ, *self.places)
        )
        return _Best.of(error_2Q, _Candidates(scale_2Q, None), _Places(ratio_2Q, place_2Q))

    def improve(self, errors_CQ: Tensor, candidates: _Candidates, places: _Places) -> "_Best":
        """The best of these and of more candidates; of places there may be one for all of those."""
        index_Q = errors_CQ.argmin(0)
        error_Q = _take(errors_CQ, index_Q)[0]
        is_better_Q = error_Q < self.error_Q
        candidate = candidates.take(index_Q)
        places = places if len(places.ratio_CQ) == 1 else places.take(index_Q)

        def choose(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(is_better_Q, new, old)

        zero_point_1Q = None
        if candidate.zero_point_CQ is not None and self.candidate.zero_point_CQ is not None:
            zero_point_1Q = choose(candidate.zero_point_CQ, self.candidate.zero_point_CQ)
        return _Best(
            choose(error_Q, self.error_Q),
            _Candidates(choose(candidate.scale_CQ, self.candidate.scale_CQ), zero_point_1Q),
            _Places(*map(choose, places, self.places)),
        )


def _make_candidates(problem: Problem, own: Range, global_scale: Tensor | None, places: _Places) -> _Candidates:
    """The candidates at places."""
    grid = problem.format.grid
    if problem.format.symmetric:
        low_Q, high_Q = own.min.minimum(own.max), own.max.maximum(own.min)
        exact_Q = calculate_exact_scale(low_Q, high_Q, problem.format, None)
        exact_Q = torch.where(own.min > own.max, -exact_Q, exact_Q)
        return _Candidates(_store(problem, exact_Q * places.ratio_CQ, global_scale), None)
    low_Q = own.min.clamp(max=0)
    span_Q = own.max.clamp(min=0) - low_Q
    num_steps = grid.qmax - grid.qmin
    scale_CQ = _store(problem, span_Q / num_steps * places.ratio_CQ, global_scale)
    low_CQ = low_Q + places.place_CQ * (span_Q - scale_CQ * num_steps)
    return _Candidates(scale_CQ, grid.round((grid.qmin - low_CQ / scale_CQ).clamp(grid.qmin, grid.qmax)))


def _store(problem: Problem, scale: Tensor, global_scale: Tensor | None) -> Tensor:
    """A scale as it will be stored, in units of x."""
    dtype = problem.format.scale_dtype or problem.dtype
    if global_scale is None:
        return round_scale(scale, dtype)
    return round_scale(scale * global_scale, dtype) / global_scale
