"""Models of every kind to a graph of our own, whose weights are get_attr nodes."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from fxmse.capture.attributes import find_place, get_attribute
from fxmse.capture.evaluation import evaluate
from fxmse.capture.exporting import export_module, warn_if_fixed, without_cache
from fxmse.config import KEPT_KEYS, MODULES_KEY

__all__ = ["capture", "check_graph", "copy_graph_module", "split_inputs"]


def capture(model: nn.Module | ExportedProgram, example_inputs: Any = None, dynamic_shapes: Any = None) -> GraphModule:
    """A graph of ``model`` that shares its parameters and can be changed without changing the model.

    Args:
        model: a GraphModule (``torch.fx.symbolic_trace``, or an ExportedProgram's ``module()``) or an ExportedProgram,
            taken as they are; any other module is exported. All compute as in evaluation mode.
        example_inputs: for a module that is exported: a dict of keyword arguments, a tuple or list of positional
            ones, or one tensor.
        dynamic_shapes: as torch.export takes it; by default dimensions may vary
            (:func:`fxmse.capture.exporting.export_module`).

    Raises:
        ValueError: a module without example inputs, or with such as it does not take.
    """
    if isinstance(model, ExportedProgram | GraphModule):
        captured = copy_graph_module(model.module() if isinstance(model, ExportedProgram) else model)
        evaluate(captured)
        _name_parameters(captured)
        return captured
    if example_inputs is None:
        raise ValueError(
            f"{type(model).__name__} has to be exported, which needs example_inputs: a dict of keyword arguments, a "
            "tuple of positional ones or a tensor; or pass a GraphModule or an ExportedProgram"
        )
    args, kwargs = split_inputs(example_inputs)
    on_meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if on_meta and not any(tensor.is_meta for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)):
        raise ValueError(
            f"{', '.join(on_meta[:3])}{', ...' if on_meta[3:] else ''} on the meta device, the example inputs are not: "
            "load the weights first"
        )
    was_training = {module: module.training for module in model.modules()}
    try:
        with without_cache(model):
            exported = export_module(model.eval(), args, kwargs, dynamic_shapes)
            if dynamic_shapes is None:
                warn_if_fixed(model, exported)
    finally:
        for module, training in was_training.items():
            module.training = training
    captured = copy_graph_module(exported.module())
    _name_parameters(captured)
    captured.meta[MODULES_KEY] = dict(model.named_modules())
    return captured


def _name_parameters(graph_module: GraphModule) -> None:
    """Has a graph read parameters by their names, where torch.export made constants of them.

    So it does of those that a module reaches through a list.
    """
    names = {_identify(parameter): name for name, parameter in graph_module.named_parameters()}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        value = get_attribute(graph_module, str(node.target))
        is_constant = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
        if is_constant and value.numel() and (name := names.get(_identify(value))):
            node.target = name
    graph_module.recompile()


def _identify(tensor: Tensor) -> object:
    return find_place(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def copy_graph_module(graph_module: GraphModule) -> GraphModule:
    """A copy with graphs and containers of its own, and the same parameters, buffers and leaf modules."""
    copied = GraphModule(graph_module, _copy_graph(graph_module.graph))
    for node in copied.graph.find_nodes(op="get_attr"):
        region = get_attribute(copied, str(node.target))
        if isinstance(region, GraphModule):
            copied.set_submodule(str(node.target), copy_graph_module(region))
    copied.meta.update({key: graph_module.meta[key] for key in KEPT_KEYS if key in graph_module.meta})
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


def check_graph(value: object, maker: str) -> None:
    """Raises ValueError where ``value`` is not what ``maker`` returns, but a model."""
    if not isinstance(value, GraphModule):
        raise ValueError(f"found a {type(value).__name__}: expected the graph that {maker} returns")


def split_inputs(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments from a dict, a tuple or list, or a single value.

    Raises:
        ValueError: there are numpy arrays among them.
    """
    if any(type(leaf).__module__ == "numpy" for leaf in tree_leaves(inputs)):
        raise ValueError("a batch has numpy arrays: expected tensors (torch.from_numpy)")
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}
