"""Cuts an observed graph into parts, each of which can meet its weights and run alone."""

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from fxmse.capture.attributes import find_place, find_regions, get_attribute
from fxmse.config import CONFIG_KEY
from fxmse.observers.inputs import Inputs, Mean
from fxmse.passes.constants import find_sources
from fxmse.passes.probe import Probe, find_called, find_inputs
from fxmse.passes.trimming import find_effects, find_sources_of_activations, return_as_written
from fxmse.passes.versions import Versions

__all__ = ["Part", "cut", "make_entry"]

_UNKNOWN_SIZE = 1 << 30  # bytes of a value of which no example is known


class Part(NamedTuple):
    """Some consecutive nodes of a graph, as a graph of their own.

    Attributes:
        graph_module: takes values of earlier parts by position and returns a tuple of those that later ones read. It
            has the whole graph's names, parameters and probes.
        inputs: the names of the values that it takes.
        outputs: the names of those that it returns.
        carried: of all that has been computed when it has run, what later parts read: outputs of its own and before.
        num_bytes: of the parameters and buffers that it reads.
        carried_bytes: of ``carried``, of the example that the graph was traced with.
    """

    graph_module: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    carried: tuple[str, ...]
    num_bytes: int
    carried_bytes: int


def make_entry(graph_module: GraphModule) -> GraphModule:
    """A graph that is called as ``graph_module`` is, and returns its inputs as a tuple, in the order of their nodes."""
    graph = Graph(tracer_cls=graph_module.graph._tracer_cls)
    inputs = [graph.node_copy(node) for node in graph_module.graph.find_nodes(op="placeholder")]
    graph.output(tuple(inputs))
    graph.set_codegen(copy.copy(graph_module.graph._codegen))
    return_as_written(graph)
    return GraphModule(nn.Module(), graph)


def cut(graph_module: GraphModule, max_bytes: int, together: Iterable[Collection[nn.Parameter]] = ()) -> list[Part]:
    """The parts of an observed graph, in the order in which they run.

    Run one after another they compute what the graph computes, bit for bit, as far as observers of activations need
    it: the graph's outputs are not among theirs.

    Rules:

    1. What follows from parameters alone belongs to every part that reads it: weights, views of them, their probes.
    2. Nothing is cut between two nodes that have to know of each other before either is folded: those of one observer
       of activations, a weight and what looks at its inputs, weights that share a global scale, and
       what writes a value in place and what reads it; nor between readers of parameters that belong together, nor
       where autocast or a vmap is at work.
    3. The cuts are those over which the fewest bytes of activations pass, with no part's weights above ``max_bytes``
       where that can be.

    Args:
        graph_module: an observed graph; its parts share its parameters and probes.
        max_bytes: of the weights of a part.
        together: parameters that have to be in one part.
    """
    return list(_Cutter(graph_module, together).cut(max_bytes))


