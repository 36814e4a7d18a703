"""The MSE search: pure tensors in and out, and the only place that compiles it.

All candidates of a group are evaluated in one pass over the data. For a group of range (min, max) candidate c is
the range (min, max) * expand * (1 - c / grid); what is summed up for it is

    error[c] = (scale[c] / scale[0]) ** norm * sum(|round_to_grid(x / scale[c]) - x / scale[c]| ** norm)

that is sum(|fake_quantize(x) - x| ** norm) in units of the group's first scale, which keeps tiny and huge values
from leaving float32's range and makes the result independent of any power of two in x.

Three things save evaluations and change no result. Candidates whose scales are stored alike (e4m3 and powers of two
have few values) have one error. Where reading a flag waits for no device, steps behind the end that patience sets are
not taken. And of the groups that a global scale is searched for, the largest are enough where they decide it.

Shape suffixes as in :mod:`fxmse.numerics`: O observations, Q qparams, C candidates, K different scales,
P parts of a group, G elements of a group or of such a part, W words of a bit set.
"""

import functools
import itertools
import math
import struct
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fxmse.layout import MAX_ELEMENTS, Layout
from fxmse.numerics import (
    Format,
    Grid,
    calculate_exact_scale,
    calculate_global_scale,
    calculate_scale_and_zero_point,
    count_stored_scales,
    keep,
    list_stored_scales,
)
from fxmse.power import AbsolutePower

__all__ = [
    "Range",
    "SearchOptions",
    "check_argument",
    "compilation",
    "measure_range",
    "search",
    "search_global_range",
]

