"""Which candidate the reference's loop ends with, from the errors of all: the order of the steps, and its patience.

One bit a step says whether a group improved there. Or-reduced over the groups the bits give the step where the loop
ends; the highest bit below it is a group's answer.

Of two errors that are nearly equal float32 cannot tell which is less: what it says depends on the order of its sums. So
there are two such sets, of what improved for sure and of what may have, and :mod:`fxmse.search.near_ties` settles what
depends on the difference.

Shape suffixes as in :mod:`fxmse.search.shrunk_ranges`, and W words of a bit set.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fxmse.formats.scales import calculate_exact_scale
from fxmse.formats.tables import keep
from fxmse.search.compiling import reads_flags, unrolls
from fxmse.search.shrunk_ranges import ShrinkProblem, list_scales
from fxmse.search.tiles import Range

__all__ = [
    "Improvements",
    "allow_steps",
    "choose_candidates",
    "find_end",
    "find_improvements",
    "find_improvements_of_stored",
    "find_unsettled",
    "pack_steps",
    "unpack_steps",
]

_WORD = 24  # steps per word of a bit set: what float32 holds exactly
# Errors of float32 may be off by less than this, in parts of themselves: by the power, the product with the reciprocal
# and the sums. Measured it is at most 4.3e-7.
_NOISE = 2.0**-17


class Improvements(NamedTuple):
    """Bit sets [Q, W] of ``_WORD`` steps a word, and bools [C]: where a group improved and where any did."""

    maybe_QW: Tensor
    sure_QW: Tensor
    any_maybe_C: Tensor
    any_sure_C: Tensor


def find_end(any_improved: list[bool], patience: int) -> int:
    """How many candidates the contract's loop evaluates at least, with improvements at these steps.

    It ends once no group improved in ``patience`` steps in a row.
    """
    stale = 0
    for step, is_improved in enumerate(any_improved):
        stale = 0 if is_improved or step == 0 else stale + 1
        if stale == patience:
            return step + 1
    return len(any_improved)


@unrolls(0)
def find_improvements(_: None, errors_CQ: Tensor) -> Improvements:
    """The steps whose error is or may be below all errors before; the first one where it is finite."""
    best_Q = torch.full_like(errors_CQ[0], torch.finfo(torch.float32).max)
    words: dict[float, list[Tensor]] = {1 + _NOISE: [], 1 - _NOISE: []}
    any_improved: dict[float, list[Tensor]] = {margin: [] for margin in words}
    for part_CQ in errors_CQ.split(_WORD):
        # Floats add up powers of two as exactly, and are what vectorises.
        word_Q = dict.fromkeys(words, torch.zeros_like(best_Q, dtype=torch.float32))
        for place, errors_Q in enumerate(part_CQ.unbind(0)):
            for margin in words:
                word_Q[margin] = word_Q[margin] + torch.where(errors_Q < best_Q * margin, 2.0**place, 0.0)
            best_Q = torch.minimum(best_Q, errors_Q)
        for margin, parts in words.items():
            parts.append(keep(word_Q[margin].int()))
            place_C1 = torch.arange(len(part_CQ), device=best_Q.device, dtype=torch.int32)[:, None]
            any_improved[margin].append(((parts[-1] >> place_C1) & 1).amax(1))
    sets = [torch.stack(parts, 1) for parts in words.values()]
    return Improvements(*sets, *(torch.cat(parts) > 0 for parts in any_improved.values()))


@unrolls(3)
def find_improvements_of_stored(
    problem: ShrinkProblem,
    errors_KQ: Tensor,
    low_Q: Tensor,
    high_Q: Tensor,
    factors_C: Tensor,
    global_scale: Tensor | None,
) -> Improvements:
    """``find_improvements`` of the candidates that are stored as these scales.

    The first candidate of a scale has its error, and those after it cannot improve on that.
    """
    total = len(factors_C)
    first_KQ = keep(_find_first_steps(problem, low_Q, high_Q, total, global_scale))
    # Large steps skip scales.
    is_skipped_KQ = first_KQ >= torch.cat([first_KQ[1:], torch.full_like(first_KQ[:1], total)])
    best_Q = torch.full_like(errors_KQ[0], torch.finfo(torch.float32).max)
    steps: dict[float, list[Tensor]] = {1 + _NOISE: [], 1 - _NOISE: []}
    for errors_Q, step_Q in zip(torch.where(is_skipped_KQ, math.inf, errors_KQ), first_KQ, strict=True):
        for margin, listed in steps.items():
            listed.append(torch.where(errors_Q < best_Q * margin, step_Q, -1.0))
        best_Q = torch.minimum(best_Q, errors_Q)
    sets, any_improved = [], []
    for listed in steps.values():
        step_KQ = keep(torch.stack(listed))
        words = []
        for start in range(0, total, _WORD):
            # 2 ** place by its bits; 0 where the step is another word's.
            place_KQ = torch.where((step_KQ >= start) & (step_KQ < start + _WORD), step_KQ - start, -127.0)
            words.append(((place_KQ.to(torch.int32) + 127) << 23).view(torch.float32).sum(0))
        any_improved_C = torch.zeros(total, dtype=torch.bool, device=factors_C.device)
        if problem.patience < total:  # nobody asks otherwise
            step_C11 = torch.arange(total, device=factors_C.device, dtype=torch.float32)[:, None, None]
            any_improved_C = torch.where(step_KQ == step_C11, 1.0, 0.0).amax((1, 2)) > 0
        sets.append(torch.stack(words, 1).int())
        any_improved.append(any_improved_C)
    return Improvements(*sets, *any_improved)


def _find_first_steps(
    problem: ShrinkProblem, low_Q: Tensor, high_Q: Tensor, total: int, global_scale: Tensor | None
) -> Tensor:
    """The first step of each stored scale, [K, Q], float32; where it is ``total`` or that of the next there is none.

    It follows from the scale's bound up to roundings, of which two steps are looked at.
    """
    assert problem.num_scales

    def calculate(step_KQ: Tensor) -> Tensor:
        # In float64, as the factors are; multiplied in float32, as the candidates are.
        factor = (1 - step_KQ.double() / problem.grid).float()
        return calculate_exact_scale(low_Q * factor, high_Q * factor, problem.format, global_scale)

    _, bound_KQ = list_scales(problem, low_Q, high_Q, global_scale)
    bound_KQ = keep(bound_KQ)
    exact_Q = calculate_exact_scale(low_Q, high_Q, problem.format, global_scale)
    start_KQ = keep((((1 - bound_KQ / exact_Q) * problem.grid).ceil() - 1).clamp(0, total))
    step_KQ = start_KQ
    for step in (start_KQ, start_KQ + 1):
        step_KQ = step_KQ + torch.where(calculate(step) > bound_KQ, 1.0, 0.0)
    step_KQ = torch.where(bound_KQ < 0, total, step_KQ.clamp(max=total))
    is_own_K1 = torch.arange(problem.num_scales, device=low_Q.device)[:, None] == 0
    return torch.where(is_own_K1, 0.0, step_KQ)


def find_unsettled(improved: Improvements, steps_W: Tensor) -> Tensor:
    """The groups whose last improvement among these steps is not for sure, [K]."""
    is_unsettled_Q = torch.zeros_like(improved.sure_QW[:, 0], dtype=torch.bool)
    for maybe_Q, sure_Q, steps in zip(improved.maybe_QW.unbind(1), improved.sure_QW.unbind(1), steps_W, strict=True):
        # A word of higher steps outweighs those before it. The highest bit of either set is that of the larger number.
        maybe_Q, sure_Q = maybe_Q & steps, sure_Q & steps
        is_unsettled_Q = torch.where(maybe_Q == 0, is_unsettled_Q, (maybe_Q ^ sure_Q) > sure_Q)
    return is_unsettled_Q.nonzero()[:, 0]


def unpack_steps(words_QW: Tensor, num_steps: int) -> Tensor:
    """Bit sets as bools, [C, Q]."""
    step_C = torch.arange(num_steps, device=words_QW.device)
    return ((words_QW.T[step_C // _WORD] >> (step_C % _WORD)[:, None].int()) & 1) > 0


def pack_steps(is_step_CQ: Tensor) -> Tensor:
    """The inverse of :func:`unpack_steps`, [Q, W]."""
    words = []
    for part_CQ in is_step_CQ.split(_WORD):
        places_C1 = torch.arange(len(part_CQ), device=part_CQ.device, dtype=torch.int32)[:, None]
        words.append((part_CQ.int() << places_C1).sum(0, dtype=torch.int32))
    return torch.stack(words, 1)


def allow_steps(any_improved_C: Tensor, patience: int, num_steps: int) -> Tensor:
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


def choose_candidates(
    _: None, improved_QW: Tensor, steps_W: Tensor, low_Q: Tensor, high_Q: Tensor, factors_C: Tensor
) -> Range:
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
