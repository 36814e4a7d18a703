"""The MSE search: pure tensors in and out, and the only place that compiles it.

All candidates of a group are evaluated in one pass over the data. For a group of range (min, max) candidate c is
the range (min, max) * expand * (1 - c / grid); what is summed up for it is

    error[c] = (scale[c] / scale[0]) ** norm * sum(|round_to_grid(x / scale[c]) - x / scale[c]| ** norm)

that is sum(|fake_quantize(x) - x| ** norm) in units of the group's first scale, which keeps tiny and huge values
from leaving float32's range and makes the result independent of any power of two in x.

Shape suffixes as in :mod:`fxmse.numerics`: O observations, Q qparams, C candidates, G elements of a group.
"""

import functools
import itertools
import math
import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fxmse.layout import MAX_ELEMENTS, Layout
from fxmse.numerics import Format, calculate_global_scale, calculate_scale_and_zero_point
from fxmse.power import AbsolutePower

__all__ = ["Range", "SearchOptions", "check_argument", "measure_range", "search", "search_global_range"]

# Entries of a table [Q, C]: 4 MiB in float32, 8 MiB for the errors' float64, whatever the value's size.
_MAX_TABLE = 1 << 20
# Below this many elements the uncompiled search takes a few ms, and a compiled one would not earn its compilation.
_MIN_COMPILED = 1 << 12
# Uncompiled, so many errors are held at a time.
_MAX_EAGER = 1 << 20
_WORD = 62  # steps per word of a bit set
# Scales whose ratio is a power of two may round a group of floats alike. What is summed up for them differs by the
# noise of float32 powers and sums then, at most 4.3e-7 where it was measured.
_TIE = 2.0**-21
_HALF = (torch.bfloat16, torch.float16)


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
    is_one_group: bool
    optimize_global_scale: bool


class _Scores(NamedTuple):
    low_Q: Tensor  # float32
    high_Q: Tensor  # float32
    improved_QW: Tensor  # int64 bit sets: the steps at which a group's error fell
    any_improved_C: Tensor  # bool: the steps at which any group's did


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
    problem = _Problem(
        format,
        value.dtype,
        options.power,
        int(options.patience) or len(options.factors),
        float(options.expand),
        layout.strategy == "tensor",
        optimize_global_scale,
    )
    with torch.no_grad():
        factors_C = _factors_on(options, value)
        max_groups = _MAX_TABLE // len(options.factors)
        tiles = layout.tiles(value.detach(), max_groups)
        if problem.is_one_group and value.dtype not in _HALF:
            best = _run(_solve, problem, next(tiles), factors_C, global_scale)
        elif problem.is_one_group or layout.base_name != "weight":
            best = _solve_in_parts(problem, next(tiles), factors_C, global_scale)
        else:
            weights: Iterable[Tensor | None] = itertools.repeat(None)
            if importance is not None:
                weights = layout.channel_tiles(importance, value.shape, max_groups)
            scores = [
                _run(_score, problem, tile, factors_C, global_scale, weights_QG)
                for tile, weights_QG in zip(tiles, weights, strict=False)
            ]
            best = _choose(problem, scores, factors_C)
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
    best = search(value, replace(format, scale_dtype=None), layout, options, importance=importance)
    return Range(best.min.amin().reshape(1), best.max.amax().reshape(1))


def measure_range(value: Tensor, layout: Layout) -> Range:
    """The smallest and largest value of each group."""
    shape = layout.qparam_shape(value.shape)
    with torch.no_grad():
        parts = [_measure(tile) for tile in layout.tiles(value.detach(), _MAX_TABLE)]
    return Range(torch.cat([p.min for p in parts]).reshape(shape), torch.cat([p.max for p in parts]).reshape(shape))


def _solve(problem: _Problem, values_OQG: Tensor, factors_C: Tensor, global_scale: Tensor | None) -> Range:
    """The whole search of a value that is one tile."""
    return _choose(problem, [_score(problem, values_OQG, factors_C, global_scale)], factors_C)


