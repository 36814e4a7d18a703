"""Observed graphs without what no observer looks at."""

from collections.abc import Iterable

import torch
from torch.fx import Graph, GraphModule, Node

from fxmse.capture.attributes import find_regions
from fxmse.capture.front_ends import copy_graph_module
from fxmse.observers.inputs import Inputs
from fxmse.passes.probe import Probe, find_called, find_inputs, find_probes
from fxmse.passes.versions import Versions

__all__ = ["find_effects", "find_sources_of_activations", "observes_activations", "return_as_written", "trim"]

_PURE = ("_operator", "builtins", "math")


def find_sources_of_activations(graph_module: GraphModule) -> set[Node]:
    """The nodes that have to run for all activations to be observed: observers of them, and what is behind."""
    return _find_sources(graph_module, [*_list_watchers(graph_module), *find_effects(graph_module)])


def observes_activations(graph_module: GraphModule) -> bool:
    """Whether data has to run through an observed graph: of dynamic values nothing is kept."""
    probes = (probe for _, probe in find_probes(graph_module))
    return any(find_inputs(graph_module)) or any(probe.observer and not probe.is_weight for probe in probes)


def trim(graph_module: GraphModule, *, keep_outputs: bool) -> GraphModule:
    """A copy of an observed graph that runs no more than its observers of activations and its outputs need.

    Without outputs it returns None: of a language model the head is not run, unless its input is observed.
    """
    trimmed = copy_graph_module(graph_module)
    output = trimmed.graph.output_node()
    if not keep_outputs:
        output.args = (None,)
        return_as_written(trimmed.graph)
    needed = _find_sources(trimmed, [output, *_list_watchers(trimmed), *find_effects(trimmed)])
    for node in reversed(trimmed.graph.nodes):
        if node not in needed and node.op != "placeholder":
            trimmed.graph.erase_node(node)
    trimmed.recompile()
    return trimmed


def return_as_written(graph: Graph) -> None:
    """Has a graph return what its output node says, not in the structure of the model's outputs."""
    info = getattr(graph._codegen, "pytree_info", None)
    if info is not None:
        graph._codegen.pytree_info = info._replace(out_spec=None)  # type: ignore[attr-defined]


def _list_watchers(graph_module: GraphModule) -> list[Node]:
    return [node for node in graph_module.graph.nodes if _watches(graph_module, node)]


def _watches(graph_module: GraphModule, node: Node) -> bool:
    """Whether a node, or one in the branches and loops that it runs, looks at an activation."""
    called = find_called(graph_module, node)
    if isinstance(called, Inputs) or (isinstance(called, Probe) and not called.is_weight):
        return True
    return any(_list_watchers(region) for region in find_regions(graph_module, node))


def find_effects(graph_module: GraphModule) -> list[Node]:
    """The nodes that are there for what they do, not for what they give: they begin and end autocast, or a vmap.

    No schema says what they do, and nothing reads them.
    """
    return [
        node
        for node in graph_module.graph.nodes
        if node.op == "call_function"
        and not node.users
        and not isinstance(node.target, torch._ops.OperatorBase)
        and getattr(node.target, "__module__", None) not in _PURE
    ]


def _find_sources(graph_module: GraphModule, nodes: Iterable[Node]) -> set[Node]:
    """``nodes``, all that they are computed of, and what writes the memory that they read."""
    versions = Versions(graph_module)
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += node.all_input_nodes
        waiting = [writer for writer in versions.find_writers(found) if writer not in found]
    return found
