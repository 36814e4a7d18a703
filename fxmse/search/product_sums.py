"""The errors of outputs of many scales at once: e H e of each group, e its row of errors and H its channels' products.

Shape suffixes as in :mod:`fxmse.search.error_sums`. H is the mean of x xᵀ over all inputs x; of a group it is
[P, G, G], where what lies beside these blocks counts as 0.
"""

import torch
from torch import Tensor

from fxmse.formats.scales import round_to_dtype
from fxmse.formats.tables import keep
from fxmse.search.candidates import Candidates, OptimumProblem
from fxmse.search.error_sums import list_errors

__all__ = ["list_changes", "multiply", "sum_crosses", "sum_products"]

_HALF = (torch.bfloat16, torch.float16)


def multiply(errors_XPG: Tensor, products_PGG: Tensor) -> Tensor:
    """Rows of errors times H, in the errors' shape."""
    if len(products_PGG) == 1:
        return (errors_XPG.flatten(0, -3)[:, 0] @ products_PGG[0]).view(errors_XPG.shape)
    by_part = errors_XPG.flatten(0, -3).transpose(0, 1)
    return (by_part @ products_PGG).transpose(0, 1).view(errors_XPG.shape)


def sum_products(problem: OptimumProblem, values_OQPG: Tensor, candidates: Candidates, products_PGG: Tensor) -> Tensor:
    """The error e H e of each candidate, summed over O, shape [C, Q], in units of x ** 2 times those of H.

    Args:
        problem: the format.
        values_OQPG: the groups, float32.
        candidates: scales in units of x, and zero points.
        products_PGG: H.
    """
    errors_OCQPG = list_changes(problem, values_OQPG, candidates)
    return _sum(errors_OCQPG * multiply(errors_OCQPG, products_PGG))


def sum_crosses(problem: OptimumProblem, values_OQPG: Tensor, candidates: Candidates, cross_OQPG: Tensor) -> Tensor:
    """The product e c of each candidate, summed over O, shape [C, Q]: what it makes of the errors of other groups.

    Args:
        problem: the format.
        values_OQPG: the groups, float32.
        candidates: scales in units of x, and zero points.
        cross_OQPG: c, the other groups' errors times their rows of H.
    """
    return _sum(list_changes(problem, values_OQPG, candidates) * cross_OQPG[:, None])


def list_changes(problem: OptimumProblem, values_OQPG: Tensor, candidates: Candidates) -> Tensor:
    """Each candidate's errors with their signs, in units of x, shape [O, C, Q, P, G]; the values are float32.

    Half precision divides coarsely: of bfloat16 every 32nd quotient between 4 and 8 is half a step of the grid, from
    where it is rounded to even. What that does to one error's square is little, but the error has the other sign. So
    each operation is rounded as it is where the weight is quantized.
    """
    scale_CQ, zero_point_CQ = candidates
    scale_CQ = keep(scale_CQ)
    shape_CQ11 = (len(scale_CQ), *values_OQPG.shape[1:-2], 1, 1)
    scale = scale_CQ.reshape(shape_CQ11)
    if problem.dtype not in _HALF:
        return list_errors(problem, values_OQPG, scale_CQ, zero_point_CQ) * scale
    grid, values = problem.format.grid, values_OQPG[:, None]
    scaled = round_to_dtype(values / scale, problem.dtype)
    zero_point = None if zero_point_CQ is None else keep(zero_point_CQ).reshape(shape_CQ11)
    if zero_point is not None:
        scaled = round_to_dtype(scaled + zero_point, problem.dtype)
    quantized = grid.round(scaled.clamp(grid.qmin, grid.qmax))
    if zero_point is not None:
        quantized = quantized - zero_point
    return round_to_dtype(quantized * scale, problem.dtype) - values


def _sum(terms_OCQPG: Tensor) -> Tensor:
    sums_OCQP = terms_OCQPG.sum(-1)
    if sums_OCQP.shape[0] == sums_OCQP.shape[-1] == 1:
        return sums_OCQP[0, ..., 0].flatten(1)
    return sums_OCQP.sum((0, -1)).flatten(1)
