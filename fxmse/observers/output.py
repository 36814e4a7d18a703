"""The observer of weights that finds the least error of what is computed of them."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from fxmse.observers.base import Observer
from fxmse.observers.input_aware import InputAwareObserver, check_input_options
from fxmse.observers.inputs import Inputs, Products
from fxmse.search.global_scale import find_global_range
from fxmse.search.optimum import find_optimum
from fxmse.search.options import check_argument
from fxmse.search.output_optimum import find_output_optimum, list_diagonal
from fxmse.search.power import AbsolutePower
from fxmse.search.tiles import Range, search_matrices

__all__ = ["OutputMSEObserver", "OutputMSEOptions"]

# 256 MiB; of wider inputs, blocks of about so many channels.
_MAX_CHANNELS, _BLOCK_SIZE = 8192, 2048
_SQUARE = AbsolutePower.of(2.0)


@dataclass(frozen=True, kw_only=True)
class OutputMSEOptions:
    """Arguments of the search for the least error of outputs.

    Attributes:
        max_sweeps: how often all groups of a weight are gone through; 0 looks at each group by itself. 16 is more than
            most rows need until none of their groups is better with another scale.
        damping: what is added to H's diagonal, in parts of its mean, as GPTQ does, so that little data is not taken for
            all there is; at least 0. Of .01 (GPTQ's) to .3, .1 and more had the least error on held-out data.
        block_size: of how many channels H is kept together; of all by default, up to 8192, and else of 2048. At least
            as many as a group's, and a multiple of them. Memory is channels * block_size * 4 bytes for each value.
        negative_scale: as of ``exact_mse``.
        strict: raise where no activations were seen, instead of warning and searching for the weight's error.
        mask: the name of the graph's input that is 0 where a token is padding, shape (batch, tokens); it is left out.
    """

    max_sweeps: int = 16
    damping: float = 0.1
    block_size: int | None = None
    negative_scale: bool = True
    strict: bool = False
    mask: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError naming the argument that is out of range."""
        check_argument("max_sweeps", self.max_sweeps, "a whole number of at least 0", lambda v: v >= 0 and v % 1 == 0)
        check_argument("damping", self.damping, "a number of at least 0", lambda v: 0 <= v < float("inf"))
        if self.block_size is not None:
            check_argument("block_size", self.block_size, "a whole number above 0", lambda v: v > 0 and v % 1 == 0)
        if not isinstance(self.negative_scale, bool):
            raise ValueError(f"negative_scale={self.negative_scale!r}: expected True or False")
        check_input_options(self.strict, self.mask)


@Observer.register("output_mse")
class OutputMSEObserver(InputAwareObserver):
    """Finds the ranges of a weight with which its op's output changes least (:class:`OutputMSEOptions`).

    It minimises the mean of |x (q - w)ᵀ| ** 2 over the activations x that it was shown, by their products H = E[xᵀ x]
    (:func:`fxmse.search.output_optimum.find_output_optimum`). Where it knows what x would be if nothing before it was
    quantized, r, it is the mean of |x qᵀ - r wᵀ| ** 2, by E[xᵀ (x - r)], too. Weights that share a global scale search
    it together, by the diagonal of H.

    Raises:
        ValueError: the value is no weight, or a block of H does not hold whole groups.
    """

    options_class = OutputMSEOptions

    def __init__(self, base_name: str, args: QuantizationArgs, **observer_kwargs: Any) -> None:
        if base_name != "weight":
            raise ValueError(f"output_mse has no meaning for a value of role {base_name}: expected a weight")
        super().__init__(base_name, args, **observer_kwargs)
        size = self._group_size
        if self.options.block_size is not None and self.options.block_size % size:
            raise ValueError(f"block_size={self.options.block_size}: expected a multiple of the groups' size, {size}")

    @property
    def _group_size(self) -> int:
        """How many channels of a row share a scale; 1 for all."""
        layout = self.layout
        return layout.block_structure[1] if layout.block_structure else layout.group_size or 1

    @property
    def needs_inputs(self) -> bool:
        """Yes."""
        return True

    def make_inputs(self) -> Inputs:
        """The products of activations."""
        if self.options.block_size is not None:
            return Products(self.options.block_size, 0)
        size = self._group_size
        return Products(size * max(1, _BLOCK_SIZE // size), _MAX_CHANNELS)

    def measure(self, value: Tensor, global_scale: Tensor | None) -> Range:
        """The best range of each of a weight's groups."""
        negative_scale = self.takes_negative_scales
        products = self.find_products(value, self.options.damping)
        if products is None:

            def search(value: Tensor, global_scale: Tensor | None) -> Range:
                return find_optimum(
                    value, self.format, self.layout, _SQUARE, global_scale=global_scale, negative_scale=negative_scale
                )

            return search_matrices(search, value, self.layout, global_scale)
        crosses = self.find_crosses(value)
        parts, parts_products = self._split(value, products)
        parts_crosses: Sequence[Tensor | None] = [None] * len(parts)
        if crosses is not None:
            _, parts_crosses = self._split(value, crosses)
        scales: Iterable[Tensor | None] = itertools.repeat(None, len(parts))
        if global_scale is not None:
            scales = global_scale.flatten().expand(len(parts)).split(1)
        found = [
            find_output_optimum(
                part,
                self.format,
                self.layout,
                part_products,
                crosses=part_crosses,
                global_scale=scale,
                negative_scale=negative_scale,
                max_sweeps=int(self.options.max_sweeps),
            )
            for part, part_products, part_crosses, scale in zip(
                parts, parts_products, parts_crosses, scales, strict=True
            )
        ]
        shape = self.layout.qparam_shape(value.shape)
        return Range(*(torch.cat(ends).reshape(shape) for ends in zip(*found, strict=True)))

    def _split(self, value: Tensor, products: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The parts of a weight that meet tokens of their own, or have a (global) scale of their own; with products."""
        if self.layout.is_by_matrix(value.shape):
            matrices = value.flatten(0, -3)
            own = products if len(products) == len(matrices) else products.mean(0).expand(len(matrices), -1, -1, -1)
            return matrices.unbind(), own.unbind()
        # What shares a scale is searched together.
        if len(products) == 1 or self.layout.strategy in ("tensor", "block"):
            return [value], [products.mean(0)]
        return value.flatten(0, -2).tensor_split(len(products)), products.unbind()

    def measure_global(self, value: Tensor) -> Range:
        """The range that a weight's best global scale follows from."""
        return self.find_shared_global_range([self], [value])

    @staticmethod
    def find_shared_global_range(observers: Sequence[Observer], weights: Sequence[Tensor]) -> Range:
        """The range of the global scale that is best for all of the weights."""
        if not all(isinstance(observer, OutputMSEObserver) for observer in observers):
            return Observer.find_shared_global_range(observers, weights)
        first = observers[0]
        diagonals: list[Tensor | None] = []
        for observer, weight in zip(observers, weights, strict=True):
            assert isinstance(observer, OutputMSEObserver)
            products = observer.find_products(weight, observer.options.damping)
            if products is None:
                diagonals.append(None)
                continue
            _, own = observer._split(weight, products)
            by_part = torch.stack([list_diagonal(part, weight.shape[-1]) for part in own])
            diagonals.append(by_part if observer.layout.is_by_matrix(weight.shape) else by_part.mean(0))
        return find_global_range(weights, first.format, first.layout, _SQUARE, diagonals)
