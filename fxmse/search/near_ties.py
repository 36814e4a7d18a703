"""Which of nearly equal errors is less: float64, summed up in one order whatever computed them first.

Compiled and uncompiled sums differ in their order and in their power, so that candidates whose errors differ by less
than that would be chosen by chance. Here the same operations compare them in either case; of equal ones the first wins.

Shape suffixes as in :mod:`fxmse.search.patience`, K groups, N pairs of a group and a candidate.
"""

import torch
from torch import Tensor

from fxmse.search.patience import Improvements, pack_steps, unpack_steps
from fxmse.search.shrunk_ranges import ShrinkProblem, calculate_scale
from fxmse.search.tiles import Range, Tile

__all__ = ["settle"]

_MAX_ELEMENTS = 1 << 19  # of float64, at a time


def settle(
    problem: ShrinkProblem,
    tile: Tile,
    own: Range,
    improved: Improvements,
    index_K: Tensor,
    num_steps: int,
    factors_C: Tensor,
    global_scale: Tensor | None,
    *,
    after_last: bool,
) -> Tensor:
    """Bit sets [K, W] of the steps at which these groups improved.

    Args:
        problem: the format.
        tile: the groups' values are among its.
        own: ranges [Q] that candidates are factors of.
        improved: what float32 knows.
        index_K: the groups.
        num_steps: as many steps are looked at.
        factors_C: of the candidates.
        global_scale: used in every candidate.
        after_last: only the steps from the last sure one on; the others are not in the sets.
    """
    maybe_CK = unpack_steps(improved.maybe_QW[index_K], num_steps)
    if after_last:
        sure_CK = unpack_steps(improved.sure_QW[index_K], num_steps)
        step_C1 = torch.arange(num_steps, device=index_K.device)[:, None]
        maybe_CK &= step_C1 >= torch.where(sure_CK, step_C1, 0).amax(0)
    low_K, high_K = own.min[index_K], own.max[index_K]
    factor_C1 = factors_C[:num_steps, None]
    scale_CK, zero_point_CK = calculate_scale(problem, factor_C1 * low_K, factor_C1 * high_K, global_scale)
    errors_CK = torch.full(maybe_CK.shape, torch.inf, dtype=torch.float64, device=index_K.device)
    step_N, place_N = maybe_CK.nonzero().unbind(1)
    base_K = scale_CK[0].double()
    values_OQPG, weights = tile
    values_OQPG = values_OQPG.flatten(1, -3)
    at_a_time = max(1, _MAX_ELEMENTS // values_OQPG[:, 0].numel())
    found = []
    for step, place in zip(step_N.split(at_a_time), place_N.split(at_a_time), strict=True):
        scale, index = scale_CK[step, place], index_K[place]
        zero_point = None if zero_point_CK is None else zero_point_CK[step, place]
        weights_QPG = None if weights is None else weights[0].expand(values_OQPG.shape[1:])
        found.append(_sum(problem, values_OQPG, index, scale, zero_point, base_K[place], weights_QPG))
    errors_CK[step_N, place_N] = torch.cat(found)
    least_CK = errors_CK.cummin(0).values
    before_CK = torch.cat([torch.full_like(least_CK[:1], torch.finfo(torch.float32).max), least_CK[:-1]])
    is_improved_CK = torch.zeros(len(factors_C), len(index_K), dtype=torch.bool, device=index_K.device)
    is_improved_CK[:num_steps] = errors_CK < before_CK
    return pack_steps(is_improved_CK)


def _sum(
    problem: ShrinkProblem,
    values_OQPG: Tensor,
    index_N: Tensor,
    scale_N: Tensor,
    zero_point_N: Tensor | None,
    base_N: Tensor,
    weights_QPG: Tensor | None,
) -> Tensor:
    """The errors [N] of groups at these indices, each with a candidate, in units of ``base`` ** norm."""
    grid, shape = problem.format.grid, (-1, 1, 1)
    reciprocal, ratio = scale_N.reciprocal().double().view(shape), (scale_N.double() / base_N).view(shape)
    zero_point = 0.0 if zero_point_N is None else zero_point_N.double().view(shape)
    total_N = torch.zeros_like(base_N)
    num_rows = max(1, _MAX_ELEMENTS // values_OQPG[0, 0].numel())
    for rows_OQPG in values_OQPG.split(num_rows):
        scaled = rows_OQPG[:, index_N].double() * reciprocal
        errors = (grid.round((scaled + zero_point).clamp(grid.qmin, grid.qmax)) - zero_point) - scaled
        # A power of two between two scales changes no bit of this.
        powers = (errors * ratio).abs().pow(problem.power.exponent)
        if weights_QPG is not None:
            powers = powers * weights_QPG[index_N]
        total_N = total_N + _add_up(powers.transpose(0, 1).flatten(1))
    return total_N


def _add_up(terms_NE: Tensor) -> Tensor:
    """The sums of rows, by halves: no kernel has a say in their order."""
    while terms_NE.shape[1] > 1:
        half = terms_NE.shape[1] // 2
        rest = terms_NE[:, 2 * half :]
        terms_NE = torch.cat([terms_NE[:, :half] + terms_NE[:, half : 2 * half], rest], 1)
    return terms_NE[:, 0]
