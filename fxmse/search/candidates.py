"""Scales and zero points as they can be stored: what the search for the optimum chooses from.

Shape suffixes as in :mod:`fxmse.search.error_sums`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fxmse.formats.scales import calculate_exact_scale, calculate_scale_and_zero_point, round_scale
from fxmse.search.tiles import Arithmetic, Range

__all__ = [
    "Candidates",
    "OptimumProblem",
    "Places",
    "cross",
    "find_own_place",
    "make_candidates",
    "shrink",
    "store_scale",
    "take",
]

_NUM_POWERS_OF_TWO = 3  # the group's own, the one above and the one below


@dataclass(frozen=True)
class OptimumProblem(Arithmetic):
    """All that a compiled search depends on but tensors."""

    dtype: torch.dtype  # that scales are stored in, where the format names none
    both_signs: bool = False  # of scales

    @property
    def scale_dtype(self) -> torch.dtype:
        """What scales are stored in."""
        return self.format.scale_dtype or self.dtype

    @property
    def num_signs(self) -> int:
        """How often each group is searched."""
        return 2 if self.both_signs else 1

    @property
    def num_scales(self) -> int | None:
        """How many stored scales can be best, from ``top_ratio`` times the group's own downwards; None for many."""
        if self.format.is_mx:
            return _NUM_POWERS_OF_TWO
        if self.format.scale_dtype != torch.float8_e4m3fn or not self.format.symmetric:
            return None
        low = 0.25 if self.format.grid.type == "int" else 0.7
        return 2 + math.ceil(8 * math.log2(self.top_ratio / low))  # eight in each octave

    @property
    def top_ratio(self) -> float:
        """The largest scale that can be best, in parts of that of the group's own range."""
        grid = self.format.grid
        return 1.2 if grid.type == "int" else 2 - 2.0 ** (-1 - grid.mantissa_bits)


class Candidates(NamedTuple):
    """Scales as they will be stored, in units of x, and zero points."""

    scale_CQ: Tensor
    zero_point_CQ: Tensor | None

    def take(self, index_Q: Tensor) -> "Candidates":
        """One for each group, [1, Q]."""
        zero_point_CQ = self.zero_point_CQ
        return Candidates(take(self.scale_CQ, index_Q), None if zero_point_CQ is None else take(zero_point_CQ, index_Q))


class Places(NamedTuple):
    """Where candidates are: scales in parts of that of the group's own range, places of the range in the group's."""

    ratio_CQ: Tensor
    place_CQ: Tensor

    def take(self, index_Q: Tensor) -> "Places":
        """One for each group, [1, Q]."""
        return Places(take(self.ratio_CQ, index_Q), take(self.place_CQ, index_Q))


def take(table_CQ: Tensor, index_Q: Tensor) -> Tensor:
    """Each group's entry at its index, [1, Q]."""
    return table_CQ.gather(0, index_Q[None])


def cross(table_CQ: Tensor, table_TQ: Tensor) -> tuple[Tensor, Tensor]:
    """Every entry of one table beside every one of the other."""
    size = (len(table_CQ), len(table_TQ), -1)
    return table_CQ[:, None].expand(size).flatten(0, 1), table_TQ[None].expand(size).flatten(0, 1)


def make_candidates(problem: OptimumProblem, own: Range, global_scale: Tensor | None, places: Places) -> Candidates:
    """The candidates at places."""
    grid = problem.format.grid
    if problem.format.symmetric:
        low_Q, high_Q = own.min.minimum(own.max), own.max.maximum(own.min)
        exact_Q = calculate_exact_scale(low_Q, high_Q, problem.format, None)
        exact_Q = torch.where(own.min > own.max, -exact_Q, exact_Q)
        return Candidates(store_scale(problem, exact_Q * places.ratio_CQ, global_scale), None)
    low_Q = own.min.clamp(max=0)
    span_Q = own.max.clamp(min=0) - low_Q
    num_steps = grid.qmax - grid.qmin
    scale_CQ = store_scale(problem, span_Q / num_steps * places.ratio_CQ, global_scale)
    low_CQ = low_Q + places.place_CQ * (span_Q - scale_CQ * num_steps)
    return Candidates(scale_CQ, grid.round((grid.qmin - low_CQ / scale_CQ).clamp(grid.qmin, grid.qmax)))


def shrink(problem: OptimumProblem, own: Range, global_scale: Tensor | None, ratio_CQ: Tensor) -> Candidates:
    """Parts of the group's own range, with the scales and zero points that the reference has for them."""
    low_Q, high_Q = own.min.minimum(own.max), own.max.maximum(own.min)
    scale_CQ, zero_point_CQ = calculate_scale_and_zero_point(
        low_Q * ratio_CQ, high_Q * ratio_CQ, problem.format, dtype=problem.dtype, global_scale=global_scale
    )
    if global_scale is not None:
        scale_CQ = scale_CQ / global_scale
    scale_CQ = torch.where(own.min > own.max, -scale_CQ, scale_CQ)
    return Candidates(scale_CQ, None if problem.format.symmetric else zero_point_CQ)


def find_own_place(own: Range) -> Tensor:
    """The place of :func:`shrink`'s ranges, [Q]."""
    span_Q = own.max.clamp(min=0) - own.min.clamp(max=0)
    return torch.where(span_Q > 0, -own.min.clamp(max=0) / span_Q, 0.0)


def store_scale(problem: OptimumProblem, scale: Tensor, global_scale: Tensor | None) -> Tensor:
    """A scale as it will be stored, in units of x; one whose range float32 holds."""
    # Half precision may round it up.
    grid = problem.format.grid
    largest = torch.finfo(torch.float32).max / (grid.qmax - grid.qmin) * (2 - 2.0**-6)
    if global_scale is None:
        return round_scale(scale.clamp(-largest, largest), problem.scale_dtype)
    return round_scale((scale * global_scale).clamp(-largest, largest), problem.scale_dtype) / global_scale
