"""Observers by name: what is kept of the values seen, and the scale and zero point that come of it.

An observer is one state machine: ``init`` gives the state before the first value, ``update`` that after one more,
``merge`` that of two halves of the data, and ``finish`` the ranges that the qparams follow from. All four are pure
functions of states, which are tensors (:class:`fxmse.observers.states.State`).
"""

import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from compressed_tensors.quantization import DynamicType, QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.registry import RegistryMixin
from torch import Tensor

from fxmse.formats.grids import Format, calculate_global_scale, round_scale
from fxmse.formats.layout import Layout
from fxmse.observers.states import State, Stateful
from fxmse.search.error_sums import Range, cover_ranges
from fxmse.search.shrinking import SearchOptions, check_argument, measure_range, search, search_global_range

__all__ = [
    "ExpandedMSEOptions",
    "FourOverSixObserver",
    "MSEObserver",
    "MSEOptions",
    "MemorylessMSEObserver",
    "MemorylessMinMaxObserver",
    "MinMaxObserver",
    "MovingAverageMSEObserver",
    "NVFP4ExpandedMSEObserver",
    "Observer",
    "StaticMinMaxObserver",
    "describe_non_finite",
]


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """An observer without arguments."""


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


@dataclass(frozen=True, kw_only=True)
class MSEOptions(SearchOptions):
    """Arguments of an MSE search.

    Attributes:
        global_scale: used in every candidate; a number or a tensor of one element, above 0. Where none is given,
            tensor_group searches one.
        optimize_global_scale: search the global scale even though one is given, as llm-compressor 0.9 does: as that
            of the one range for all of the value that has the least error.
        triton_error_buffer: has no effect; llm-compressor's configs have it for its CUDA kernel.
    """

    global_scale: float | Tensor | None = None
    optimize_global_scale: bool = False
    triton_error_buffer: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError naming the argument that is out of range."""
        super().__post_init__()
        if not isinstance(self.optimize_global_scale, bool):
            raise ValueError(f"optimize_global_scale={self.optimize_global_scale!r}: expected True or False")
        if self.global_scale is None:
            return
        global_scale = torch.as_tensor(self.global_scale, dtype=torch.float32)
        if global_scale.numel() != 1 or not (0 < global_scale.item() < float("inf")):
            raise ValueError(f"global_scale={self.global_scale!r}: expected one finite number above 0")


@dataclass(frozen=True, kw_only=True)
class MovingAverageMSEOptions(MSEOptions, AverageOptions):
    """Arguments of an MSE search whose results are averaged."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the argument that is out of range."""
        MSEOptions.__post_init__(self)
        AverageOptions.__post_init__(self)


class Observer(Stateful[State], RegistryMixin):
    """Finds the quantization parameters of one value from the samples of it that it is shown.

    Where ``args.dynamic`` is "local" only the global scale is found; each value brings the rest.

    Args:
        base_name: the value's role: "weight", "input", "output", "q", "k" or "v".
        args: the format; ``args.observer_kwargs`` are arguments of the observer, too. Never changed.
        observer_kwargs: arguments of the observer; they come before those in ``args``.

    Attributes:
        name: what the value is called in messages; "" outside of a graph.

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
        self.name = ""
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
        try:
            observer_class = cls.get_value_from_registry(name)
        except KeyError:
            known = ", ".join(sorted(cls.registered_names())).replace("-", "_")  # the registry's spelling
            raise ValueError(f"observer={name!r}: expected one of {known}") from None
        return observer_class(**kwargs)

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
    def needs_importance(self) -> bool:
        """Whether a weight is searched only after the activations that meet it were seen."""
        return False

    @property
    def has_statistics(self) -> bool:
        """Whether any value has been seen."""
        return self.like is not None

    def forward(self, value: Tensor) -> "Observer":
        """Takes one more value into account and returns the observer itself.

        Args:
            value: float; a weight (out, in), an activation (..., channels) or an attention state
                (batch, heads, tokens, head_dim). An empty value changes nothing.

        Raises:
            ValueError: NaN or Inf in the value, or a shape that the strategy does not fit. The state is unchanged.
        """
        before = self.state
        self.observe(value)
        if not all(tensor.isfinite().all() for tensor in self.state.witnesses):
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
        self.state = self.update(self.state, value)

    def _meet(self, state: State, value: Tensor) -> State:
        """The state with what it has to know of a value's dtype and device."""
        if state.like is None:
            return state._replace(like=value.new_empty(0))
        if state.like.device != value.device:  # as after loading
            state = state.to(value.device)
        return self.widen(state, value.dtype)

    def widen(self, state: State, dtype: torch.dtype) -> State:
        """The state of values some of which have another dtype."""
        assert state.like is not None
        wide = torch.promote_types(state.like.dtype, dtype)
        return state if wide == state.like.dtype else state._replace(like=state.like.to(wide))

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

    @torch.no_grad()
    def get_qparams(self) -> dict[str, Tensor | None]:
        """The quantization parameters, by compressed-tensors' ``calculate_qparams``.

        Returns:
            scale: shape qparam_shape, in the dtype of the values seen (float32 next to a global scale).
            zero_point: the same shape, ``args.zp_dtype``; 0 where the format is symmetric.
            global_scale: float32, shape (1,), or None. Of a "local" value it is all there is.

        Raises:
            ValueError: no value has been seen, or one that was not finite.
        """
        if not self.has_statistics:
            raise ValueError(f"the {self.base_name} observer has seen no value: call observer(value) first")
        if not all(tensor.isfinite().all() for tensor in self.state.witnesses):
            raise ValueError(f"the {self.base_name} observer has seen NaN or Inf: calibrate again without that batch")
        state = self.finish(self.state)
        assert state.like is not None
        global_scale = self._global_scale_of(state)
        if state.range is None:
            return {"scale": None, "zero_point": None, "global_scale": global_scale}
        min, max = state.range
        scale, zero_point = calculate_qparams(min.minimum(max), max.maximum(min), self.args, global_scale)
        scale = torch.where(min > max, -scale, scale)
        if global_scale is None:
            scale = round_scale(scale, state.like.dtype).to(state.like.dtype)
        return {"scale": scale, "zero_point": zero_point, "global_scale": global_scale}

    def extra_repr(self) -> str:
        """What distinguishes this observer in a printed model."""
        return f"{self.base_name}, {self.layout.strategy}, {self.options}"


