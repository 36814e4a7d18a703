"""Coordinate descent: groups of one row that take turns in choosing, each beside the errors of all others.

Shape suffixes as in :mod:`fxmse.search.output_optimum`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fxmse.search.candidates import Candidates, OptimumProblem, take
from fxmse.search.compiling import run
from fxmse.search.product_sums import list_changes, sum_crosses

__all__ = ["Column", "descend", "find_channels"]

_IMPROVEMENT = 1e-6  # what a group has to gain, in parts of its own error: less is rounding


class Column(NamedTuple):
    """Of one group of each row: what it can be quantized with, and the error e H e that each makes by itself."""

    candidates: Candidates
    errors_CQ: Tensor

    def take(self, rows: Tensor) -> "Column":
        """Some rows' groups."""
        scale, zero_point = self.candidates
        candidates = Candidates(scale[:, rows], None if zero_point is None else zero_point[:, rows])
        return Column(candidates, self.errors_CQ[:, rows])


def find_channels(n: int, size: int, block: int) -> tuple[int, slice]:
    """In which block of H the channels of the n-th group of a row are, and where in it."""
    place, start = divmod(n * size, block)
    return place, slice(start, start + size)


def descend(
    problem: OptimumProblem,
    values_NOQG: Tensor,
    linear_NOQG: Tensor | None,
    columns: list[Column],
    starts: Iterable[Tensor],
    products_MBB: Tensor,
    is_compiled: bool,
    max_sweeps: int,
) -> Tensor:
    """The candidates of all groups after so many sweeps, or when no group finds a better one.

    Each row begins with the start that is best for it, so that it ends above none of them.

    Args:
        problem: the format.
        values_NOQG: float32.
        linear_NOQG: what half the error's slope is where there is none; None for 0.
        columns: the candidates of each of N groups.
        starts: which candidates may be chosen first, [N, Q] each.
        products_MBB: H; B is a multiple of G, and there are channels for N groups.
        is_compiled: whether to compile what a group does.
        max_sweeps: how often all groups are gone through.
    """
    num_blocks, block = products_MBB.shape[:2]

    def arrange(groups: Iterable[Tensor]) -> Tensor:
        """Groups of rows, [O, Q, G] each, as rows, beside the blocks of H."""
        by_row = torch.cat([group.flatten(0, 1) for group in groups], 1)
        by_row = torch.nn.functional.pad(by_row, (0, num_blocks * block - by_row.shape[1]))
        return by_row.unflatten(1, (num_blocks, block)).transpose(0, 1)

    linear_MRB = None if linear_NOQG is None else arrange(linear_NOQG)

    def begin(index_NQ: Tensor) -> tuple[_Rows, Tensor]:
        """Rows at a start, and the errors that they have there, [Q]."""
        changes = [
            list_changes(problem, values[:, :, None], column.candidates.take(index))[:, 0, :, 0]
            for values, column, index in zip(values_NOQG, columns, index_NQ, strict=True)
        ]
        by_row_MRB = arrange(changes)
        through_MRB = by_row_MRB @ products_MBB
        errors_MR = (by_row_MRB * through_MRB).sum(2, dtype=torch.float64)
        if linear_MRB is not None:
            through_MRB += linear_MRB
            errors_MR += 2 * (by_row_MRB * linear_MRB).sum(2, dtype=torch.float64)
        tensors = (index_NQ, torch.stack(changes), through_MRB)
        errors_Q = errors_MR.sum(0).unflatten(0, (values_NOQG.shape[1], -1)).sum(0)
        return _Rows(problem, values_NOQG, columns, products_MBB, is_compiled, *tensors), errors_Q

    first, *others = starts
    rows, errors_Q = begin(first)
    for index_NQ in others:
        other, other_errors_Q = begin(index_NQ)
        is_less_Q = other_errors_Q < errors_Q
        errors_Q = torch.where(is_less_Q, other_errors_Q, errors_Q)
        rows.replace(is_less_Q, other)
    rows.descend(max_sweeps)
    return rows.index_NQ


