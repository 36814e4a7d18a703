"""Observers that search the range of least quantization error: llm-compressor's two, and its wider NVFP4 search."""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from fxmse.formats.tables import is_traced
from fxmse.observers.averages import AverageOptions, AveragingObserver
from fxmse.observers.base import Observer
from fxmse.observers.searches import describe_search
from fxmse.observers.states import State
from fxmse.search.options import SearchOptions
from fxmse.search.shrinking import shrink_global_range, shrink_ranges
from fxmse.search.tiles import Range, search_matrices

__all__ = [
    "ExpandedMSEOptions",
    "FourOverSixObserver",
    "MSEObserver",
    "MSEOptions",
    "MemorylessMSEObserver",
    "MovingAverageMSEObserver",
    "MovingAverageMSEOptions",
    "NVFP4ExpandedMSEObserver",
]


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
        given = None if global_scale is None else global_scale.item()
        self._spec = describe_search(self, "memoryless_mse", MSEOptions, global_scale=given)

    def measure(self, value: Tensor, global_scale: Tensor | None) -> Range:
        """The best range of each of the value's groups."""
        if is_traced(value) and not self.needs_inputs:
            return Range(*torch.ops.fxmse.measure(value, global_scale, self._spec))
        return self.search(value, global_scale)

    def search(self, value: Tensor, global_scale: Tensor | None) -> Range:
        """:meth:`measure`, which is never a node of a graph."""
        options = self.options
        if self.global_scale is None and global_scale is not None and not options.optimize_global_scale:
            options = replace(options, patience=len(options.factors))
        importance = self.find_importance(value)
        layout = self.layout

        def search(value: Tensor, global_scale: Tensor | None) -> Range:
            return shrink_ranges(value, self.format, layout, options, global_scale=global_scale, importance=importance)

        return search_matrices(search, value, layout, global_scale)

    def measure_global(self, value: Tensor) -> Range:
        """The range that the value's global scale follows from."""
        if is_traced(value) and not self.needs_inputs:
            return Range(*torch.ops.fxmse.measure_global(value, self._spec))
        return self.search_global(value)

    def search_global(self, value: Tensor) -> Range:
        """:meth:`measure_global`, which is never a node of a graph."""
        one_group, importance = self.layout.as_one_group(), self.find_importance(value)

        def search(value: Tensor, _: Tensor | None) -> Range:
            if self.options.optimize_global_scale:
                return shrink_ranges(value, self.format, one_group, self.options, optimize_global_scale=True)
            return shrink_global_range(value, self.format, self.layout, self.options, importance=importance)

        return search_matrices(search, value, one_group)

    def update_global(self, state: State, value: Tensor) -> State:
        """As :meth:`Observer.update_global`, but a global scale that was given needs none."""
        return state if self.global_scale is not None else super().update_global(state, value)

    def _global_scale_of(self, state: State) -> Tensor | None:
        if self.global_scale is None:
            return super()._global_scale_of(state)
        # The observer is made before it meets a value, and so its device.
        return self.global_scale if state.like is None else self.global_scale.to(state.like.device)


@Observer.register("memoryless_mse")
class MemorylessMSEObserver(MSEObserver):
    """Keeps the search's result for the last value."""


@dataclass(frozen=True, kw_only=True)
class MovingAverageMSEOptions(MSEOptions, AverageOptions):
    """Arguments of an MSE search whose results are averaged."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the argument that is out of range."""
        MSEOptions.__post_init__(self)
        AverageOptions.__post_init__(self)


@Observer.register("mse")
class MovingAverageMSEObserver(AveragingObserver, MSEObserver):
    """Keeps a moving average of each value's best range (:class:`MovingAverageMSEOptions`)."""

    options_class = MovingAverageMSEOptions


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
