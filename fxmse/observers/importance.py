"""How much the errors of a weight's channels count: by how large the activations are that they are multiplied with."""

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from fxmse.observers.base import Observer
from fxmse.observers.states import Stateful

__all__ = ["Importance", "ImportanceObserver", "ImportanceState", "check_importance_options"]

_STRATEGIES = ("channel", "group", "tensor_group")


class ImportanceState(NamedTuple):
    """What an :class:`Importance` keeps; None before the first value.

    Attributes:
        squares: the sum of each channel's, float64, shape (channels,).
        num_tokens: float64, no dimension.
    """

    squares: Tensor | None = None
    num_tokens: Tensor | None = None

    @property
    def witnesses(self) -> list[Tensor]:
        """Float tensors, one of which is not finite if a value was not."""
        return [tensor for tensor in self if tensor is not None]


class Importance(Stateful[ImportanceState]):
    """Adds up x ** 2 of each channel of the values that it is shown, and passes them on.

    In a graph it is the node on the value that feeds a weight's op.
    """

    state_class = ImportanceState
    squares: Tensor | None
    num_tokens: Tensor | None

    def init(self) -> ImportanceState:
        """The state before the first value."""
        return ImportanceState()

    def merge(self, state: ImportanceState, other: ImportanceState) -> ImportanceState:
        """The state after all that two states have seen."""
        if state.squares is None or state.num_tokens is None:
            return other
        if other.squares is None or other.num_tokens is None:
            return state
        device = state.squares.device
        return ImportanceState(state.squares + other.squares.to(device), state.num_tokens + other.num_tokens.to(device))

    @torch.no_grad()
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns ``x`` as it is.

        Args:
            x: float, shape (..., channels).
            mask: bool or numbers, shape (...) or what broadcasts to it; where it is 0, x is padding and is left out.
        """
        squares = x.detach().double().square()
        if mask is None:
            # One element makes the count a tensor of x's device without waiting for it.
            num_tokens = squares.new_ones(()) * (x.numel() // x.shape[-1])
        else:
            is_kept = mask.bool().expand(x.shape[:-1])
            # Padding may be anything, NaN, too.
            squares = torch.where(is_kept[..., None], squares, 0.0)
            num_tokens = is_kept.sum().double()
        total = squares.reshape(-1, x.shape[-1]).sum(0)
        # What was loaded may be on another device than x.
        self.state = self.merge(ImportanceState(total, num_tokens), self.state)
        return x

    def mean(self) -> Tensor | None:
        """E[x ** 2] of each channel, float32, shape (channels,); None where nothing was seen."""
        if self.squares is None or self.num_tokens is None or not self.num_tokens:
            return None
        return (self.squares / self.num_tokens).float()


def check_importance_options(strict: object, mask: object) -> None:
    """Raises ValueError where an argument is none that :class:`ImportanceObserver` takes."""
    if not isinstance(strict, bool):
        raise ValueError(f"strict={strict!r}: expected True or False")
    if mask is not None and not isinstance(mask, str):
        raise ValueError(f"mask={mask!r}: expected the name of one of the graph's inputs")


class ImportanceObserver(Observer):
    """An observer of weights that can take into account how large the activations are that meet each channel.

    Show ``importance`` the activations, then the observer the weight. Without importance that can be used the errors
    count alike, and a warning says why; where ``strict``, that is a ValueError. Its options have ``strict`` and
    ``mask``.
    """

    importance: Importance | None

    def __init__(self, base_name: str, args: QuantizationArgs, **observer_kwargs: Any) -> None:
        super().__init__(base_name, args, **observer_kwargs)
        self.importance = Importance() if self.needs_importance else None

    def give_importance(self) -> Importance | None:
        """The importance, for a graph that has it as a module of its own: a state dict names it once."""
        importance = self.importance
        self._modules.pop("importance", None)
        object.__setattr__(self, "importance", importance)
        return importance

    def observe(self, value: Tensor) -> None:
        """As :meth:`Observer.observe`; says why where there is no importance to search with."""
        if self.importance is not None and (reason := self._find_fault(self.importance, value)):
            message = f"{self.name or self.base_name}: {type(self).__name__} has {reason}"
            if self.options.strict:
                raise ValueError(message)
            warnings.warn(f"{message}: all errors count alike", UserWarning, stacklevel=2)
        super().observe(value)

    def find_importance(self, value: Tensor) -> Tensor | None:
        """E[x ** 2] of each channel by its mean over them, float32; None where it cannot be used."""
        if self.importance is None or self._find_fault(self.importance, value):
            return None
        mean = self.importance.mean()
        assert mean is not None
        # The channels' sum may leave float32 where none of them does.
        average = mean.double().mean() + torch.finfo(torch.float32).tiny
        return (mean / average).float().to(value.device)

    def _find_fault(self, importance: Importance, value: Tensor) -> str | None:
        """Why the importance cannot be used."""
        if self.base_name != "weight":
            return f"no meaning for a value of role {self.base_name}: expected a weight"
        if self.layout.strategy not in _STRATEGIES:
            return f"no meaning for strategy={self.layout.strategy}: expected {', '.join(_STRATEGIES)}"
        mean = importance.mean()
        if mean is None:
            return "seen no activations: run calibration data through the graph first"
        if len(mean) != value.shape[-1]:
            return f"seen activations of {len(mean)} channels, where the weight has {value.shape[-1]}"
        faults: Iterable[tuple[Tensor, str]] = (
            (~mean.isfinite().all(), "seen activations that are not finite"),
            ((mean < 0).any(), "importance that is negative"),
            ((mean == 0).all(), "seen activations that are all 0"),
        )
        return next((fault for is_so, fault in faults if is_so), None)
