"""Shows observers the tokens of all experts, whichever the router has chosen."""

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxmse.capture.attributes import find_owner, list_graphs, make_container
from fxmse.observers.arrangements import Experts
from fxmse.observers.inputs import Inputs
from fxmse.passes.arranging import find_arrangement
from fxmse.passes.op_names import get_op_name
from fxmse.passes.operation import Operand, Operation
from fxmse.passes.probe import Probe, find_called, find_probe, skip_probes
from fxmse.passes.routers import list_indices
from fxmse.passes.versions import Versions, list_written

__all__ = ["AllExperts", "remove_all_experts", "show_all_experts"]


# A sort's places are an order of tokens, not a choice.
_CHOICES = ("topk", "argmax", "max")
_SIZES = ("size", "sym_size", "numel", "sym_numel")
_PRODUCTS = ("linear", "matmul", "mm", "addmm", "bmm")


class AllExperts(nn.Module):
    """Runs what is computed of a router's choice with other choices, until each token was at each expert.

    The choice has k experts a token, and keeps its shape: the first round has experts 0 to k - 1, the next one the k
    after these. Where k does not divide their number, the last round has some of the first ones again.

    Args:
        part: called with a choice and the other inputs, gives a value whose entries are tokens at experts, and what
            says at which.
        experts: how that is said; None where nothing is.
        num_experts: so many.
    """

    def __init__(self, part: GraphModule, experts: Experts | None, num_experts: int) -> None:
        super().__init__()
        self.part, self.experts, self.num_experts = part, experts, num_experts

    def forward(self, choice: Tensor, *others: Any) -> tuple[Tensor, Tensor | None]:
        """The tokens of all experts, and the number of each token's expert.

        Args:
            choice: the router's, whole numbers, (..., k), or (tokens,) of one expert a token.
            others: what else the part reads.
        """
        num_choices = choice.shape[-1] if choice.dim() > 1 else 1
        values, numbers = [], []
        for first in range(0, self.num_experts, num_choices):
            own = torch.arange(first, first + num_choices, device=choice.device, dtype=choice.dtype) % self.num_experts
            value, said = self.part(own.expand(choice.shape).contiguous(), *others)
            values.append(value)
            if self.experts:
                numbers.append(self.experts.number(value, said))
        return torch.cat(values), torch.cat(numbers) if numbers else None


def show_all_experts(operations: Iterable[Operation]) -> None:
    """Has the nodes on the values that experts read look at those of all tokens at all experts.

    Rules:

    1. Meant are the weights of experts that are chosen by an index, or read in groups of tokens, where that follows
       from what a ``topk`` or ``argmax`` chose. Where all tokens are at all experts anyway, they are seen so.
    2. What stands between the choice and such a value is copied, and run with other choices (:class:`AllExperts`),
       on the batch that the graph is run on. The graph's own values, and so its outputs, stay those of the choice.
    3. Values that do not depend on the choice are seen as they are: they are all tokens.
    4. Where the copy would write what the graph reads, or a mask goes with the tokens, the chosen experts are shown.

    Args:
        operations: those that have observers.
    """
    versions: dict[GraphModule, Versions] = {}
    parts = []
    for operation, operand, experts, source in _list_choices(operations):
        graph_module = find_owner(operation.node)
        if graph_module not in versions:
            versions[graph_module] = Versions(graph_module)
        if part := _find_part(graph_module, versions[graph_module], operation, operand, experts, source):
            parts.append(part)
    for part in parts:
        _insert(part)


def remove_all_experts(graph_module: GraphModule) -> None:
    """Takes back what :func:`show_all_experts` put into a graph and those in it, once nothing looks at it."""
    for graph in list_graphs(graph_module):
        for node in graph.graph.find_nodes(op="call_module"):
            if isinstance(find_called(graph, node), AllExperts):
                for user in list(node.users):
                    graph.graph.erase_node(user)
                graph.graph.erase_node(node)
                graph.delete_submodule(str(node.target))


def _list_choices(operations: Iterable[Operation]) -> Iterator[tuple[Operation, Operand, Experts, Node]]:
    """Rule 1: what reads tokens at experts, and the router's choice."""
    for operation in {operation.node: operation for operation in operations if operation.weight}.values():
        for operand in operation.operands:
            arrangement, choice = find_arrangement(operation, operand)
            if isinstance(arrangement, Experts) and choice and isinstance(choice[0], Node):
                source = _find_source(choice[0], arrangement.num_matrices)
                if source is not None:
                    yield operation, operand, arrangement, source


def _find_source(choice: Node, num_experts: int) -> Node | None:
    """The places of the largest of ``num_experts`` scores that a choice follows from; None where it does not."""
    found, seen, waiting = [], set[Node](), [choice]
    while waiting:
        node = waiting.pop()
        if node in seen or get_op_name(node) in _SIZES or (get_op_name(node) == "getattr" and node.args[1] == "shape"):
            continue
        seen.add(node)
        if get_op_name(node) in _PRODUCTS:
            return None  # it follows from the values themselves
        chosen_by = next((s for s in (node, *node.all_input_nodes) if node in list_indices(s)), None)
        if chosen_by is not None and get_op_name(chosen_by) in _CHOICES:
            found.append((node, chosen_by))
        else:
            waiting += node.all_input_nodes
    if len(found) != 1:
        return None
    ((source, chosen_by),) = found
    scores = chosen_by.all_input_nodes[0].meta.get("val")
    return None if isinstance(scores, Tensor) and scores.shape[-1] != num_experts else source


