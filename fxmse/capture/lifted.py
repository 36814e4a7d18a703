"""Graphs that Dynamo made: parameters that it lifted to inputs become get_attr nodes, and paths the model's own."""

import itertools
import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn
from torch.fx import GraphModule, Node

from fxmse.capture.attributes import list_graphs, make_container

__all__ = ["Lifted", "bind_parameters", "find_lifted"]

# How Dynamo writes where a parameter of a module is: L['self']._modules['fc']._parameters['weight'].
_PARAMETER = re.compile(r"(.*?)((?:\._modules\['[^']+'\])*)\._parameters\['([^']+)'\]")
_MODULE = re.compile(r"\._modules\['([^']+)'\]")
_ROOT = re.compile(r"^[LG]\['\w+'\]\.?")


class Lifted(NamedTuple):
    """A parameter that is an input of the graph.

    Attributes:
        place: its place among the inputs.
        node: its placeholder.
        root: the module that it was reached from, in Dynamo's words.
        name: its dotted path from there.
    """

    place: int
    node: Node
    root: str
    name: str


def find_lifted(graph_module: GraphModule) -> list[Lifted]:
    """The parameters among a graph's inputs."""
    found = []
    for place, node in enumerate(graph_module.graph.find_nodes(op="placeholder")):
        source = getattr(node.meta.get("grapharg"), "source", None)
        if source is not None and (match := _PARAMETER.fullmatch(source.name)):
            root, modules, leaf = match.groups()
            found.append(Lifted(place, node, root, ".".join([*_MODULE.findall(modules), leaf])))
    return found


def bind_parameters(graph_module: GraphModule, parameters: Mapping[Lifted, tuple[str, nn.Parameter]]) -> None:
    """Has a graph read parameters as its own, under the given names, and name modules as these do.

    The placeholders stay, without readers.
    """
    prefixes: dict[str, str] = {}  # of each root, its path in the model
    for lifted, (name, parameter) in parameters.items():
        if name.endswith(lifted.name):
            prefixes.setdefault(lifted.root, name.removesuffix(lifted.name))
        container, _, leaf = name.rpartition(".")
        make_container(graph_module, container).register_parameter(leaf, parameter)
        with graph_module.graph.inserting_before(lifted.node):
            node = graph_module.graph.get_attr(name)
        node.meta = {key: lifted.node.meta[key] for key in ("val", "example_value") if key in lifted.node.meta}
        lifted.node.replace_all_uses_with(node)
    for node in itertools.chain.from_iterable(graph.graph.nodes for graph in list_graphs(graph_module)):
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {
                key: (_make_absolute(path, prefixes), module_class) for key, (path, module_class) in stack.items()
            }


def _make_absolute(path: str, prefixes: Mapping[str, str]) -> str:
    """``L['self'].layers.0`` as the path from the model's root."""
    for root, prefix in prefixes.items():
        if path == root:
            return prefix.rstrip(".")
        if path.startswith(f"{root}."):
            return prefix + path[len(root) + 1 :]
    return _ROOT.sub("", path)
