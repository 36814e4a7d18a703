"""The optimum of groups of few elements, each for itself: bounds leave out where it cannot be.

The error of such a group has no trend that a search could follow. But whatever a group's elements are rounded to at the
best scale, s * q with the error E*, at a scale that is 1 + d times as large these q are no further off than

    E(s + d * s) <= E* + d ** 2 * sum((s * q) ** 2),    sqrt(sum((s * q) ** 2)) <= sqrt(sum(x ** 2)) + sqrt(E*)

So all scales that can be best are cut into cells, E is evaluated at the centre of each, and only the cells in which it
can be below the least of these are looked at closely: on average two or three. There the q of some scales are listed,
each with the scale that is best for them, sum(x * q) / sum(q ** 2).

What is chosen in the end does not depend on the order of sums: these two are, in float64, exact for integers of up to 8
bits, and nearly so for floats. The errors at the centres, which are not, only say what is looked at.

Shape suffixes as in :mod:`fxmse.search.error_sums`, where candidates are cells; N pairs of a group and a cell.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fxmse.formats.grids import Format
from fxmse.search.candidates import (
    Candidates,
    OptimumProblem,
    Places,
    find_own_place,
    make_candidates,
    shrink,
    store_scale,
)
from fxmse.search.compiling import reads_flags, rounds_each, run
from fxmse.search.error_sums import sum_exactly, sum_powers
from fxmse.search.narrowing import Found, report_ranges
from fxmse.search.plan import NUM_SHRUNK
from fxmse.search.tiles import Range, Tile, as_readable, measure_pairs, split_pairs

__all__ = ["SMALL", "Cells", "search_small"]

SMALL = 64
"""Groups of at most so many elements are searched here."""
_WIDTH, _FLOAT_WIDTH = 0.6, 0.12  # of a cell: of the logarithm of scales, in parts of 1 / qmax and 2 ** -mantissa_bits
_MAX_WIDTH = 0.1
# Above this part of the group's own scale the error is so much larger than the least that cells may be twice as wide.
_KNEE = 1.25
_STEPS = (0.0, 0.4, -0.4, 0.8, -0.8)  # scales that are listed in a cell, in parts of what it reaches to either side
_FINE_STEPS = (0.0, *(sign * i / 4 for i in range(1, 5) for sign in (1, -1)))
# Of other norms than 2 there is no such bound: the cells within this part of the least error.
_WITHIN = 0.15
_MAX_CELLS = 16  # of a group, where they are not counted


class Cells(NamedTuple):
    """Scales, in parts of that of the group's own range; floats of one number a cell."""

    ratio: Tensor
    reach: Tensor  # to either side, in parts of the scale
    place: Tensor  # of the range in the group's; below 0 one that is shrunk as the reference does
    side: Tensor  # 1: of both signs that which has the grid's longer end where the group's is, -1: the other

    @classmethod
    @functools.cache
    def of(cls, format: Format, num_elements: int, both_signs: bool, device: torch.device) -> "Cells":
        """The cells of groups of so many elements.

        At the scale of the group's own range no element's error is above half the largest distance h of two values. A
        scale below 1 - sqrt(G) * h / 2 times that clamps the largest element, for more than that is worth. Twice a
        scale whose upper half is not used has no value that this one lacks. Where nothing is clamped the sign makes no
        difference.
        """
        grid = format.grid
        width = _find_width(format)
        if grid.type == "float":
            half = 2.0 ** (-1 - grid.mantissa_bits) / (2 - 2.0**-grid.mantissa_bits)
            high = 2.0
        else:
            half = 1 / (grid.qmax - grid.qmin)
            high = (grid.qmax - grid.qmin) / grid.qmax if format.symmetric else 2.0
        low = max(0.1, 1 - math.sqrt(num_elements) * half)
        knee = min(_KNEE, high)
        # The reference's ranges are cells themselves, but where other cells are narrower than from one to the next.
        shrunk = [1 - i / 100 for i in range(NUM_SHRUNK) if i == 0 or 1 - i / 100 > low]
        reach = 0.005 if width > 0.01 else 0.0
        listed = [(ratio, reach / ratio, -1.0, 1.0) for ratio in shrunk]
        is_covered = reach > 0 and format.symmetric
        for ratio, reach_ in _divide(low, shrunk[-1] - reach if is_covered else 1 + reach, width):
            # The zero points beside that of a place are tried with it.
            num_steps = 0.0 if format.symmetric else (grid.qmax - grid.qmin) * (1 / ratio - 1)
            num_places = 1 if num_steps <= 2 else math.ceil(num_steps / 3) + 1
            places = [i / (num_places - 1) for i in range(num_places)] if num_places > 1 else [0.5]
            listed += [(ratio, reach_, place, 1.0) for place in places]
        listed += [(*cell, 0.5, 1.0) for cell in _divide(1 + reach, knee, width) + _divide(knee, high, 2 * width)]
        if both_signs:
            listed += [(*cell, 0.5, -1.0) for cell in _divide(low, 1 + reach, width)]
        return cls(*torch.tensor(listed, device=device).T.contiguous())


