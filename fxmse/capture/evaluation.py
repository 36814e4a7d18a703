"""Graphs that were made in training mode, as they compute in evaluation mode."""

import copy
import inspect

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxmse.capture.attributes import list_graphs

__all__ = ["evaluate"]

aten = torch.ops.aten
# Where an op has whether it trains.
_PLACES = {
    aten.dropout.default: 2,
    aten.dropout_.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.batch_norm.default: 5,
    aten.instance_norm.default: 5,
    aten.rrelu.default: 3,
}


def evaluate(graph_module: GraphModule) -> None:
    """Has a graph of our own compute as in evaluation mode: no dropout, and the statistics that it has.

    Modules that it calls are replaced by copies that share their parameters and buffers. The model that the graph was
    made of stays as it is.
    """
    for graph in list_graphs(graph_module):
        _evaluate(graph)
        graph.recompile()


def _evaluate(graph_module: GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            if module.training:
                shared = copy.copy(module)
                shared.training = False
                graph_module.set_submodule(str(node.target), shared)
        elif node.op == "call_function":
            _switch_off(node)
            if _counts_batches(node):
                graph_module.graph.erase_node(node)


def _switch_off(node: Node) -> None:
    """Has a call of dropout or of a norm do what it does in evaluation mode."""
    place = _PLACES.get(node.target)  # type: ignore[call-overload]
    place = _find_training(node.target) if place is None else place
    if place is not None and len(node.args) > place:
        node.update_arg(place, False)
    if node.kwargs.get("training"):
        node.update_kwarg("training", False)


def _counts_batches(node: Node) -> bool:
    """Whether a node is what a norm in training mode counts its batches with."""
    counter = node.args[0] if node.target is aten.add_.Tensor else None
    return isinstance(counter, Node) and str(counter.target).endswith("num_batches_tracked") and not node.users


def _find_training(function: object) -> int | None:
    """The place of a parameter ``training`` of a function as F.dropout is."""
    if getattr(function, "__module__", None) != nn.functional.__name__:
        return None
    names = list(inspect.signature(function).parameters)  # type: ignore[arg-type]
    return names.index("training") if "training" in names else None
