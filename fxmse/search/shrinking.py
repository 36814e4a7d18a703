"""The reference's search: each group's range is shrunk step by step, and the step of least error kept.

All candidates of a group are evaluated in one pass over the data. For a group of range (min, max) candidate c is
the range (min, max) * expand * (1 - c / grid); what is summed up for it is

    error[c] = (scale[c] / scale[0]) ** norm * sum(|round_to_grid(x / scale[c]) - x / scale[c]| ** norm)

that is sum(|fake_quantize(x) - x| ** norm) in units of the group's first scale, which keeps tiny and huge values
from leaving float32's range and makes the result independent of any power of two in x.

Three things save evaluations and change no result. Candidates whose scales are stored alike (e4m3 and powers of two
have few values) have one error. Where reading a flag waits for no device, steps behind the end that patience sets are
not taken. And of the groups that a global scale is searched for, the largest are enough where they decide it.

Shape suffixes as in :mod:`fxmse.search.patience`.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fxmse.formats.grids import Format
from fxmse.formats.layout import Layout, enlarge
from fxmse.search.compiling import MIN_COMPILED, pays_to_compile, reads_flags, run, unrolls
from fxmse.search.near_ties import NearTies, settle
from fxmse.search.options import SearchOptions
from fxmse.search.patience import (
    Improvements,
    allow_steps,
    choose_candidates,
    find_end,
    find_improvements,
    find_improvements_of_stored,
    find_unsettled,
    unpack_steps,
)
from fxmse.search.shrunk_ranges import ShrinkProblem, make_factors, sum_errors
from fxmse.search.tiles import (
    MAX_TABLE,
    Range,
    Tile,
    as_readable,
    count_parts,
    cut_groups,
    cut_tiles,
    find_max_elements,
    holds_pairs,
    measure,
    measure_pairs,
    measure_tiles,
)

__all__ = ["shrink_global_range", "shrink_ranges"]

# Of a tensor_group value: so many of the largest groups, and as many of all, are looked at first.
_NUM_LARGEST = 1 << 10


class _Scores(NamedTuple):
    """What is kept of a tile."""

    range: Range  # [Q], what the candidates are factors of
    improved: Improvements  # the steps at which errors fell
    num_steps: int  # so many candidates were evaluated


def shrink_ranges(
    value: Tensor,
    format: Format,
    layout: Layout,
    options: SearchOptions,
    *,
    global_scale: Tensor | None = None,
    optimize_global_scale: bool = False,
    importance: Tensor | None = None,
) -> Range:
    """Finds the range of each group whose quantization error is least.

    Minimises sum(importance * |fake_quantize(x) - x| ** norm) per group over the candidates of ``options``; of equal
    errors the wider range wins. NaN and Inf are not looked for: a group that has one gets a range that is not finite.

    Args:
        value: float, any shape and strides that ``layout`` takes, not empty.
        format: the format.
        layout: the groups.
        options: the candidates.
        global_scale: float32, one element; used in every candidate.
        optimize_global_scale: recompute the global scale from each candidate's range, and ignore ``global_scale``.
            Needs a layout of one group.
        importance: float32, one element a channel of ``value``'s last dimension: the weight of its errors. For the
            channel, group and tensor_group strategies of a weight.

    Returns:
        The best range, at most ``expand`` times the value's own.

    Source: llm-compressor 0.9 ``_grid_search_mse``; deviations are listed at :class:`SearchOptions`, and errors are
    summed up in float32 and float64 whatever the value's dtype, each candidate's scale rounded as it will be stored.
    """
    shape = layout.qparam_shape(value.shape)
    assert not optimize_global_scale or math.prod(shape) == 1
    assert importance is None or layout.strategy in ("channel", "group", "tensor_group")
    if optimize_global_scale:
        global_scale = None
    problem = ShrinkProblem.of(format, value.dtype, options, layout, optimize_global_scale)
    num_steps = len(options.factors)
    is_compiled = pays_to_compile(problem, value, num_steps, finds_same=True)
    reads_pairs = is_compiled and importance is None and holds_pairs(value, layout)
    problem = replace(problem, reads_pairs=reads_pairs)
    # With few stored scales a dozen tables are held at a time, else three.
    max_groups = min(
        enlarge(MAX_TABLE, value.device) // (4 * problem.num_scales if problem.num_scales else num_steps),
        find_max_elements(problem, value) * math.prod(shape) // value.numel(),
    )
    cut = functools.partial(cut_tiles, value, layout, max_groups, importance)
    with torch.no_grad():
        best, _ = _search_tiles(problem, cut, make_factors(options, value), global_scale, is_compiled)
    return Range(best.min.reshape(shape), best.max.reshape(shape))


def shrink_global_range(
    value: Tensor, format: Format, layout: Layout, options: SearchOptions, *, importance: Tensor | None = None
) -> Range:
    """Finds the range that tensor_group's global scale follows from, shape (1,).

    It covers the best range of each group when scales are stored exactly: with the global scale of that, the scale
    of no such group is cut off. Arguments are those of :func:`shrink_ranges`.

    Source: llm-compressor 0.14. The one range for all of the value that 0.9 searches instead (``shrink_ranges`` with
    ``optimize_global_scale`` and ``layout.as_one_group()``) shrinks until the scales of the largest groups no longer
    fit their dtype.
    """
    exact = replace(format, scale_dtype=None)
    best = None
    if importance is None and layout.base_name == "weight" and reads_flags(value):
        # All groups are measured for it, which is compiled where the search that follows is.
        problem = ShrinkProblem.of(format, value.dtype, options, layout)
        is_compiled = pays_to_compile(problem, value, 0, finds_same=True)
        best = _search_largest_groups(value, exact, layout, options, is_compiled)
    if best is None:
        best = shrink_ranges(value, exact, layout, options, importance=importance)
    return Range(best.min.amin().reshape(1), best.max.amax().reshape(1))


def _search_largest_groups(
    value: Tensor, format: Format, layout: Layout, options: SearchOptions, is_compiled: bool
) -> Range | None:
    """The best ranges of groups that include the largest of all; None where they cannot be told from a few groups.

    No group's best range is larger than ``expand`` times its own. So the groups with the largest values are searched,
    and where the best range of one of them is as large as all others could be, that is the largest. Some of all
    other groups are searched beside them: patience ends the search where no group at all improves, and is out of the
    question if these few go on improving.
    """
    assert layout.group_size is not None
    groups_QG = value.detach().reshape(-1, layout.group_size)
    if len(groups_QG) <= 4 * _NUM_LARGEST:
        return None
    own = measure_tiles(groups_QG, Layout("weight", "channel"), is_compiled)
    absmax_Q = torch.maximum(-own.min, own.max)
    largest = absmax_Q.topk(_NUM_LARGEST + 1)
    spread = torch.arange(0, len(groups_QG), len(groups_QG) // _NUM_LARGEST, device=value.device)
    some_QG = groups_QG[torch.cat([largest.indices[:-1], spread])]
    problem = ShrinkProblem.of(format, value.dtype, options, layout)
    with torch.no_grad():
        tile = cut_groups(some_QG[None], None)
        is_compiled = pays_to_compile(problem, some_QG, len(options.factors), finds_same=True)
        best, num_steps = _search_tiles(problem, lambda: iter([tile]), make_factors(options, value), None, is_compiled)
    others = largest.values[-1] * options.expand
    is_certain = num_steps == len(options.factors) and torch.maximum(-best.min, best.max).amax() >= others
    return best if is_certain else None


def _search_tiles(
    problem: ShrinkProblem,
    cut: Callable[[], Iterator[Tile]],
    factors_C: Tensor,
    global_scale: Tensor | None,
    is_compiled: bool,
) -> tuple[Range, int]:
    """The range [Q] of each group's best candidate in all tiles that ``cut`` gives, and where patience ended it.

    Patience looks at the groups of all tiles. Where a flag can be read without waiting for a device, candidates behind
    the end that the steps seen so far lead to are not evaluated; an improvement in a later tile moves it, and
    tiles that stopped before are then evaluated again.
    """
    total = len(factors_C)
    any_maybe_C: Tensor | None = None
    scores: dict[int, _Scores] = {}
    num_steps = total
    while True:
        for index, tile in enumerate(cut()):
            if index in scores and scores[index].num_steps >= num_steps:
                continue
            score = _score(problem, tile, factors_C, global_scale, any_maybe_C, is_compiled)
            scores[index] = score
            found_C = score.improved.any_maybe_C
            any_maybe_C = found_C if any_maybe_C is None else any_maybe_C | found_C
        assert any_maybe_C is not None
        num_steps = total
        if reads_flags(factors_C):
            num_steps = find_end(any_maybe_C.tolist(), problem.patience)
        if all(score.num_steps >= num_steps for score in scores.values()):
            break
    if reads_flags(factors_C):
        num_steps = _settle_near_ties(problem, cut, factors_C, global_scale, scores, num_steps)
    steps_W = allow_steps(any_maybe_C, problem.patience, num_steps)
    best = []
    for index in sorted(scores):
        score = scores.pop(index)  # frees it: of small groups there are many
        words = score.improved.maybe_QW
        is_large = len(words) >= MIN_COMPILED
        best.append(run(is_compiled and is_large, choose_candidates, None, words, steps_W, *score.range, factors_C))
    if len(best) == 1:
        return best[0], num_steps
    return Range(torch.cat([part.min for part in best]), torch.cat([part.max for part in best])), num_steps


def _settle_near_ties(
    problem: ShrinkProblem,
    cut: Callable[[], Iterator[Tile]],
    factors_C: Tensor,
    global_scale: Tensor | None,
    scores: dict[int, _Scores],
    num_steps: int,
) -> int:
    """Where patience ends the search; which candidate is least is settled in ``scores``."""

    def replace_sets(find: Callable[[_Scores], Tensor], after_last: bool) -> None:
        unsettled = {index: index_K for index, score in scores.items() if len(index_K := find(score))}
        if not unsettled:
            return
        # Those of all tiles together: each call of an operation costs more than its few elements.
        tiles = (tile for index, tile in enumerate(cut()) if index in unsettled)
        ties = [
            NearTies.of(tile, scores[index].range, scores[index].improved, index_K)
            for tile, (index, index_K) in zip(tiles, sorted(unsettled.items()), strict=True)
        ]
        words = settle(problem, NearTies.join(ties), num_steps, factors_C, global_scale, after_last=after_last)
        for index, words_KW in zip(sorted(unsettled), words.split([len(part.low_K) for part in ties]), strict=True):
            improved = scores[index].improved
            maybe_QW, sure_QW = (old.index_copy(0, unsettled[index], words_KW) for old in improved[:2])
            any_sure_C = improved.any_sure_C
            if not after_last:
                any_sure_C = any_sure_C | unpack_steps(words_KW, len(factors_C)).any(1)
            improved = improved._replace(maybe_QW=maybe_QW, sure_QW=sure_QW, any_sure_C=any_sure_C)
            scores[index] = scores[index]._replace(improved=improved)

    def find_sure_end() -> int:
        any_sure_C = functools.reduce(torch.logical_or, (score.improved.any_sure_C for score in scores.values()))
        return find_end(any_sure_C.tolist(), problem.patience)

    if find_sure_end() < num_steps:
        # The end itself depends on what may have improved.
        def find_differing(score: _Scores) -> Tensor:
            return (score.improved.maybe_QW != score.improved.sure_QW).any(1).nonzero()[:, 0]

        replace_sets(find_differing, after_last=False)
        num_steps = min(num_steps, find_sure_end())
    steps_W = allow_steps(torch.ones(len(factors_C), dtype=torch.bool), problem.patience, num_steps)
    replace_sets(lambda score: find_unsettled(score.improved, steps_W), after_last=True)
    return num_steps


def _score(
    problem: ShrinkProblem,
    tile: Tile,
    factors_C: Tensor,
    global_scale: Tensor | None,
    any_improved_C: Tensor | None,
    is_compiled: bool,
) -> _Scores:
    """Evaluates the candidates of every group of a tile, as far as ``any_improved_C`` and its own errors say."""
    values_OQPG, weights_OQPG = tile
    total = len(factors_C)
    num_parts = count_parts(problem, values_OQPG, total) if problem.is_spread else 1
    if num_parts == 1 and (problem.is_spread or problem.num_scales):
        values_OQPG = as_readable(problem, values_OQPG)
        own, improved = run(is_compiled, _score_at_once, problem, values_OQPG, factors_C, global_scale, weights_OQPG)
        return _Scores(own, improved, total)
    own = run(is_compiled, measure, None, values_OQPG)
    own = Range(own.min * problem.expand, own.max * problem.expand)
    sum_errors = functools.partial(_sum_in_parts, is_compiled, problem, values_OQPG, weights_OQPG, num_parts)
    if problem.num_scales:
        errors_KQ = sum_errors(factors_C, global_scale, own)
        improved = run(is_compiled, find_improvements_of_stored, problem, errors_KQ, *own, factors_C, global_scale)
        return _Scores(own, improved, total)
    if not reads_flags(factors_C):
        improved = run(is_compiled, find_improvements, None, sum_errors(factors_C, global_scale, own))
        return _Scores(own, improved, total)
    if any_improved_C is None:
        any_improved_C = torch.zeros(total, dtype=torch.bool, device=factors_C.device)
    errors_CQ = torch.full((total, len(own.min)), math.inf, device=factors_C.device)
    num_steps, any_improved = 0, any_improved_C.tolist()
    while num_steps < (end := find_end(any_improved, problem.patience)):
        # While the last step improved no end is in sight: one more pass over the data is best spent on all the rest.
        # At least two steps at a time: torch.compile makes a graph of its own for one.
        end = total if num_steps and any_improved[num_steps - 1] else min(max(end, num_steps + 2), total)
        start = max(0, min(num_steps, end - 2))
        errors_CQ[start:end] = sum_errors(factors_C[start:end], global_scale, own)
        num_steps = end
        improved = run(is_compiled, find_improvements, None, errors_CQ)
        any_improved = (any_improved_C | improved.any_maybe_C).tolist()
    return _Scores(own, improved, num_steps)


def _sum_in_parts(
    is_compiled: bool,
    problem: ShrinkProblem,
    values_OQPG: Tensor,
    weights_OQPG: Tensor | None,
    num_parts: int,
    factors_C: Tensor,
    global_scale: Tensor | None,
    own: Range,
) -> Tensor:
    """``sum_errors``, for groups that are spread over many observations some of these at a time."""
    errors = []
    for part_OQPG in values_OQPG.tensor_split(num_parts):
        values = as_readable(problem, part_OQPG)
        errors.append(run(is_compiled, sum_errors, problem, values, factors_C, global_scale, *own, weights_OQPG))
    return errors[0] if num_parts == 1 else torch.stack(errors).sum(0)


@unrolls(1)
def _score_at_once(
    problem: ShrinkProblem,
    values_OQPG: Tensor,
    factors_C: Tensor,
    global_scale: Tensor | None,
    weights_OQPG: Tensor | None,
) -> tuple[Range, Improvements]:
    """All of ``_score`` in one graph, where no candidate is left out: each call costs."""
    low_Q, high_Q = measure_pairs(problem, values_OQPG)
    own = Range(low_Q * problem.expand, high_Q * problem.expand)
    errors_CQ = sum_errors(problem, values_OQPG, factors_C, global_scale, *own, weights_OQPG)
    if problem.num_scales:
        return own, find_improvements_of_stored(problem, errors_CQ, *own, factors_C, global_scale)
    return own, find_improvements(None, errors_CQ)
