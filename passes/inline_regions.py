"""Puts the graphs of regions that run once into the graph around them."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp import autocast_mode
from torch.fx import Graph, GraphModule, Node

from fxmse.capture.attributes import get_attribute, list_graphs
from fxmse.passes.base import GraphPass

__all__ = ["InlineRegions"]

_higher_order = torch.ops.higher_order
_NO_GRAD, _AUTOCAST = _higher_order.wrap_with_set_grad_enabled, _higher_order.wrap_with_autocast
# Of each operator, at which argument the region stands, and at which its operands begin.
_PLACES = {
    _NO_GRAD: (1, 2),
    _AUTOCAST: (4, 5),
    _higher_order.tag_activation_checkpoint: (0, 1),
    _higher_order.wrap_activation_checkpoint: (0, 1),
    _higher_order.wrap: (0, 1),
    _higher_order.invoke_subgraph: (0, 2),
}


@dataclass(frozen=True)
class InlineRegions(GraphPass):
    """Replaces the nodes that run a region (``no_grad``, ``autocast``, checkpointing, ...) by the region's own nodes.

    torch.export and Dynamo have what is run so as a graph of its own, whose weights are its inputs; in the graph
    around it they are what they are everywhere else. Rules:

    1. Regions run once, whatever the data, so that their nodes compute the same where the region stood. Branches and
       loops stay as they are (:class:`fxmse.passes.open_regions.OpenRegions` is for them).
    2. What leaves a region without gradients is detached: it has none, as before.
    3. A region under autocast stands between the nodes that enter and leave it.
    4. A checkpointed region is not run again in the backward pass, which changes memory and time alone.
    """

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Applies the rules, to regions in regions, and in branches and loops, too."""
        modified = False
        for graph in list_graphs(graph_module):
            while nodes := [node for node in graph.graph.nodes if node.target in _PLACES]:
                for node in nodes:
                    _inline(graph, node)
                modified = True
                graph.recompile()
        return modified


def enter_autocast(device_type: str, dtype: torch.dtype, enabled: bool, cache_enabled: bool) -> Any:
    """What a graph calls where a region under autocast begins.

    While torch.export traces, torch's own node for it is recorded and nothing more, so that values behind it had
    another dtype than they will have: there autocast is entered, which records the node, too.
    """
    arguments = (device_type, dtype, enabled, cache_enabled)
    if not _is_exporting():
        return autocast_mode._enter_autocast(*arguments)
    context = torch.autocast(device_type, dtype, enabled, cache_enabled)
    context.__enter__()
    return context


def exit_autocast(context: Any) -> None:
    """What a graph calls where a region under autocast ends."""
    if _is_exporting():
        context.__exit__(None, None, None)
    else:
        autocast_mode._exit_autocast(context)


def _is_exporting() -> bool:
    return not torch.compiler.is_dynamo_compiling() and torch._C._is_torch_function_mode_enabled()


def _inline(graph_module: GraphModule, node: Node) -> None:
    graph, (place, first) = graph_module.graph, _PLACES[node.target]
    before, operands = node.args[:place], node.args[first:]
    path = str(node.args[place].target)  # type: ignore[union-attr]
    region = get_attribute(graph_module, path)
    with graph.inserting_before(node):
        entered = graph.call_function(enter_autocast, before) if node.target is _AUTOCAST else None
        outputs = _copy_nodes(graph, path, region.graph, operands)
        if entered:
            graph.call_function(exit_autocast, (entered,))
        if node.target is _NO_GRAD and before[0] is False:
            outputs = torch.fx.node.map_arg(outputs, lambda output: _detach(graph, output))
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(outputs, list | tuple):
            user.replace_all_uses_with(outputs[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(outputs)
    graph.erase_node(node)


def _copy_nodes(graph: Graph, path: str, region: Graph, operands: tuple[Any, ...]) -> Any:
    """The region's nodes at the graph's insertion point; returns what stands for its output."""
    known: dict[Node, Any] = dict(zip(region.find_nodes(op="placeholder"), operands, strict=True))
    for node in region.nodes:
        if node.op == "output":
            return torch.fx.node.map_arg(node.args[0], known.__getitem__)
        if node.op != "placeholder":
            known[node] = graph.node_copy(node, known.__getitem__)
            if node.op in ("get_attr", "call_module"):
                known[node].target = f"{path}.{node.target}"
    raise AssertionError("a graph without an output")


def _detach(graph: Graph, value: Node) -> Node:
    if not isinstance(value.meta.get("val", value.meta.get("example_value")), Tensor):
        return value
    detached = graph.call_function(torch.ops.aten.detach.default, (value,))
    detached.meta = dict(value.meta)
    return detached
