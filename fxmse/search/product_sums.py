"""The errors of outputs of many scales at once: e H e of each group, e its row of errors and H its channels' products.

Shape suffixes as in :mod:`fxmse.search.error_sums`. H is the mean of x xᵀ over all inputs x; of a group it is
[P, G, G], where what lies beside these blocks counts as 0.
"""

from torch import Tensor

from fxmse.formats.tables import keep
from fxmse.search.candidates import Candidates
from fxmse.search.error_sums import list_errors
from fxmse.search.tiles import Arithmetic

__all__ = ["list_changes", "multiply", "sum_crosses", "sum_products"]


def multiply(errors_XPG: Tensor, products_PGG: Tensor) -> Tensor:
    """Rows of errors times H, in the errors' shape."""
    if len(products_PGG) == 1:
        return (errors_XPG.flatten(0, -3)[:, 0] @ products_PGG[0]).view(errors_XPG.shape)
    by_part = errors_XPG.flatten(0, -3).transpose(0, 1)
    return (by_part @ products_PGG).transpose(0, 1).view(errors_XPG.shape)


def sum_products(arithmetic: Arithmetic, values_OQPG: Tensor, candidates: Candidates, products_PGG: Tensor) -> Tensor:
    """E H e of each candidate, summed over O, shape [C, Q], in units of x ** 2 times those of H.

    Args:
        arithmetic: the format.
        values_OQPG: the groups, float32.
        candidates: scales in units of x, and zero points.
        products_PGG: H.
    """
    errors_OCQPG = list_changes(arithmetic, values_OQPG, candidates)
    return _sum(errors_OCQPG * multiply(errors_OCQPG, products_PGG))


def sum_crosses(arithmetic: Arithmetic, values_OQPG: Tensor, candidates: Candidates, cross_OQPG: Tensor) -> Tensor:
    """E c of each candidate, summed over O, shape [C, Q]: what it makes of the errors of other groups.

    Args:
        arithmetic: the format.
        values_OQPG: the groups, float32.
        candidates: scales in units of x, and zero points.
        cross_OQPG: c, the other groups' errors times their rows of H.
    """
    return _sum(list_changes(arithmetic, values_OQPG, candidates) * cross_OQPG[:, None])


def list_changes(arithmetic: Arithmetic, values_OQPG: Tensor, candidates: Candidates) -> Tensor:
    """Each candidate's errors with their signs, in units of x, shape [O, C, Q, P, G]; the values are float32."""
    scale_CQ = keep(candidates.scale_CQ)
    shape_CQ11 = (len(scale_CQ), *values_OQPG.shape[1:-2], 1, 1)
    return list_errors(arithmetic, values_OQPG, *candidates) * scale_CQ.reshape(shape_CQ11)


def _sum(terms_OCQPG: Tensor) -> Tensor:
    sums_OCQP = terms_OCQPG.sum(-1)
    if sums_OCQP.shape[0] == sums_OCQP.shape[-1] == 1:
        return sums_OCQP[0, ..., 0].flatten(1)
    return sums_OCQP.sum((0, -1)).flatten(1)
