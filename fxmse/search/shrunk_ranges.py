"""The candidates of the reference's search: a group's range, shrunk step by step, and the errors of these.

Shape suffixes as in :mod:`fxmse.search.error_sums`, and K different scales.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fxmse.formats.grids import Format
from fxmse.formats.layout import Layout
from fxmse.formats.scales import calculate_exact_scale, calculate_global_scale, calculate_scale_and_zero_point
from fxmse.formats.stored_scales import count_stored_scales, list_stored_scales
from fxmse.formats.tables import is_traced
from fxmse.search.error_sums import sum_powers
from fxmse.search.options import SearchOptions
from fxmse.search.tiles import Arithmetic

__all__ = ["ShrinkProblem", "calculate_scale", "list_scales", "make_factors", "sum_errors"]


@dataclass(frozen=True)
class ShrinkProblem(Arithmetic):
    """All that a compiled search depends on but tensors: there is one graph for each of these."""

    dtype: torch.dtype  # of the value, and so of its scales
    patience: int
    expand: float
    is_spread: bool  # whether each group is spread over all of the value, which is then one tile
    optimize_global_scale: bool
    num_scales: int | None  # that a group's candidates can be stored as, where that is fewer than candidates
    grid: float  # the factor of step c is 1 - c / grid; 0 where nobody asks

    @classmethod
    def of(
        cls,
        format: Format,
        dtype: torch.dtype,
        options: SearchOptions,
        layout: Layout,
        optimize_global_scale: bool = False,
    ) -> "ShrinkProblem":
        """The problem of a value of this dtype; whether it reads pairs is settled later."""
        num_steps = len(options.factors)
        num_scales = None if optimize_global_scale else count_stored_scales(format, options.factors[-1])
        has_few_scales = num_scales is not None and num_scales < num_steps
        return cls(
            format,
            options.power,
            False,
            dtype,
            int(options.patience) or num_steps,
            float(options.expand),
            layout.strategy == "tensor" or layout.base_name != "weight",
            optimize_global_scale,
            num_scales if has_few_scales else None,
            options.grid if has_few_scales else 0.0,
        )


def sum_errors(
    problem: ShrinkProblem,
    values_OQPG: Tensor,
    factors_C: Tensor,
    global_scale: Tensor | None,
    low_Q: Tensor,
    high_Q: Tensor,
    weights_OQPG: Tensor | None = None,
) -> Tensor:
    """error[c] of every group, shape [C, Q], float64 where there are several observations or parts, else float32.

    Where groups have few different scales it is the error of each of these, shape [K, Q].
    """
    if problem.num_scales:
        scale_CQ, _ = list_scales(problem, low_Q, high_Q, global_scale)
        if global_scale is not None:
            scale_CQ = scale_CQ / global_scale
        base_Q, zero_point_CQ = scale_CQ[0], None
    else:
        base_Q, _ = calculate_scale(problem, low_Q, high_Q, global_scale)
        min_CQ, max_CQ = factors_C[:, None] * low_Q, factors_C[:, None] * high_Q
        scale_CQ, zero_point_CQ = calculate_scale(problem, min_CQ, max_CQ, global_scale)
    sums_CQ = sum_powers(problem, values_OQPG, scale_CQ, zero_point_CQ, weights_OQPG)
    return sums_CQ * torch.pow(scale_CQ / base_Q, problem.power.exponent)


def list_scales(
    problem: ShrinkProblem, low_Q: Tensor, high_Q: Tensor, global_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``list_stored_scales`` of ranges."""
    assert problem.num_scales
    exact_Q = calculate_exact_scale(low_Q, high_Q, problem.format, global_scale)
    return list_stored_scales(exact_Q, problem.format, problem.num_scales)


def calculate_scale(
    problem: ShrinkProblem, min: Tensor, max: Tensor, global_scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scale, in units of x, and zero point of ranges; None where it is 0."""
    if problem.optimize_global_scale:
        global_scale = calculate_global_scale(min, max)
    scale, zero_point = calculate_scale_and_zero_point(
        min, max, problem.format, dtype=problem.dtype, global_scale=global_scale
    )
    if global_scale is not None:
        scale = scale / global_scale
    return scale, None if problem.format.symmetric else zero_point


def make_factors(options: SearchOptions, value: Tensor) -> Tensor:
    """The factor of each candidate, float32 [C], on the value's device."""
    # One copy to the device; a traced tensor must not outlive its trace.
    make = _make_tensor if is_traced(value) else _make_tensor_once
    return make(options.factors, value.device)


def _make_tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


_make_tensor_once = functools.cache(_make_tensor)
