"""The MSE search of the contract: pure tensors in and out.

All candidates of a group are evaluated in one pass over the data. For a group of range (min, max) candidate c is
the range (min, max) * expand * (1 - c / grid); what is summed up for it is

    error[c] = (scale[c] / scale[0]) ** norm * sum(|round_to_grid(x / scale[c]) - x / scale[c]| ** norm)

that is sum(|fake_quantize(x) - x| ** norm) in units of the group's first scale, which keeps tiny and huge values
from leaving float32's range and makes the result independent of any power of two in x.

Three things save evaluations and change no result. Candidates whose scales are stored alike (e4m3 and powers of two
have few values) have one error. Where reading a flag waits for no device, steps behind the end that patience sets are
not taken. And of the groups that a global scale is searched for, the largest are enough where they decide it.

Shape suffixes as in :mod:`fxmse.search.error_sums`, and K different scales, W words of a bit set.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from fxmse.formats.grids import (
    Format,
    calculate_exact_scale,
    calculate_global_scale,
    calculate_scale_and_zero_point,
    count_stored_scales,
    keep,
    list_stored_scales,
)
from fxmse.formats.layout import Layout
from fxmse.search.compiling import MIN_COMPILED, is_traced, pays_to_compile, reads_flags, run, unrolls
from fxmse.search.error_sums import (
    MAX_TABLE,
    Arithmetic,
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
    sum_powers,
)
from fxmse.search.power import AbsolutePower

__all__ = [
    "SearchOptions",
    "check_argument",
    "measure_range",
    "search",
    "search_global_range",
]

_WORD = 24  # steps per word of a bit set: what float32 holds exactly
# Scales whose ratio is a power of two may round a group of floats alike. What is summed up for them differs by the
# noise of float32 powers and sums then, at most 4.3e-7 where it was measured.
_TIE = 2.0**-21
# Of a tensor_group value: so many of the largest groups, and as many of all, are looked at first.
_NUM_LARGEST = 1 << 10


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Which candidates are tried and what they are judged by.

    Attributes:
        maxshrink: the range shrinks by at most this part; in (0, 1].
        patience: the search ends after so many steps in a row in which no group improved; at least 1.
        grid: candidates are p = 1 - i / grid for i in 0 .. maxshrink * grid - 1; above 0.
        norm: exponent of the error; above 0. 2 is the mean squared error.
        expand: the range that is shrunk is so many times the value's own; at least 1.
        factors: the factor p of each candidate; follows from maxshrink and grid.
        power: |e| ** norm; follows from norm.

    Deviation from the reference: maxshrink * grid is taken of the decimal numbers as written (.29 * 100 is 29
    steps, where float arithmetic truncates to 28), and no steps at all is an error.
    """

    maxshrink: float = 0.20
    patience: int = 5
    grid: float = 100.0
    norm: float = 2.4
    expand: float = 1.0
    factors: tuple[float, ...] = field(init=False, repr=False, compare=False)
    power: AbsolutePower = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises ValueError naming the argument that is out of range."""
        self._check_limits()
        check_argument("grid", self.grid, "a number above 0", lambda v: 0 < v < math.inf)
        check_argument("norm", self.norm, "a number above 0", lambda v: 0 < v < math.inf)
        check_argument("expand", self.expand, "a number of at least 1", lambda v: 1 <= v < math.inf)
        num_steps = self._count_steps(math.floor(Fraction(str(self.maxshrink)) * Fraction(str(self.grid))))
        if num_steps < 1:
            raise ValueError(
                f"maxshrink={self.maxshrink} and grid={self.grid} make no search step: "
                "expected maxshrink * grid of at least 1"
            )
        object.__setattr__(self, "factors", tuple(1 - i / self.grid for i in range(num_steps)))
        object.__setattr__(self, "power", AbsolutePower.of(self.norm))

    def _check_limits(self) -> None:
        check_argument("maxshrink", self.maxshrink, "a number in (0, 1]", lambda v: 0 < v <= 1)
        check_argument("patience", self.patience, "a whole number of at least 1", lambda v: v >= 1 and v == int(v))

    def _count_steps(self, num_shrinks: int) -> int:
        """The number of candidates, of maxshrink * grid."""
        return num_shrinks


def check_argument(name: str, value: object, expected: str, is_allowed: Callable[[float], bool]) -> None:
    """Raises ValueError where ``value`` is no number, or none that is allowed."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_allowed(value):
        raise ValueError(f"{name}={value!r}: expected {expected}")