def describe_non_finite(value: Tensor) -> str:
    """How many elements of ``value`` are NaN or Inf, in words."""
    nans, infs = value.isnan().sum().item(), value.isinf().sum().item()
    return f"has {nans} NaN and {infs} Inf among {value.numel()} elements of shape {tuple(value.shape)}"


@Observer.register("memoryless_minmax")
class MemorylessMinMaxObserver(Observer):
    """Keeps the smallest and largest element of the last value."""


@Observer.register("static_minmax")
class StaticMinMaxObserver(Observer):
    """Keeps the smallest and largest element of all values."""

    def accumulate(self, old: Range | None, new: Range) -> Range:
        """The range that covers both."""
        if old is None:
            return new
        return cover_ranges([old, new])


def _average(old: Range, new: Range, constant: float | Tensor) -> Range:
    """Old * (1 - constant) + new * constant."""
    return Range(*(torch.lerp(a, b, constant) for a, b in zip(old, new, strict=True)))


class _AveragingObserver(Observer):
    """Keeps a moving average of each value's range.

    That of two halves of the data is the average of theirs, each weighed by how many values it is of. A moving average
    depends on the order of the values, so that this is near the one of all of them, not equal to it.
    """

    def _update_met(self, state: State, value: Tensor) -> State:
        num_values = torch.ones((), dtype=torch.int64, device=value.device)
        if state.num_values is not None:
            num_values = num_values + state.num_values
        return super()._update_met(state, value)._replace(num_values=num_values)

    def accumulate(self, old: Range | None, new: Range) -> Range:
        """The moving average; the first range as it is."""
        constant = self.options.averaging_constant
        return new if old is None or constant == 1 else _average(old, new, constant)

    def _merge_seen(self, state: State, other: State) -> State:
        assert state.num_values is not None
        assert other.num_values is not None
        num_values = state.num_values + other.num_values
        part = (other.num_values / num_values).float()
        if state.range is not None and other.range is not None:
            state = state.with_range(_average(state.range, other.range, part))
        if state.global_range is not None and other.global_range is not None:
            state = state.with_global_range(_average(state.global_range, other.global_range, part))
        return state._replace(num_values=num_values)


@Observer.register("minmax")
class MinMaxObserver(_AveragingObserver):
    """Keeps a moving average of each value's smallest and largest element (:class:`AverageOptions`)."""

    options_class = AverageOptions