def _solve_in_parts(problem: _Problem, values_OQG: Tensor, factors_C: Tensor, global_scale: Tensor | None) -> Range:
    """The same for groups that are spread over many observations: errors of some at a time are added up."""
    low_Q, high_Q = _measure(values_OQG, problem.expand)
    num_parts = 1
    if not _is_traced(values_OQG):
        table_size = values_OQG.shape[0] * values_OQG.shape[1] * len(factors_C)
        num_parts = max(-(-values_OQG.numel() // MAX_ELEMENTS), -(-table_size // _MAX_TABLE))
    errors_QC = torch.stack(
        [
            _run(_sum_errors, problem, part_OQG, factors_C, global_scale, low_Q, high_Q)
            for part_OQG in values_OQG.tensor_split(num_parts)
        ]
    ).sum(0)
    return _choose(problem, [_compare(low_Q, high_Q, errors_QC)], factors_C)


def _score(
    problem: _Problem,
    values_OQG: Tensor,
    factors_C: Tensor,
    global_scale: Tensor | None,
    weights_QG: Tensor | None = None,
) -> _Scores:
    """Evaluates every candidate of every group of a tile that holds all of its groups."""
    low_Q, high_Q = _measure(values_OQG, problem.expand)
    errors_QC = _sum_errors(problem, values_OQG, factors_C, global_scale, low_Q, high_Q, weights_QG)
    return _compare(low_Q, high_Q, errors_QC)


def _measure(values_OQG: Tensor, expand: float = 1.0) -> Range:
    """``expand`` times the range [Q] of each group of a tile."""
    return Range(values_OQG.amin((0, 2)).float() * expand, values_OQG.amax((0, 2)).float() * expand)


def _compare(low_Q: Tensor, high_Q: Tensor, errors_QC: Tensor) -> _Scores:
    """What is kept of an error table."""
    improved_QC = _find_improvements(errors_QC)
    return _Scores(low_Q, high_Q, _pack_bits(improved_QC), improved_QC.any(0))


def _choose(problem: _Problem, scores: list[_Scores], factors_C: Tensor) -> Range:
    """The range [Q] of each group's best candidate; patience looks at the groups of all tiles."""
    any_improved_C = torch.stack([score.any_improved_C for score in scores]).any(0)
    step_Q = torch.cat([_find_best_step(score.improved_QW, any_improved_C, problem.patience) for score in scores])
    factor_Q = factors_C[step_Q]
    return Range(
        torch.cat([score.low_Q for score in scores]) * factor_Q,
        torch.cat([score.high_Q for score in scores]) * factor_Q,
    )


def _sum_errors(
    problem: _Problem,
    values_OQG: Tensor,
    factors_C: Tensor,
    global_scale: Tensor | None,
    low_Q: Tensor,
    high_Q: Tensor,
    weights_QG: Tensor | None = None,
) -> Tensor:
    """error[c] of every group, shape [Q, C], float64; ``weights_QG`` (Q may be 1) weighs the elements."""
    min_QC, max_QC = low_Q[:, None] * factors_C, high_Q[:, None] * factors_C
    if problem.optimize_global_scale:
        global_scale = calculate_global_scale(min_QC, max_QC)
    scale_QC, zero_point_QC = calculate_scale_and_zero_point(
        min_QC, max_QC, problem.format, dtype=problem.dtype, global_scale=global_scale
    )
    if global_scale is not None:
        scale_QC = scale_QC / global_scale
    # Compiled, the candidates are a loop around a row that stays in cache. Uncompiled they would be copies of the
    # data: take as many at a time as fit.
    num_steps = scale_QC.shape[1]
    at_a_time = num_steps
    if not torch.compiler.is_compiling():
        at_a_time = max(1, min(num_steps, _MAX_EAGER // values_OQG.numel()))
    parts = [
        _sum_powers(problem, values_OQG, scale, zero_point, weights_QG)
        for scale, zero_point in zip(scale_QC.split(at_a_time, 1), zero_point_QC.split(at_a_time, 1), strict=True)
    ]
    sums_QC = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return sums_QC * torch.pow(scale_QC / scale_QC[:, :1], problem.power.exponent)


def _sum_powers(
    problem: _Problem, values_OQG: Tensor, scale_QC: Tensor, zero_point_QC: Tensor, weights_QG: Tensor | None
) -> Tensor:
    """sum(weight * |round_to_grid(x / scale) - x / scale| ** norm) over O and G, shape [Q, C], float64."""
    grid = problem.format.grid
    # fake_quantize's error is continuous in x / scale, so that a reciprocal off by an ulp changes it by an ulp.
    reciprocal_QC1 = _keep(scale_QC.reciprocal())[:, :, None]
    values_OQCG = values_OQG.float()[:, :, None] * reciprocal_QC1
    if grid.type == "int":
        # A whole zero point moves the grid by whole steps: moving the bounds instead keeps x / scale exact. The clamp
        # is spelt with relu, which takes one instruction where a maximum that passes NaN on takes four.
        qmin_QC1, qmax_QC1 = _keep(grid.qmin - zero_point_QC)[:, :, None], _keep(grid.qmax - zero_point_QC)[:, :, None]
        above_OQCG = torch.relu(grid.round(values_OQCG - qmin_QC1))
        rounded_OQCG = qmax_QC1 - torch.relu((grid.qmax - grid.qmin) - above_OQCG)
    elif problem.format.symmetric:
        rounded_OQCG = grid.round(values_OQCG.clamp(grid.qmin, grid.qmax))
    else:
        zero_point_QC1 = _keep(zero_point_QC)[:, :, None]
        rounded_OQCG = grid.round((values_OQCG + zero_point_QC1).clamp(grid.qmin, grid.qmax)) - zero_point_QC1
    # A row's errors are summed while it is in cache, the rows' in float64.
    powers_OQCG = problem.power(rounded_OQCG - values_OQCG)
    if weights_QG is not None:
        powers_OQCG = powers_OQCG * weights_QG[:, None]
    return powers_OQCG.sum(-1).sum(0, dtype=torch.float64)


def _keep(table_QC: Tensor) -> Tensor:
    """``table_QC`` itself, and in a compiled graph a buffer.

    Inductor would otherwise compute each entry anew for every vector of the innermost loop. It writes whatever
    as_strided looks at.
    """
    return table_QC.as_strided(table_QC.shape, table_QC.stride())


def _find_improvements(errors_QC: Tensor) -> Tensor:
    """The steps whose error is below all errors before by more than a tie; the first one where it is finite."""
    best_QC = torch.cummin(errors_QC, dim=1).values
    first = errors_QC[:, :1] < torch.finfo(torch.float32).max
    return torch.cat([first, errors_QC[:, 1:] < best_QC[:, :-1] * (1 - _TIE)], dim=1)


def _pack_bits(flags_QC: Tensor) -> Tensor:
    """Bit sets [Q, W] of ``_WORD`` flags a word."""
    words = []
    for part in flags_QC.split(_WORD, 1):
        place = torch.arange(part.shape[1], device=part.device)
        words.append((part.long() << place).sum(1))
    return torch.stack(words, 1)


def _find_best_step(improved_QW: Tensor, any_improved_C: Tensor, patience: int) -> Tensor:
    """Each group's last improvement before the search would have ended, [Q].

    The contract's loop ends once no group improved in ``patience`` steps in a row, so that no step behind such a
    run counts.
    """
    num_steps = any_improved_C.shape[0]
    if patience < num_steps:
        is_stale = (~any_improved_C).unfold(0, patience, 1).all(1)
        has_ended = torch.cat([is_stale.new_zeros(patience), is_stale.cumsum(0)[:-1] > 0])
        improved_QW = improved_QW & _pack_bits(~has_ended[None])
    # A whole number has as many bits as there are powers of two up to it.
    powers = 1 << torch.arange(min(_WORD, num_steps), device=improved_QW.device)
    highest_QW = (improved_QW[:, :, None] >= powers).sum(2) - 1
    offset_W = torch.arange(0, num_steps, _WORD, device=improved_QW.device)
    return torch.where(highest_QW >= 0, highest_QW + offset_W, 0).amax(1)


def _run(stage: Callable[..., Any], problem: _Problem, values_OQG: Tensor, *tensors: Tensor | None) -> Any:
    """Runs ``_solve``, ``_score`` or ``_sum_errors``, compiled where that pays and can be done."""
    if _is_traced(values_OQG):
        return stage(problem, values_OQG, *tensors)
    if values_OQG.numel() <= MAX_ELEMENTS:
        # Inductor does not vectorise bit casts next to half precision; the copy is small and pays five times over.
        values_OQG = values_OQG.float()
    if values_OQG.numel() < _MIN_COMPILED or not _Compiler.is_usable:
        return stage(problem, values_OQG, *tensors)
    # Which dimensions vary from layer to layer and from batch to batch: naming them spares the recompilation that
    # would find it out. Weights are one observation, and per-tensor values one group: there O and Q stay 1.
    for tensor in (values_OQG, *(t for t in tensors if t is not None and t.dim() > 1)):
        for dim in range(tensor.dim()):
            if tensor.shape[dim] != 1:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
    try:
        return _compile(stage, problem)(values_OQG, *tensors)
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
        return stage(problem, values_OQG, *tensors)


_serial = itertools.count()


class _Compiler:
    """Whether the machine has one; found out by the first use."""

    is_usable = True


@functools.cache
def _compile(stage: Callable[..., Any], problem: _Problem) -> Callable[..., Any]:
    """One graph per problem: a code object of its own keeps Dynamo's limit of recompilations away from it."""

    def run(values_OQG: Tensor, *tensors: Tensor | None) -> Any:
        return stage(problem, values_OQG, *tensors)

    grid = problem.format.grid
    code = run.__code__.replace(co_name=f"search_{grid.type}{grid.num_bits}_{next(_serial)}")
    run = types.FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)
    # Contraction (x * y + z rounded once) makes the errors more exact, and the power a third faster.
    return torch.compile(run, fullgraph=True, options={"cpp.enable_floating_point_contract_flag": "fast"})


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


def _factors_on(options: SearchOptions, value: Tensor) -> Tensor:
    # One copy to the device; a traced tensor must not outlive its trace.
    make = _make_tensor if _is_traced(value) else _make_tensor_once
    return make(options.factors, value.device)


def _make_tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


_make_tensor_once = functools.cache(_make_tensor)
