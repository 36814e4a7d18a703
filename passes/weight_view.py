"""How parameters of every op become rows of output channels, and rows become parameters again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

__all__ = ["WeightView"]

_Step = tuple[Callable[..., Any], tuple]


@dataclass(frozen=True)
class WeightView:
    """The parameter as (..., out, in), the shape that weights are observed and quantized in.

    Attributes:
        layout: "rows" is (..., out, in) already; "columns" is (..., in, out); "convolution" is
            (out, in / groups, *kernel), seen as (out, everything else); "transposed_convolution" is
            (in, out / groups, *kernel), seen as (out, in / groups * kernel).
        shape: the parameter's.
        groups: of a transposed convolution.
    """

    layout: str
    shape: tuple[int, ...]
    groups: int = 1

    def apply(self, parameter: Tensor) -> Tensor:
        """The parameter's rows."""
        for function, args in self._to_rows:
            parameter = function(parameter, *args)
        return parameter

    def revert(self, rows: Tensor) -> Tensor:
        """The parameter from its rows."""
        for function, args in self._from_rows:
            rows = function(rows, *args)
        return rows

    def trace(self, graph: Graph, parameter: Node) -> Node:
        """The same in a graph, at its insertion point."""
        return _trace(graph, parameter, self._to_rows)

    def trace_back(self, graph: Graph, rows: Node) -> Node:
        """The parameter from its rows, at the graph's insertion point."""
        return _trace(graph, rows, self._from_rows)

    @property
    def _to_rows(self) -> tuple[_Step, ...]:
        if self.layout == "columns":
            return ((torch.transpose, (-2, -1)),)
        if self.layout == "convolution":
            return ((torch.flatten, (1,)),)
        if self.layout == "transposed_convolution":
            return (
                (torch.unflatten, (0, (self.groups, -1))),
                (torch.transpose, (1, 2)),
                (torch.flatten, (0, 1)),
                (torch.flatten, (1,)),
            )
        return ()

    @property
    def _from_rows(self) -> tuple[_Step, ...]:
        if self.layout == "columns":
            return ((torch.transpose, (-2, -1)),)
        if self.layout == "convolution":
            return ((torch.reshape, (list(self.shape),)),)
        if self.layout == "transposed_convolution":
            inputs, outputs, *kernel = self.shape
            by_group = [self.groups, outputs, inputs // self.groups, *kernel]
            return ((torch.reshape, (by_group,)), (torch.transpose, (1, 2)), (torch.flatten, (0, 1)))
        return ()


def _trace(graph: Graph, node: Node, steps: tuple[_Step, ...]) -> Node:
    for function, args in steps:
        node = graph.call_function(function, (node, *args))
    return node
