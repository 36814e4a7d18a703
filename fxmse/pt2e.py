"""fxmse's observers inside of torchao's PT2E: a quantizer says where, and the search finds the ranges.

::

    config = use_observer(get_default_x86_inductor_quantization_config(), "exact_mse")
    prepared = prepare_pt2e(program.module(), X86InductorQuantizer().set_global(config))
"""

import dataclasses
import math
from typing import Any, TypeVar

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor
from torchao.quantization.pt2e.observer import UniformQuantizationObserverBase
from torchao.quantization.pt2e.quantizer import QuantizationSpec

from fxmse.observers import Observer

__all__ = ["PT2EObserver", "use_observer"]

_Config = TypeVar("_Config")
_PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_symmetric)
_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)


class PT2EObserver(UniformQuantizationObserverBase):
    """An observer of fxmse's as PT2E calls observers: what ``QuantizationSpec.observer_or_fake_quant_ctr`` takes.

    Args:
        observer: its name.
        observer_kwargs: its arguments. Scales are above 0, as PT2E has them.
        ch_axis: of a scheme per channel, the dimension of channels.
        arguments: those of PT2E's own: dtype, qscheme, quant_min, quant_max, eps.

    Attributes:
        requested: the observer's name and arguments.

    Raises:
        ValueError: a name that is not registered, or arguments that the observer does not have.
    """

    def __init__(
        self,
        observer: str = "exact_mse",
        observer_kwargs: dict[str, Any] | None = None,
        ch_axis: int = 0,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.ch_axis = ch_axis
        self.requested = (observer, dict(observer_kwargs or {}))
        self._is_by_channel = self.qscheme in _PER_CHANNEL
        args = QuantizationArgs(
            num_bits=math.ceil(math.log2(self.quant_max - self.quant_min + 1)),
            strategy="channel" if self._is_by_channel else "tensor",
            symmetric=self.qscheme in _SYMMETRIC,
        )
        options = {"negative_scale": False} if observer == "exact_mse" else {}
        role = "weight" if self._is_by_channel else "input"
        kwargs = {**options, **(observer_kwargs or {})}
        self.observer = Observer.load_from_registry(observer, base_name=role, args=args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Takes a value into account, and returns it."""
        value = x.detach()
        self.observer(value.movedim(self.ch_axis, 0).flatten(1) if self._is_by_channel else value)
        return x

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Scale and zero point by PT2E's own arithmetic, of the range that was found; one, or one a channel.

        Raises:
            ValueError: no value has been seen.
        """
        if not self.observer.has_statistics:
            raise ValueError("a PT2E observer has seen no value: run sample data through the prepared model")
        range = self.observer.finish(self.observer.state).range
        assert range is not None
        return self._calculate_qparams(range.min.flatten(), range.max.flatten())


def use_observer(config: _Config, observer: str, **observer_kwargs: Any) -> _Config:
    """A quantizer's configuration (as X86InductorQuantizer's or XNNPACKQuantizer's) with fxmse's observer in its specs.

    Args:
        config: a dataclass of ``QuantizationSpec``; not changed. What is dynamic keeps its own observer.
        observer: the name, of weights and of activations.
        observer_kwargs: its arguments.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        spec = getattr(config, field.name)
        if isinstance(spec, QuantizationSpec) and not spec.is_dynamic and spec.dtype in (torch.int8, torch.uint8):
            constructor = PT2EObserver.with_args(observer=observer, observer_kwargs=observer_kwargs)
            changes[field.name] = dataclasses.replace(spec, observer_or_fake_quant_ctr=constructor)
    if not changes:
        raise ValueError(f"{type(config).__name__} has no static int8 specs: there is nothing to observe")
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]