@dataclass(frozen=True)
class _Rows:
    """Rows on their way down; the last three tensors change.

    Attributes:
        index_NQ: which candidates are chosen.
        changes_NOQG: the errors that they make.
        through_MRB: half the slope of the error there: all of a row's errors times H, and the linear part; R = O * Q.
    """

    problem: OptimumProblem
    values_NOQG: Tensor
    columns: list[Column]
    products_MBB: Tensor
    is_compiled: bool
    index_NQ: Tensor
    changes_NOQG: Tensor
    through_MRB: Tensor

    def replace(self, is_other_Q: Tensor, other: "_Rows") -> None:
        """Takes some rows as they are elsewhere."""
        rows_Q = is_other_Q.nonzero()[:, 0]
        height = self.changes_NOQG.shape[1]
        self.index_NQ[:, rows_Q] = other.index_NQ[:, rows_Q]
        self.changes_NOQG[:, :, rows_Q] = other.changes_NOQG[:, :, rows_Q]
        own, others = (rows.through_MRB.unflatten(1, (height, -1)) for rows in (self, other))
        own[:, :, rows_Q] = others[:, :, rows_Q]

    def descend(self, max_sweeps: int) -> None:
        """Goes on until no group finds a better candidate."""
        for sweep in range(1, max_sweeps + 1):
            is_changed_Q = torch.zeros_like(self.index_NQ[0], dtype=torch.bool)
            for n in range(len(self.columns)):
                is_changed_Q |= self._improve(n)
            rows_Q = is_changed_Q.nonzero()[:, 0]
            # A row all of whose groups are content stays as it is.
            if 2 * len(rows_Q) < len(is_changed_Q):
                if len(rows_Q):
                    rest = self._take(rows_Q)
                    rest.descend(max_sweeps - sweep)
                    self.index_NQ[:, rows_Q] = rest.index_NQ
                return

    def _improve(self, n: int) -> Tensor:
        """Has the n-th group of each row choose; whether it chose another candidate, [Q]."""
        column, errors_OQG = self.columns[n], self.changes_NOQG[n]
        height, num_rows, size = errors_OQG.shape
        block, channels = find_channels(n, size, self.products_MBB.shape[1])
        through_RB, products_GB = self.through_MRB[block], self.products_MBB[block, channels]
        cross_RG = through_RB[:, channels] - errors_OQG.view(-1, size) @ products_GB[:, channels]
        cross_OQPG = cross_RG.view(height, num_rows, 1, size)
        tensors = (self.values_NOQG[n][:, :, None], *column.candidates, column.errors_CQ, cross_OQPG, self.index_NQ[n])
        index_Q, new_OQPG, is_other_Q = run(self.is_compiled, _choose, self.problem, *tensors)
        change_RG = new_OQPG.view(-1, size) - errors_OQG.view(-1, size)
        rows_R = is_other_Q.expand(height, -1).flatten().nonzero()[:, 0]
        if 2 * len(rows_R) > len(change_RG):
            through_RB.addmm_(change_RG, products_GB)
        elif len(rows_R):
            through_RB.index_add_(0, rows_R, change_RG[rows_R] @ products_GB)
        self.index_NQ[n], self.changes_NOQG[n] = index_Q, new_OQPG[:, :, 0]
        return is_other_Q

    def _take(self, rows_Q: Tensor) -> "_Rows":
        height, num_rows = self.changes_NOQG.shape[1:3]
        through = self.through_MRB.unflatten(1, (height, num_rows))[:, :, rows_Q].flatten(1, 2)
        return _Rows(
            self.problem,
            self.values_NOQG[:, :, rows_Q],
            [column.take(rows_Q) for column in self.columns],
            self.products_MBB,
            self.is_compiled,
            self.index_NQ[:, rows_Q],
            self.changes_NOQG[:, :, rows_Q],
            through,
        )


def _choose(
    problem: OptimumProblem,
    values_OQPG: Tensor,
    scale_CQ: Tensor,
    zero_point_CQ: Tensor | None,
    errors_CQ: Tensor,
    cross_OQPG: Tensor,
    index_Q: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best candidates beside the other groups' errors, the errors that they make, and whether they are others."""
    candidates = Candidates(scale_CQ, zero_point_CQ)
    totals_CQ = errors_CQ + 2 * sum_crosses(problem, values_OQPG, candidates, cross_OQPG)
    best_Q = totals_CQ.argmin(0)
    gain_Q = take(totals_CQ, index_Q)[0] - take(totals_CQ, best_Q)[0]
    is_other_Q = gain_Q > _IMPROVEMENT * take(errors_CQ, index_Q)[0]
    chosen_Q = torch.where(is_other_Q, best_Q, index_Q)
    return chosen_Q, list_changes(problem, values_OQPG, candidates.take(chosen_Q))[:, 0], is_other_Q
