"""Has branches and loops be graphs like others, whose weights are get_attr nodes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from fxmse.capture.attributes import copy_attribute, find_regions, get_attribute
from fxmse.capture.front_ends import copy_graph_module
from fxmse.ops import is_fake_quantize
from fxmse.passes.base import GraphPass
from fxmse.passes.constants import find_sources
from fxmse.passes.versions import Versions

__all__ = ["OPERAND_KEY", "OPERATORS", "OpenRegions", "find_open", "is_passed_in", "is_plain", "list_open_graphs"]

OPERAND_KEY = "fxmse_operand"
"""Where a region's constant has in its ``meta`` which placeholder of the region's it stands for."""


@dataclass(frozen=True)
class OpenRegions(GraphPass):
    """Has the regions of branches and loops (``cond``, ``while_loop``, ``scan``, ``map``) read weights as their own.

    torch.export and Dynamo give a region everything that it reads as an operand, weights among them, and run regions
    that have a state as little as they like. Rules:

    1. An operand that follows from the graph's attributes alone, and that nothing writes, is computed in the regions
       that read it, of attributes that these have under the same names. It is passed in as before, to no reader.
       What is observed or fake-quantized already is computed around the region.
    2. The node runs the regions in Python, as often as they are run, so that observers in them see each value once.
    3. That goes for regions in regions, too.

    :class:`fxmse.passes.close_regions.CloseRegions` is the way back, which export and compilers need.
    """

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Applies the rules."""
        nodes = [node for node in graph_module.graph.nodes if node.target in OPERATORS]
        versions = Versions(graph_module)
        for node in nodes:
            _unshare(graph_module, node)
            place, runner = OPERATORS[node.target]
            for operand, placeholders in _pair(graph_module, node, place):
                _sink(graph_module, versions, operand, placeholders)
            node.target = runner  # rule 2
        for node in nodes:
            for region in find_regions(graph_module, node):
                self(region)  # rule 3
                region.graph.lint()
                region.recompile()
        return bool(nodes)


@torch.compiler.disable
def run_cond(condition: Any, true: Callable[..., Any], false: Callable[..., Any], operands: Sequence[Any] = ()) -> Any:
    """``torch.cond``."""
    return (true if condition else false)(*operands)


@torch.compiler.disable
def run_while_loop(
    condition: Callable[..., Any], body: Callable[..., Any], carried: Sequence[Any], operands: Sequence[Any] = ()
) -> Any:
    """``while_loop``; a value that is carried through no round is copied, as there."""
    values = tuple(value.clone() if isinstance(value, Tensor) else value for value in carried)
    while condition(*values, *operands):
        values = body(*values, *operands)
    return values


@torch.compiler.disable
def run_scan(
    combine: Callable[..., Any], carried: Sequence[Any], slices: Sequence[Tensor], operands: Sequence[Any] = ()
) -> Any:
    """``scan``."""
    outputs = []
    for step in zip(*(values.unbind(0) for values in slices), strict=True):
        results = combine(*carried, *step, *operands)
        carried = results[: len(carried)]
        outputs.append(results[len(carried) :])
    return *carried, *(torch.stack(steps) for steps in zip(*outputs, strict=True))


@torch.compiler.disable
def run_map(function: Callable[..., Any], slices: Sequence[Tensor], operands: Sequence[Any] = ()) -> Any:
    """``map``."""
    steps = [function(*step, *operands) for step in zip(*(values.unbind(0) for values in slices), strict=True)]
    return tuple(torch.stack(outputs) for outputs in zip(*steps, strict=True))


_higher_order = torch.ops.higher_order
OPERATORS: dict[Any, tuple[int, Callable[..., Any]]] = {
    _higher_order.cond: (3, run_cond),
    _higher_order.while_loop: (3, run_while_loop),
    _higher_order.scan: (3, run_scan),
    _higher_order.map_impl: (2, run_map),
}
"""Of each operator, which argument lists what its regions read and is the same each time (they have it as their last
inputs), and what runs it while it is open."""
_RUNNERS = {runner: place for place, runner in OPERATORS.values()}


def find_open(graph_module: GraphModule) -> list[Node]:
    """The nodes of a graph whose regions are open."""
    return [node for node in graph_module.graph.nodes if node.target in _RUNNERS]


def list_open_graphs(graph_module: GraphModule) -> Iterator[GraphModule]:
    """A graph, and those of the open regions in it."""
    yield graph_module
    for node in find_open(graph_module):
        for region in find_regions(graph_module, node):
            yield from list_open_graphs(region)


def is_passed_in(node: Node, constant: Node) -> bool:
    """Whether an open node reads a constant as an operand alone, which its regions have as their own by rule 1."""
    if node.target not in _RUNNERS:
        return False
    others = [argument for place, argument in enumerate(node.args) if place != _RUNNERS[node.target]]
    return constant not in tree_leaves((others, node.kwargs))


def _unshare(graph_module: GraphModule, node: Node) -> None:
    """Gives a node its own regions where another runs them, too."""
    graph = graph_module.graph
    for source in node.all_input_nodes:
        region = get_attribute(graph_module, str(source.target)) if source.op == "get_attr" else None
        if not isinstance(region, GraphModule):
            continue
        readers = {user for same in graph.find_nodes(op="get_attr", target=source.target) for user in same.users}
        if readers != {node}:
            target = f"{source.target}_of_{node.name}"
            graph_module.set_submodule(target, copy_graph_module(region))
            with graph.inserting_before(node):
                node.replace_input_with(source, graph.get_attr(target))


def _pair(graph_module: GraphModule, node: Node, place: int) -> Iterator[tuple[Node, list[tuple[GraphModule, Node]]]]:
    """Each operand, and the placeholder that it is in each region."""
    operands: Any = node.args[place] if len(node.args) > place else ()
    regions = list(find_regions(graph_module, node))
    for number, operand in enumerate(operands):
        if isinstance(operand, Node):
            from_end = number - len(operands)
            yield operand, [(region, region.graph.find_nodes(op="placeholder")[from_end]) for region in regions]


def _sink(
    graph_module: GraphModule, versions: Versions, operand: Node, placeholders: list[tuple[GraphModule, Node]]
) -> None:
    """Rule 1."""
    if not find_sources(graph_module, versions, operand) or not is_plain(operand):
        return
    if any(Versions(region).is_written(placeholder) for region, placeholder in placeholders):
        return
    for region, placeholder in placeholders:
        if placeholder.users:
            last = region.graph.find_nodes(op="placeholder")[-1]
            with region.graph.inserting_before(last.next):
                constant = _copy(graph_module, operand, region)
            constant.meta[OPERAND_KEY] = placeholder.target
            placeholder.replace_all_uses_with(constant)


def is_plain(constant: Node) -> bool:
    """Whether a constant is computed of attributes in float: nothing of it is observed or quantized."""
    is_float = constant.op not in ("call_module", "placeholder") and not is_fake_quantize(constant)
    return is_float and all(map(is_plain, constant.all_input_nodes))


def _copy(graph_module: GraphModule, value: Node, region: GraphModule) -> Node:
    """The computation of ``value`` at a region's insertion point."""
    if value.op == "get_attr":
        copy_attribute(graph_module, str(value.target), region)
    sources = {source: _copy(graph_module, source, region) for source in value.all_input_nodes}
    copied = region.graph.node_copy(value, sources.__getitem__)
    copied.meta = dict(value.meta)
    return copied
