"""Narrowing down: the best of more and more of the scales around the best ones so far.

Shape suffixes as in :mod:`fxmse.search.error_sums`, and T places.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fxmse.formats.scales import calculate_range_of_scale
from fxmse.search.candidates import (
    Candidates,
    OptimumProblem,
    Places,
    cross,
    find_own_place,
    make_candidates,
    shrink,
    store_scale,
    take,
)
from fxmse.search.plan import NUM_LAST, NUM_SHRUNK
from fxmse.search.tiles import Range

__all__ = ["PLACES", "Found", "Sum", "Sums", "narrow_down", "report_ranges"]

# Of an asymmetric grid's range in the group's: from its lower end to its upper end.
PLACES = (0.5, 0.0, 0.25, 0.75, 1.0)
_NEAR_PLACES = tuple(i / 32 for i in range(-5, 6) if i)
# So many times the scale of its own range all of a group is rounded to 0: its errors are its values.
_BEYOND = 2.0**24
_NEAR_ZERO_POINTS = (0.0, -1.0, 1.0, -2.0, 2.0)


class Found(NamedTuple):
    """The best of each group, [Q]: its range, and its error in units of ``base`` ** norm."""

    min: Tensor
    max: Tensor
    error: Tensor
    base: Tensor


Sum: TypeAlias = Callable[[Candidates], Tensor]
"""What is summed up over a tile's groups, for each of some candidates."""


@dataclass(frozen=True)
class Sums:
    """Sums over a tile's groups, of candidates; ``rough`` ones, where they are, are nearly the powers."""

    powers: Sum
    moments: Sum
    rough: Sum | None = None


def narrow_down(
    problem: OptimumProblem,
    sums: Sums,
    own: Range,
    global_scale: Tensor | None,
    coarse_C: Tensor,
    middle_C: Tensor,
    fine_C: Tensor,
    limit: Tensor,
    last_C: Tensor,
    *,
    is_counted: bool = False,
) -> Found:
    """The best of more and more of the scales around the best ones so far."""
    listed = own
    if problem.both_signs:
        # Each group is listed twice, the second time with its ends the other way round.
        listed = Range(torch.cat([own.min, own.max]), torch.cat([own.max, own.min]))
        global_scale = None if global_scale is None else global_scale.repeat(2)
        sums = Sums(_take_both_signs(sums.powers), _take_both_signs(sums.moments))
    search = _Search.of(problem, sums, listed, global_scale)
    best = search.look_around(coarse_C, middle_C, limit)
    ratio_1Q = best.places.ratio_CQ if problem.format.grid.type == "int" else torch.ones_like(best.places.ratio_CQ)
    candidates, places = search.list_valleys(best, torch.minimum(fine_C[:, None] * ratio_1Q, limit))
    # Much of what was counted may be rounded to something else at the next scale of a float grid.
    has_valleys = problem.power.exponent == 2 and not (is_counted and problem.format.grid.type == "float")
    best = search.look_closely(best, candidates, places, fine_C[1] - fine_C[0], last_C, has_valleys)
    if is_counted and not problem.format.symmetric:
        # The best one may be at the edge of what was looked at.
        best = search.look_beside(best, best.candidate, best.places, last_C)
    # With both signs: a weight and the same one negated have the same errors.
    best = best.improve(*search.list_shrunk())
    if problem.both_signs:
        best = best.choose_sign(own)
    scale_1Q, zero_point_1Q = best.candidate
    zero_point_Q = None if zero_point_1Q is None else zero_point_1Q[0]
    return report_ranges(
        problem, own, best.error_Q, search.first.scale_CQ[0, : len(own.min)], scale_1Q[0], zero_point_Q
    )


def _take_both_signs(sum: Sum) -> Sum:
    """The sums of candidates of groups that are listed twice."""

    def sum_both(candidates: Candidates) -> Tensor:
        scale_CQ = candidates.scale_CQ.unflatten(1, (2, -1)).flatten(0, 1)
        return sum(Candidates(scale_CQ, None)).unflatten(-2, (-1, 2)).flatten(-2)

    return sum_both


