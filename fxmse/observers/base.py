"""Observers by name: what is kept of the values seen, and the scale and zero point that come of it.

An observer is one state machine: ``init`` gives the state before the first value, ``update`` that after one more,
``merge`` that of two halves of the data, and ``finish`` the ranges that the qparams follow from. All four are pure
functions of states, which are tensors (:class:`fxmse.observers.states.State`).
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from compressed_tensors.quantization import DynamicType, QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.registry import RegistryMixin, standardize_lookup_name
from torch import Tensor

from fxmse.formats.grids import Format
from fxmse.formats.layout import Layout
from fxmse.formats.scales import calculate_global_scale, round_scale
from fxmse.formats.tables import is_traced
from fxmse.observers.states import State, Stateful, are_finite, plain_modes, without_autocast
from fxmse.search.compiling import beside_compiler
from fxmse.search.tiles import Range, cover_ranges, measure_range

__all__ = ["QPARAMS", "NoOptions", "Observer", "describe_non_finite"]


_AT_A_TIME = 1 << 20  # ranges whose qparams are calculated at once, in several float32 copies
QPARAMS = ("scale", "zero_point", "global_scale")
"""What :meth:`Observer.get_qparams` gives. A buffer is called so, behind its site's name: ``fc.weight_scale``."""


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """An observer without arguments."""


