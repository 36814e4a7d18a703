"""Modules in a graph that quantize a value on demand, and look at what becomes of it."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxmse.analysis.divergences import Sums
from fxmse.capture.attributes import make_container
from fxmse.capture.front_ends import copy_graph_module
from fxmse.config import Site
from fxmse.passes.fold_fake_quant import Qparams, make_call, replace_probes
from fxmse.passes.insert_observers import CONFIG_NUMBER_KEY, OPERATIONS_KEY
from fxmse.passes.open_regions import OpenRegions, list_open_graphs
from fxmse.passes.probe import Probe, find_called
from fxmse.passes.versions import Versions, list_written

__all__ = ["Instruments", "Meter", "Replay", "Tap", "compare", "instrument"]


def compare(value: Tensor, other: Tensor) -> Sums:
    """The sum of squared errors, and of the squares of ``value``."""
    wide = value.detach().double()
    return Sums((other.detach().double() - wide).square().sum().item(), wide.square().sum().item())


class Meter(nn.Module):
    """Passes a value on as it is, or quantized while it ``is_active``.

    While it ``is_recording`` the value gets to know its gradient; :meth:`take` says then what quantizing it changes.

    Args:
        sites: that read the value.
        number: of the config that they are of.
        is_weight: whether it is one.
        quantize: from a value to what it is quantized to, of its shape.
        is_written: whether the graph writes the value in place.
    """

    def __init__(
        self,
        sites: tuple[Site, ...],
        number: int,
        is_weight: bool,
        quantize: Callable[[Tensor], Tensor],
        is_written: bool,
    ) -> None:
        super().__init__()
        self.sites, self.number, self.is_weight = sites, number, is_weight
        self.quantize, self.is_written = quantize, is_written
        self.is_active = self.is_recording = False
        self.recorded: list[tuple[Tensor, Tensor]] = []  # what has a gradient, and its values
        self.value_error = Sums()
        self.output_error: Sums | None = None
        self.num_elements = 0  # of a weight
        self.change = 0.0  # the sum of squares of what quantization moves a draw by

    def forward(self, value: Tensor) -> Tensor:
        """Returns the value, which may be quantized."""
        if self.is_active:
            return self.quantize(value).to(value.dtype)
        if not self.is_recording:
            return value
        if value.requires_grad:
            # Another tensor, whose gradient is not that of the value's other readers.
            value = value.clone() if self.is_written else value.view_as(value)
        else:
            # Of a weight this keeps gradients away from the model's parameters.
            is_own = self.is_written or value.is_inference()
            value = (value.clone() if is_own else value.detach()).requires_grad_()
        self.recorded.append((value, value.detach().clone() if self.is_written else value.detach()))
        return value

    @torch.no_grad()
    def take(self, gradients: dict[int, Tensor | None]) -> bool:
        """Adds up what a batch's values and gradients say, and forgets them; returns whether there was a gradient.

        A row's errors add up before they are squared; those of different rows are taken for independent, as rounding
        has them. So the many rows of a value are as many draws.

        Args:
            gradients: by the identity of what has them; None where the outputs do not depend on it.
        """
        recorded, self.recorded = self.recorded, []
        # A value that several readers get in several ways, and a weight however often it is read, is quantized once.
        values: dict[object, Tensor] = {}
        found: dict[object, Tensor | None] = {}
        for leaf, value in recorded:
            key = None if self.is_weight else (value.data_ptr(), value.shape, value.stride())
            values.setdefault(key, value)
            sums = [part for part in (found.get(key), gradients[id(leaf)]) if part is not None]
            found[key] = functools.reduce(torch.add, sums) if sums else None
        for identity, value in values.items():
            self._add(value, found[identity])
        return any(gradient is not None for gradient in found.values())

    def _add(self, value: Tensor, gradient: Tensor | None) -> None:
        quantized = self.quantize(value)
        if not self.is_weight or not self.value_error.size:
            self.value_error = self.value_error.plus(compare(value, quantized))
            self.num_elements = value.numel() if self.is_weight else 0
        if gradient is not None:
            wide = torch.promote_types(value.dtype, torch.float32)
            changes = gradient.to(wide) * (quantized.to(wide) - value.to(wide))
            rows = changes.sum(-1) if changes.dim() else changes
            self.change += rows.double().square().sum().item()


class Replay(nn.Module):
    """Runs what is between a value and an op again with the value quantized, and compares the op's outputs.

    Args:
        meter: the value's.
        part: called with the value and what else it reads, gives the output.
    """

    def __init__(self, meter: Meter, part: GraphModule) -> None:
        super().__init__()
        self._meter = [meter]  # it is a module of the graph already
        self.part = part
        self.is_measuring = False

    def forward(self, value: Tensor, output: Tensor, *others: object) -> None:
        """Looks at one call."""
        if self.is_measuring:
            (meter,) = self._meter
            replayed = self.part(meter.quantize(value).to(value.dtype), *others)
            meter.output_error = (meter.output_error or Sums()).plus(compare(output, replayed))


class Tap(nn.Module):
    """Keeps an op's outputs of one run, and compares those of the next run with them."""

    def __init__(self) -> None:
        super().__init__()
        self.mode = ""  # "keep" or "compare"
        self.kept: list[Tensor] = []
        self._place = 0
        self.error = Sums()

    def forward(self, output: Tensor) -> None:
        """Looks at one call."""
        if self.mode == "keep":
            self.kept.append(output.detach().clone())
        elif self.mode == "compare" and self._place < len(self.kept):
            kept = self.kept[self._place]
            self._place += 1
            # Of tokens that were sent elsewhere there are others.
            if kept.shape == output.shape:
                self.error = self.error.plus(compare(kept, output))

    def begin(self, mode: str) -> None:
        """Starts a run."""
        self.mode, self._place, self.error = mode, 0, Sums()


