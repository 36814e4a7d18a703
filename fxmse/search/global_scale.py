"""The global scale that weights of tensor_group are best with.

Shape suffixes as in :mod:`fxmse.search.error_sums`; J counts global scales, B the groups of a row, N groups that were
drawn.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxmse.formats.grids import Format
from fxmse.formats.layout import Layout
from fxmse.formats.scales import calculate_global_scale
from fxmse.search.candidates import OptimumProblem
from fxmse.search.compiling import pays_to_compile
from fxmse.search.optimum import Sample, sum_least_errors
from fxmse.search.power import AbsolutePower
from fxmse.search.tiles import Range, measure_tiles

__all__ = ["find_global_range"]

# Places of an octave where the global scale of tensor_group is tried, times sqrt(Q): the error of few groups is more
# jagged. At the octave's upper end the group of the largest element can have all scales that are worth trying.
_PLACES_OF_ONE = 1 << 12
_MIN_PLACES, _MAX_PLACES = 16, 64
# Some groups judge each place, and more the best of these: how many groups, and how many places they leave.
_ROUNDS = ((1 << 11, 4), (1 << 13, 1))


def find_global_range(
    values: Sequence[Tensor], format: Format, layout: Layout, power: AbsolutePower, importances: Sequence[Tensor | None]
) -> Range:
    """Finds the range, shape (1,), that the global scale follows from which weights of tensor_group are best with.

    Of weights (..., out, in) it has shape (..., 1, 1): those matrices share one that stand at the same place.

    All of an octave is tried: another octave has the same scales but for the smallest and largest ones. Weights of many
    groups are judged by a sample.

    Args:
        values: weights that share their global scale.
        format: the format.
        layout: their groups.
        power: |e| ** norm.
        importances: of each weight, as for :func:`fxmse.search.optimum.find_optimum`; or one of each matrix.
    """
    if layout.is_by_matrix(values[0].shape):
        matrices = [value.flatten(0, -3) for value in values]
        by_matrix = [None if i is None else i.expand(len(m), -1) for i, m in zip(importances, matrices, strict=True)]
        found = [
            find_global_range(
                [own[n] for own in matrices], format, layout, power, [None if i is None else i[n] for i in by_matrix]
            )
            for n in range(len(matrices[0]))
        ]
        shape = layout.as_one_group().qparam_shape(values[0].shape)
        return Range(*(torch.cat(ends).reshape(shape) for ends in zip(*found, strict=True)))
    assert layout.group_size is not None
    problem = OptimumProblem(format, power, False, values[0].dtype)
    with torch.no_grad():
        weights = []
        for value, importance in zip(values, importances, strict=True):
            groups_QG = value.detach().reshape(-1, layout.group_size)
            # All groups are measured, which is compiled where the search that follows is.
            is_compiled = pays_to_compile(problem, value, 0, finds_same=True)
            weights.append(_Groups.of(groups_QG, importance, power.exponent, is_compiled))
        largest = torch.stack([weight.largest for weight in weights]).amax()
        num_groups = sum(len(weight.groups_QG) for weight in weights)
        num_places = min(max(int(_PLACES_OF_ONE / math.sqrt(num_groups)), _MIN_PLACES), _MAX_PLACES)
        range_J = largest * 2 * torch.exp2(torch.arange(num_places, device=largest.device) / num_places)
        range_J = range_J.clamp(max=torch.finfo(torch.float32).max)
        for num_judges, num_left in _ROUNDS:
            samples = [weight.draw(num_judges) for weight in weights]
            global_scale_J = calculate_global_scale(-range_J, range_J)
            total_J = torch.stack([sum_least_errors(problem, sample, global_scale_J) for sample in samples]).sum(0)
            range_J = range_J[total_J.topk(num_left, largest=False).indices]
    # Without a branch: what is not finite stays so.
    return Range(-range_J, range_J + largest * 0.0)


class _Groups(NamedTuple):
    """A weight's groups, to draw some of."""

    groups_QG: Tensor
    importance_BG: Tensor | None  # of the groups of one row
    share_Q: Tensor  # how likely each is drawn, int64
    end_Q: Tensor  # their running sum
    largest: Tensor

    @classmethod
    def of(cls, groups_QG: Tensor, importance: Tensor | None, exponent: float, is_compiled: bool) -> "_Groups":
        """Groups that are as likely as their largest magnitude ** norm, times the importance, is large."""
        own = measure_tiles(groups_QG, Layout("weight", "channel"), is_compiled)
        absmax_Q = torch.maximum(own.min.neg_(), own.max)
        largest = absmax_Q.amax()
        # In place: new memory costs more than the arithmetic.
        share_Q = absmax_Q.div_(largest).pow_(exponent)
        importance_BG = None
        if importance is not None:
            importance_BG = importance.reshape(-1, groups_QG.shape[1])
            share_Q.view(-1, len(importance_BG)).mul_(importance_BG.mean(1) / importance_BG.mean())
        # Whole numbers, whose sums are the same in any order. What is not finite counts as some number.
        share_Q = share_Q.mul_(2.0**24).long().clamp_(min=1)
        return cls(groups_QG, importance_BG, share_Q, share_Q.cumsum(0), largest)

    def draw(self, num: int) -> Sample:
        """So many groups, systematically; all of fewer."""
        groups_QG, importance_BG, share_Q, end_Q, _ = self
        total = len(groups_QG)
        if total <= num:
            weights_QG = None if importance_BG is None else importance_BG.repeat(total // len(importance_BG), 1)
            return Sample(groups_QG, weights_QG, torch.ones_like(share_Q))
        step = end_Q[-1].double() / num
        places_N = torch.arange(0.5, num, device=groups_QG.device, dtype=torch.float64) * step
        index_N = torch.searchsorted(end_Q, places_N.long(), right=True).clamp_(max=total - 1)
        weights_NG = None if importance_BG is None else importance_BG[index_N % len(importance_BG)]
        return Sample(groups_QG[index_N], weights_NG, step / share_Q[index_N])
