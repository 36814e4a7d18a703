"""The optimum of values that are given by how often each was seen.

Shape suffixes as in :mod:`fxmse.search.error_sums`; N different values, M merged ones.
"""

import math

import torch
from torch import Tensor

from fxmse.formats.grids import Format
from fxmse.search.candidates import OptimumProblem
from fxmse.search.compiling import pays_to_compile
from fxmse.search.plan import OF_COUNTS, Plan
from fxmse.search.power import AbsolutePower
from fxmse.search.tile_optimum import search_spread, search_tile
from fxmse.search.tiles import Range, Tile

__all__ = ["find_optimum_of_counts"]

# Values that were counted, of which there may be many different ones: the first scales are tried on fewer.
_ROUGH = 1 << 11
_COUNTED = 1 << 10  # they are cut into parts of this length
# Much of an activation may be next to one value, as behind a GELU: the trend is as jagged as for a group of so few
# elements, but each valley is wide.
_COUNTED_AS = 128


def find_optimum_of_counts(
    values_N: Tensor,
    counts_QN: Tensor,
    format: Format,
    power: AbsolutePower,
    dtype: torch.dtype,
    *,
    global_scale: Tensor | None = None,
) -> Range:
    """:func:`fxmse.search.optimum.find_optimum` of values that are given by how often each of them was seen.

    Args:
        values_N: finite, float32.
        counts_QN: of each group, any dtype.
        format: the format.
        power: |e| ** norm.
        dtype: of the values, and so of scales.
        global_scale: as for :func:`fxmse.search.optimum.find_optimum`.

    Returns:
        The ranges, shape (Q,).
    """
    problem = OptimumProblem(format, power, False, dtype)
    has_any_QN = counts_QN > 0
    own = Range(
        torch.where(has_any_QN, values_N, math.inf).amin(1), torch.where(has_any_QN, values_N, -math.inf).amax(1)
    )
    tile = _make_tile(values_N, counts_QN)
    plan = Plan.of(format, _COUNTED_AS, OF_COUNTS)
    is_compiled = pays_to_compile(problem, counts_QN, problem.num_scales or plan.work)
    if problem.num_scales:
        found = search_tile(problem, plan, tile, global_scale, is_compiled, own)
    else:
        rough = _make_tile(*_merge_neighbours(values_N, counts_QN)) if len(values_N) > 2 * _ROUGH else None
        found = search_spread(problem, plan, tile, global_scale, is_compiled, own, rough)
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
