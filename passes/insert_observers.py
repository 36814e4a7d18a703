"""Puts observers on the values that a config wants quantized."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch.fx import GraphModule, Node

from fxmse.capture.attributes import list_graphs, make_container
from fxmse.config import CONFIG_KEY, MODULES_KEY, Config, Site, resolve_config
from fxmse.observers.arrangements import Patches
from fxmse.observers.base import Observer
from fxmse.observers.input_aware import InputAwareObserver
from fxmse.observers.inputs import Products
from fxmse.ops import is_fake_quantize
from fxmse.passes.all_experts import show_all_experts
from fxmse.passes.annotations import AnnotatedReads, find_annotated_reads
from fxmse.passes.arranging import find_arrangement
from fxmse.passes.base import GraphPass
from fxmse.passes.bias_correction import BiasedOp, insert_means
from fxmse.passes.close_regions import CloseRegions
from fxmse.passes.constants import describe
from fxmse.passes.decompose_attention import DecomposeAttention
from fxmse.passes.functionalize_modules import FunctionalizeModules
from fxmse.passes.inline_regions import InlineRegions
from fxmse.passes.input_nodes import Meeting, insert_input_nodes
from fxmse.passes.joins import JOINS, find_joined_values
from fxmse.passes.loading import register_check
from fxmse.passes.naming import Names
from fxmse.passes.open_regions import OpenRegions, list_open_graphs
from fxmse.passes.operation import Weight
from fxmse.passes.probe import Probe, find_probes, skip_probes
from fxmse.passes.reads import Read, find_reads
from fxmse.passes.weight_view import WeightView

if TYPE_CHECKING:
    from torchao.quantization.pt2e.quantizer import Quantizer

__all__ = ["CONFIG_NUMBER_KEY", "OPERATIONS_KEY", "InsertObservers"]

CONFIG_NUMBER_KEY = "fxmse_config_number"
"""Where a probe's node has in its ``meta`` by which config it was inserted: 0, or its place among the others and 1."""
OPERATIONS_KEY = "fxmse_operations"
"""Where it has the names of the nodes whose operations read the value, or give it."""


