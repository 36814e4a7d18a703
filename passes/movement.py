"""Ops that move a parameter's values without changing them, and the way back through them."""

import operator
from typing import NamedTuple

import torch
from torch.fx import GraphModule, Node

from fxmse.capture.attributes import get_attribute
from fxmse.passes.probe import find_probe

__all__ = ["FoundParameter", "find_parameter"]

aten = torch.ops.aten

# Experts are picked by select and index, fused projections are split. Casts change values, but a parameter is
# quantized in its own dtype whatever it is cast to behind.
_MOVEMENTS = {
    *(torch.flatten, torch.unflatten, torch.reshape, torch.unsqueeze, torch.squeeze, torch.select, torch.chunk),
    *(torch.split, operator.getitem),
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.expand.default, aten.clone.default, aten.contiguous.default),
    *(aten.detach.default, aten.alias.default, aten.select.int, aten.slice.Tensor, aten.index.Tensor),
    *(aten.index_select.default, aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.chunk.default),
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.flatten.using_ints, aten.unflatten.int),
    *("flatten", "unflatten", "reshape", "view", "unsqueeze", "squeeze", "expand", "clone", "contiguous", "detach"),
    *("to", "float", "half", "bfloat16", "chunk", "split", "select"),
}
_ALWAYS_SWAP = (torch.t, aten.t.default, aten.numpy_T.default, aten.mT.default, aten.matrix_H.default, "t")
_TRANSPOSES = (torch.transpose, torch.swapaxes, aten.transpose.int, "transpose", "swapaxes")
_PERMUTES = (torch.permute, aten.permute.default, "permute")


class FoundParameter(NamedTuple):
    """A parameter behind an argument.

    Attributes:
        parameter: its get_attr node.
        reader: the first node that reads it, or the probe on it.
        is_transposed: whether its last two dimensions are swapped on the way.
        is_observed: whether a probe is on the way.
    """

    parameter: Node
    reader: Node
    is_transposed: bool
    is_observed: bool


def find_parameter(graph_module: GraphModule, reader: Node, value: object) -> FoundParameter | None:
    """The parameter that ``value``, an argument of ``reader``, is or was moved from; None for everything else."""
    is_transposed = is_observed = False
    while isinstance(value, Node) and value.op != "get_attr":
        if find_probe(graph_module, value):
            is_observed = True
        elif _swaps(value):
            is_transposed = not is_transposed
        elif value.target not in _MOVEMENTS and value.target not in (*_TRANSPOSES, *_PERMUTES):
            return None
        reader, value = value, value.args[0] if value.args else None
    if not isinstance(value, Node) or not isinstance(get_attribute(graph_module, str(value.target)), torch.Tensor):
        return None
    return FoundParameter(value, reader, is_transposed, is_observed)


def _swaps(node: Node) -> bool:
    """Whether ``node`` swaps the last two dimensions of its argument."""
    if node.target in _ALWAYS_SWAP:
        return True
    if node.target is getattr:
        return node.args[1] in ("T", "mT")
    if node.target in _TRANSPOSES:
        return {dim for dim in node.args[1:3] if isinstance(dim, int)} in ({0, 1}, {1, 2}, {-1, -2})
    if node.target in _PERMUTES:
        dims = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
        return list(dims[-2:]) in ([len(dims) - 1, len(dims) - 2], [-1, -2])
    return False
