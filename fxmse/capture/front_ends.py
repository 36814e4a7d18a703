"""Models of every kind to a graph of our own, whose weights are get_attr nodes."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node

from fxmse.config import CONFIG_KEY

__all__ = ["capture", "copy_graph_module", "let_vary", "split_inputs"]


def capture(model: nn.Module | ExportedProgram, example_inputs: Any = None, dynamic_shapes: Any = None) -> GraphModule:
    """A graph of ``model`` that shares its parameters and can be changed without changing the model.

    Args:
        model: a GraphModule (``torch.fx.symbolic_trace``, or an ExportedProgram's ``module()``) or an ExportedProgram,
            taken as they are; any other module is exported, in evaluation mode.
        example_inputs: for a module that is exported: a dict of keyword arguments, a tuple or list of positional
            ones, or one tensor.
        dynamic_shapes: as torch.export takes it; by default every dimension that can vary may.

    Raises:
        ValueError: a module without example inputs.
    """
    if isinstance(model, ExportedProgram):
        return copy_graph_module(model.module())
    if isinstance(model, GraphModule):
        return copy_graph_module(model)
    if example_inputs is None:
        raise ValueError(
            f"{type(model).__name__} has to be exported, which needs example_inputs: a dict of keyword arguments, a "
            "tuple of positional ones or a tensor; or pass a GraphModule or an ExportedProgram"
        )
    args, kwargs = split_inputs(example_inputs)
    if dynamic_shapes is None:
        dynamic_shapes = let_vary(args, kwargs)
    was_training = {module: module.training for module in model.modules()}
    try:
        exported = torch.export.export(model.eval(), args, kwargs, dynamic_shapes=dynamic_shapes)
    finally:
        for module, training in was_training.items():
            module.training = training
    return copy_graph_module(exported.module())


def copy_graph_module(graph_module: GraphModule) -> GraphModule:
    """A copy with a graph and containers of its own, and the same parameters, buffers and leaf modules."""
    copied = GraphModule(graph_module, _copy_graph(graph_module.graph))
    if CONFIG_KEY in graph_module.meta:
        copied.meta[CONFIG_KEY] = graph_module.meta[CONFIG_KEY]
    return copied


def _copy_graph(graph: Graph) -> Graph:
    """A deep copy, but for the pytree specs of how the graph is called, which never change.

    torch up to 2.13 warns of a deprecated class of its own whenever one of those is copied.
    """
    copied = Graph(tracer_cls=graph._tracer_cls)
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        copies[node] = copied.node_copy(node, copies.__getitem__)
    copied.set_codegen(copy.copy(graph._codegen))
    return copied


def split_inputs(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments from a dict, a tuple or list, or a single value."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def let_vary(args: tuple, kwargs: dict[str, Any]) -> Any:
    """``dynamic_shapes`` for torch.export with which every dimension may vary that can."""
    specs = torch.utils._pytree.tree_map(_let_all_vary, (args, kwargs))
    return specs[1] if kwargs else specs[0]


def _let_all_vary(value: Any) -> dict[int, Any] | None:
    return dict.fromkeys(range(value.dim()), Dim.AUTO) if isinstance(value, Tensor) else None