@dataclass(frozen=True)
class InsertObservers(GraphPass):
    """Inserts a probe between each value that is to be quantized and the ops that read it for quantized modules.

    Rules:

    1. Regions come into the graph first (:class:`InlineRegions`), calls of modules become functional
       (:class:`FunctionalizeModules`), and fused attention its products (:class:`DecomposeAttention`). Branches and
       loops are quantized as graphs of their own (:class:`OpenRegions`); those without a probe are left as they are.
    2. A value that several sites read with equal arguments has one probe, named after the first of them. That goes
       for activations (one node, with no write in place between the readers: :mod:`fxmse.passes.versions`) and for
       weights (one tensor, however many names it has: tied weights stay tied). A weight that is read in two ways, as
       it is and transposed, is two values.
    3. A layer that is called more than once has one observer, which sees the values of all its calls, and which it
       shares with the sites that read all the same values alone. A layer is a module, or a functional call, and one
       way of reading its weight.
    4. A weight is observed, and later quantized, as rows of output channels, whatever shape its op wants
       (:class:`fxmse.passes.weight_view.WeightView`): those of the parameter, before anything that leaves its rows
       as they are (a transpose, the choice of an expert), and otherwise, of what is computed of parameters alone
       (a reshaped one, a weight norm), those that its op reads.
    5. Readers of the value that are not sites keep reading it as it is.
    6. A value that has a probe already is left alone.
    7. The weights of linears that read the same value share their global scale, where they have one: a runtime fuses
       them (q/k/v, gate/up). Those of experts share one an expert.
    8. A dynamic value's probe observes nothing; it holds the place of the fake-quantize node to be.
    9. A weight whose observer asks for it (``imatrix_mse``, ``output_mse``) gets a node on the values that its op
       reads, which shows them to what is kept of them; weights that read the same values share it.
    10. What experts read is observed of all tokens at all experts (:func:`fxmse.passes.all_experts.show_all_experts`).
    11. With ``bias_correction`` each op whose weight is quantized and whose bias can be corrected gets such a node
        (:func:`fxmse.passes.bias_correction.insert_means`).
    12. Each of ``others`` has probes of its own on the values, in a row with the first config's: all formats of a value
        are searched while data runs once. Such a graph is to be compared (``fxmse.analyze``), not folded.
    13. With ``quantizer`` the sites are what that annotates (:mod:`fxmse.passes.annotations`), and share what it says,
        instead of rule 3. Fused attention stays.

    The observed graph computes what it computed before, bit for bit. It loads no state of another calibration
    (:mod:`fxmse.passes.loading`).

    Attributes:
        config: which modules get which scheme, as :func:`fxmse.config.resolve_config` takes it.
        share_across: ops, "cat" or "add", whose observed inputs and output share one observer where their arguments
            are equal, for runtimes that run them in one scale.
        moe_calibrate_all_experts: rule 10; False observes each expert with the tokens that its router chooses for it.
        bias_correction: keep the means of inputs, with which biases are corrected once the probes are folded.
        others: rule 12.
        quantizer: rule 13, instead of ``config``.

    Raises:
        ValueError: the config matches nothing; values that do not fit their formats (all are named); the graph is
            folded; an op in ``share_across`` that is not known; a config and a quantizer, or neither.
    """

    config: Config | None = None
    share_across: tuple[str, ...] = ()
    moe_calibrate_all_experts: bool = True
    bias_correction: bool = False
    others: tuple[Config, ...] = ()
    quantizer: "Quantizer | None" = None

    def __post_init__(self) -> None:
        """Raises ValueError for an op that cannot be shared across, and for what does not say what is quantized."""
        if (self.config is None) == (self.quantizer is None):
            raise ValueError(
                f"config={self.config!r}, quantizer={self.quantizer!r}: expected one of them, to say what is quantized"
            )
        for name in self.share_across:
            if name not in JOINS:
                raise ValueError(f"share_across has {name!r}: expected some of {', '.join(JOINS)}")

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Applies the rules."""
        if any(is_fake_quantize(node) for graph in list_graphs(graph_module) for node in graph.graph.nodes):
            raise ValueError(
                "the graph has fake-quantize nodes, so it was folded already: start from the float model to quantize "
                "it differently"
            )
        # Rule 1.
        modified = InlineRegions()(graph_module).modified
        modified |= FunctionalizeModules()(graph_module).modified
        if self.quantizer is None:
            modified |= DecomposeAttention()(graph_module).modified
        configs = [resolve_config(config) for config in (self.config, *self.others) if config is not None]
        OpenRegions()(graph_module)
        try:
            found = [AnnotatedReads(find_reads(graph_module, config), []) for config in configs]  # not those of rule 6
            if self.quantizer is not None:
                found = [find_annotated_reads(graph_module, self.quantizer)]
            plans = [self._plan(graph_module, number, *reads) for number, reads in enumerate(found)]
            plan = list(itertools.chain.from_iterable(plans))
            probes = {str(node.target): probe for node, probe in find_probes(graph_module)}
            order = {node: place for place, node in enumerate(_list_nodes(graph_module))}
            for observation in plan:
                observation.reads.sort(key=lambda read: order[read.reader])
                _insert(observation, probes)
            insert_input_nodes(_list_meetings(plan), order)
            if self.moe_calibrate_all_experts:
                show_all_experts(read.operation for observation in plan for read in observation.reads)
            if self.bias_correction:
                insert_means(graph_module, _list_biased(plan))
        finally:
            CloseRegions()(graph_module)
        register_check(graph_module)
        if configs:
            graph_module.meta[CONFIG_KEY] = configs[0]
        graph_module.meta.pop(MODULES_KEY, None)
        return modified or bool(plan)

    def _plan(
        self, graph_module: GraphModule, number: int, reads: list[Read], joined: list[list[Node]]
    ) -> list["_Observation"]:
        plan = _share_observers(graph_module, reads, number, by_layer=self.quantizer is None)
        for observation in plan:
            observation.mask = _find_mask(observation)
        by_ops = (find_joined_values(graph, self.share_across) for graph in list_open_graphs(graph_module))
        _share_across(plan, itertools.chain(joined, *by_ops))
        return plan


def _list_nodes(graph_module: GraphModule) -> Iterator[Node]:
    for graph in list_graphs(graph_module):
        yield from graph.graph.nodes


@dataclass
class _Observation:
    """Reads of one value with equal arguments, and the observer they share, at ``target``.

    It shares that with ``first``, the first observation of the same quantity, which may be of another value.
    """

    first: "_Observation | None"
    target: str = ""
    observer: Observer | None = None
    reads: list[Read] = field(default_factory=list)
    number: int = 0
    global_group: str = ""
    mask: tuple[Node, ...] = ()


def _share_observers(graph_module: GraphModule, reads: list[Read], number: int, by_layer: bool) -> list[_Observation]:
    """Rules 2, 3 (with ``by_layer``) and 7, of the config of a number."""
    suffix = f"_{number}_observer" if number else "_observer"
    plan: dict[object, _Observation] = {}
    by_quantity: dict[object, _Observation] = {}
    names = Names(graph_module)
    groups: dict[object, str] = {}
    for read, value, quantity in _identify_quantities(reads, by_layer):
        key = (read.graph_module, value, quantity)
        observation = plan.setdefault(key, _Observation(by_quantity.get(quantity), number=number))
        first = by_quantity.setdefault(quantity, observation)
        read = replace(read, site=names.find(read, first))
        if not observation.target:
            observation.target = first.target or f"{read.site.name}{suffix}"
            observation.observer = _make_observer(read.site) if observation is first else first.observer
        observation.reads.append(read)
        if fused := _identify_fused(read):
            own = f"{read.site.name} {number}" if number else read.site.name
            observation.global_group = observation.global_group or groups.get(fused, own)
            groups.setdefault(fused, observation.global_group)
    return list(plan.values())


def _identify_quantities(reads: list[Read], by_layer: bool) -> Iterator[tuple[Read, object, object]]:
    """Each read with its value and its quantity: all values that its layer reads, and how they are quantized."""
    values = [_identify_value(read) for read in reads]
    layers = [_identify_layer(read, value) if by_layer else value for read, value in zip(reads, values, strict=True)]
    quantities: defaultdict[object, set[object]] = defaultdict(set)
    for layer, value in zip(layers, values, strict=True):
        quantities[layer].add(value)
    for read, value, layer in zip(reads, values, layers, strict=True):
        yield read, value, frozenset(quantities[layer])


def _identify_value(read: Read) -> object:
    """Rule 2: tied weights may be several Parameters of one storage."""
    arguments = repr(read.site.args)  # observer_kwargs may hold tensors, which JSON cannot
    if read.weight:
        return *_identify_weight(read, read.weight), arguments
    return read.value, read.version, arguments


def _identify_layer(read: Read, value: object) -> object:
    """Rule 3: what a site's values belong to; a weight is one by itself."""
    if read.weight:
        return value
    weight = read.operation.weight
    # What no module owns is called after its node, which is another one in every graph.
    owner = (
        _identify_weight(read, weight.as_read or weight)
        if weight
        else None
        if read.operation.has_weight
        else read.graph_module
    )
    return read.site.name, repr(read.site.args), owner