@dataclass(frozen=True)
class _Problem(Arithmetic):
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
    ) -> "_Problem":
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


class _Scores(NamedTuple):
    """What is kept of a tile."""

    range: Range  # [Q], what the candidates are factors of
    improved_QW: Tensor  # int32 bit sets: the steps at which a group's error fell
    any_improved_C: Tensor  # bool: the steps at which any group's did
    num_steps: int  # so many candidates were evaluated


def search(
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
    problem = _Problem.of(format, value.dtype, options, layout, optimize_global_scale)
    num_steps = len(options.factors)
    is_compiled = pays_to_compile(problem, value, num_steps)
    reads_pairs = is_compiled and importance is None and holds_pairs(value, layout)
    problem = replace(problem, reads_pairs=reads_pairs)
    # With few stored scales a dozen tables are held at a time, else three.
    max_groups = min(
        MAX_TABLE // (4 * problem.num_scales if problem.num_scales else num_steps),
        find_max_elements(problem, value.dtype) * math.prod(shape) // value.numel(),
    )
    cut = functools.partial(cut_tiles, value, layout, max_groups, importance)
    with torch.no_grad():
        best, _ = _search_tiles(problem, cut, _factors_on(options, value), global_scale, is_compiled)
    return Range(best.min.reshape(shape), best.max.reshape(shape))


def search_global_range(
    value: Tensor, format: Format, layout: Layout, options: SearchOptions, *, importance: Tensor | None = None
) -> Range:
    """Finds the range that tensor_group's global scale follows from, shape (1,).

    It covers the best range of each group when scales are stored exactly: with the global scale of that, the scale
    of no such group is cut off. Arguments are those of :func:`search`.

    Source: llm-compressor 0.14. The one range for all of the value that 0.9 searches instead (``search`` with
    ``optimize_global_scale`` and ``layout.as_one_group()``) shrinks until the scales of the largest groups no longer
    fit their dtype.
    """
    exact = replace(format, scale_dtype=None)
    best = None
    if importance is None and layout.base_name == "weight" and reads_flags(value):
        # All groups are measured for it, which is compiled where the search that follows is.
        is_compiled = pays_to_compile(_Problem.of(format, value.dtype, options, layout), value, 0)
        best = _search_largest_groups(value, exact, layout, options, is_compiled)
    if best is None:
        best = search(value, exact, layout, options, importance=importance)
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
    problem = _Problem.of(format, value.dtype, options, layout)
    with torch.no_grad():
        tile = cut_groups(some_QG[None], None)
        is_compiled = pays_to_compile(problem, some_QG, len(options.factors))
        best, num_steps = _search_tiles(problem, lambda: iter([tile]), _factors_on(options, value), None, is_compiled)
    others = largest.values[-1] * options.expand
    is_certain = num_steps == len(options.factors) and torch.maximum(-best.min, best.max).amax() >= others
    return best if is_certain else None


def measure_range(value: Tensor, layout: Layout) -> Range:
    """The smallest and largest value of each group."""
    shape = layout.qparam_shape(value.shape)
    own = measure_tiles(value, layout, is_compiled=False)
    return Range(own.min.reshape(shape), own.max.reshape(shape))


def _search_tiles(
    problem: _Problem,
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
    any_improved_C: Tensor | None = None
    scores: dict[int, _Scores] = {}
    num_steps = total
    while True:
        for index, tile in enumerate(cut()):
            if index in scores and scores[index].num_steps >= num_steps:
                continue
            score = _score(problem, tile, factors_C, global_scale, any_improved_C, is_compiled)
            scores[index] = score
            found_C = score.any_improved_C
            any_improved_C = found_C if any_improved_C is None else any_improved_C | found_C
        assert any_improved_C is not None
        num_steps = total
        if reads_flags(factors_C):
            num_steps = _find_end(any_improved_C.tolist(), problem.patience)
        if all(score.num_steps >= num_steps for score in scores.values()):
            break
    steps_W = _allow_steps(any_improved_C, problem.patience, num_steps)
    best = []
    for index in sorted(scores):
        score = scores.pop(index)  # frees it: of small groups there are many
        is_large = len(score.improved_QW) >= MIN_COMPILED
        best.append(run(is_compiled and is_large, _choose, None, score.improved_QW, steps_W, *score.range, factors_C))
    if len(best) == 1:
        return best[0], num_steps
    return Range(torch.cat([part.min for part in best]), torch.cat([part.max for part in best])), num_steps


def _score(
    problem: _Problem,
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
        own, improved_QW, found_C = run(
            is_compiled, _score_at_once, problem, values_OQPG, factors_C, global_scale, weights_OQPG
        )
        return _Scores(own, improved_QW, found_C, total)
    own = run(is_compiled, measure, None, values_OQPG)
    own = Range(own.min * problem.expand, own.max * problem.expand)
    sum_errors = functools.partial(_sum_in_parts, is_compiled, problem, values_OQPG, weights_OQPG, num_parts)
    if problem.num_scales:
        errors_KQ = sum_errors(factors_C, global_scale, own)
        improved_QW, found_C = run(
            is_compiled, _find_improvements_of_stored, problem, errors_KQ, *own, factors_C, global_scale
        )
        return _Scores(own, improved_QW, found_C, total)
    if not reads_flags(factors_C):
        improved_QW, found_C = run(is_compiled, _find_improvements, None, sum_errors(factors_C, global_scale, own))
        return _Scores(own, improved_QW, found_C, total)
    if any_improved_C is None:
        any_improved_C = torch.zeros(total, dtype=torch.bool, device=factors_C.device)
    errors_CQ = torch.full((total, len(own.min)), math.inf, device=factors_C.device)
    num_steps, improved = 0, any_improved_C.tolist()
    while num_steps < (end := _find_end(improved, problem.patience)):
        # While the last step improved no end is in sight: one more pass over the data is best spent on all the rest.
        # At least two steps at a time: torch.compile makes a graph of its own for one.
        end = total if num_steps and improved[num_steps - 1] else min(max(end, num_steps + 2), total)
        start = max(0, min(num_steps, end - 2))
        errors_CQ[start:end] = sum_errors(factors_C[start:end], global_scale, own)
        num_steps = end
        improved_QW, found_C = run(is_compiled, _find_improvements, None, errors_CQ)
        improved = (any_improved_C | found_C).tolist()
    return _Scores(own, improved_QW, found_C, num_steps)


def _find_end(any_improved: list[bool], patience: int) -> int:
    """How many candidates the contract's loop evaluates at least, with improvements at these steps.

    It ends once no group improved in ``patience`` steps in a row.
    """
    stale = 0
    for step, is_improved in enumerate(any_improved):
        stale = 0 if is_improved or step == 0 else stale + 1
        if stale == patience:
            return step + 1
    return len(any_improved)


def _sum_in_parts(
    is_compiled: bool,
    problem: _Problem,
    values_OQPG: Tensor,
    weights_OQPG: Tensor | None,
    num_parts: int,
    factors_C: Tensor,
    global_scale: Tensor | None,
    own: Range,
) -> Tensor:
    """``_sum_errors``, for groups that are spread over many observations some of these at a time."""
    errors = []
    for part_OQPG in values_OQPG.tensor_split(num_parts):
        values = as_readable(problem, part_OQPG)
        errors.append(run(is_compiled, _sum_errors, problem, values, factors_C, global_scale, *own, weights_OQPG))
    return errors[0] if num_parts == 1 else torch.stack(errors).sum(0)


@unrolls(1)
def _score_at_once(
    problem: _Problem,
    values_OQPG: Tensor,
    factors_C: Tensor,
    global_scale: Tensor | None,
    weights_OQPG: Tensor | None,
) -> tuple[Range, Tensor, Tensor]:
    """All of ``_score`` in one graph, where no candidate is left out: each call costs."""
    low_Q, high_Q = measure_pairs(problem, values_OQPG)
    own = Range(low_Q * problem.expand, high_Q * problem.expand)
    errors_CQ = _sum_errors(problem, values_OQPG, factors_C, global_scale, *own, weights_OQPG)
    if problem.num_scales:
        return own, *_find_improvements_of_stored(problem, errors_CQ, *own, factors_C, global_scale)
    return own, *_find_improvements(None, errors_CQ)


def _sum_errors(
    problem: _Problem,
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
        scale_CQ, _ = _list_scales(problem, low_Q, high_Q, global_scale)
        if global_scale is not None:
            scale_CQ = scale_CQ / global_scale
        base_Q, zero_point_CQ = scale_CQ[0], None
    else:
        base_Q, _ = _calculate_scale(problem, low_Q, high_Q, global_scale)
        min_CQ, max_CQ = factors_C[:, None] * low_Q, factors_C[:, None] * high_Q
        scale_CQ, zero_point_CQ = _calculate_scale(problem, min_CQ, max_CQ, global_scale)
    sums_CQ = sum_powers(problem, values_OQPG, scale_CQ, zero_point_CQ, weights_OQPG)
    return sums_CQ * torch.pow(scale_CQ / base_Q, problem.power.exponent)


def _list_scales(
    problem: _Problem, low_Q: Tensor, high_Q: Tensor, global_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``list_stored_scales`` of ranges."""
    assert problem.num_scales
    exact_Q = calculate_exact_scale(low_Q, high_Q, problem.format, global_scale)
    return list_stored_scales(exact_Q, problem.format, problem.num_scales)


def _calculate_scale(
    problem: _Problem, min: Tensor, max: Tensor, global_scale: Tensor | None
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


@unrolls(0)
def _find_improvements(_: None, errors_CQ: Tensor) -> tuple[Tensor, Tensor]:
    """The steps whose error is below all errors before by more than a tie; the first one where it is finite.

    Returns:
        bit sets [Q, W] of ``_WORD`` steps a word, and which steps improved any group, bool [C].
    """
    best_Q = torch.full_like(errors_CQ[0], torch.finfo(torch.float32).max)
    words, any_improved = [], []
    margin = 1.0
    for part_CQ in errors_CQ.split(_WORD):
        # Floats add up powers of two as exactly, and are what vectorises.
        word_Q = torch.zeros_like(best_Q, dtype=torch.float32)
        for place, errors_Q in enumerate(part_CQ.unbind(0)):
            word_Q = word_Q + torch.where(errors_Q < best_Q * margin, 2.0**place, 0.0)
            best_Q, margin = torch.minimum(best_Q, errors_Q), 1 - _TIE
        words.append(keep(word_Q.int()))
        place_C1 = torch.arange(len(part_CQ), device=word_Q.device, dtype=torch.int32)[:, None]
        any_improved.append(((words[-1] >> place_C1) & 1).amax(1))
    return torch.stack(words, 1), torch.cat(any_improved) > 0


@unrolls(3)
def _find_improvements_of_stored(
    problem: _Problem, errors_KQ: Tensor, low_Q: Tensor, high_Q: Tensor, factors_C: Tensor, global_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``_find_improvements`` of the candidates that are stored as these scales.

    The first candidate of a scale has its error, and those after it cannot improve on that.
    """
    total = len(factors_C)
    first_KQ = keep(_find_first_steps(problem, low_Q, high_Q, total, global_scale))
    # Large steps skip scales.
    is_skipped_KQ = first_KQ >= torch.cat([first_KQ[1:], torch.full_like(first_KQ[:1], total)])
    best_Q = torch.full_like(errors_KQ[0], torch.finfo(torch.float32).max)
    steps, margin = [], 1.0
    for errors_Q, step_Q in zip(torch.where(is_skipped_KQ, math.inf, errors_KQ), first_KQ, strict=True):
        steps.append(torch.where(errors_Q < best_Q * margin, step_Q, -1.0))
        best_Q, margin = torch.minimum(best_Q, errors_Q), 1 - _TIE
    step_KQ = keep(torch.stack(steps))
    words = []
    for start in range(0, total, _WORD):
        # 2 ** place by its bits; 0 where the step is another word's.
        place_KQ = torch.where((step_KQ >= start) & (step_KQ < start + _WORD), step_KQ - start, -127.0)
        words.append(((place_KQ.to(torch.int32) + 127) << 23).view(torch.float32).sum(0))
    any_improved_C = torch.zeros(total, dtype=torch.bool, device=factors_C.device)
    if problem.patience < total:  # nobody asks otherwise
        step_C11 = torch.arange(total, device=factors_C.device, dtype=torch.float32)[:, None, None]
        any_improved_C = torch.where(step_KQ == step_C11, 1.0, 0.0).amax((1, 2)) > 0
    return torch.stack(words, 1).int(), any_improved_C


def _find_first_steps(
    problem: _Problem, low_Q: Tensor, high_Q: Tensor, total: int, global_scale: Tensor | None
) -> Tensor:
    """The first step of each stored scale, [K, Q], float32; where it is ``total`` or that of the next there is none.

    It follows from the scale's bound up to roundings, of which two steps are looked at.
    """
    assert problem.num_scales

    def calculate(step_KQ: Tensor) -> Tensor:
        # In float64, as the factors are; multiplied in float32, as the candidates are.
        factor = (1 - step_KQ.double() / problem.grid).float()
        return calculate_exact_scale(low_Q * factor, high_Q * factor, problem.format, global_scale)

    _, bound_KQ = _list_scales(problem, low_Q, high_Q, global_scale)
    bound_KQ = keep(bound_KQ)
    exact_Q = calculate_exact_scale(low_Q, high_Q, problem.format, global_scale)
    start_KQ = keep((((1 - bound_KQ / exact_Q) * problem.grid).ceil() - 1).clamp(0, total))
    step_KQ = start_KQ
    for step in (start_KQ, start_KQ + 1):
        step_KQ = step_KQ + torch.where(calculate(step) > bound_KQ, 1.0, 0.0)
    step_KQ = torch.where(bound_KQ < 0, total, step_KQ.clamp(max=total))
    is_own_K1 = torch.arange(problem.num_scales, device=low_Q.device)[:, None] == 0
    return torch.where(is_own_K1, 0.0, step_KQ)


def _allow_steps(any_improved_C: Tensor, patience: int, num_steps: int) -> Tensor:
    """Bit sets [W] of the steps before the contract's loop ends, ``num_steps`` where flags can be read.

    It ends once no group improved in ``patience`` steps in a row, so that no step behind such a run counts.
    """
    total = len(any_improved_C)
    if reads_flags(any_improved_C) or patience >= total:
        return _make_words(total, num_steps, any_improved_C.device)
    is_stale = (~any_improved_C).unfold(0, patience, 1).all(1)
    has_ended = torch.cat([is_stale.new_zeros(patience), is_stale.cumsum(0)[:-1] > 0])
    words = []
    for part in (~has_ended).split(_WORD):
        words.append((part.int() << torch.arange(len(part), device=part.device)).sum(dtype=torch.int32))
    return torch.stack(words)


@functools.cache
def _make_words(total: int, num_steps: int, device: torch.device) -> Tensor:
    """Bit sets [W] of the first ``num_steps`` of ``total`` steps."""
    words = [(1 << min(max(num_steps - start, 0), _WORD)) - 1 for start in range(0, total, _WORD)]
    return torch.tensor(words, dtype=torch.int32, device=device)


def _choose(_: None, improved_QW: Tensor, steps_W: Tensor, low_Q: Tensor, high_Q: Tensor, factors_C: Tensor) -> Range:
    """The candidate of each group's last improvement among these steps; the first one where it has none."""
    if len(improved_QW) == 1 and reads_flags(improved_QW):
        # Of one number an operation takes longer than Python.
        words = zip(improved_QW[0].tolist(), steps_W.tolist(), strict=True)
        bits = sum((word & steps) << (_WORD * index) for index, (word, steps) in enumerate(words))
        factor = factors_C[max(bits.bit_length() - 1, 0)]
        return Range(low_Q * factor, high_Q * factor)
    # A float's exponent is the place of its highest bit; that of 0 is below all.
    highest_QW = ((improved_QW & steps_W).float().view(torch.int32) >> 23) - 127
    offset_W = torch.arange(0, _WORD * len(steps_W), _WORD, device=steps_W.device)
    step_Q = torch.where(highest_QW >= 0, highest_QW + offset_W, 0).amax(1)
    factor_Q = factors_C[step_Q]
    return Range(low_Q * factor_Q, high_Q * factor_Q)


def _factors_on(options: SearchOptions, value: Tensor) -> Tensor:
    # One copy to the device; a traced tensor must not outlive its trace.
    make = _make_tensor if is_traced(value) else _make_tensor_once
    return make(options.factors, value.device)


def _make_tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


_make_tensor_once = functools.cache(_make_tensor)