class Observer(Stateful[State], RegistryMixin):
    """Finds the quantization parameters of one value from the samples of it that it is shown.

    Where ``args.dynamic`` is "local" only the global scale is found; each value brings the rest.

    Args:
        base_name: the value's role: "weight", "input", "output", "q", "k" or "v".
        args: the format; ``args.observer_kwargs`` are arguments of the observer, too. Never changed.
        observer_kwargs: arguments of the observer; they come before those in ``args``.

    Attributes:
        name: what the value is called in messages; outside of a graph as its role is.

    Raises:
        ValueError: an argument that is misspelt or out of range, a strategy that makes no sense for the role, or a
            dynamic value, which there is nothing to observe of.
    """

    state_class = State
    options_class: ClassVar[type] = NoOptions

    def __init__(self, base_name: str, args: QuantizationArgs, **observer_kwargs: Any) -> None:
        super().__init__()
        if args.dynamic is True:
            raise ValueError(f"the {base_name} is dynamic: its scales come from each value, expected dynamic=False")
        self.base_name = base_name
        self.name = base_name
        self.args = args.model_copy(deep=True)
        self.is_local = args.dynamic == DynamicType.LOCAL
        self.layout = Layout.of(args, base_name)
        self.format = Format.of(args)
        self.options = self._parse_options({**(args.observer_kwargs or {}), **observer_kwargs})

    @classmethod
    def load_from_registry(cls, name: str, **kwargs: Any) -> "Observer":
        """Makes the observer called ``name``, as llm-compressor's method of that name does.

        Raises:
            ValueError: no observer has that name.
        """
        return cls.get_value_from_registry(name)(**kwargs)

    @classmethod
    def get_value_from_registry(cls, name: str) -> Any:
        """The class of the observer called ``name``; no path of a file is imported for it.

        Raises:
            ValueError: no observer has that name.
        """
        spelling = standardize_lookup_name(name)
        if spelling not in (*cls.registered_names(), *cls.registered_aliases()):
            known = ", ".join(sorted(cls.registered_names())).replace("-", "_")  # the registry's spelling
            raise ValueError(f"observer={name!r}: expected one of {known}")
        return super().get_value_from_registry(spelling)

    @classmethod
    def _parse_options(cls, kwargs: Mapping[str, Any]) -> Any:
        allowed = [field.name for field in fields(cls.options_class) if field.init]
        for name in kwargs:
            if name not in allowed:
                raise ValueError(
                    f"{cls.__name__} has no argument {name!r}: "
                    + (f"expected one of {', '.join(allowed)}" if allowed else "it takes none")
                )
        return cls.options_class(**kwargs)

    @property
    def needs_inputs(self) -> bool:
        """Whether a weight is searched only after the activations that meet it were seen."""
        return False

    @property
    def has_statistics(self) -> bool:
        """Whether any value has been seen."""
        return self.like is not None

    def describe(self) -> dict[str, str]:
        """The observer's name, the value's role and format, and all options."""
        args = self.args.model_dump(mode="json", exclude={"observer", "observer_kwargs"})
        options = {f.name: getattr(self.options, f.name) for f in fields(self.options) if f.init}
        facts = {"observer": self._find_registered_name(), "role": self.base_name, **args, **options}
        return {name: str(_to_json(fact)) for name, fact in facts.items()}

    def _find_registered_name(self) -> str:
        own = type(self)
        names = (name for name in Observer.registered_names() if Observer.get_value_from_registry(name) is own)
        return next(names, own.__name__).replace("-", "_")  # the registry's spelling

    def forward(self, value: Tensor) -> "Observer":
        """Takes one more value into account and returns the observer itself.

        Args:
            value: float; a weight (out, in), an activation (..., channels) or an attention state
                (batch, heads, tokens, head_dim). An empty value changes nothing.

        Raises:
            ValueError: NaN or Inf in the value, or a shape that the strategy does not fit. The state is unchanged.
        """
        with self.lock:
            before = self.state
            self.observe(value)
            if not are_finite(self.state.witnesses):
                self.state = before
                raise ValueError(f"{self.base_name} {describe_non_finite(value)}: nothing of it was kept")
        return self

    def observe(self, value: Tensor) -> None:
        """:meth:`forward` without the check for NaN and Inf, so that nothing waits for the device.

        A value that is not finite makes a state that is not finite; whoever calls this looks at it.
        """
        if value.numel() == 0:
            return
        if not value.is_floating_point():
            raise ValueError(f"{self.base_name} has dtype {value.dtype}: expected a float dtype")
        if is_traced(value):
            with without_autocast(value):
                self.state = self.update(self.state, value.detach())
            return
        with self.lock, plain_modes(value), beside_compiler():
            self.state = self.update(self.state, value.detach())

    def _meet(self, state: State, value: Tensor) -> State:
        """The state with what it has to know of a value's dtype and device."""
        if state.like is None:
            return state.replace(like=value.new_empty(0))
        if state.like.device != value.device:  # as after loading
            state = state.to(value.device)
        return self.widen(state, value.dtype)

    def widen(self, state: State, dtype: torch.dtype) -> State:
        """The state of values some of which have another dtype."""
        assert state.like is not None
        wide = torch.promote_types(state.like.dtype, dtype)
        return state if wide == state.like.dtype else state.replace(like=state.like.to(wide))

    def find_importance(self, value: Tensor) -> Tensor | None:
        """How much the errors of each channel count, float32; None for all the same."""
        return None

    def init(self) -> State:
        """The state before the first value."""
        return State()

    def update(self, state: State, value: Tensor) -> State:
        """The state after ``value`` was seen."""
        return self._update_met(self._meet(state, value), value)

    def _update_met(self, state: State, value: Tensor) -> State:
        """:meth:`update`, where ``state.like`` has the value's dtype and device already."""
        if self.layout.strategy == "tensor_group":
            state = self.update_global(state, value)
        return state if self.is_local else self._update_groups(state, value)

    def merge(self, state: State, other: State) -> State:
        """The state after all that two states have seen, ``other``'s after ``state``'s."""
        if state.like is None or other.like is None:
            return state if other.like is None else other
        other = self.widen(other.to(state.like.device), state.like.dtype)
        assert other.like is not None
        return self._merge_seen(self.widen(state, other.like.dtype), other)

    def _merge_seen(self, state: State, other: State) -> State:
        """:meth:`merge`, where both have seen something; here, the ranges by :meth:`accumulate`."""
        if state.range is not None and other.range is not None:
            state = state.with_range(self.accumulate(state.range, other.range))
        if state.global_range is not None and other.global_range is not None:
            state = state.with_global_range(self.accumulate(state.global_range, other.global_range))
        return state

    def finish(self, state: State) -> State:
        """The state with the ranges that qparams follow from; here it has them already."""
        return state

    def update_with_global(self, state: State, value: Tensor, global_range: Range) -> State:
        """The state after ``value`` was seen, with a global scale that follows from a range found elsewhere."""
        return self._update_groups(self._meet(state, value).with_global_range(global_range), value)

    def _update_groups(self, state: State, value: Tensor) -> State:
        measured = self.measure(value, self._global_scale_of(state))
        return state.with_range(self.accumulate(state.range, measured))

    def update_global(self, state: State, value: Tensor) -> State:
        """The state with the range that tensor_group's global scale follows from brought up to date."""
        return state.with_global_range(self.accumulate(state.global_range, self.measure_global(value)))

    @staticmethod
    def find_shared_global_range(observers: "Sequence[Observer]", weights: Sequence[Tensor]) -> Range:
        """The range of the global scale that weights share which were observed; here that which covers theirs."""
        return cover_ranges([o.state.global_range for o in observers if o.state.global_range is not None])

    def measure(self, value: Tensor, global_scale: Tensor | None) -> Range:
        """The range of each of the value's groups; here from its smallest to its largest element."""
        return measure_range(value, self.layout)

    def measure_global(self, value: Tensor) -> Range:
        """The range of all of the value."""
        return measure_range(value, self.layout.as_one_group())

    def accumulate(self, old: Range | None, new: Range) -> Range:
        """The range kept after ``new`` was measured; here the newest."""
        return new

    def _global_scale_of(self, state: State) -> Tensor | None:
        return None if state.global_range is None else calculate_global_scale(*state.global_range)

    def get_qparams(self) -> dict[str, Tensor | None]:
        """The quantization parameters, by compressed-tensors' ``calculate_qparams``.

        Returns:
            scale: shape qparam_shape, in the dtype of the values seen (float32 next to a global scale).
            zero_point: the same shape, ``args.zp_dtype``; 0 where the format is symmetric.
            global_scale: float32, shape (1,), of matrices (experts) one for each, (..., 1, 1); or None. Of a "local"
                value it is all there is.

        Raises:
            ValueError: no value has been seen, or one that was not finite.
        """
        if not self.has_statistics:
            raise ValueError(f"the {self.base_name} observer has seen no value: call observer(value) first")
        assert self.state.like is not None
        with self.lock, plain_modes(self.state.like):
            return self._find_qparams()

    def _find_qparams(self) -> dict[str, Tensor | None]:
        if not are_finite(self.state.witnesses):
            raise ValueError(f"the {self.base_name} observer has seen NaN or Inf: calibrate again without that batch")
        state = self.finish(self.state)
        assert state.like is not None
        global_scale = self._global_scale_of(state)
        if state.range is None:
            return {"scale": None, "zero_point": None, "global_scale": global_scale}
        dtype = state.like.dtype if global_scale is None else None
        step = max(1, _AT_A_TIME // math.prod(state.range.min.shape[1:]))
        ranges = zip(state.range.min.split(step), state.range.max.split(step), strict=True)
        # Of experts each has its own.
        global_scales: Iterable[Tensor | None] = itertools.repeat(global_scale)
        if global_scale is not None and global_scale.numel() > 1:
            global_scales = global_scale.split(step)
        parts = [
            self._calculate_qparams(Range(*range), own, dtype)
            for range, own in zip(ranges, global_scales, strict=False)
        ]
        scale, zero_point = (torch.cat(own) for own in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]
        return {"scale": scale, "zero_point": zero_point, "global_scale": global_scale}

    def _calculate_qparams(
        self, range: Range, global_scale: Tensor | None, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        min, max = range
        low, high = min.minimum(max), max.maximum(min)
        # A range may be wider than float32 holds. A power of two changes no rounding, and no zero point.
        factor = torch.where((high.clamp(min=0) - low.clamp(max=0)).isinf(), 0.25, 1.0)
        scale, zero_point = calculate_qparams(low * factor, high * factor, self.args, global_scale)
        scale = torch.where(min > max, -scale, scale) / factor
        return scale if dtype is None else round_scale(scale, dtype).to(dtype), zero_point

    def extra_repr(self) -> str:
        """What distinguishes this observer in a printed model."""
        return f"{self.base_name}, {self.layout.strategy}, {self.options}"


def _to_json(fact: object) -> object:
    return fact.tolist() if isinstance(fact, Tensor) else fact


def describe_non_finite(value: Tensor) -> str:
    """How many elements of ``value`` are NaN or Inf, in words."""
    nans, infs = value.isnan().sum().item(), value.isinf().sum().item()
    return f"has {nans} NaN and {infs} Inf among {value.numel()} elements of shape {tuple(value.shape)}"