def _identify_weight(read: Read, weight: Weight) -> tuple[str, WeightView]:
    return describe(read.graph_module, weight.value), weight.view


def _identify_fused(read: Read) -> object:
    """What the weights that share a global scale have in common; None for all others."""
    args = read.site.args
    if not read.weight or args.strategy != "tensor_group" or not read.operation.operands:
        return None
    operand = read.operation.operands[0]
    value = skip_probes(read.graph_module, operand.argument.get(operand.reader))
    matrices = read.weight.view.shape[:-2] if read.weight.view.layout in ("rows", "columns") else ()
    return value, matrices, args.num_bits, args.type, args.group_size, args.scale_dtype


def _share_across(plan: list[_Observation], joined: Iterable[list[Node]]) -> None:
    """Gives the observations of values that are joined one observer, where their arguments are equal."""
    by_node: defaultdict[Node, list[_Observation]] = defaultdict(list)
    for observation in plan:
        if observation.observer and not observation.reads[0].weight:
            by_node[observation.reads[0].value].append(observation)
    for values in joined:
        by_arguments: dict[str, list[_Observation]] = {}
        for observation in itertools.chain.from_iterable(by_node.get(value, ()) for value in values):
            by_arguments.setdefault(repr(observation.reads[0].site.args), []).append(observation)
        for shared, *others in by_arguments.values():
            # What shares with one of the others already comes along.
            targets = {other.target for other in others}
            for observation in plan:
                if observation.target in targets:
                    observation.target, observation.observer = shared.target, shared.observer


def _make_observer(site: Site) -> Observer | None:
    """Rule 8: a dynamic value has none."""
    if site.is_dynamic:
        return None
    try:
        return Observer.load_from_registry(str(site.args.observer), base_name=site.role, args=site.args)
    except ValueError as error:
        raise ValueError(f"{site.name}: {error}") from None


