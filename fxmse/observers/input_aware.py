"""Observers of weights that take into account the activations that meet them."""

import warnings
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from fxmse.observers.base import Observer
from fxmse.observers.inputs import Importance, Inputs, Products

__all__ = ["InputAwareObserver", "check_input_options"]


def check_input_options(strict: object, mask: object) -> None:
    """Raises ValueError where an argument is none that :class:`InputAwareObserver` takes."""
    if not isinstance(strict, bool):
        raise ValueError(f"strict={strict!r}: expected True or False")
    if mask is not None and not isinstance(mask, str):
        raise ValueError(f"mask={mask!r}: expected the name of one of the graph's inputs")


class InputAwareObserver(Observer):
    """An observer of weights that can take into account the activations that meet them.

    Show ``inputs`` the activations, then the observer the weight. Without any that can be used the errors count alike,
    and a warning says why; where ``strict``, that is a ValueError. Its options have ``strict`` and ``mask``.
    """

    inputs: Inputs | None

    def __init__(self, base_name: str, args: QuantizationArgs, **observer_kwargs: Any) -> None:
        super().__init__(base_name, args, **observer_kwargs)
        self.inputs = self.make_inputs() if self.needs_inputs else None

    @property
    def takes_negative_scales(self) -> bool:
        """Whether a weight's scales are searched below 0, too, of an observer that has the option."""
        # Of 8 bits it would gain a hundredth of the error at most, and their kernels are the pickiest.
        return bool(self.options.negative_scale) and self.format.grid.num_bits < 8

    def make_inputs(self) -> Inputs:
        """What is to be kept of the activations; here how large they are."""
        return Importance()

    def share_inputs(self, inputs: Inputs) -> None:
        """Has what a graph has as a module of its own be this observer's: a state dict names it once."""
        self._modules.pop("inputs", None)
        object.__setattr__(self, "inputs", inputs)

    def observe(self, value: Tensor) -> None:
        """As :meth:`Observer.observe`; says why where there are no activations to search with."""
        if self.inputs is not None and (reason := self._find_fault(self.inputs, value)):
            message = f"{self.name}: {type(self).__name__} has {reason}"
            if self.options.strict:
                raise ValueError(message)
            warnings.warn(f"{message}: all errors count alike", UserWarning, stacklevel=2)
        super().observe(value)

    def find_importance(self, value: Tensor) -> Tensor | None:
        """E[x ** 2] of each channel by its mean over them, float32; None where it cannot be used."""
        if not isinstance(self.inputs, Importance) or self._find_fault(self.inputs, value):
            return None
        mean = self.inputs.mean()
        assert mean is not None
        # The channels' sum may leave float32 where none of them does.
        average = mean.double().mean() + torch.finfo(torch.float32).tiny
        return (mean / average).float().to(value.device)

    def find_products(self, value: Tensor, damping: float) -> Tensor | None:
        """:meth:`Products.mean`; None where it cannot be used."""
        if not isinstance(self.inputs, Products) or self._find_fault(self.inputs, value):
            return None
        mean = self.inputs.mean(damping)
        assert mean is not None
        return mean.to(value.device)

    def find_crosses(self, value: Tensor) -> Tensor | None:
        """:meth:`Products.mean_crosses`; None where it is not known."""
        if not isinstance(self.inputs, Products):
            return None
        crosses = self.inputs.mean_crosses()
        return None if crosses is None else crosses.to(value.device)

    def _find_fault(self, inputs: Inputs, value: Tensor) -> str | None:
        """Why the activations cannot be used."""
        if self.base_name != "weight":
            return f"no meaning for a value of role {self.base_name}: expected a weight"
        if self.layout.strategy not in inputs.strategies:
            return f"no meaning for strategy={self.layout.strategy}: expected {', '.join(inputs.strategies)}"
        return inputs.find_fault(value.shape[-1])
