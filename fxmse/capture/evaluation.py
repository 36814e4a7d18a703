"""Graphs that were made in training mode, as they compute in evaluation mode."""

import copy
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxmse.capture.attributes import list_graphs

__all__ = ["evaluate", "refuse_training"]

aten = torch.ops.aten
# What says that an op trains, by the names that its schema or signature has for it, and its value where none does.
_IN_EVALUATION = {"train": False, "training": False, "use_input_stats": False, "dropout_p": 0.0}
_STATISTICS = "running_mean"
_TRAINED = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase, nn.RReLU)
_WITH_DROPOUT = (nn.MultiheadAttention, nn.RNNBase)


def evaluate(graph_module: GraphModule) -> None:
    """Has a graph of our own compute as in evaluation mode: no dropout, and the statistics that it has.

    Modules that it calls are replaced by copies that share their parameters and buffers. The model that the graph was
    made of stays as it is.
    """
    for graph in list_graphs(graph_module):
        for node in list(graph.graph.nodes):
            called = _list_called(graph, node)
            if any(module.training for module in called):
                graph.set_submodule(str(node.target), _copy_evaluated(called[0]))
            for argument in _find_training(node):
                argument.update(node)
            if _counts_batches(node):
                graph.graph.erase_node(node)
        graph.recompile()


def refuse_training(graph_module: GraphModule, way_out: str) -> None:
    """Raises ValueError, with ``way_out``, where a graph computes as in training mode."""
    nodes = [(graph, node) for graph in list_graphs(graph_module) for node in graph.graph.nodes]
    training = [
        node.name for graph, node in nodes if any(map(_trains, _list_called(graph, node))) or any(_find_training(node))
    ]
    if training:
        raise ValueError(
            f"the graph computes as in training mode in {', '.join(training[:5])}{', ...' if training[5:] else ''}: "
            f"values would be observed that are not those of evaluation. {way_out}"
        )


def _list_called(graph_module: GraphModule, node: Node) -> list[nn.Module]:
    """The module that a node calls, and those in it."""
    return list(graph_module.get_submodule(str(node.target)).modules()) if node.op == "call_module" else []


def _trains(module: nn.Module) -> bool:
    """Whether a module of torch's own is in training mode and does something else there."""
    return module.training and (
        isinstance(module, _TRAINED) or (isinstance(module, _WITH_DROPOUT) and module.dropout > 0)
    )


def _copy_evaluated(module: nn.Module) -> nn.Module:
    shared = copy.copy(module)
    shared.training = False
    shared._modules = {name: child and _copy_evaluated(child) for name, child in module._modules.items()}
    return shared


@dataclass(frozen=True)
class _Argument:
    """An argument of a call."""

    name: str
    place: int

    def find(self, node: Node) -> Any:
        """What is passed; None for nothing."""
        return node.args[self.place] if len(node.args) > self.place else node.kwargs.get(self.name)

    def update(self, node: Node) -> None:
        """Passes what an op in evaluation mode is called with."""
        value = _IN_EVALUATION[self.name]
        if len(node.args) > self.place:
            node.update_arg(self.place, value)
        else:
            node.update_kwarg(self.name, value)


def _find_training(node: Node) -> Iterator[_Argument]:
    """The arguments that have a call of dropout or of a norm do what it does in training mode."""
    if node.op != "call_function":
        return
    places = {name: place for place, name in enumerate(_list_parameters(node.target))}
    # A norm without statistics takes those of its input in both modes.
    statistics = _STATISTICS in places and _Argument(_STATISTICS, places[_STATISTICS]).find(node) is None
    for name in places if not statistics else ():
        argument = _Argument(name, places[name])
        if name in _IN_EVALUATION and argument.find(node):
            yield argument


def _list_parameters(function: object) -> list[str]:
    """The names of a function's parameters: of an aten op, of torch's functions of that name, of torch.nn's."""
    if isinstance(function, types.BuiltinFunctionType):
        function = getattr(getattr(aten, function.__name__, None), "default", None)
    if isinstance(function, torch._ops.OpOverload):
        return [argument.name for argument in function._schema.arguments]
    if getattr(function, "__module__", None) != nn.functional.__name__ or not inspect.isfunction(function):
        return []
    return list(inspect.signature(function).parameters)


def _counts_batches(node: Node) -> bool:
    """Whether a node is what a norm in training mode counts its batches with."""
    counter = node.args[0] if node.target is aten.add_.Tensor else None
    return isinstance(counter, Node) and str(counter.target).endswith("num_batches_tracked") and not node.users