def _insert(observation: _Observation, probes: dict[str, Probe]) -> None:
    """Rules 4, 5 and 12."""
    first = observation.reads[0]
    graph = first.graph_module.graph
    _register_probe(observation, probes)
    names = tuple(dict.fromkeys(read.operation.node.name for read in observation.reads))
    meta = {OPERATIONS_KEY: names, CONFIG_NUMBER_KEY: observation.number}
    if first.argument is None:
        with graph.inserting_after(first.value):
            probe = graph.call_module(observation.target, (first.value,))
        probe.meta = {**first.value.meta, **meta}
        first.value.replace_all_uses_with(probe, delete_user_cb=lambda user: user is not probe)
        return
    for reads in _group_by_probe(observation.reads):
        # Tied weights have several get_attr nodes: the first reader's stands before every reader.
        first = reads[0]
        assert first.argument is not None
        with graph.inserting_before(first.reader):
            value = first.argument.get(first.reader)
            seen = first.weight.view.trace(graph, value) if first.weight else value
            probe = graph.call_module(observation.target, (seen,))
            probe.meta = {**value.meta, **meta}
            if first.weight:
                probe = first.weight.view.trace_back(graph, probe)
                probe.meta[CONFIG_NUMBER_KEY] = observation.number
        for read in reads:
            assert read.argument is not None
            read.argument.set(read.reader, probe)


def _group_by_probe(reads: list[Read]) -> list[list[Read]]:
    """Reads of one value, of which those are apart that have it from probes of another config that do not share it."""
    groups: dict[object, list[Read]] = {}
    for read in reads:
        assert read.argument is not None
        value = read.argument.get(read.reader)
        groups.setdefault(value if CONFIG_NUMBER_KEY in value.meta else None, []).append(read)
    return list(groups.values())


def _register_probe(observation: _Observation, probes: dict[str, Probe]) -> None:
    """Has the observation's graph hold its probe, which others may hold, too."""
    sites = {read.site.name: read.site for read in observation.reads}
    parent, _, name = observation.target.rpartition(".")
    probe = probes.get(observation.target)
    if probe is not None:
        probe.sites = tuple({**{site.name: site for site in probe.sites}, **sites}.values())
    else:
        weight = observation.reads[0].weight
        view = weight.view if weight else None
        is_computed = weight is not None and weight.value.op != "get_attr"
        probe = Probe(
            observation.observer, tuple(sites.values()), view, observation.global_group, is_computed=is_computed
        )
        probes[observation.target] = probe
    container = make_container(observation.reads[0].graph_module, parent)
    if not hasattr(container, name):
        container.add_module(name, probe)


def _list_biased(plan: list[_Observation]) -> Iterator[BiasedOp]:
    """Rule 10."""
    for observation in plan:
        for read in observation.reads:
            if read.weight:
                yield BiasedOp(read.graph_module, read.operation, observation.target, observation.mask)


def _list_meetings(plan: list[_Observation]) -> Iterator[Meeting]:
    """Rule 9."""
    for observation in plan:
        observer = observation.observer
        if not isinstance(observer, InputAwareObserver) or observer.inputs is None:
            continue
        name, graph_module = observation.target.removesuffix("_observer"), observation.reads[0].graph_module
        operands = [(read.operation, operand) for read in observation.reads for operand in read.operation.operands]
        for operation, operand in operands:
            arrangement, choice = find_arrangement(operation, operand)
            # Of columns, and of what a convolution reads unless as patches, the last dimension is not the channels'.
            is_patches = isinstance(observer.inputs, Products) and isinstance(arrangement, Patches)
            if operand.is_channels_last or is_patches:
                yield Meeting(observer, name, graph_module, operand, observation.mask, arrangement, choice)
        # An embedding's input is an index, and importance knows no convolution's rows: their observers see nothing, and
        # say so.
        yield Meeting(observer, name, graph_module, None, observation.mask)


def _find_mask(observation: _Observation) -> tuple[Node, ...]:
    observer, read = observation.observer, observation.reads[0]
    name = observer.options.mask if isinstance(observer, InputAwareObserver) else None
    if name is None:
        return ()
    inputs = {str(node.target): node for node in read.graph_module.graph.find_nodes(op="placeholder")}
    if name not in inputs:
        raise ValueError(f"{read.site.name}: mask={name!r}: expected one of the graph's inputs, {', '.join(inputs)}")
    return (inputs[name],)
