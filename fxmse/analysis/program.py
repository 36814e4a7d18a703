"""The integer program: one format for each group, the least sum of errors of those whose costs a budget allows."""

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Solution", "find_least_cost", "solve"]

_SECONDS = 60.0
_TOLERANCE = 1e-9
"""By what part of it a budget may be missed: floats are added up in another order."""
_OPTIMUM = 1e4
"""What errors are scaled to: the solver takes a sum for the least that is within 1e-6 of it."""
_ATTEMPTS = 4
_PRINTED = b"HighsMipSolverData::"
"""What a line begins with that the solver prints, whatever its options, while it repairs a solution."""


class Solution(NamedTuple):
    """A choice.

    Attributes:
        choice: the place of each group's candidate.
        error: the sum of errors.
        cost: the sum of costs.
        gap: by what part of it the error may be above the optimum; 0 where it is the optimum, proven.
    """

    choice: list[int]
    error: float
    cost: float
    gap: float


class _Steps(NamedTuple):
    """Candidates of all groups in a row.

    Attributes:
        group: whose.
        place: among its candidates.
        loss: by how much its error is above the group's least.
        extra: by how much its cost is.
    """

    group: NDArray[np.int64]
    place: NDArray[np.int64]
    loss: NDArray[np.float64]
    extra: NDArray[np.float64]

    def keep(self, which: NDArray[np.bool_]) -> "_Steps":
        """Some of them."""
        return _Steps(self.group[which], self.place[which], self.loss[which], self.extra[which])


def find_least_cost(costs: Sequence[Sequence[float]]) -> float:
    """What the cheapest choice costs."""
    return sum(map(min, costs))


def solve(
    errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float, seconds: float = _SECONDS
) -> Solution:
    """Minimises sum(errors[g][x_g]) over x with sum(costs[g][x_g]) <= budget, by ``scipy.optimize.milp``.

    A multiple-choice knapsack. Of a group's candidates those are looked at that have less error than all that cost no
    more, and of these those that can be in an optimum: the relaxed program's price of the budget gives a bound for
    every one, and rounding its solution a choice to beat.

    Args:
        errors: of each group's candidates, finite.
        costs: of the same shape, finite.
        budget: at least :func:`find_least_cost`.
        seconds: after which the best choice that was found is taken.

    Raises:
        ImportError: scipy is not installed.
        RuntimeError: no choice was found within ``seconds``.
    """
    useful = [_list_useful(own, cost) for own, cost in zip(errors, costs, strict=True)]
    best, cheapest = [own[-1] for own in useful], [own[0] for own in useful]
    if _sum(costs, best) <= budget * (1 + _TOLERANCE):
        return Solution(best, _sum(errors, best), _sum(costs, best), 0.0)
    own = [
        (g, c, errors[g][c] - errors[g][best[g]], costs[g][c] - costs[g][cheapest[g]])
        for g in range(len(useful))
        for c in useful[g]
    ]
    steps = _Steps(*(np.array(column) for column in zip(*own, strict=True)))
    limit = budget - _sum(costs, cheapest)
    for _ in range(_ATTEMPTS):
        if limit <= 0:
            break
        places, bound = _run_solver(steps, limit, seconds)
        choice = [places[group] for group in range(len(useful))]
        error, cost = _sum(errors, choice), _sum(costs, choice)
        if cost <= budget * (1 + _TOLERANCE):
            gap = (error - bound - _sum(errors, best)) / abs(error) if error else 0.0
            return Solution(choice, error, cost, gap if gap > _TOLERANCE else 0.0)
        limit -= 2 * (cost - budget)
    return Solution(cheapest, _sum(errors, cheapest), _sum(costs, cheapest), 0.0)


def _sum(table: Sequence[Sequence[float]], choice: Sequence[int]) -> float:
    return sum(row[place] for row, place in zip(table, choice, strict=True))


def _list_useful(errors: Sequence[float], costs: Sequence[float]) -> list[int]:
    """The candidates of a group with less error than all that cost no more, cheapest first."""
    useful: list[int] = []
    for place in sorted(range(len(errors)), key=lambda place: (costs[place], errors[place])):
        if not useful or errors[place] < errors[useful[-1]]:
            useful.append(place)
    return useful


def _run_solver(steps: _Steps, limit: float, seconds: float) -> tuple[dict[int, int], float]:
    """The place that each group takes, and what the sum of losses is at least."""
    from scipy.optimize import Bounds, LinearConstraint, linprog, milp

    largest, row = steps.loss.max(), (steps.extra / limit)[None]
    one_each, ones = _make_rows(steps.group)
    relaxed = linprog(steps.loss / largest, row, [1.0], one_each, ones, (0, 1))
    assert relaxed.success, relaxed.message
    price = max(0.0, -relaxed.ineqlin.marginals[0]) * largest / limit
    possible = steps.keep(_find_possible(steps, limit, price, relaxed.x > 0))
    one_each, ones = _make_rows(possible.group)
    scale = _OPTIMUM / max(relaxed.fun * largest, largest * _TOLERANCE)
    within = LinearConstraint((possible.extra / limit)[None], ub=1.0)
    with _without_its_prints():
        found = milp(
            possible.loss * scale,
            integrality=np.ones(len(possible.loss)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, ones, ones), within],
            options={"mip_rel_gap": 0.0, "time_limit": seconds},
        )
    if found.x is None:
        raise RuntimeError(f"the integer program: {found.message}")
    taken = possible.keep(found.x > 0.5)
    return dict(zip(taken.group.tolist(), taken.place.tolist(), strict=True)), found.mip_dual_bound / scale


def _make_rows(group: NDArray[np.int64]) -> tuple[Any, NDArray[np.float64]]:
    """A row for each group, with 1 for its candidates, and a 1 for each row."""
    from scipy.sparse import csr_array

    number = np.unique(group, return_inverse=True)[1]
    rows = csr_array((np.ones(len(group)), (number, np.arange(len(group)))))
    return rows, np.ones(rows.shape[0])


def _find_possible(steps: _Steps, limit: float, price: float, is_used: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The candidates that a choice can have that is no worse than one that is known.

    With the budget at a price, each group's best candidate gives a bound of the sum, and any other candidate raises it.
    The choice that is known is the cheapest of what the relaxed program uses.
    """
    starts = np.flatnonzero(np.r_[True, np.diff(steps.group) > 0])
    priced = steps.loss + price * steps.extra
    least = np.minimum.reduceat(priced, starts)
    raised = priced - least[np.cumsum(np.r_[False, np.diff(steps.group) > 0])]
    used = steps.keep(is_used)
    cheapest = np.lexsort((used.extra, used.group))
    firsts = np.flatnonzero(np.r_[True, np.diff(used.group[cheapest]) > 0])
    known = used.loss[cheapest[firsts]].sum()
    return raised <= known - (least.sum() - price * limit) + _TOLERANCE * (known + priced.max())


@contextmanager
def _without_its_prints() -> Iterator[None]:
    """Takes the solver's own lines out of what is written to the process' stdout within a ``with`` block."""
    if os.name != "posix":
        yield
        return
    flush = ctypes.CDLL(None).fflush
    try:
        sys.stdout.flush()
        flush(None)
        stdout = os.dup(1)
    except (OSError, ValueError):  # closed
        yield
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            flush(None)
            os.dup2(stdout, 1)
            os.close(stdout)
            file.seek(0)
            others = b"".join(line for line in file if not line.startswith(_PRINTED))
            if others:
                os.write(1, others)
