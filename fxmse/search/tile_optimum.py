"""The optimum of one tile's groups: all stored scales where these are few, narrowing down elsewhere."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fxmse.formats.scales import calculate_exact_scale
from fxmse.formats.stored_scales import list_stored_scales
from fxmse.search.candidates import Candidates, OptimumProblem
from fxmse.search.compiling import reads_flags, rounds_each, run
from fxmse.search.error_sums import sum_moments, sum_powers
from fxmse.search.narrowing import PLACES, Found, Sum, Sums, narrow_down, report_ranges
from fxmse.search.plan import Plan
from fxmse.search.small_groups import Cells, search_small
from fxmse.search.tiles import Range, Tile, as_readable, count_parts, cover_ranges, measure_pairs

__all__ = ["search_spread", "search_tile"]

_EXTREME = 2.0**100  # scales above it, and below its inverse, are looked at with a power of two
_LARGEST_EXPONENT = 120

# What decides between candidates is the same in a graph and outside, where sums are made in one order, too.
rounds_each(sum_powers)
rounds_each(sum_moments)


def search_tile(
    problem: OptimumProblem,
    plan: Plan | Cells,
    tile: Tile,
    global_scale: Tensor | None,
    is_compiled: bool,
    own: Range | None = None,
) -> Found:
    """The best of each group; ``own`` is the groups' range where it does not follow from the tile's values."""
    if tile.values_OQPG.stride(-1) != 1:
        # Loops over another dimension add up in another order, and are slower.
        tile = tile._replace(values_OQPG=tile.values_OQPG.contiguous())
    found = _search_tile(problem, plan, tile, global_scale, is_compiled, own)
    if own is not None or problem.format.is_mx or not reads_flags(found.base):
        return found
    scale_Q = found.base.abs()
    extreme_Q = ((scale_Q < 1 / _EXTREME) | (scale_Q > _EXTREME)).nonzero()[:, 0]
    return _search_extremes(problem, plan, tile, global_scale, found, extreme_Q) if len(extreme_Q) else found


def _search_extremes(
    problem: OptimumProblem, plan: Plan | Cells, tile: Tile, global_scale: Tensor | None, found: Found, index_E: Tensor
) -> Found:
    """What was found, with the groups at these indices searched again, each times a power of two.

    Errors, reciprocals and ranges of very small or large scales are beyond float32. A global scale that takes the power
    back has scales rounded as they are stored.
    """
    exponent_E = -found.base[index_E].abs().frexp().exponent.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    factor_E = torch.ldexp(torch.ones_like(found.base[index_E]), exponent_E)
    values_OEPG = tile.values_OQPG.flatten(1, -3)[:, index_E].float() * factor_E[:, None, None]
    weights = tile.weights_OQPG
    if weights is not None and weights.shape[1] > 1:
        weights = weights[:, index_E]
    problem = replace(problem, reads_pairs=False)
    given = 1.0 if global_scale is None else global_scale.expand(len(found.base))[index_E]
    again = _search_tile(problem, plan, Tile(values_OEPG, weights), given / factor_E, False, None)
    largest = torch.finfo(torch.float32).max
    parts = [(part / factor_E).clamp(-largest, largest) for part in (again.min, again.max)]
    parts += [again.error, again.base / factor_E]
    return Found(*(old.index_copy(0, index_E, new) for old, new in zip(found, parts, strict=True)))


def _search_tile(
    problem: OptimumProblem,
    plan: Plan | Cells,
    tile: Tile,
    global_scale: Tensor | None,
    is_compiled: bool,
    own: Range | None,
) -> Found:
    values_OQPG, weights_OQPG = tile
    num_groups = values_OQPG.shape[1:-2].numel()
    if global_scale is not None:
        # One for each group, so that one graph does for one and for several.
        global_scale = global_scale.expand(num_groups).contiguous()
    if isinstance(plan, Cells):
        return search_small(problem, plan, tile, global_scale, is_compiled)
    if not problem.num_scales and (own is not None or num_groups == 1):
        return search_spread(problem, plan, tile, global_scale, is_compiled, own)
    readable = as_readable(problem, values_OQPG)
    if problem.num_scales:
        low, high = own or (None, None)
        return Found(*run(is_compiled, _pick_stored, problem, readable, global_scale, weights_OQPG, low, high))
    tensors = plan.make_tensors(readable.device)
    return Found(*run(is_compiled, _search_at_once, problem, readable, global_scale, weights_OQPG, *tensors))


@rounds_each
def _pick_stored(
    problem: OptimumProblem,
    values_OQPG: Tensor,
    global_scale: Tensor | None,
    weights_OQPG: Tensor | None,
    low_Q: Tensor | None,
    high_Q: Tensor | None,
) -> Found:
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
    return report_ranges(problem, own, error_Q, base_Q, scale_Q, None)


@rounds_each
def _search_at_once(
    problem: OptimumProblem,
    values_OQPG: Tensor,
    global_scale: Tensor | None,
    weights_OQPG: Tensor | None,
    *plan: Tensor,
) -> Found:
    """All of a tile's search in one graph."""

    def make(stage: Callable[..., Tensor]) -> Sum:
        return lambda candidates: stage(problem, values_OQPG, *candidates, weights_OQPG)

    sums = Sums(make(sum_powers), make(sum_moments))
    return narrow_down(problem, sums, measure_pairs(problem, values_OQPG), global_scale, *plan)


def search_spread(
    problem: OptimumProblem,
    plan: Plan,
    tile: Tile,
    global_scale: Tensor | None,
    is_compiled: bool,
    own: Range | None,
    rough: Tile | None = None,
) -> Found:
    """The search of groups that are spread over many observations, some of these at a time."""
    num_candidates = len(plan.coarse) * (1 if problem.format.symmetric else len(PLACES))
    num_candidates = max(num_candidates, len(plan.fine)) * problem.num_signs
    parts = _split(problem, tile, num_candidates)
    is_counted = own is not None
    if own is None:
        own = cover_ranges([run(is_compiled, measure_pairs, problem, part.values_OQPG) for part in parts])

    def make(stage: Callable[..., Tensor], parts: list[Tile]) -> Sum:
        def sum_parts(candidates: Candidates) -> Tensor:
            values_and_weights = ((part.values_OQPG, *candidates, part.weights_OQPG) for part in parts)
            return functools.reduce(
                torch.add, (run(is_compiled, stage, problem, *tensors) for tensors in values_and_weights)
            )

        return sum_parts

    rough_sums = make(sum_powers, _split(problem, rough, num_candidates)) if rough else None
    sums = Sums(make(sum_powers, parts), make(sum_moments, parts), rough_sums)
    tensors = plan.make_tensors(tile.values_OQPG.device)
    return narrow_down(problem, sums, own, global_scale, *tensors, is_counted=is_counted)


def _split(problem: OptimumProblem, tile: Tile, num_candidates: int) -> list[Tile]:
    """The tile in parts for which copies and tables are small."""
    values_OQPG, weights_OQPG = tile
    num_parts = count_parts(problem, values_OQPG, num_candidates)
    values = [as_readable(problem, part) for part in values_OQPG.tensor_split(num_parts)]
    weights = [None] * num_parts if weights_OQPG is None else weights_OQPG.tensor_split(num_parts)
    return list(map(Tile, values, weights))
