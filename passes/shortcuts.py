"""Shortcuts of residual nets: what an addition reads beside the output of a convolution."""

import operator
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.fx import GraphModule, Node

from fxmse.passes.constants import find_sources
from fxmse.passes.operation import Argument, Operand, Operation
from fxmse.passes.stand_ins import find_module
from fxmse.passes.versions import Versions

__all__ = ["ADDITION", "find_shortcuts"]

ADDITION = "add"
"""What a config's target calls them."""

aten = torch.ops.aten

_ADDITIONS = (torch.add, operator.add, aten.add.Tensor, "add")
_IN_PLACE = (operator.iadd, aten.add_.Tensor, "add_")
_SUMMANDS = (Argument(0, "input"), Argument(1, "other"))


def find_shortcuts(
    graph_module: GraphModule, versions: Versions, operations: Sequence[Operation]
) -> Iterator[Operation]:
    """Additions that an int8 kernel can do along with the convolution before them, if what they add is int8, too.

    Rules:

    1. One summand is the output of a Conv2d that nothing else reads; of two such, that of the later one.
    2. The other one, the operand, is an activation of the same shape, as far as the graph knows it. An addition in
       place writes the convolution's output, not the operand.
    3. Nothing is scaled (alpha).

    Args:
        graph_module: the graph.
        versions: its versions.
        operations: those of the graph, in its order.
    """
    layers = {o.node: place for place, o in enumerate(operations) if o.class_name == "Conv2d" and o.weight}
    for node in graph_module.graph.nodes:
        if node.target not in (*_ADDITIONS, *_IN_PLACE) or node.kwargs or len(node.args) != len(_SUMMANDS):  # rule 3
            continue
        argument = _find_shortcut(layers, node)
        if argument and _is_activation(graph_module, versions, argument.get(node)) and not _is_broadcast(node):
            path, module = find_module(graph_module, node, ADDITION)
            operands = (Operand("input", node, argument, f"{node.name}_", is_channels_last=False),)
            yield Operation(node, ADDITION, path, module, False, None, operands, is_meant_by_name=True)


def _find_shortcut(layers: Mapping[Node, int], node: Node) -> Argument | None:
    """Rule 1: where the summand is that the layer's output is added to."""
    places = {
        layers[summand.get(node)]: summand
        for summand in (_SUMMANDS[:1] if node.target in _IN_PLACE else _SUMMANDS)
        if summand.get(node) in layers and len(summand.get(node).users) == 1
    }
    if not places:
        return None
    layer = places[max(places)]
    return next(summand for summand in _SUMMANDS if summand is not layer)


def _is_activation(graph_module: GraphModule, versions: Versions, value: object) -> bool:
    return isinstance(value, Node) and find_sources(graph_module, versions, value) is None


def _is_broadcast(node: Node) -> bool:
    """Whether summands are known to be of different shapes: then a dimension of one has size 1, or it has fewer."""
    for key in ("val", "tensor_meta", "example_value"):
        values = [summand.get(node).meta.get(key) for summand in _SUMMANDS]
        if all(value is not None for value in values):
            ones = [[isinstance(size, int) and size == 1 for size in value.shape] for value in values]
            return ones[0] != ones[1]
    return False