class MSEObserver(Observer):
    """Searches the range whose quantization error is least (:class:`MSEOptions`).

    For tensor_group the global scale comes first, from the groups' best ranges with scales that are stored exactly;
    then each group's range with that global scale in every candidate, its scale rounded as it will be stored. The
    second step looks at all candidates, so that it is never worse than the first step's ranges stored so.

    In a graph that torch.compile makes the search is one node, ``fxmse::measure``, and so compiled once for all sites
    and not once for each.
    """

    options_class = MSEOptions
    global_scale: Tensor | None

    def __init__(self, base_name: str, args: QuantizationArgs, **observer_kwargs: Any) -> None:
        super().__init__(base_name, args, **observer_kwargs)
        if self.options.optimize_global_scale and self.layout.strategy != "tensor_group":
            raise ValueError(
                f"optimize_global_scale=True with strategy={self.layout.strategy}: only tensor_group has a global "
                "scale to search; leave it out, or use strategy=tensor_group"
            )
        given = self.options.global_scale
        is_given = given is not None and not self.options.optimize_global_scale
        global_scale = torch.as_tensor(given, dtype=torch.float32).reshape(1) if is_given else None
        self.register_buffer("global_scale", global_scale, persistent=False)
        self._spec = self._describe()

    def _describe(self) -> str:
        """JSON of all that a search depends on, for the op that a graph has in its place."""
        options = {field.name: getattr(self.options, field.name) for field in fields(MSEOptions) if field.init}
        options["global_scale"] = None if self.global_scale is None else self.global_scale.item()
        args = self.args.model_copy(update={"observer_kwargs": {}}).model_dump(mode="json")
        return json.dumps({"base_name": self.base_name, "args": args, "options": options})

    @staticmethod
    @functools.cache
    def of_spec(spec: str) -> "MSEObserver":
        """An observer that measures as the one described by ``spec``; it keeps nothing."""
        described = json.loads(spec)
        args = QuantizationArgs.model_validate(described["args"])
        return MSEObserver(described["base_name"], args, **described["options"])

    def measure(self, value: Tensor, global_scale: Tensor | None) -> Range:
        """The best range of each of the value's groups."""
        if torch.compiler.is_compiling() and not self.needs_importance:
            return Range(*torch.ops.fxmse.measure(value, global_scale, self._spec))
        options = self.options
        if self.global_scale is None and global_scale is not None and not options.optimize_global_scale:
            options = replace(options, patience=len(options.factors))
        importance = self.find_importance(value)
        return search(value, self.format, self.layout, options, global_scale=global_scale, importance=importance)

    def measure_global(self, value: Tensor) -> Range:
        """The range that the value's global scale follows from."""
        if torch.compiler.is_compiling() and not self.needs_importance:
            return Range(*torch.ops.fxmse.measure_global(value, self._spec))
        if self.options.optimize_global_scale:
            layout = self.layout.as_one_group()
            return search(value, self.format, layout, self.options, optimize_global_scale=True)
        importance = self.find_importance(value)
        return search_global_range(value, self.format, self.layout, self.options, importance=importance)

    def update_global(self, state: State, value: Tensor) -> State:
        """As :meth:`Observer.update_global`, but a global scale that was given needs none."""
        return state if self.global_scale is not None else super().update_global(state, value)

    def _global_scale_of(self, state: State) -> Tensor | None:
        return self.global_scale if self.global_scale is not None else super()._global_scale_of(state)


@Observer.register("memoryless_mse")
class MemorylessMSEObserver(MSEObserver):
    """Keeps the search's result for the last value."""


@dataclass(frozen=True, kw_only=True)
class ExpandedMSEOptions(MSEOptions):
    """Arguments of an MSE search from 1.8 times down to .8 times the value's range."""

    maxshrink: float = 1 - 0.8 / 1.8
    grid: float = 200.0
    patience: int = 1000
    expand: float = 1.8


@Observer.register("nvfp4_expanded_mse")
class NVFP4ExpandedMSEObserver(MemorylessMSEObserver):
    """``memoryless_mse`` over the ranges that serve NVFP4 best (:class:`ExpandedMSEOptions`)."""

    options_class = ExpandedMSEOptions


@Observer.register("fouroversix")
class FourOverSixObserver(NVFP4ExpandedMSEObserver):
    """Another name of ``nvfp4_expanded_mse``, as llm-compressor 0.14 has it."""

    def __init__(self, base_name: str, args: QuantizationArgs, **observer_kwargs: Any) -> None:
        warnings.warn("observer='fouroversix' is a name of 'nvfp4_expanded_mse': use that", UserWarning, stacklevel=3)
        super().__init__(base_name, args, **observer_kwargs)


@Observer.register("mse")
class MovingAverageMSEObserver(_AveragingObserver, MSEObserver):
    """Keeps a moving average of each value's best range (:class:`MovingAverageMSEOptions`)."""

    options_class = MovingAverageMSEOptions
