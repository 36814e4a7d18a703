"""What observers keep: named tensors, so that they can be saved, merged and gone back to."""

from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fxmse.observers.counting import count_non_finite
from fxmse.search.tiles import Range

__all__ = ["State", "Stateful"]


class State(NamedTuple):
    """What an observer keeps; None before the first value, and where an observer has no use for it.

    Attributes:
        min_vals: float32, qparam_shape, in units of x; with ``max_vals`` the range of each group.
        max_vals: see above.
        global_min_vals: float32, (1,), in units of x; with ``global_max_vals`` the range that tensor_group's global
            scale follows from.
        global_max_vals: see above.
        counts: int64, (groups, patterns): how often each group had which value (:mod:`fxmse.observers.counting`).
        num_values: int64, no dimension: of how many values ``min_vals`` and ``max_vals`` are the average.
        like: an empty tensor, of the values' dtype and on their device.
    """

    min_vals: Tensor | None = None
    max_vals: Tensor | None = None
    global_min_vals: Tensor | None = None
    global_max_vals: Tensor | None = None
    counts: Tensor | None = None
    num_values: Tensor | None = None
    like: Tensor | None = None

    @property
    def range(self) -> Range | None:
        """The range of each group."""
        return None if self.min_vals is None or self.max_vals is None else Range(self.min_vals, self.max_vals)

    @property
    def global_range(self) -> Range | None:
        """The range that the global scale follows from."""
        if self.global_min_vals is None or self.global_max_vals is None:
            return None
        return Range(self.global_min_vals, self.global_max_vals)

    @property
    def witnesses(self) -> list[Tensor]:
        """Float tensors, one of which is not finite if a value was not."""
        ranges = [tensor for tensor in self[:4] if tensor is not None]
        if self.counts is None or self.like is None:
            return ranges
        # 1 / 0 is infinite; nothing waits for the device.
        return [*ranges, (count_non_finite(self.counts, self.like.dtype) == 0).float().reciprocal()]

    def with_range(self, range: Range) -> "State":
        """The state with another range of each group."""
        return self.replace(min_vals=range.min, max_vals=range.max)

    def with_global_range(self, range: Range) -> "State":
        """The state with another range for the global scale."""
        return self.replace(global_min_vals=range.min, global_max_vals=range.max)

    def replace(self, **fields: Tensor) -> "State":
        """The state with other values of some fields.

        As ``_replace``, whose result torch.compile of torch 2.11 cannot keep.
        """
        return State(**{**self._asdict(), **fields})

    def to(self, device: torch.device) -> "State":
        """The state on a device."""
        return State(*(None if tensor is None else tensor.to(device) for tensor in self))


class _Kept(Protocol):
    """A NamedTuple of tensors, which may all be None."""

    def _asdict(self) -> dict[str, Tensor | None]: ...


Kept = TypeVar("Kept", bound=_Kept)


class Stateful(nn.Module, Generic[Kept]):
    """A module whose state is a NamedTuple of tensors, each a buffer of its field's name.

    So a state dict saves what was seen, also in the middle of a calibration, and loading it goes on from there: a
    module that has seen nothing takes the state of one that has, and the other way round.
    """

    state_class: ClassVar[type]

    def __init__(self) -> None:
        super().__init__()
        for name in self.state_class._fields:  # type: ignore[attr-defined]
            self.register_buffer(name, None)

    @property
    def state(self) -> Kept:
        """What has been kept so far."""
        fields = self.state_class._fields  # type: ignore[attr-defined]
        return self.state_class(*(getattr(self, name) for name in fields))

    @state.setter
    def state(self, state: Kept) -> None:
        for name, tensor in state._asdict().items():
            if getattr(self, name) is not tensor:  # a module's attributes are slow to set
                setattr(self, name, tensor)

    def go_back(self, state: Kept) -> None:
        """Goes back to an earlier state."""
        self.state = state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A buffer is copied into one of its shape, and there may be none yet.
        for name in self.state_class._fields:  # type: ignore[attr-defined]
            saved = state_dict.get(prefix + name)
            setattr(self, name, None if saved is None else torch.empty_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
