"""The observer that finds the optimum: over all calibration data, of all that a format can store."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from fxmse.formats.tables import is_traced
from fxmse.observers.base import Observer
from fxmse.observers.counting import convert_counts, count, list_values
from fxmse.observers.input_aware import InputAwareObserver, check_input_options
from fxmse.observers.searches import describe_search
from fxmse.observers.states import State
from fxmse.search.counted_optimum import find_optimum_of_counts
from fxmse.search.global_scale import find_global_range
from fxmse.search.optimum import find_optimum
from fxmse.search.options import check_argument
from fxmse.search.power import AbsolutePower
from fxmse.search.tiles import Range, cover_ranges, measure_range, search_matrices

__all__ = ["ExactMSEObserver", "ExactMSEOptions"]

# Of activations, llm-compressor's. Clamping its few large values costs a model more than their squares say.
_ACTIVATION_NORM = 2.4


@dataclass(frozen=True, kw_only=True)
class ExactMSEOptions:
    """Arguments of the search for the optimum.

    Attributes:
        norm: exponent of the error; above 0. 2, the mean squared error, by default for weights and 2.4 for activations.
        negative_scale: of a weight of symmetric integers of less than 8 bits, search scales below 0, too: the grid has
            one value more below 0 than above, and each group can have it on the side of its largest elements. False for
            a runtime that takes only scales above 0.
        importance: of a weight, each error counts E[x ** 2] of its input channel.
        strict: raise where there is no importance to search with, instead of warning and searching without.
        mask: the name of the graph's input that is 0 where a token is padding, shape (batch, tokens); it is left out of
            the importance.
        power: |e| ** norm; follows from norm.
    """

    norm: float = 2.0
    negative_scale: bool = True
    importance: bool = False
    strict: bool = False
    mask: str | None = None
    power: AbsolutePower = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises ValueError naming the argument that is out of range."""
        check_argument("norm", self.norm, "a number above 0", lambda v: 0 < v < math.inf)
        for name, value in (("negative_scale", self.negative_scale), ("importance", self.importance)):
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r}: expected True or False")
        check_input_options(self.strict, self.mask)
        object.__setattr__(self, "power", AbsolutePower.of(self.norm))