def _find_width(format: Format) -> float:
    """Of a cell, of the logarithm of scales."""
    grid = format.grid
    if grid.type == "float":
        return _FLOAT_WIDTH * 2.0**-grid.mantissa_bits
    return min(_WIDTH / (grid.qmax + 0.5), _MAX_WIDTH)


def _list_steps(problem: OptimumProblem) -> tuple[float, ...]:
    """The scales of a cell, such that all are listed that can be stored, if these are nearly as few."""
    half_step = torch.finfo(problem.scale_dtype).eps / 2
    reach = _find_width(problem.format) / 2 + half_step
    return _FINE_STEPS if reach / 4 <= half_step < 0.4 * reach else _STEPS


def _divide(low: float, high: float, width: float) -> list[tuple[float, float]]:
    """The centres of cells, and what they reach to either side."""
    if high <= low:
        return []
    number = math.ceil(math.log(high / low) / width)
    reach = math.log(high / low) / number / 2
    return [(low * math.exp(reach * (2 * i + 1)), reach) for i in range(number)]


def search_small(
    problem: OptimumProblem, cells: Cells, tile: Tile, global_scale: Tensor | None, is_compiled: bool
) -> Found:
    """The best of each group of a tile; ``global_scale`` [Q]."""
    values, weights = _transpose(problem, tile)
    low_Q, high_Q, base_Q, squares_Q, excess_CQ = run(
        is_compiled, _bound, problem, values, global_scale, weights, *cells
    )
    group_N, cell_N = _list_pairs(excess_CQ)
    tables, own_2Q, found = torch.stack(cells), torch.stack([low_Q, high_Q]), []
    num_parts = -(-len(group_N) // len(low_Q))
    for group, cell in zip(group_N.tensor_split(num_parts), cell_N.tensor_split(num_parts), strict=True):
        given = None if global_scale is None else global_scale[group]
        some = (None if table is None else _take(table, group) for table in (values, weights))
        ranges_2N, tables_4N = own_2Q.index_select(1, group), tables.index_select(1, cell)
        found.append(run(is_compiled, _look_closely, problem, next(some), given, next(some), ranges_2N, tables_4N))
    error_N, scale_N, zero_point_N = (torch.cat(part) for part in zip(*found, strict=True))
    best_Q = _find_least(error_N, group_N, len(low_Q))
    zero_point_Q = None if problem.format.symmetric else zero_point_N[best_Q]
    # The sum of squares may be off by more than errors are.
    error_Q = (squares_Q + error_N[best_Q] / base_Q.double() ** 2).clamp(min=0).float()
    return report_ranges(problem, Range(low_Q, high_Q), error_Q, base_Q, scale_N[best_Q], zero_point_Q)


def _transpose(problem: OptimumProblem, tile: Tile) -> Tile:
    """The tile with each element of all groups in a row: sums of so few are fastest of many groups at a time."""
    values_OQPG, weights_OQPG = as_readable(problem, tile.values_OQPG.flatten(1, -3)), tile.weights_OQPG
    if weights_OQPG is not None:
        weights_OQPG = _move_elements(weights_OQPG.expand_as(values_OQPG))
    return Tile(_move_elements(values_OQPG), weights_OQPG)


def _move_elements(table_OQPG: Tensor) -> Tensor:
    table_EQ = table_OQPG.permute(0, 2, 3, 1).reshape(-1, table_OQPG.shape[1]).contiguous()
    return _as_groups(table_EQ)


def _as_groups(table_EQ: Tensor) -> Tensor:
    return table_EQ.T[None, :, None]


def _take(table_OQPG: Tensor, group_N: Tensor) -> Tensor:
    """What :func:`_transpose` gives, of these groups."""
    return _as_groups(table_OQPG[0, :, 0].T.index_select(1, group_N))


def _bound(
    problem: OptimumProblem,
    values_OQPG: Tensor,
    global_scale: Tensor | None,
    weights_OQPG: Tensor | None,
    *tables: Tensor,
) -> tuple[Tensor, ...]:
    """Each group's range, its own scale, its sum of squares in units of that, and how far a cell's bound is too large.

    A cell can have the best scale where that is below 0.
    """
    own = measure_pairs(problem, values_OQPG)
    cells = Cells(*(table[:, None] for table in tables))
    scale_CQ, zero_point_CQ = _place(problem, own, global_scale, cells)
    base_Q = scale_CQ[0].abs()
    ratio_CQ = scale_CQ / base_Q
    errors_CQ = sum_powers(problem, values_OQPG, scale_CQ, zero_point_CQ, weights_OQPG)
    errors_CQ = errors_CQ * torch.pow(ratio_CQ.abs(), problem.power.exponent)
    errors_CQ = torch.where(errors_CQ == errors_CQ, errors_CQ, torch.inf).float()
    squares_Q = _sum_squares(problem, values_OQPG, weights_OQPG, base_Q)
    if problem.power.exponent == 2:
        reach_CQ = (squares_Q.sqrt() + errors_CQ.sqrt()) * _widen(problem, cells.reach)
        bound_CQ = errors_CQ - reach_CQ * reach_CQ
    else:
        bound_CQ = errors_CQ * (1 - _WITHIN)
    least_Q = errors_CQ.amin(0)
    # Bools would not be vectorised.
    return own.min, own.max, base_Q, squares_Q, torch.where(errors_CQ == least_Q, -1.0, bound_CQ - least_Q)


def _widen(problem: OptimumProblem, reach: Tensor) -> Tensor:
    """What cells reach whose centres are stored: these may be half a step beside their places."""
    return reach + torch.finfo(problem.scale_dtype).eps / 2


def _sum_squares(problem: OptimumProblem, values_OQPG: Tensor, weights_OQPG: Tensor | None, base_Q: Tensor) -> Tensor:
    squares_Q = torch.zeros_like(base_Q)
    for part in split_pairs(problem, values_OQPG):
        terms = (part * base_Q.reciprocal()[:, None, None]).square()
        if weights_OQPG is not None:
            terms = terms * weights_OQPG
        squares_Q = squares_Q + terms.sum((0, -2, -1))
    return squares_Q


def _list_pairs(excess_CQ: Tensor) -> tuple[Tensor, Tensor]:
    """The groups [N], ascending, and the cells of each that can have its best scale."""
    if reads_flags(excess_CQ):
        cell_N, group_N = (excess_CQ < 0).nonzero().unbind(1)
        return group_N, cell_N
    # A GPU would have to be waited for.
    number = min(_MAX_CELLS, len(excess_CQ))
    cell_QK = excess_CQ.T.topk(number, largest=False).indices
    return torch.arange(len(cell_QK), device=cell_QK.device).repeat_interleave(number), cell_QK.flatten()


def _find_least(error_N: Tensor, group_N: Tensor, num_groups: int) -> Tensor:
    """The first of the pairs of least error of each group, [Q]."""
    least_Q = error_N.new_full((num_groups,), torch.inf).scatter_reduce(0, group_N, error_N, "amin")
    place_N = torch.arange(len(error_N), device=error_N.device)
    place_N = torch.where(error_N == least_Q[group_N], place_N, len(error_N) - 1)
    return place_N.new_full((num_groups,), len(error_N) - 1).scatter_reduce(0, group_N, place_N, "amin")


@rounds_each
def _look_closely(
    problem: OptimumProblem,
    values_ONPG: Tensor,
    global_scale: Tensor | None,
    weights_ONPG: Tensor | None,
    ranges_2N: Tensor,
    tables_4N: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best scale and zero point of a pair's cell, and sum(e ** 2 - x ** 2), or at another norm sum(|e| ** norm)."""
    own, cells = Range(*ranges_2N), Cells(*(table[None] for table in tables_4N))
    centre = _place(problem, own, global_scale, cells)
    step_K1 = torch.tensor(_list_steps(problem)[1:], device=ranges_2N.device)[:, None]
    scale_KN = store_scale(problem, centre.scale_CQ * (1 + _widen(problem, cells.reach) * step_K1), global_scale)
    scale_KN = torch.cat([centre.scale_CQ, scale_KN])
    candidates = Candidates(scale_KN, None)
    if centre.zero_point_CQ is not None:
        candidates = _list_zero_points(problem, own, centre, cells, scale_KN)
    if problem.power.exponent != 2:
        errors_KN = sum_powers(problem, values_ONPG, *candidates, weights_ONPG).double()
        errors_KN = errors_KN * candidates.scale_CQ.double().abs().pow(problem.power.exponent)
        return _choose(errors_KN, *candidates)
    products_KN, squares_KN = sum_exactly(problem, values_ONPG, *candidates, weights_ONPG)
    # Of what is rounded to nothing but zeros every scale is as good.
    best_KN = torch.where(squares_KN > 0, products_KN / squares_KN, 1.0).float()
    best_KN = torch.where(squares_KN > 0, store_scale(problem, best_KN, global_scale), candidates.scale_CQ.abs())
    errors = []
    for size_KN in (candidates.scale_CQ.double().abs(), best_KN.double()):
        errors.append(size_KN * (size_KN * squares_KN - 2 * products_KN))
    scales_KN = torch.cat([candidates.scale_CQ, torch.copysign(best_KN, candidates.scale_CQ)])
    zero_point_KN = candidates.zero_point_CQ
    return _choose(torch.cat(errors), scales_KN, None if zero_point_KN is None else zero_point_KN.repeat(2, 1))


def _choose(errors_KN: Tensor, scale_KN: Tensor, zero_point_KN: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The first of least error."""
    zero_point_KN = torch.zeros_like(scale_KN) if zero_point_KN is None else zero_point_KN
    error_N, scale_N, zero_point_N = errors_KN[0], scale_KN[0], zero_point_KN[0]
    for error, scale, zero_point in zip(errors_KN[1:], scale_KN[1:], zero_point_KN[1:], strict=True):
        is_less_N = error < error_N
        error_N = torch.where(is_less_N, error, error_N)
        scale_N = torch.where(is_less_N, scale, scale_N)
        zero_point_N = torch.where(is_less_N, zero_point, zero_point_N)
    return error_N, scale_N, zero_point_N


def _place(problem: OptimumProblem, own: Range, global_scale: Tensor | None, cells: Cells) -> Candidates:
    """The centres of cells."""
    ratio_CQ, place_CQ, side_CQ = (table + own.min * 0 for table in (cells.ratio, cells.place, cells.side))
    scale_CQ, zero_point_CQ = shrink(problem, own, global_scale, ratio_CQ)
    if zero_point_CQ is None:
        if problem.both_signs:
            # A grid of integers is longer below 0.
            scale_CQ = scale_CQ * side_CQ
        return Candidates(scale_CQ, None)
    others = make_candidates(problem, own, global_scale, Places(ratio_CQ, place_CQ))
    assert others.zero_point_CQ is not None
    return Candidates(
        torch.where(place_CQ < 0, scale_CQ, others.scale_CQ),
        torch.where(place_CQ < 0, zero_point_CQ, others.zero_point_CQ),
    )


def _list_zero_points(
    problem: OptimumProblem, own: Range, centre: Candidates, cells: Cells, scale_KN: Tensor
) -> Candidates:
    """The scales with the zero points of the cell's place, and the centre with those beside that."""
    grid = problem.format.grid
    assert centre.zero_point_CQ is not None
    place_1N = torch.where(cells.place < 0, find_own_place(own), cells.place)
    low_N = own.min.clamp(max=0)
    low_KN = low_N + place_1N * (own.max.clamp(min=0) - low_N - scale_KN[1:] * (grid.qmax - grid.qmin))
    zero_point_KN = grid.round((grid.qmin - low_KN / scale_KN[1:]).clamp(grid.qmin, grid.qmax))
    zero_point_KN = torch.cat([centre.zero_point_CQ, zero_point_KN])
    if grid.type == "float":
        return Candidates(scale_KN, zero_point_KN)
    beside = [(centre.zero_point_CQ + step).clamp(grid.qmin, grid.qmax) for step in (-1.0, 1.0)]
    return Candidates(torch.cat([scale_KN, scale_KN[:1], scale_KN[:1]]), torch.cat([zero_point_KN, *beside]))
