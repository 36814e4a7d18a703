"""Which of nearly equal errors is less: float64, summed up in one order whatever computed them first.

Compiled and uncompiled sums differ in their order and in their power, so that candidates whose errors differ by less
than that would be chosen by chance. Here the same operations compare them in either case; of equal ones the first wins.

Shape suffixes as in :mod:`fxmse.search.patience`, K groups, N pairs of a group and a candidate.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fxmse.search.patience import Improvements, pack_steps, unpack_steps
from fxmse.search.shrunk_ranges import ShrinkProblem, calculate_scale
from fxmse.search.tiles import Range, Tile

__all__ = ["NearTies", "settle"]

_MAX_ELEMENTS = 1 << 19  # of float64, at a time


class NearTies(NamedTuple):
    """Groups whose best candidate float32 cannot tell, of one tile or of several."""

    values_OKPG: Tensor
    weights_KPG: Tensor | None
    low_K: Tensor
    high_K: Tensor
    maybe_KW: Tensor
    sure_KW: Tensor

    @classmethod
    def of(cls, tile: Tile, own: Range, improved: Improvements, index_K: Tensor) -> "NearTies":
        """The groups at these indices of a tile, which have these ranges and improved as float32 knows."""
        values, weights = tile.values_OQPG.flatten(1, -3), tile.weights_OQPG
        if weights is not None:
            weights = weights[0].expand(values.shape[1:])[index_K]
        if len(index_K) < values.shape[1]:  # one large group is not copied
            values = values[:, index_K]
        sets = (words[index_K] for words in (improved.maybe_QW, improved.sure_QW))
        return cls(values, weights, own.min[index_K], own.max[index_K], *sets)

    @classmethod
    def join(cls, parts: list["NearTies"]) -> "NearTies":
        """Those of several tiles."""
        if len(parts) == 1:
            return parts[0]
        values, weights, *others = zip(*parts, strict=True)
        has_weights = weights[0] is not None
        return cls(torch.cat(values, 1), torch.cat(weights) if has_weights else None, *map(torch.cat, others))


def settle(
    problem: ShrinkProblem,
    ties: NearTies,
    num_steps: int,
    factors_C: Tensor,
    global_scale: Tensor | None,
    *,
    after_last: bool,
) -> Tensor:
    """Bit sets [K, W] of the steps at which groups improved.

    Args:
        problem: the format.
        ties: the groups.
        num_steps: as many steps are looked at.
        factors_C: of the candidates.
        global_scale: used in every candidate.
        after_last: only the steps from the last sure one on; the others are not in the sets.
    """
    maybe_CK = unpack_steps(ties.maybe_KW, num_steps)
    if after_last:
        sure_CK = unpack_steps(ties.sure_KW, num_steps)
        step_C1 = torch.arange(num_steps, device=maybe_CK.device)[:, None]
        maybe_CK &= step_C1 >= torch.where(sure_CK, step_C1, 0).amax(0)
    factor_C1 = factors_C[:num_steps, None]
    scale_CK, zero_point_CK = calculate_scale(problem, factor_C1 * ties.low_K, factor_C1 * ties.high_K, global_scale)
    errors_CK = torch.full(maybe_CK.shape, torch.inf, dtype=torch.float64, device=maybe_CK.device)
    step_N, index_N = maybe_CK.nonzero().unbind(1)
    at_a_time = max(1, _MAX_ELEMENTS // ties.values_OKPG[:, 0].numel())
    for step, index in zip(step_N.split(at_a_time), index_N.split(at_a_time), strict=True):
        zero_point = None if zero_point_CK is None else zero_point_CK[step, index]
        errors_CK[step, index] = _sum(problem, ties, index, scale_CK[step, index], zero_point, scale_CK[0, index])
    least_CK = errors_CK.cummin(0).values
    before_CK = torch.cat([torch.full_like(least_CK[:1], torch.finfo(torch.float32).max), least_CK[:-1]])
    is_improved_CK = torch.zeros(len(factors_C), maybe_CK.shape[1], dtype=torch.bool, device=maybe_CK.device)
    is_improved_CK[:num_steps] = errors_CK < before_CK
    return pack_steps(is_improved_CK)


def _sum(
    problem: ShrinkProblem,
    ties: NearTies,
    index_N: Tensor,
    scale_N: Tensor,
    zero_point_N: Tensor | None,
    base_N: Tensor,
) -> Tensor:
    """The errors [N] of groups at these indices, each with a candidate, in units of ``base`` ** norm."""
    grid, shape = problem.format.grid, (-1, 1, 1)
    reciprocal, ratio = scale_N.reciprocal().double().view(shape), (scale_N.double() / base_N.double()).view(shape)
    zero_point = 0.0 if zero_point_N is None else zero_point_N.double().view(shape)
    total_N = torch.zeros_like(base_N, dtype=torch.float64)
    num_rows = max(1, _MAX_ELEMENTS // ties.values_OKPG[0, 0].numel())
    for rows_OKPG in ties.values_OKPG.split(num_rows):
        scaled = rows_OKPG[:, index_N].double() * reciprocal
        errors = (grid.round((scaled + zero_point).clamp(grid.qmin, grid.qmax)) - zero_point) - scaled
        # A power of two between two scales changes no bit of this.
        powers = (errors * ratio).abs().pow(problem.power.exponent)
        if ties.weights_KPG is not None:
            powers = powers * ties.weights_KPG[index_N]
        total_N = total_N + _add_up(powers.transpose(0, 1).flatten(1))
    return total_N


def _add_up(terms_NE: Tensor) -> Tensor:
    """The sums of rows, by halves: no kernel has a say in their order."""
    while terms_NE.shape[1] > 1:
        half = terms_NE.shape[1] // 2
        rest = terms_NE[:, 2 * half :]
        terms_NE = torch.cat([terms_NE[:, :half] + terms_NE[:, half : 2 * half], rest], 1)
    return terms_NE[:, 0]