@dataclass(frozen=True)
class _Part:
    """What stands between a choice and a value that experts read.

    Attributes:
        graph_module: the graph.
        operation: that reads the value.
        experts: how it is said whose tokens the value has.
        source: the choice.
        watching: the nodes that look at the value, the first first.
        nodes: the part's, in the graph's order.
        inputs: what it reads beside the choice.
        value: its first result.
        said: its second one: whose the tokens are, for what wants to know it.
    """

    graph_module: GraphModule
    operation: Operation
    experts: Experts
    source: Node
    watching: list[Node]
    nodes: list[Node]
    inputs: list[Node]
    value: Node
    said: Any


def _find_part(
    graph_module: GraphModule,
    versions: Versions,
    operation: Operation,
    operand: Operand,
    experts: Experts,
    source: Node,
) -> _Part | None:
    value = operand.argument.get(operand.reader)
    lookers = []
    while isinstance(value, Node) and isinstance(find_called(graph_module, value), Probe | Inputs):
        lookers.append(value)
        value = value.args[0]
    after = _follow(source)
    watching = [node for node in lookers if not _is_dynamic(graph_module, node) and _takes_more(graph_module, node)]
    # Rule 3: what also looks at whose the tokens are depends on the choice all the same.
    watching = [node for node in watching if value in after or len(node.args) > 1][::-1]
    if not watching or not isinstance(value, Node):
        return None
    said = next((node.args[1] for node in watching if len(node.args) > 1), None)
    nodes = _collect(graph_module, versions, after, [value, said], watching[0])
    inputs = _list_inputs(nodes, source, [value, said])
    writes = [written for node in nodes for written in list_written(graph_module, node)]
    if any(versions.share_memory(written, other) for written in writes for other in (source, *inputs)):
        return None  # rule 4
    return _Part(graph_module, operation, experts, source, watching, nodes, inputs, value, said)


def _insert(part: _Part) -> None:
    """Rule 2."""
    graph_module, path = part.graph_module, part.operation.path
    copied = _copy(part)
    name = f"all_experts_of_{part.operation.node.name}"
    experts = part.experts if part.said is not None else None
    container = make_container(graph_module, path)
    container.add_module(name, AllExperts(copied, experts, part.experts.num_matrices))
    graph = graph_module.graph
    with graph.inserting_before(part.watching[0]):
        call = graph.call_module(f"{path}.{name}".lstrip("."), (part.source, *part.inputs))
        shown = graph.call_function(operator.getitem, (call, 0))
        numbers = graph.call_function(operator.getitem, (call, 1)) if experts else None
    for node in part.watching:
        if len(node.args) > 1:
            node.args = (*node.args, shown, numbers)
        else:
            node.kwargs = {"shown": shown}


def _is_dynamic(graph_module: GraphModule, node: Node) -> bool:
    probe = find_probe(graph_module, node)
    return probe is not None and probe.observer is None


def _takes_more(graph_module: GraphModule, node: Node) -> bool:
    """Rule 4: whether what a node is called with beside the value says whose tokens they are."""
    module = find_called(graph_module, node)
    return len(node.args) == 1 or getattr(module, "arrangement", None) is not None


def _follow(source: Node) -> set[Node]:
    """All that is computed of a node."""
    found, waiting = set[Node](), list(source.users)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.users
    return found


def _collect(
    graph_module: GraphModule, versions: Versions, after: set[Node], ends: list[Any], before: Node
) -> list[Node]:
    """The nodes after the choice that ``ends`` are computed of, with those that write them, in the graph's order."""
    nodes = list(graph_module.graph.nodes)
    nodes = nodes[: nodes.index(before)]
    writers = [(node, list_written(graph_module, node)) for node in nodes if node in after]
    found: set[Node] = set()
    waiting = [end for end in ends if isinstance(end, Node)]
    while waiting:
        node = waiting.pop()
        if node in found or node not in after:
            continue
        found.add(node)
        waiting += node.all_input_nodes
        waiting += [writer for writer, all_ in writers if any(versions.share_memory(w, node) for w in all_)]
    return [node for node in nodes if node in found]


def _list_inputs(own: list[Node], source: Node, ends: list[Any]) -> list[Node]:
    """What a part reads from outside of it."""
    read = [leaf for node in own for leaf in node.all_input_nodes]
    read += [end for end in ends if isinstance(end, Node)]
    inside = {source, *own}
    return [node for node in dict.fromkeys(read) if node not in inside]


def _copy(part: _Part) -> GraphModule:
    """A part of a graph as one of its own, without what looks at values in it."""
    graph = Graph()
    copies = {node: graph.placeholder(f"input_{place}") for place, node in enumerate((part.source, *part.inputs))}
    for node in part.nodes:
        passed = skip_probes(part.graph_module, node)
        assert isinstance(passed, Node)
        copies[node] = copies[passed] if passed is not node else graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[end] if isinstance(end, Node) else end for end in (part.value, part.said)))
    return GraphModule(part.graph_module, graph)