@dataclass(frozen=True)
class _Search:
    """The search of one tile; ``first`` is the scale of each group's own range, which errors are in units of."""

    problem: OptimumProblem
    sums: Sums
    own: Range
    global_scale: Tensor | None
    first: Candidates

    @classmethod
    def of(cls, problem: OptimumProblem, sums: Sums, own: Range, global_scale: Tensor | None) -> "_Search":
        """The search of groups of these ranges."""
        one_1Q = torch.ones_like(own.min)[None]
        first = make_candidates(problem, own, global_scale, Places(one_1Q, one_1Q * 0))
        return cls(problem, sums, own, global_scale, first)

    def look_around(self, coarse_C: Tensor, middle_C: Tensor, limit: Tensor) -> "_Best":
        """The best of some scales over all that may be best, with an asymmetric format at several places."""
        sums, places_TQ = self.sums, self._list_steps(PLACES)
        places = Places(*cross(coarse_C[:, None].expand(-1, len(self.own.min)), places_TQ))
        candidates = self._make(places)
        best = _Best.of(self._score(candidates, sums.rough), candidates, places)
        if sums.rough is not None:
            # What the group's own range gives is a candidate, too.
            exact = best._replace(error_Q=self._score(best.candidate)[0])
            best = exact.improve(self._score(self.first), self.first, best.places)
        if self.problem.format.grid.type == "float":
            return best
        ratio_CQ = torch.minimum(best.places.ratio_CQ * middle_C[:, None], limit)
        best = self._improve_at(best, Places(*cross(ratio_CQ, places_TQ)))
        if self.problem.format.symmetric:
            return best
        near_TQ = (best.places.place_CQ + self._list_steps(_NEAR_PLACES)).clamp(0, 1)
        return self._improve_at(best, Places(*cross(best.places.ratio_CQ, near_TQ)))

    def list_shrunk(self) -> tuple[Tensor, Candidates, Places]:
        """The ranges that the reference tries, and their errors: none of them shall be better."""
        ratio_C = 1 - torch.arange(NUM_SHRUNK, device=self.own.min.device) / 100
        ratio_CQ = ratio_C[:, None].expand(-1, len(self.own.min))
        candidates = shrink(self.problem, self.own, self.global_scale, ratio_CQ)
        return self._score(candidates), candidates, Places(ratio_CQ, find_own_place(self.own).expand_as(ratio_CQ))

    def list_valleys(self, best: "_Best", ratio_CQ: Tensor) -> tuple[Candidates, Places]:
        """Candidates of these scales near the best one."""
        places = Places(ratio_CQ, best.places.place_CQ.expand_as(ratio_CQ))
        candidates = self._make(places)
        if best.candidate.zero_point_CQ is None or candidates.zero_point_CQ is None:
            return candidates, places
        # Where little is clamped the place is arbitrary and may not do for other scales: with the zero point, too.
        zero_point_CQ = torch.cat([candidates.zero_point_CQ, best.candidate.zero_point_CQ.expand_as(ratio_CQ)])
        return Candidates(candidates.scale_CQ.repeat(2, 1), zero_point_CQ), Places(*(t.repeat(2, 1) for t in places))

    def look_closely(
        self,
        best: "_Best",
        candidates: Candidates,
        places: Places,
        spacing: Tensor,
        last_C: Tensor,
        has_valleys: bool,
    ) -> "_Best":
        """The best scale and zero point around the best candidate, or of the best valley that candidates are in."""
        if has_valleys:
            index_Q, change_1Q = self._follow_moments(candidates)
            # Where few scales can be stored those beside it are looked at.
            change = spacing * 0.05 + torch.finfo(self.problem.scale_dtype).eps * 0.7
            near_C = torch.stack([change * 0, -change, change])
        else:
            errors_CQ = self._score(candidates)
            best = best.improve(errors_CQ, candidates, places)
            index_Q = errors_CQ.argmin(0)
            change_1Q = torch.ones_like(best.places.ratio_CQ)
            near_C = torch.linspace(-1, 1, NUM_LAST, device=spacing.device) * spacing
        chosen, places = candidates.take(index_Q), places.take(index_Q)
        chosen = chosen._replace(scale_CQ=chosen.scale_CQ * change_1Q)
        return self.look_beside(best, chosen, places, torch.cat([near_C, last_C]))

    def look_beside(self, best: "_Best", chosen: Candidates, places: Places, change_C: Tensor) -> "_Best":
        """The best of these changes of a scale, with all steps of its zero point."""
        scale_CQ = (chosen.scale_CQ * (1 + change_C[:, None])).to(self.first.scale_CQ.dtype)
        scale_CQ = store_scale(self.problem, scale_CQ, self.global_scale)
        scale_CQ, steps_CQ = cross(scale_CQ, self._list_steps(_NEAR_ZERO_POINTS))
        last = Candidates(scale_CQ, None)
        if chosen.zero_point_CQ is not None:
            grid = self.problem.format.grid
            steps_CQ = steps_CQ if grid.type == "int" else torch.zeros_like(steps_CQ)
            last = Candidates(scale_CQ, (chosen.zero_point_CQ + steps_CQ).clamp(grid.qmin, grid.qmax))
        return best.improve(self._score(last), last, places)

    def _follow_moments(self, candidates: Candidates) -> tuple[Tensor, Tensor]:
        """Which candidate's valley is deepest, and how many times its scale the bottom is."""
        beyond_1Q, zero_point_CQ = self.first.scale_CQ * _BEYOND, candidates.zero_point_CQ
        if zero_point_CQ is not None:
            zero_point_CQ = torch.cat([zero_point_CQ, zero_point_CQ[:1]])
        listed = Candidates(torch.cat([candidates.scale_CQ, beyond_1Q]), zero_point_CQ)
        moments_2CQ = self.sums.moments(listed)
        (error_CQ, slope_CQ), squares_1Q = moments_2CQ[:, :-1].unbind(0), moments_2CQ[0, -1:]
        ratio_CQ = candidates.scale_CQ / self.first.scale_CQ
        curvature_CQ = squares_1Q * (_BEYOND / ratio_CQ).square() + 2 * slope_CQ - error_CQ
        curvature_CQ = curvature_CQ.clamp(min=torch.finfo(torch.float32).tiny)
        depth_CQ = (error_CQ - slope_CQ * slope_CQ / curvature_CQ) * ratio_CQ * ratio_CQ
        index_Q = depth_CQ.argmin(0)
        return index_Q, 1 - take(slope_CQ / curvature_CQ, index_Q)

    def _improve_at(self, best: "_Best", places: Places) -> "_Best":
        candidates = self._make(places)
        return best.improve(self._score(candidates), candidates, places)

    def _make(self, places: Places) -> Candidates:
        return make_candidates(self.problem, self.own, self.global_scale, places)

    def _score(self, candidates: Candidates, sum_powers: Sum | None = None) -> Tensor:
        """The errors, in units of the first scale ** norm."""
        # Dynamo of torch 2.11 does not know that a function is true.
        sums_CQ = (self.sums.powers if sum_powers is None else sum_powers)(candidates)
        errors_CQ = sums_CQ * torch.pow(candidates.scale_CQ / self.first.scale_CQ, self.problem.power.exponent)
        # 0 times infinity, where a scale too small to be stored became the stand-in for 0: no argmin shall find it.
        return torch.where(errors_CQ == errors_CQ, errors_CQ, torch.inf)

    def _list_steps(self, steps: tuple[float, ...]) -> Tensor:
        """Of an asymmetric format all of ``steps``, of a symmetric one the first, [T, Q]."""
        listed = steps[:1] if self.problem.format.symmetric else steps
        return torch.tensor(listed, device=self.own.min.device)[:, None].expand(-1, len(self.own.min))