@dataclass
class Instruments:
    """A graph with its instruments.

    Attributes:
        graph_module: the graph; it gives what the model gives, as long as no meter is active.
        meters: of each value and config one, in the graph's order.
        replays: of each op that reads the value.
        taps: by op, in the graph's order.
    """

    graph_module: GraphModule
    meters: list[Meter] = field(default_factory=list)
    replays: list[Replay] = field(default_factory=list)
    taps: dict[Node, Tap] = field(default_factory=dict)


def instrument(observed: GraphModule) -> Instruments:
    """A copy of a calibrated graph with a meter in the place of each probe, and taps and replays behind their ops.

    Rules:

    1. A meter quantizes as the graph would that is folded.
    2. The replay of an op runs what is computed of the value and that the op's output is computed of. Where some of
       that writes in place, there is none.
    3. A replay and a tap read values right behind the op, before anything writes them.
    """
    graph_module = copy_graph_module(observed)
    OpenRegions()(graph_module)
    instruments = Instruments(graph_module)
    versions = {graph: Versions(graph) for graph in list_open_graphs(graph_module)}
    meters: dict[Probe, Meter] = {}
    ops: list[tuple[GraphModule, Node, Meter]] = []

    def replace(graph: GraphModule, node: Node, probe: Probe, qparams: Qparams) -> Node:
        value = node.args[0]
        assert isinstance(value, Node)
        op, arguments = make_call(probe.sites[0].args, qparams)
        is_written = versions[graph].is_written(node)
        meter = meters.get(probe) or Meter(
            probe.sites, node.meta[CONFIG_NUMBER_KEY], probe.is_weight, lambda x: op(x, *arguments), is_written
        )
        meter.is_written |= is_written
        meters[probe] = meter
        parent, _, name = str(node.target).removesuffix("_observer").rpartition(".")
        container = make_container(graph, parent)
        if not hasattr(container, f"{name}_meter"):
            container.add_module(f"{name}_meter", meter)
        with node.graph.inserting_before(node):
            metered = node.graph.call_module(f"{parent}.{name}_meter".lstrip("."), (value,))
        metered.meta = dict(node.meta)
        node.replace_all_uses_with(metered)
        node.graph.erase_node(node)
        ops.append((graph, metered, meter))
        return metered

    replace_probes(graph_module, replace)
    instruments.meters = list(meters.values())
    for graph in list_open_graphs(graph_module):
        places = {node: place for place, node in enumerate(graph.graph.nodes)}
        own = [(node, meter) for owner, node, meter in ops if owner is graph]
        by_name = {node.name: node for node in places}
        watched = [(node, by_name[name], meter) for node, meter in own for name in node.meta[OPERATIONS_KEY]]
        for node, output, meter in sorted(watched, key=lambda entry: places[entry[1]]):
            _watch(instruments, graph, places, node, output, meter)
        graph.graph.lint()
        graph.recompile()
    return instruments


def _watch(
    instruments: Instruments,
    graph_module: GraphModule,
    places: Mapping[Node, int],
    node: Node,
    output: Node,
    meter: Meter,
) -> None:
    """Rules 2 and 3."""
    if output not in instruments.taps:
        instruments.taps[output] = Tap()
        _insert(graph_module, output, f"{output.name}_tap", instruments.taps[output], (output,))
    part = _find_part(graph_module, places, node, output)
    if part is not None:
        replay, others = Replay(meter, part[0]), part[1]
        instruments.replays.append(replay)
        _insert(graph_module, output, f"{node.name}_replay_of_{output.name}", replay, (node.args[0], output, *others))


def _insert(graph_module: GraphModule, output: Node, name: str, module: nn.Module, args: tuple[object, ...]) -> None:
    graph_module.add_submodule(name, module)
    with graph_module.graph.inserting_after(output):
        graph_module.graph.call_module(name, args)  # type: ignore[arg-type]


def _find_part(
    graph_module: GraphModule, places: Mapping[Node, int], value: Node, output: Node
) -> tuple[GraphModule, list[Node]] | None:
    """What is between a meter and an op's output, as a graph of its own, and what else that reads.

    None where the value is not before the output, or something on the way writes in place.
    """
    after = _collect(value, lambda node: node.users, lambda node: places.get(node, len(places)) <= places[output])
    between = _collect(output, lambda node: node.all_input_nodes, lambda node: node in after and node is not value)
    if output not in after or any(list_written(graph_module, node) for node in between):
        return None
    inside = {value, *between}
    own = sorted(between, key=places.__getitem__)
    others = [node for node in dict.fromkeys(n for o in own for n in o.all_input_nodes) if node not in inside]
    graph = Graph()
    copies = {node: graph.placeholder(f"input_{place}") for place, node in enumerate((value, *others))}
    for node in own:
        passed = node.args[0] if isinstance(find_called(graph_module, node), Meter) else node
        assert isinstance(passed, Node)
        # Other meters on the way pass the value on.
        copies[node] = copies[passed] if passed is not node else graph.node_copy(node, copies.__getitem__)
    graph.output(copies[output])
    return GraphModule(graph_module, graph), others


def _collect(
    start: Node, follow: Callable[[Node], Iterable[Node]], is_meant: Callable[[Node], bool]
) -> dict[Node, None]:
    """``start`` and what is reached from it."""
    found: dict[Node, None] = {}
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found[node] = None
            waiting += filter(is_meant, follow(node))
    return found
