"""What observers keep: named tensors, so that they can be saved, merged and gone back to."""

import itertools
import json
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fxmse.observers.counting import count_non_finite
from fxmse.search.tiles import Range

__all__ = [
    "Described",
    "Lock",
    "State",
    "Stateful",
    "are_finite",
    "hold",
    "plain_modes",
    "refuse_differences",
    "without_autocast",
]

_EXTRA = "_extra_state"  # torch's key of what a state dict has beside parameters and buffers
_NUM_SHOWN = 8  # differences that an error names
_UNDESCRIBED = (
    "the state does not say which formats, observers and weights it is of, as states did not always: it is taken for "
    "one of this calibration"
)


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element is NaN or Inf; one synchronisation, and no copy: small groups have many ranges."""
    ends = [end for tensor in tensors if tensor.numel() for end in tensor.aminmax()]
    return not ends or bool(torch.stack(ends).isfinite().all())


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


class Lock:
    """Has one thread at a time do what another must not do meanwhile; a copy is another lock."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.number = next(self._numbers)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type, tuple]:
        return Lock, ()


@contextmanager
def hold(locks: Iterable[Lock]) -> Iterator[None]:
    """Holds several locks within a ``with`` block, taken in an order that is the same for all threads."""
    with ExitStack() as stack:
        for lock in sorted(set(locks), key=lambda lock: lock.number):
            stack.enter_context(lock)
        yield


@contextmanager
def plain_modes(value: Tensor) -> Iterator[None]:
    """Within a ``with`` block arithmetic on ``value``'s device is what is written, whatever the model runs under.

    Autocast would compute in another dtype than the tensors', inference mode gives tensors that nothing outside of it
    can write, and gradients keep alive what they are of.
    """
    with torch.inference_mode(False), torch.no_grad(), without_autocast(value):
        yield


def without_autocast(value: Tensor) -> AbstractContextManager[object]:
    """That part of :func:`plain_modes` that graphs can have.

    Raises:
        ValueError: the default dtype is not float32. It is one of the process, so that it cannot be set for a moment.
    """
    if (default := torch.get_default_dtype()) != torch.float32:
        raise ValueError(
            f"the default dtype is {default}, in which ranges would be searched: call "
            "torch.set_default_dtype(torch.float32) first. The model's own dtype stays what it is"
        )
    device_type = value.device.type
    is_on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if is_on else nullcontext()


class Described(nn.Module):
    """A module whose state dict says what its state is of, and which takes the state of nothing else.

    That is JSON in a tensor of bytes, under torch's own key for what is not a parameter or buffer. There is none where
    there is no state, or nothing to say of it.

    Attributes:
        name: what the module is called in messages.
    """

    name: str

    def describe(self) -> dict[str, str]:
        """All that a state depends on, fact by fact."""
        raise NotImplementedError

    @property
    def has_statistics(self) -> bool:
        """Whether there is a state."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        """:meth:`describe` as uint8."""
        return torch.tensor(list(json.dumps(self.describe()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing: what was loaded is of what this module is of."""

    def read_facts(self, state_dict: Mapping[str, Any], prefix: str) -> dict[str, str]:
        """What a state dict says that the state of this module is of; nothing where it does not say."""
        saved = state_dict.get(prefix + _EXTRA)
        if saved is None:
            return {}
        try:
            facts = json.loads(bytes(saved.tolist()))
            return {str(name): str(fact) for name, fact in facts.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.name}: {prefix}{_EXTRA} of the state is no description: {error}") from None

    def find_difference(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """How what a state dict has for this module is of something else; None where it is not.

        What one of them does not know, as an option of a later version, has no say.
        """
        return self._compare(self.read_facts(state_dict, prefix), self.describe())

    def _compare(self, there: Mapping[str, str], here: Mapping[str, str]) -> str | None:
        differing = [name for name, fact in here.items() if there.get(name, fact) != fact]
        if "observer" in differing:  # whose options are others in any case
            differing = ["observer"]
        facts = ", ".join(f"{name} is {there[name]} in the state and {here[name]} here" for name in differing)
        return f"{self.name}: {facts}" if differing else None

    def _make_room(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Prepares for a state that is about to be loaded."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not (self.has_statistics and self.describe()):
            del destination[prefix + _EXTRA]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        refuse_differences([self.find_difference(state_dict, prefix)])
        self._make_room(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        if prefix + _EXTRA in missing_keys:
            missing_keys.remove(prefix + _EXTRA)
            if self.has_statistics and self.describe():
                warnings.warn(_UNDESCRIBED, UserWarning, stacklevel=2)


def refuse_differences(found: Iterable[str | None]) -> None:
    """Raises ValueError where any of what :meth:`Described.find_difference` has found is one."""
    if differences := [difference for difference in found if difference]:
        shown, rest = "; ".join(differences[:_NUM_SHOWN]), len(differences) - _NUM_SHOWN
        raise ValueError(
            f"the state is of another calibration: {shown}{f'; and {rest} more' if rest > 0 else ''}. Nothing was "
            "loaded: prepare the graph as the one that was saved, or calibrate anew"
        )


class Stateful(Described, Generic[Kept]):
    """A module whose state is a NamedTuple of tensors, each a buffer of its field's name.

    So a state dict saves what was seen, also in the middle of a calibration, and loading it goes on from there: a
    module that has seen nothing takes the state of one that has, and the other way round.

    Attributes:
        lock: held while the state becomes that after one more value.
    """

    state_class: ClassVar[type]

    def __init__(self) -> None:
        super().__init__()
        self.lock = Lock()
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

    @property
    def has_statistics(self) -> bool:
        """Whether any value has been seen."""
        return any(tensor is not None for tensor in self.state._asdict().values())

    def go_back(self, state: Kept) -> None:
        """Goes back to an earlier state."""
        self.state = state

    def _make_room(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        # A buffer is copied into one of its shape, and there may be none yet.
        for name in self.state_class._fields:  # type: ignore[attr-defined]
            saved = state_dict.get(prefix + name)
            setattr(self, name, None if saved is None else torch.empty_like(saved))
