"""Moving averages of ranges."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxmse.observers.base import Observer
from fxmse.observers.states import State
from fxmse.search.options import check_argument
from fxmse.search.tiles import Range

__all__ = ["AverageOptions", "AveragingObserver", "average_ranges"]


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """Arguments of a moving average.

    Attributes:
        averaging_constant: weight of the new batch; in (0, 1].
    """

    averaging_constant: float = 0.01

    def __post_init__(self) -> None:
        """Raises ValueError where the constant is out of range."""
        check_argument("averaging_constant", self.averaging_constant, "a number in (0, 1]", lambda v: 0 < v <= 1)


def average_ranges(old: Range, new: Range, constant: float | Tensor) -> Range:
    """Old * (1 - constant) + new * constant."""
    return Range(*(torch.lerp(a, b, constant) for a, b in zip(old, new, strict=True)))


class AveragingObserver(Observer):
    """Keeps a moving average of each value's range.

    That of two halves of the data is the average of theirs, each weighed by how many values it is of. A moving average
    depends on the order of the values, so that this is near the one of all of them, not equal to it.
    """

    def _update_met(self, state: State, value: Tensor) -> State:
        num_values = torch.ones((), dtype=torch.int64, device=value.device)
        if state.num_values is not None:
            num_values = num_values + state.num_values
        return super()._update_met(state, value).replace(num_values=num_values)

    def accumulate(self, old: Range | None, new: Range) -> Range:
        """The moving average; the first range as it is."""
        constant = self.options.averaging_constant
        return new if old is None or constant == 1 else average_ranges(old, new, constant)

    def _merge_seen(self, state: State, other: State) -> State:
        assert state.num_values is not None
        assert other.num_values is not None
        num_values = state.num_values + other.num_values
        part = (other.num_values / num_values).float()
        if state.range is not None and other.range is not None:
            state = state.with_range(average_ranges(state.range, other.range, part))
        if state.global_range is not None and other.global_range is not None:
            state = state.with_global_range(average_ranges(state.global_range, other.global_range, part))
        return state.replace(num_values=num_values)
