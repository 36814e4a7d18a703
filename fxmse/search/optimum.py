"""The search for the optimum: of all ranges that a format can store the best, not the best of a list of shrunk ones.

Where few scales can be stored (e4m3, powers of two) all that can be best are evaluated. Elsewhere the error is a jagged
function of the scale: it falls and rises each time that large elements change the value they are rounded to, which
happens about each .5 / qmax of the scale, around a smooth trend. The search narrows that down: scales a third of an
octave apart, some more around the best of these, then so many around the best again that each valley is met, and a
last look at the best valley. At norm 2 any point of a valley tells how deep it is and where
(:func:`fxmse.search.error_sums.sum_moments`), so that a scale or two in each are enough.

The depths of valleys differ by about 1 / sqrt(G). In small groups the best one may be as far from the trend's minimum,
and also above the group's own range; those of the fewest elements have no trend (:mod:`fxmse.search.small_groups`).

The grid of symmetric integers has one value more below 0 than above. With a scale below 0 that value is at the other
end: each group is searched twice, as if its range were the other way round, too, and has it where it is of more use.

Asymmetric formats have a second dimension, the place of their range within the group's. Only elements that are clamped
depend on it: a few places are tried with each scale, and single steps of the zero point at the end.

Shape suffixes as in :mod:`fxmse.search.error_sums`; J counts global scales.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fxmse.formats.grids import Format
from fxmse.formats.layout import Layout, enlarge
from fxmse.search.candidates import OptimumProblem
from fxmse.search.compiling import pays_to_compile
from fxmse.search.plan import Plan
from fxmse.search.power import AbsolutePower
from fxmse.search.small_groups import SMALL, Cells
from fxmse.search.tile_optimum import search_tile
from fxmse.search.tiles import (
    MAX_TABLE,
    Range,
    count_lanes,
    cut_groups,
    cut_tiles,
    find_max_elements,
    find_row,
    holds_pairs,
)

__all__ = ["Sample", "find_optimum", "sum_least_errors"]

_MAX_AT_ONCE = 1 << 14  # groups that are tried with several global scales


class Sample(NamedTuple):
    """Some of a weight's groups, each for so many."""

    groups_QG: Tensor
    weights_QG: Tensor | None
    num_Q: Tensor


def find_optimum(
    value: Tensor,
    format: Format,
    layout: Layout,
    power: AbsolutePower,
    *,
    global_scale: Tensor | None = None,
    importance: Tensor | None = None,
    negative_scale: bool = False,
) -> Range:
    """Finds the range of each group whose quantization error is least, of all that the format can store.

    Minimises sum(importance * |fake_quantize(x) - x| ** norm) per group. NaN and Inf are not looked for: a group that
    has one gets a range that is not finite.

    Args:
        value: float, any shape and strides that ``layout`` takes, not empty.
        format: the format.
        layout: the groups.
        power: |e| ** norm.
        global_scale: float32, one element; scales are stored times it.
        importance: float32, one element a channel of ``value``'s last dimension: the weight of its errors. For the
            channel, group and tensor_group strategies of a weight.
        negative_scale: of symmetric integers whose scales are not e4m3, search scales below 0, too.

    Returns:
        Ranges that give the best scales and zero points by compressed-tensors' ``calculate_qparams``; that of a scale
        below 0 has its ends the other way round.
    """
    shape = layout.qparam_shape(value.shape)
    size = value.numel() // math.prod(shape)
    both_signs = negative_scale and format.symmetric and format.grid.type == "int"
    problem = OptimumProblem(format, power, False, value.dtype, both_signs)
    plan: Plan | Cells
    if size <= SMALL and not problem.num_scales:
        plan = Cells.of(format, size, both_signs, value.device)
        work = num_candidates = len(plan.ratio)
    else:
        plan = Plan.of(format, size)
        work = problem.num_scales or plan.work * problem.num_signs
        num_candidates = problem.num_scales or max(16, len(plan.fine)) * problem.num_signs
    is_compiled = pays_to_compile(problem, value, work, finds_same=_finds_same(problem, size, find_row(value, layout)))
    problem = replace(problem, reads_pairs=importance is None and holds_pairs(value, layout))
    max_elements = find_max_elements(problem, value)
    max_groups = max(1, min(enlarge(MAX_TABLE, value.device) // num_candidates, max_elements // size))
    with torch.no_grad():
        tiles = cut_tiles(value, layout, max_groups, importance)
        found = [search_tile(problem, plan, tile, global_scale, is_compiled) for tile in tiles]
    return Range(*(torch.cat(part).reshape(shape) for part in list(zip(*found, strict=True))[:2]))


def _finds_same(problem: OptimumProblem, size: int, row: int) -> bool:
    """Whether compiled and uncompiled sums over a group of ``size``, in rows of ``row`` elements, are made alike."""
    return problem.power.exponent in (1, 2) and (size <= SMALL or row % count_lanes() == 0)


def sum_least_errors(problem: OptimumProblem, sample: Sample, global_scale_J: Tensor) -> Tensor:
    """The least error of a weight of tensor_group with each global scale, float64 [J]."""
    num_groups, size = sample.groups_QG.shape
    work = (problem.num_scales or 1) * len(global_scale_J)
    is_compiled = pays_to_compile(problem, sample.groups_QG, work, finds_same=_finds_same(problem, size, size))
    plan = Plan.of(problem.format, size)
    totals = []
    for part_J in global_scale_J.split(max(1, _MAX_AT_ONCE // num_groups)):
        times = len(part_J)
        weights_QG = None if sample.weights_QG is None else sample.weights_QG.repeat(times, 1)
        tile = cut_groups(sample.groups_QG.repeat(times, 1)[None], weights_QG)
        global_scale_Q = part_J.repeat_interleave(num_groups)
        found = search_tile(problem, plan, tile, global_scale_Q, is_compiled)
        errors_Q = found.error.double() * found.base.double() ** problem.power.exponent
        totals.append((errors_Q.view(times, -1) * sample.num_Q).sum(1))
    return torch.cat(totals)