class _Cutter:
    """A graph's nodes in the order in which they run, without those that follow from parameters alone."""

    def __init__(self, graph_module: GraphModule, together: Iterable[Collection[nn.Parameter]]) -> None:
        self.graph_module = graph_module
        self.together = {find_place(p): number for number, group in enumerate(together) for p in group}
        self.corrected = {i.weight for _, i in find_inputs(graph_module) if isinstance(i, Mean)}
        self.needed = find_sources_of_activations(graph_module)
        versions = Versions(graph_module)
        nodes = [node for node in graph_module.graph.nodes if node.op != "output"]
        self.free = _find_free(graph_module, versions)
        self.body = [node for node in nodes if node not in self.free and node.op != "placeholder"]
        self.places = {node: place for place, node in enumerate(self.body)}
        self.places |= {node: -1 for node in nodes if node.op == "placeholder"}
        self.constants = {node: self._list_constants(node) for node in self.body}
        self.last_reads = self._find_last_reads()
        self.passing = self._count_passing()
        self.bound = self._find_bound(versions)

    def _list_constants(self, node: Node) -> list[Node]:
        """Rule 1: what ``node`` reads that follows from parameters alone, and all that this is computed of."""
        found: dict[Node, None] = {}
        waiting = list(node.all_input_nodes)
        while waiting:
            source = waiting.pop()
            if source in self.free and source not in found:
                found[source] = None
                waiting += source.all_input_nodes
        return list(found)

    def _find_last_reads(self) -> dict[Node, int]:
        """Of each value that an observer of activations needs, the last place where one does."""
        found: dict[Node, int] = {}
        for node in self.body:
            if node in self.needed:
                found |= {source: self.places[node] for source in node.all_input_nodes if source not in self.free}
        return found

    def _count_passing(self) -> list[int]:
        """How many bytes pass over a cut before each place."""
        changes = [0] * (len(self.body) + 2)
        for node, last in self.last_reads.items():
            size = _measure_value(node)
            changes[self.places[node] + 1] += size
            changes[last + 1] -= size
        return list(itertools.accumulate(changes))

    def _find_bound(self, versions: Versions) -> list[bool]:
        """Rule 2: of each place, whether there can be no cut before it."""
        tied: defaultdict[object, list[int]] = defaultdict(list)
        for node in self.body:
            for tie in self._list_ties(node):
                tied[tie].append(self.places[node])
        for effect in find_effects(self.graph_module):
            # What an effect begins with is its input; without one, it is of one kind with the others.
            begins: list[object] = [*effect.all_input_nodes, ""]
            tied["effect", begins[0]] += [self.places[n] for n in (*effect.all_input_nodes, effect) if n in self.places]
        for number, written in enumerate(versions.list_written()):
            readers = itertools.chain.from_iterable((node, *node.users) for node in written)
            tied[number] = [max(self.places[node], 0) for node in readers if node in self.places]
        bound = [False] * len(self.body)
        for places in filter(None, tied.values()):
            for place in range(min(places) + 1, max(places) + 1):
                bound[place] = True
        return bound

    def _list_ties(self, node: Node) -> Iterator[object]:
        """What is equal for nodes that have to be in one part."""
        for called in (node, *self.constants[node]):
            yield from _list_ties(find_called(self.graph_module, called))
            if called.target in self.corrected:
                yield called.target
        for place in self._list_attributes(node):
            if place in self.together:
                yield "together", self.together[place]
        for region in find_regions(self.graph_module, node):
            for module in region.modules():
                yield from _list_ties(module)

    def cut(self, max_bytes: int) -> Iterator[Part]:
        """The parts."""
        begins = self._choose(max_bytes)
        for begin, end in itertools.pairwise([*begins, len(self.body)]):
            yield self._make_part(begin, end)

    def _choose(self, max_bytes: int) -> list[int]:
        """Rule 3: where parts begin, by dynamic programming over the cheapest cut before each reader of weights."""
        candidates = self._list_candidates()
        sizes = [self._measure_weights(begin, end) for begin, end in itertools.pairwise([*candidates, len(self.body)])]
        best: list[tuple[int, int, int]] = [(0, 0, 0)]  # bytes that pass, parts, where the last of them begins
        for end in range(1, len(sizes) + 1):
            weights: dict[object, int] = {}
            options: list[tuple[int, int, int]] = []
            for begin in range(end - 1, -1, -1):
                weights |= sizes[begin]
                if options and sum(weights.values()) > max_bytes:
                    break
                passed, parts, _ = best[begin]
                options.append((passed + (self.passing[candidates[begin]] if begin else 0), parts + 1, begin))
            best.append(min(options))
        begins, end = [], len(sizes)
        while end:
            end = best[end][2]
            begins.append(candidates[end])
        return begins[::-1]

    def _list_candidates(self) -> list[int]:
        """The beginning, and between one reader of weights and the next the place over which least passes."""
        candidates, waiting = [0], []
        has_read = False
        for place, node in enumerate(self.body):
            waiting += [place] if has_read and not self.bound[place] else []
            if self.constants[node]:
                candidates += [min(waiting, key=self.passing.__getitem__)] if waiting else []
                waiting, has_read = [], True
        return candidates

    def _list_carried(self, place: int) -> list[Node]:
        """The values that are computed before ``place`` and read behind it."""
        return [node for node, last in self.last_reads.items() if self.places[node] < place <= last]

    def _measure_weights(self, begin: int, end: int) -> dict[object, int]:
        """The bytes of each attribute that some nodes read."""
        found: dict[object, int] = {}
        for node in self.body[begin:end]:
            found |= self._list_attributes(node)
        return found

    def _list_attributes(self, node: Node) -> dict[object, int]:
        """The bytes of the tensors that a node reads, by their places."""
        attributes = (constant for constant in self.constants[node] if constant.op == "get_attr")
        values = [get_attribute(self.graph_module, str(constant.target)) for constant in attributes]
        return {find_place(value): value.nbytes for value in values if isinstance(value, Tensor)}

    def _make_part(self, begin: int, end: int) -> Part:
        own = set(self.body[begin:end])
        constants = {constant for node in own for constant in self.constants[node]}
        sources = dict.fromkeys(s for node in self.body[begin:end] for s in node.all_input_nodes)
        inputs = [node for node in sources if node not in own and node not in self.free]
        carried = self._list_carried(end)
        outputs = [node for node in carried if node in own]
        graph = Graph(tracer_cls=self.graph_module.graph._tracer_cls)
        copies = {node: graph.placeholder(node.name) for node in inputs}
        for node, copied in copies.items():
            copied.meta = dict(node.meta)
        for node in self.graph_module.graph.nodes:
            if node in own or node in constants:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in outputs))
        part = GraphModule(self.graph_module, graph)
        part.meta[CONFIG_KEY] = self.graph_module.meta[CONFIG_KEY]
        num_bytes = sum(self._measure_weights(begin, end).values())
        names = [tuple(node.name for node in nodes) for nodes in (inputs, outputs, carried)]
        return Part(part, names[0], names[1], names[2], num_bytes, sum(map(_measure_value, carried)))


def _find_free(graph_module: GraphModule, versions: Versions) -> set[Node]:
    """Rule 1: the nodes that follow from parameters and buffers alone."""
    free: set[Node] = set()
    for node in graph_module.graph.nodes:
        sources = node.all_input_nodes
        is_computed = bool(sources) and free.issuperset(sources) and bool(find_sources(graph_module, versions, node))
        if node.op == "get_attr" or is_computed:
            free.add(node)
    return free


def _list_ties(called: nn.Module | None) -> Iterator[object]:
    """Rule 2, of a probe or inputs that a node calls."""
    if isinstance(called, Mean):
        yield called.weight
    if isinstance(called, Inputs):
        yield called
    if not isinstance(called, Probe):
        return
    if called.global_group:
        yield called.global_group
    if called.inputs is not None:
        yield called.inputs
    if not called.is_weight:
        yield called


def _measure_value(node: Node) -> int:
    """The bytes of a node's value, of the example that it was traced with."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if value is None:
        return _UNKNOWN_SIZE
    return sum(_count_elements(leaf) * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _count_elements(tensor: Tensor) -> int:
    sizes = (size.node.hint if isinstance(size, torch.SymInt) else size for size in tensor.shape)
    return math.prod(1 if size is None else int(size) for size in sizes)
