"""How a graph's attributes are read, and where new ones are put; the graphs in a graph, which are attributes, too."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

__all__ = [
    "copy_attribute",
    "find_owner",
    "find_place",
    "find_regions",
    "get_attribute",
    "list_graphs",
    "make_container",
    "replace_parameter",
]


def get_attribute(graph_module: GraphModule, target: str) -> Any:
    """What a get_attr node of ``target`` returns."""
    value: Any = graph_module
    for name in target.split("."):
        value = getattr(value, name)
    return value


def find_place(tensor: Tensor) -> int:
    """Where a tensor's values begin; those without storage (meta) are told apart by identity."""
    return tensor.data_ptr() or id(tensor)


def make_container(graph_module: GraphModule, path: str) -> nn.Module:
    """The submodule at ``path``, made of empty modules where there is none."""
    module: nn.Module = graph_module
    for name in filter(None, path.split(".")):
        if not hasattr(module, name):
            module.add_module(name, nn.Module())
        module = getattr(module, name)
    return module


def copy_attribute(source: GraphModule, target: str, graph_module: GraphModule) -> None:
    """Has ``graph_module`` hold a tensor of ``source`` under the same name, as what it is there."""
    path, _, name = target.rpartition(".")
    container, value = make_container(graph_module, path), get_attribute(source, target)
    if hasattr(container, name):
        assert getattr(container, name) is value
        return
    if isinstance(value, nn.Parameter):
        container.register_parameter(name, value)
    elif isinstance(value, Tensor) and name in source.get_submodule(path)._buffers:
        is_persistent = name not in source.get_submodule(path)._non_persistent_buffers_set
        container.register_buffer(name, value, persistent=is_persistent)
    else:
        setattr(container, name, value)


def replace_parameter(graph_module: GraphModule, target: str, parameter: nn.Parameter) -> None:
    """Has a graph hold a parameter in place of what it calls so, if anything."""
    path, _, name = target.rpartition(".")
    container = make_container(graph_module, path)
    if hasattr(container, name):
        delattr(container, name)
    container.register_parameter(name, parameter)


def find_regions(graph_module: GraphModule, node: Node) -> Iterator[GraphModule]:
    """The graphs that ``node`` runs: regions, branches and loops."""
    for source in node.all_input_nodes:
        region = get_attribute(graph_module, str(source.target)) if source.op == "get_attr" else None
        if isinstance(region, GraphModule):
            yield region


def list_graphs(graph_module: GraphModule) -> Iterator[GraphModule]:
    """A graph and all graphs in it, each once."""
    found = [graph_module]
    for graph in found:
        yield graph
        for node in graph.graph.find_nodes(op="get_attr"):
            region = get_attribute(graph, str(node.target))
            if isinstance(region, GraphModule) and region not in found:
                found.append(region)


def find_owner(node: Node) -> GraphModule:
    """The module of the graph that ``node`` stands in, which may be one in another."""
    owner = node.graph.owning_module
    assert owner is not None
    return owner