# Entries of a table [C, Q]: 1 MiB in float32, 2 MiB in float64, whatever the value's size.
_MAX_TABLE = 1 << 18
# Below this many elements the uncompiled search takes a few ms, whatever else is compiled.
_MIN_COMPILED = 1 << 12
# Errors (elements times candidates) that take about as long to evaluate uncompiled, at 6 ns each, as a scheme's graphs
# take to be compiled where no cache has them.
_COMPILATION_WORK = 1 << 29
# Uncompiled, so many errors are held at a time.
_MAX_EAGER = 1 << 20
_WORD = 24  # steps per word of a bit set: what float32 holds exactly
# Scales whose ratio is a power of two may round a group of floats alike. What is summed up for them differs by the
# noise of float32 powers and sums then, at most 4.3e-7 where it was measured.
_TIE = 2.0**-21
# Of a tensor_group value: so many of the largest groups, and as many of all, are looked at first.
_NUM_LARGEST = 1 << 10
_INDUCTOR_OPTIONS: dict[str, Any] = {
    # Contraction (x * y + z rounded once) makes the errors more exact, and the power a third faster.
    "cpp.enable_floating_point_contract_flag": "fast",
    # Inductor writes what takes more than 30 operations to a buffer, if it is read twice: here one of the data's size
    # times the candidates.
    "realize_opcount_threshold": 1 << 10,
}
# Groups are cut into parts of one of these lengths. It is a constant of the graph: the innermost loop needs no check
# for its end then and is two to three times as fast, and float32 sums of so few errors are exact enough.
_PARTS = (128, 64, 32, 16)
# A value of one group is better cut into longer ones: each has an entry for every candidate.
_LONG_PARTS = (1024, *_PARTS)
_STATIC = {*_LONG_PARTS, *(part // 2 for part in _LONG_PARTS)}  # the latter in pairs
# Elements of half precision that are copied to float32 at a time, where they cannot be read as pairs.
_MAX_COPIED = 1 << 18
_HALF = (torch.bfloat16, torch.float16)
_Mode = Literal["auto", "always", "never"]


class Range(NamedTuple):
    """The range of each group, float32, in units of x; shape qparam_shape."""

    min: Tensor
    max: Tensor


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
class _Problem:
    """All that a compiled search depends on but tensors: there is one graph for each of these."""

    format: Format
    dtype: torch.dtype  # of the value, and so of its scales
    power: AbsolutePower
    patience: int
    expand: float
    is_spread: bool  # whether each group is spread over all of the value, which is then one tile
    optimize_global_scale: bool
    num_scales: int | None  # that a group's candidates can be stored as, where that is fewer than candidates
    grid: float  # the factor of step c is 1 - c / grid; 0 where nobody asks
    reads_pairs: bool = False  # whether two bfloat16 are read as one float32

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
            dtype,
            options.power,
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


class _Tile(NamedTuple):
    values_OQPG: Tensor
    weights_OQPG: Tensor | None  # of the elements' errors; O and Q may be 1


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
    is_compiled = _pays_to_compile(problem, value, num_steps)
    reads_pairs = is_compiled and importance is None and _holds_pairs(value, layout)
    problem = replace(problem, reads_pairs=reads_pairs)
    max_elements = _MAX_COPIED if value.dtype in _HALF and not reads_pairs else MAX_ELEMENTS
    # With few stored scales a dozen tables are held at a time, else three.
    max_groups = min(
        _MAX_TABLE // (4 * problem.num_scales if problem.num_scales else num_steps),
        max_elements * math.prod(shape) // value.numel(),
    )

    def cut() -> Iterator[_Tile]:
        weights: Iterable[Tensor | None] = itertools.repeat(None)
        if importance is not None:
            weights = layout.channel_tiles(importance, value.shape, max_groups)
        return map(_cut_groups, layout.tiles(value.detach(), max_groups), weights)

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
    if importance is None and layout.base_name == "weight" and _reads_flags(value):
        # All groups are measured for it, which is compiled where the search that follows is.
        is_compiled = _pays_to_compile(_Problem.of(format, value.dtype, options, layout), value, 0)
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
    own = _measure_tiles(groups_QG, Layout("weight", "channel"), is_compiled)
    absmax_Q = torch.maximum(-own.min, own.max)
    largest = absmax_Q.topk(_NUM_LARGEST + 1)
    spread = torch.arange(0, len(groups_QG), len(groups_QG) // _NUM_LARGEST, device=value.device)
    some_QG = groups_QG[torch.cat([largest.indices[:-1], spread])]
    problem = _Problem.of(format, value.dtype, options, layout)
    with torch.no_grad():
        tile = _cut_groups(some_QG[None], None)
        is_compiled = _pays_to_compile(problem, some_QG, len(options.factors))
        best, num_steps = _search_tiles(problem, lambda: iter([tile]), _factors_on(options, value), None, is_compiled)
    others = largest.values[-1] * options.expand
    is_certain = num_steps == len(options.factors) and torch.maximum(-best.min, best.max).amax() >= others
    return best if is_certain else None


def measure_range(value: Tensor, layout: Layout) -> Range:
    """The smallest and largest value of each group."""
    shape = layout.qparam_shape(value.shape)
    own = _measure_tiles(value, layout, is_compiled=False)
    return Range(own.min.reshape(shape), own.max.reshape(shape))


@torch.no_grad()
def _measure_tiles(value: Tensor, layout: Layout, is_compiled: bool) -> Range:
    """The smallest and largest value of each group, [Q]."""
    tiles = (_cut_groups(tile, None).values_OQPG for tile in layout.tiles(value.detach(), _MAX_TABLE))
    parts = [_run(is_compiled, _measure, None, tile) for tile in tiles]
    return Range(torch.cat([part.min for part in parts]), torch.cat([part.max for part in parts]))


def _search_tiles(
    problem: _Problem,
    cut: Callable[[], Iterator[_Tile]],
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
        if _reads_flags(factors_C):
            num_steps = _find_end(any_improved_C.tolist(), problem.patience)
        if all(score.num_steps >= num_steps for score in scores.values()):
            break
    steps_W = _allow_steps(any_improved_C, problem.patience, num_steps)
    best = []
    for index in sorted(scores):
        score = scores.pop(index)  # frees it: of small groups there are many
        is_large = len(score.improved_QW) >= _MIN_COMPILED
        best.append(_run(is_compiled and is_large, _choose, None, score.improved_QW, steps_W, *score.range, factors_C))
    if len(best) == 1:
        return best[0], num_steps
    return Range(torch.cat([part.min for part in best]), torch.cat([part.max for part in best])), num_steps


def _score(
    problem: _Problem,
    tile: _Tile,
    factors_C: Tensor,
    global_scale: Tensor | None,
    any_improved_C: Tensor | None,
    is_compiled: bool,
) -> _Scores:
    """Evaluates the candidates of every group of a tile, as far as ``any_improved_C`` and its own errors say."""
    values_OQPG, weights_OQPG = tile
    total = len(factors_C)
    num_parts = _count_parts(problem, values_OQPG, total) if problem.is_spread else 1
    if num_parts == 1 and (problem.is_spread or problem.num_scales):
        values_OQPG = _as_readable(problem, values_OQPG)
        own, improved_QW, found_C = _run(
            is_compiled, _score_at_once, problem, values_OQPG, factors_C, global_scale, weights_OQPG
        )
        return _Scores(own, improved_QW, found_C, total)
    own = _run(is_compiled, _measure, None, values_OQPG)
    own = Range(own.min * problem.expand, own.max * problem.expand)
    sum_errors = functools.partial(_sum_in_parts, is_compiled, problem, values_OQPG, weights_OQPG, num_parts)
    if problem.num_scales:
        errors_KQ = sum_errors(factors_C, global_scale, own)
        improved_QW, found_C = _run(
            is_compiled, _find_improvements_of_stored, problem, errors_KQ, *own, factors_C, global_scale
        )
        return _Scores(own, improved_QW, found_C, total)
    if not _reads_flags(factors_C):
        improved_QW, found_C = _run(is_compiled, _find_improvements, None, sum_errors(factors_C, global_scale, own))
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
        improved_QW, found_C = _run(is_compiled, _find_improvements, None, errors_CQ)
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


def _cut_groups(values_OQG: Tensor, weights_QG: Tensor | None) -> _Tile:
    """A tile with its groups cut into parts of one of the lengths that graphs are made for, if one divides them."""
    if weights_QG is None and values_OQG.shape[1:-1].numel() == 1 and values_OQG.is_contiguous():
        # One group's parts are observations as well.
        part = _choose_part(values_OQG.numel(), _LONG_PARTS, values_OQG.shape[-1])
        return _Tile(values_OQG.reshape(-1, 1, 1, part), None)
    length = values_OQG.shape[-1]
    part = _choose_part(length, _PARTS, length)
    weights_OQPG = None if weights_QG is None else weights_QG[None].unflatten(-1, (-1, part))
    return _Tile(values_OQG.unflatten(-1, (-1, part)), weights_OQPG)


def _choose_part(length: int, parts: tuple[int, ...], default: int) -> int:
    return next((part for part in parts if length % part == 0), default)


def _holds_pairs(value: Tensor, layout: Layout) -> bool:
    """Whether the search can read two bfloat16 of a part as one float32.

    It spares a copy: Inductor does not vectorise bit casts next to half precision. A GPU's kernels need no such thing.
    """
    if value.dtype != torch.bfloat16 or value.device.type != "cpu":
        return False
    length = layout.block_structure[1] if layout.block_structure else layout.group_size or value.shape[-1]
    num_lanes = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    has_pairs = _choose_part(length, _PARTS, 0) >= 2 * num_lanes
    return has_pairs and value.is_contiguous() and value.storage_offset() % 2 == 0


def _measure(_: None, values_OQPG: Tensor) -> Range:
    """The range [Q] of each group of a tile."""
    dims = (0, -2, -1)
    return Range(values_OQPG.amin(dims).flatten().float(), values_OQPG.amax(dims).flatten().float())


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
        values = _as_readable(problem, part_OQPG)
        errors.append(_run(is_compiled, _sum_errors, problem, values, factors_C, global_scale, *own, weights_OQPG))
    return errors[0] if num_parts == 1 else torch.stack(errors).sum(0)


def _count_parts(problem: _Problem, values_OQPG: Tensor, num_steps: int) -> int:
    """Into how many parts the observations are cut, so that copies and tables stay small."""
    if _is_traced(values_OQPG):
        return 1
    num_parts = -(-values_OQPG.shape[:-1].numel() * num_steps // _MAX_TABLE)
    if values_OQPG.dtype in _HALF and not problem.reads_pairs:
        num_parts = max(num_parts, -(-values_OQPG.numel() // _MAX_COPIED))
    return num_parts


def _as_readable(problem: _Problem, values_OQPG: Tensor) -> Tensor:
    """What ``_sum_errors`` reads: a view of pairs, or float32."""
    if problem.reads_pairs:
        return values_OQPG.view(torch.float32)
    return values_OQPG if _is_traced(values_OQPG) else values_OQPG.float()


def _score_at_once(
    problem: _Problem,
    values_OQPG: Tensor,
    factors_C: Tensor,
    global_scale: Tensor | None,
    weights_OQPG: Tensor | None,
) -> tuple[Range, Tensor, Tensor]:
    """All of ``_score`` in one graph, where no candidate is left out: each call costs."""
    ranges = [_measure(None, part) for part in _split_pairs(problem, values_OQPG)]
    low_Q = functools.reduce(torch.minimum, (part.min for part in ranges))
    high_Q = functools.reduce(torch.maximum, (part.max for part in ranges))
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
    sums_CQ = _sum_powers_in_parts(problem, values_OQPG, scale_CQ, zero_point_CQ, weights_OQPG)
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


def _sum_powers_in_parts(
    problem: _Problem, values_OQPG: Tensor, scale_CQ: Tensor, zero_point_CQ: Tensor | None, weights_OQPG: Tensor | None
) -> Tensor:
    """``_sum_powers``, uncompiled so many candidates at a time as may be copies of the data."""
    if torch.compiler.is_compiling():
        # There the candidates are a loop around a row that stays in cache.
        return _sum_powers(problem, values_OQPG, scale_CQ, zero_point_CQ, weights_OQPG)
    at_a_time = max(1, min(len(scale_CQ), _MAX_EAGER // values_OQPG.numel()))
    parts = []
    for start in range(0, len(scale_CQ), at_a_time):
        some = slice(start, start + at_a_time)
        zero_point = None if zero_point_CQ is None else zero_point_CQ[some]
        parts.append(_sum_powers(problem, values_OQPG, scale_CQ[some], zero_point, weights_OQPG))
    return torch.cat(parts)


def _sum_powers(
    problem: _Problem, values_OQPG: Tensor, scale_CQ: Tensor, zero_point_CQ: Tensor | None, weights_OQPG: Tensor | None
) -> Tensor:
    """sum(weight * |round_to_grid(x / scale) - x / scale| ** norm) over O and G, shape [C, Q].

    A row's errors are summed up in float32 while it is in cache, the rows' in float64.
    """
    # fake_quantize's error is continuous in x / scale, so that a reciprocal off by an ulp changes it by an ulp.
    shape_CQ11 = (len(scale_CQ), *values_OQPG.shape[1:-2], 1, 1)
    reciprocal = keep(scale_CQ.reciprocal()).reshape(shape_CQ11)
    zero_point = None if zero_point_CQ is None else zero_point_CQ.reshape(shape_CQ11)
    values = _split_pairs(problem, values_OQPG)
    powers = [problem.power(_round(part[:, None], reciprocal, zero_point, problem.format)) for part in values]
    powers_OCQPG = functools.reduce(torch.add, powers)
    if weights_OQPG is not None:
        powers_OCQPG = powers_OCQPG * weights_OQPG[:, None]
    sums_OCQP = powers_OCQPG.sum(-1)
    if sums_OCQP.shape[0] == sums_OCQP.shape[-1] == 1:
        return sums_OCQP[0, ..., 0].flatten(1)
    return sums_OCQP.sum((0, -1), dtype=torch.float64).flatten(1)


def _split_pairs(problem: _Problem, values_OQPG: Tensor) -> list[Tensor]:
    """The values, float32: all of them, or the even and the odd ones.

    A bfloat16 is the upper half of a float32. Loads of floats are fast, those of integers are not, and the negation
    has the load be one of floats without changing any other bit.
    """
    if not problem.reads_pairs:
        return [values_OQPG.float()]
    bits = (-values_OQPG).view(torch.int32)
    return [(bits * (1 << 16)).view(torch.float32), -(bits & -(1 << 16)).view(torch.float32)]


def _round(values: Tensor, reciprocal: Tensor, zero_point: Tensor | None, format: Format) -> Tensor:
    """The error of rounding x / scale, in units of the scale; up to its sign."""
    grid = format.grid
    if grid.type == "int":
        return _round_to_integer(values, reciprocal, grid, zero_point)
    if zero_point is None:
        return _round_to_float(values, reciprocal, grid)
    scaled, zero_point = values * reciprocal, keep(zero_point)
    rounded = grid.round((scaled + zero_point).clamp(grid.qmin, grid.qmax))
    return (rounded - zero_point) - scaled


def _round_to_integer(values: Tensor, reciprocal: Tensor, grid: Grid, zero_point: Tensor | None) -> Tensor:
    """The error of rounding x / scale to an integer grid, in units of the scale.

    1.5 * 2 ** 23 has the adder round, half to even. Positive floats are ordered as their bits are, and negative ones
    below them, so that the clamp is one of integers: one instruction a bound, where one of floats that passes NaN on
    takes four. The last difference passes it on.
    """
    shift, shift_bits = 1.5 * 2.0**23, 0x4B40_0000
    bits = (values * reciprocal + shift).view(torch.int32)
    low, high = shift_bits + int(grid.qmin), shift_bits + int(grid.qmax)
    if zero_point is None:
        bits = bits.clamp(low, high)
    else:
        # A whole zero point moves the grid by whole steps: moving the bounds instead keeps x / scale exact.
        steps = zero_point.to(torch.int32)
        bits = torch.minimum(torch.maximum(bits, keep(low - steps)), keep(high - steps))
    return (bits.view(torch.float32) - shift) - values * reciprocal


def _round_to_float(values: Tensor, reciprocal: Tensor, grid: Grid) -> Tensor:
    """The error of rounding |x| / scale to a float grid, in units of the scale; both signs have the same.

    As ``Grid.round``, with the clamp one of integers: see ``_round_to_integer``.
    """
    magnitudes = values.abs()
    clamped = (magnitudes * reciprocal).view(torch.int32).clamp(max=_to_bits(grid.qmax))
    power = (clamped & 0x7F80_0000).clamp(min=_to_bits(2.0**grid.min_exponent)).view(torch.float32)
    shift = power * 2.0 ** (23 - grid.mantissa_bits)
    rounded = (clamped.view(torch.float32) + shift) - shift
    return rounded - magnitudes * reciprocal


def _to_bits(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")


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
    if _reads_flags(any_improved_C) or patience >= total:
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
    if len(improved_QW) == 1 and _reads_flags(improved_QW):
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


def _pays_to_compile(problem: _Problem, value: Tensor, num_steps: int) -> bool:
    """The rule of :func:`compilation`; a graph that is being made takes the search as it is."""
    if _is_traced(value) or value.numel() < _MIN_COMPILED or (mode := _mode.get()) == "never":
        return False
    if mode == "auto" and _uncompiled_work[problem] < _COMPILATION_WORK:
        _uncompiled_work[problem] += value.numel() * num_steps
    return mode == "always" or _uncompiled_work[problem] >= _COMPILATION_WORK


# The tensor whose first dimension are steps that a stage looks at one after the other.
_UNROLLED = {_find_improvements: 0, _score_at_once: 1, _find_improvements_of_stored: 3}


@contextmanager
def compilation(mode: _Mode) -> Iterator[None]:
    """Sets within a ``with`` block whether searches are compiled.

    Args:
        mode: "auto", the default: a scheme's searches run uncompiled until they would have taken as long as compiling
            does, and compiled from then on. So a small model never waits for a compiler, a large one compiles at its
            first weight, and neither takes more than twice the time of the better choice. "always" compiles from the
            first value of 4096 elements on, "never" not at all. What is compiled is the same; candidates whose errors
            tie to 2 ** -21 may be told apart differently.

    Raises:
        ValueError: another mode.
    """
    if mode not in get_args(_Mode):
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(get_args(_Mode))}")
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


_mode: ContextVar[_Mode] = ContextVar("compilation", default="auto")
_uncompiled_work: Counter[_Problem] = Counter()


def _run(is_compiled: bool, stage: Callable[..., Any], problem: _Problem | None, *tensors: Tensor | None) -> Any:
    """Runs a stage of the search, compiled where that is wanted and can be done."""
    if not is_compiled or not _Compiler.is_usable or any(t is not None and _is_traced(t) for t in tensors):
        return stage(problem, *tensors)
    try:
        # Of a view Dynamo would look at what it is a view of, and it at who asks for the graph.
        bare = [None if tensor is None else tensor.data for tensor in tensors]
        unrolled = bare[_UNROLLED[stage]] if stage in _UNROLLED else None
        num_steps = None if unrolled is None else len(unrolled)
        return _compile(stage, problem, num_steps, tuple(map(_sign, bare)))(*bare)
    except Exception as error:
        if not _is_missing_compiler(error):
            raise
        _Compiler.is_usable = False
        warnings.warn(
            f"the MSE search runs uncompiled, several times slower: {_first_line(error)}. "
            "Install a C++ compiler (g++ or clang), or set CXX to one that works.",
            RuntimeWarning,
            stacklevel=2,
        )
        return stage(problem, *tensors)


_serial = itertools.count()


class _Compiler:
    """Whether the machine has one; found out by the first use."""

    is_usable = True


def _sign(tensor: Tensor | None) -> tuple[object, ...] | None:
    """What a graph is made for: of each dimension whether it is 1, and the length of parts."""
    if tensor is None:
        return None
    sizes: list[int | None] = [1 if size == 1 else None for size in tensor.shape]
    if tensor.dim() > 3 and tensor.shape[-1] in _STATIC:
        sizes[-1] = tensor.shape[-1]
    return tensor.is_contiguous(), tensor.dtype, tensor.device, *sizes


@functools.cache
def _compile(
    stage: Callable[..., Any], problem: _Problem | None, num_steps: int | None, signature: tuple[Any, ...]
) -> Callable[..., Any]:
    """One graph per problem, signature and, where it looks at steps one after the other, their number.

    A code object of its own keeps Dynamo's limit of recompilations away from it.
    """
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list as list_entries

    def run(*tensors: Tensor | None) -> Any:
        return stage(problem, *tensors)

    code = run.__code__.replace(co_name=f"{stage.__name__.strip('_')}_{next(_serial)}")
    run = types.FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)
    options = {**_INDUCTOR_OPTIONS, "guard_filter_fn": functools.partial(_keep_guards, signature)}
    compiled = torch.compile(run, fullgraph=True, options=options)
    varying = [
        (place, dim)
        for place, signed in enumerate(signature)
        for dim, size in enumerate(signed[3:] if signed else ())
        if size is None
    ]

    def call(*tensors: Tensor | None) -> Any:
        # Which dimensions vary from layer to layer and from batch to batch: naming them spares the recompilation that
        # would find it out. Dynamo may look at any call: its caches are reset, or the mode is another.
        for place, dim in varying:
            torch._dynamo.maybe_mark_dynamic(tensors[place], dim)
        if list_entries(code):
            return compiled(*tensors)
        # Sizes that happen to be equal now need not be so later.
        with torch.fx.experimental._config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return compiled(*tensors)

    return call


def _keep_guards(signature: tuple[Any, ...], guards: Sequence[Any]) -> list[bool]:
    """Which guards are looked at: those of the mode, the sizes, and the strides that the signature leaves open.

    Looking at all of them takes longer than the search of a small value, and some hold nothing that the graph depends
    on: whether an operator of torch.library or inference mode is at work.
    """
    open_tensors = {f"L['tensors'][{i}]" for i, signed in enumerate(signature) if signed and not signed[0]}
    return [guard.name in ("", *open_tensors) or guard.guard_type == "DUPLICATE_INPUT" for guard in guards]


def _is_missing_compiler(error: BaseException | None) -> bool:
    from torch._inductor import exc

    missing = (exc.InvalidCxxCompiler, exc.CppCompileError)
    while error is not None:
        if isinstance(error, missing) or "TritonMissing" in type(error).__name__:
            return True
        error = getattr(error, "inner_exception", None) or error.__cause__
    return False


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _is_traced(value: Tensor) -> bool:
    """Whether somebody else's graph is being made, or ``value`` has no data that a kernel could read."""
    return torch.compiler.is_compiling() or isinstance(value, FakeTensor)


def _reads_flags(tensor: Tensor) -> bool:
    """Whether a flag's value can be looked at without waiting for a device."""
    return tensor.device.type == "cpu" and not _is_traced(tensor)


def _factors_on(options: SearchOptions, value: Tensor) -> Tensor:
    # One copy to the device; a traced tensor must not outlive its trace.
    make = _make_tensor if _is_traced(value) else _make_tensor_once
    return make(options.factors, value.device)


def _make_tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


_make_tensor_once = functools.cache(_make_tensor)
