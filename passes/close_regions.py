"""Has branches and loops get what they read as operands."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxmse.capture.attributes import copy_attribute, find_regions, get_attribute
from fxmse.capture.front_ends import copy_graph_module
from fxmse.ops import is_fake_quantize
from fxmse.passes.base import GraphPass
from fxmse.passes.constants import find_sources
from fxmse.passes.open_regions import OPERAND_KEY, OPERATORS, find_open, is_plain
from fxmse.passes.probe import find_probes
from fxmse.passes.versions import Versions

__all__ = ["CloseRegions"]

_OPERATORS: dict[Any, tuple[Any, int]] = {runner: (operator, place) for operator, (place, runner) in OPERATORS.items()}


@dataclass(frozen=True)
class CloseRegions(GraphPass):
    """Has the regions that :class:`fxmse.passes.open_regions.OpenRegions` opened read no attributes of their own.

    Rules:

    1. A region with a probe stays open, and so does one around it.
    2. A fake-quantized weight is computed once, around the region, by one node for all that read it.
    3. A constant that was an operand, and is what it was, is that one again; all other attributes (scales) become
       operands.
    4. Operands that no region reads any more go.
    """

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Applies the rules, to the innermost regions first."""
        modified = False
        for node in find_open(graph_module):
            regions = list(find_regions(graph_module, node))
            for region in regions:
                modified |= self(region).modified
            if not any(any(find_probes(region)) for region in regions):
                _Opened(graph_module, node).close()
                modified = True
        return modified


class _Opened:
    """A node whose regions are open, and what they get from around them."""

    def __init__(self, graph_module: GraphModule, node: Node) -> None:
        self.graph_module, self.node = graph_module, node
        self.operator, self.place = _OPERATORS[node.target]
        self.regions = list(find_regions(graph_module, node))
        self.operands: list[Any] = list(node.args[self.place]) if len(node.args) > self.place else []  # type: ignore[arg-type]

    def close(self) -> None:
        num_before = len(self.operands)
        for region in self.regions:
            for weight in _find_weights(region):
                self._pass_in(region, weight)
            _erase_unread_constants(region)
            _restore(region)
            for attribute in _find_tensors(region):
                self._pass_in(region, attribute)
            _erase_unread_constants(region)
        if len(self.operands) > num_before:
            self._drop_unread()
            args = self.node.args
            self.node.args = (*args[: self.place], tuple(self.operands), *args[self.place + 1 :])
        self.node.target = self.operator
        for source in self.node.all_input_nodes:
            value = get_attribute(self.graph_module, str(source.target)) if source.op == "get_attr" else None
            if isinstance(value, GraphModule):
                value.graph.lint()
                # A copy has those attributes alone that the graph still reads.
                self.graph_module.set_submodule(str(source.target), copy_graph_module(value))

    def _pass_in(self, region: GraphModule, constant: Node) -> None:
        """Has a region get a constant of its own from around it; what is passed in already is not passed in again."""
        value = self._lift(region, constant)
        if value not in self.operands:
            self.operands.append(value)
            for other in self.regions:
                _add_placeholder(other, constant)
        placeholder = _list_placeholders(region)[self.operands.index(value) - len(self.operands)]
        constant.replace_all_uses_with(placeholder)

    def _lift(self, region: GraphModule, value: Node) -> Node:
        """The node that computes the same as ``value``, a constant of a region, before the regions are run."""
        if value.op == "get_attr":
            copy_attribute(region, str(value.target), self.graph_module)
        sources = {source: self._lift(region, source) for source in value.all_input_nodes}
        args, kwargs = map_arg(value.args, sources.__getitem__), map_arg(value.kwargs, sources.__getitem__)
        graph = self.graph_module.graph
        equal = _find_equal(graph, value, args, kwargs)
        if equal is None:
            with graph.inserting_before(self.node):
                equal = graph.create_node(value.op, value.target, args, kwargs, value.name)
            equal.meta = {key: entry for key, entry in value.meta.items() if key != OPERAND_KEY}
        elif self.node < equal:
            self.node.prepend(equal)
        return equal

    def _drop_unread(self) -> None:
        """Rule 4."""
        for place in reversed(range(len(self.operands))):
            from_end = place - len(self.operands)
            placeholders = [_list_placeholders(region)[from_end] for region in self.regions]
            if not any(placeholder.users for placeholder in placeholders):
                for placeholder in placeholders:
                    placeholder.graph.erase_node(placeholder)
                del self.operands[place]


def _list_placeholders(region: GraphModule) -> list[Node]:
    return list(region.graph.find_nodes(op="placeholder"))


def _find_weights(region: GraphModule) -> list[Node]:
    """Rule 2."""
    versions = Versions(region)
    return [node for node in region.graph.nodes if is_fake_quantize(node) and find_sources(region, versions, node)]


def _find_tensors(region: GraphModule) -> list[Node]:
    attributes = region.graph.find_nodes(op="get_attr")
    return [n for n in attributes if n.users and isinstance(get_attribute(region, str(n.target)), Tensor)]


def _restore(region: GraphModule) -> None:
    """Rule 3."""
    placeholders = {node.target: node for node in _list_placeholders(region)}
    for node in region.graph.nodes:
        if OPERAND_KEY in node.meta and is_plain(node):
            node.replace_all_uses_with(placeholders[node.meta[OPERAND_KEY]])


def _erase_unread_constants(region: GraphModule) -> None:
    versions = Versions(region)
    constants = {n for n in region.graph.nodes if n.op != "output" and find_sources(region, versions, n)}
    region.graph.eliminate_dead_code(is_impure_node=lambda node: node not in constants)


def _add_placeholder(region: GraphModule, constant: Node) -> None:
    placeholders = _list_placeholders(region)
    with region.graph.inserting_before(placeholders[-1].next if placeholders else next(iter(region.graph.nodes))):
        placeholder = region.graph.placeholder(constant.name)
    placeholder.target = placeholder.name
    placeholder.meta = {key: constant.meta[key] for key in ("val", "example_value") if key in constant.meta}


def _find_equal(graph: Graph, value: Node, args: Any, kwargs: Any) -> Node | None:
    if value.op == "get_attr":
        return next(iter(graph.find_nodes(op="get_attr", target=value.target)), None)
    readers = args[0].users if args and isinstance(args[0], Node) else ()
    described = (value.op, value.target, args, kwargs)
    return next((user for user in readers if (user.op, user.target, user.args, user.kwargs) == described), None)
