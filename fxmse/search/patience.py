"""Which candidate the reference's loop ends with, from the errors of all: the order of the steps, and its patience.

One bit a step says whether a group improved there. Or-reduced over the groups the bits give the step where the loop
ends; the highest bit below it is a group's answer.

Shape suffixes as in :mod:`fxmse.search.shrunk_ranges`, and W words of a bit set.
"""

import functools
import math

import torch
from torch import Tensor

from fxmse.formats.scales import calculate_exact_scale
from fxmse.formats.tables import keep
from fxmse.search.compiling import reads_flags, unrolls
from fxmse.search.shrunk_ranges import ShrinkProblem, list_scales
from fxmse.search.tiles import Range

__all__ = ["allow_steps", "choose_candidates", "find_end", "find_improvements", "find_improvements_of_stored"]

_WORD = 24  # steps per word of a bit set: what float32 holds exactly
# Scales whose ratio is a power of two may round a group of floats alike. What is summed up for them differs by the
# noise of float32 powers and sums then, at most 4.3e-7 where it was measured.
_TIE = 2.0**-21


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
def find_improvements(_: None, errors_CQ: Tensor) -> tuple[Tensor, Tensor]:
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
def find_improvements_of_stored(
    problem: ShrinkProblem,
    errors_KQ: Tensor,
    low_Q: Tensor,
    high_Q: Tensor,
    factors_C: Tensor,
    global_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``find_improvements`` of the candidates that are stored as these scales.

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