class _Best(NamedTuple):
    """The best candidate of each group so far."""

    error_Q: Tensor
    candidate: Candidates
    places: Places

    @classmethod
    def of(cls, errors_CQ: Tensor, candidates: Candidates, places: Places) -> "_Best":
        """The best of some candidates."""
        index_Q = errors_CQ.argmin(0)
        return cls(take(errors_CQ, index_Q)[0], candidates.take(index_Q), places.take(index_Q))

    def choose_sign(self, own: Range) -> "_Best":
        """The better one of each group that is listed twice; of equal ones that with qmin at the larger end."""
        error_2Q, scale_2Q, ratio_2Q, place_2Q = (
            tensor.view(2, -1) for tensor in (self.error_Q, self.candidate.scale_CQ, *self.places)
        )
        is_tie_Q = error_2Q[1] == error_2Q[0]
        index_Q = ((error_2Q[1] < error_2Q[0]) | (is_tie_Q & (own.max > -own.min))).long()
        candidate, places = Candidates(take(scale_2Q, index_Q), None), Places(ratio_2Q, place_2Q).take(index_Q)
        return _Best(take(error_2Q, index_Q)[0], candidate, places)

    def improve(self, errors_CQ: Tensor, candidates: Candidates, places: Places) -> "_Best":
        """The best of these and of more candidates; of places there may be one for all of those."""
        index_Q = errors_CQ.argmin(0)
        error_Q = take(errors_CQ, index_Q)[0]
        is_better_Q = error_Q < self.error_Q
        candidate = candidates.take(index_Q)
        places = places if len(places.ratio_CQ) == 1 else places.take(index_Q)

        def choose(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(is_better_Q, new, old)

        zero_point_1Q = None
        if candidate.zero_point_CQ is not None and self.candidate.zero_point_CQ is not None:
            zero_point_1Q = choose(candidate.zero_point_CQ, self.candidate.zero_point_CQ)
        return _Best(
            choose(error_Q, self.error_Q),
            Candidates(choose(candidate.scale_CQ, self.candidate.scale_CQ), zero_point_1Q),
            Places(*map(choose, places, self.places)),
        )


def report_ranges(
    problem: OptimumProblem, own: Range, error_Q: Tensor, base_Q: Tensor, scale_Q: Tensor, zero_point_Q: Tensor | None
) -> Found:
    """The ranges that give these scales and zero points; errors are in units of ``base_Q`` ** norm."""
    low_Q, high_Q = calculate_range_of_scale(scale_Q, zero_point_Q, problem.format)
    # What is not finite stays so. Inductor makes zeros of products with the integer 0, not of those with a float.
    largest = torch.finfo(torch.float32).max
    low_Q, high_Q = low_Q.clamp(-largest, largest), high_Q.clamp(-largest, largest)
    return Found(low_Q + own.min * 0.0, high_Q + own.max * 0.0, error_Q, base_Q)