@Observer.register("exact_mse")
class ExactMSEObserver(InputAwareObserver):
    """Finds the ranges of least error of all that the format can store (:class:`ExactMSEOptions`).

    Of a weight, that is the scale and zero point of each group, and for tensor_group the global scale; weights that
    share one are searched together (:func:`fxmse.search.optimum.find_optimum`).

    Of an activation it counts how often each value occurs in all data (:mod:`fxmse.observers.counting`) and searches
    once, when qparams are asked for: the result does not depend on how the data is cut into batches or over processes.
    bfloat16 and float16 values are counted exactly, float32 ones to 2 ** -10 of themselves. Each group has a table of
    counts, of 2 ** 16 or for float32 2 ** 18 entries.

    A "local" value's global scale follows from its largest magnitude. In a graph that torch.compile makes, a weight's
    search is one node, as those of :class:`fxmse.observers.mse.MSEObserver` are.
    """

    options_class = ExactMSEOptions

    def __init__(self, base_name: str, args: QuantizationArgs, **observer_kwargs: Any) -> None:
        if base_name != "weight":
            observer_kwargs = {"norm": _ACTIVATION_NORM, **(args.observer_kwargs or {}), **observer_kwargs}
        super().__init__(base_name, args, **observer_kwargs)
        if self.options.importance and base_name != "weight":
            raise ValueError(f"importance=True has no meaning for a value of role {base_name}: expected a weight")
        self._spec = describe_search(self, "exact_mse", ExactMSEOptions)

    @property
    def needs_inputs(self) -> bool:
        """Whether errors are to be weighed."""
        return self.options.importance

    @property
    def _counts_values(self) -> bool:
        return self.base_name != "weight" and not self.is_local

    def _update_met(self, state: State, value: Tensor) -> State:
        if not self._counts_values:
            return super()._update_met(state, value)
        self.layout.qparam_shape(value.shape)  # raises where the groups do not fit
        assert state.like is not None
        value = value.to(state.like.dtype)
        if is_traced(value):
            layout = (self.base_name, self.layout.strategy, self.layout.group_size)
            return state.replace(counts=torch.ops.fxmse.count(value, state.counts, *layout))
        return state.replace(counts=count(value, self.layout, state.counts))

    def measure(self, value: Tensor, global_scale: Tensor | None) -> Range:
        """The best range of each of a weight's groups."""
        if is_traced(value) and not self.needs_inputs:
            return Range(*torch.ops.fxmse.measure(value, global_scale, self._spec))
        return self.search(value, global_scale)

    def search(self, value: Tensor, global_scale: Tensor | None) -> Range:
        """:meth:`measure`, which is never a node of a graph."""
        importance = self.find_importance(value)

        def search(value: Tensor, global_scale: Tensor | None) -> Range:
            return find_optimum(
                value,
                self.format,
                self.layout,
                self.options.power,
                global_scale=global_scale,
                importance=importance,
                negative_scale=self.takes_negative_scales,
            )

        return search_matrices(search, value, self.layout, global_scale)

    def measure_global(self, value: Tensor) -> Range:
        """The range that a weight's best global scale follows from; of a local value all of it."""
        if self.is_local:
            return measure_range(value, self.layout.as_one_group())
        if is_traced(value) and not self.needs_inputs:
            return Range(*torch.ops.fxmse.measure_global(value, self._spec))
        return self.search_global(value)

    def search_global(self, value: Tensor) -> Range:
        """:meth:`measure_global`, which is never a node of a graph."""
        return find_global_range([value], self.format, self.layout, self.options.power, [self.find_importance(value)])

    def accumulate(self, old: Range | None, new: Range) -> Range:
        """The newest range; of a local value that which covers both."""
        return cover_ranges([old, new]) if self.is_local and old is not None else new

    def widen(self, state: State, dtype: torch.dtype) -> State:
        """As :meth:`Observer.widen`; counts become those of the wider dtype."""
        assert state.like is not None
        wide = super().widen(state, dtype)
        if wide is state or wide.like is None or state.counts is None:
            return wide
        return wide.replace(counts=convert_counts(state.counts, state.like.dtype, wide.like.dtype))

    def _merge_seen(self, state: State, other: State) -> State:
        if state.counts is None or other.counts is None:
            return super()._merge_seen(state, other)
        return state.replace(counts=state.counts + other.counts)

    @torch.no_grad()
    def finish(self, state: State) -> State:
        """The state with the ranges that are best for what was counted."""
        counts, like = state.counts, state.like
        if counts is None or like is None:
            return state
        is_seen = counts.any(0)
        values = list_values(like.dtype, counts.device)[is_seen]
        global_scale = None
        if self.layout.strategy == "tensor_group":
            state = state.with_global_range(Range(values.amin().reshape(1), values.amax().reshape(1)))
            global_scale = self._global_scale_of(state)
        found = find_optimum_of_counts(
            values,
            counts[:, is_seen],
            self.format,
            self.options.power,
            like.dtype,
            global_scale=global_scale,
        )
        shape = (-1, 1, 1) if self.layout.strategy == "attn_head" else (-1,)
        return state.with_range(Range(found.min.reshape(shape), found.max.reshape(shape)))

    @staticmethod
    def find_shared_global_range(observers: Sequence[Observer], weights: Sequence[Tensor]) -> Range:
        """The range of the global scale that is best for all of the weights."""
        if not all(isinstance(observer, ExactMSEObserver) for observer in observers):
            return Observer.find_shared_global_range(observers, weights)
        first = observers[0]
        importances = [observer.find_importance(w) for observer, w in zip(observers, weights, strict=True)]
        return find_global_range(weights, first.format, first.layout, first.options.power, importances)
