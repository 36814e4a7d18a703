"""Puts observers on the values that a config wants quantized."""

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from torch import Tensor
from torch.fx import GraphModule, Node

from fxmse.config import Site, make_site, match_schemes, resolve_config
from fxmse.layout import Layout
from fxmse.observers import Observer
from fxmse.ops import FAKE_QUANTIZE
from fxmse.passes.base import GraphPass, get_attribute, make_container
from fxmse.passes.functionalize_modules import FunctionalizeModules
from fxmse.passes.probe import Probe, find_probe
from fxmse.passes.quantizable_ops import Argument, QuantizableOp, find_module, find_op, find_opaque_modules

__all__ = ["InsertObservers"]


@dataclass(frozen=True)
class InsertObservers(GraphPass):
    """Inserts a probe between each value that is to be quantized and the ops that read it for quantized modules.

    Rules:

    1. Calls of modules become functional first (:class:`FunctionalizeModules`).
    2. A value that several sites read with equal arguments has one probe, named after the first of them. That goes
       for activations (one node) and for weights (one tensor, however many names it has: tied weights stay tied).
    3. A module that is called more than once has one observer, which sees the values of all its calls.
    4. A convolution's weight is observed, and later quantized, as (out, everything else).
    5. Readers of the value that are not sites keep reading it as it is.
    6. A value that has a probe already is left alone.

    The observed graph computes what it computed before, bit for bit.

    Attributes:
        config: which modules get which scheme: a config, a scheme, or a preset's name.

    Raises:
        ValueError: the config matches nothing; a weight's shape or dtype does not fit its format; the graph is folded.
    """

    config: QuantizationConfig | QuantizationScheme | str

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Applies the rules."""
        if any(node.target is FAKE_QUANTIZE for node in graph_module.graph.nodes):
            raise ValueError(
                "the graph has fake-quantize nodes, so it was folded already: start from the float model to quantize "
                "it differently"
            )
        modified = FunctionalizeModules()(graph_module).modified
        plan = _plan(graph_module, resolve_config(self.config))
        for observation in plan:
            _insert(graph_module, observation)
        return modified or bool(plan)


@dataclass(frozen=True)
class _Read:
    """One site's reading of a value: ``reader``'s ``argument``; None stands for every reader (an op's output)."""

    site: Site
    value: Node
    reader: Node
    argument: Argument | None
    is_convolution_weight: bool = False


@dataclass
class _Observation:
    """Reads of one value with equal arguments, and the observer they share, at ``target``."""

    target: str
    observer: Observer
    reads: list[_Read] = field(default_factory=list)


def _plan(graph_module: GraphModule, config: QuantizationConfig) -> list[_Observation]:
    """What is to be inserted, in the graph's order."""
    ops = [(node, op) for node in graph_module.graph.nodes if (op := find_op(node))]
    paths = {node: find_module(graph_module, node, op) for node, op in ops}
    opaque = find_opaque_modules(graph_module)
    schemes = match_schemes(config, {**dict(paths.values()), **opaque})
    reads: list[_Read] = []
    skipped = [f"{path} (its hooks, options or own forward hide its weight)" for path in opaque if path in schemes]
    for node, op in ops:
        path, _ = paths[node]
        if path in schemes:
            reads += _find_reads(graph_module, node, op, path, schemes[path], skipped)
    if skipped:
        warnings.warn(f"left in float: {'; '.join(dict.fromkeys(skipped))}", UserWarning, stacklevel=2)
    return _share_observers(graph_module, reads)


def _share_observers(graph_module: GraphModule, reads: list[_Read]) -> list[_Observation]:
    """Rules 2 and 3."""
    by_value: dict[tuple[object, str], _Observation] = {}
    by_site: dict[tuple[str, str], _Observation] = {}
    for read in reads:
        _check_fits(graph_module, read)
        arguments = repr(read.site.args)  # observer_kwargs may hold tensors, which JSON cannot
        value_key = (_identify_value(graph_module, read), arguments)
        site_key = (read.site.name, arguments)
        if value_key not in by_value:
            earlier = by_site.get(site_key)
            if earlier:
                by_value[value_key] = _Observation(earlier.target, earlier.observer)
            else:
                target = _find_free_name(f"{read.site.name}_observer", {o.target for o in by_value.values()})
                by_value[value_key] = _Observation(target, _make_observer(read.site))
        by_site.setdefault(site_key, by_value[value_key])
        by_value[value_key].reads.append(read)
    return list(by_value.values())


def _find_reads(
    graph_module: GraphModule, node: Node, op: QuantizableOp, path: str, scheme: QuantizationScheme, skipped: list[str]
) -> Iterator[_Read]:
    """The values that ``scheme`` quantizes at ``node`` and that have no probe yet (rule 6)."""
    weight = op.weight.get(node)
    source = _look_through_probe(graph_module, weight)
    parameter = source if isinstance(source, Node) and source.op == "get_attr" else None
    leaf = str(parameter.target).rpartition(".")[2] if parameter else "weight"
    prefix = "" if leaf == "weight" else f"{leaf}_"
    if scheme.weights and not parameter:
        skipped.append(f"the weight of {path or node.name} (it is computed in the graph)")
    elif scheme.weights and parameter is weight:
        site = make_site(path, prefix, "weight", scheme.weights)
        yield _Read(site, parameter, node, op.weight, op.is_convolution)
    if scheme.input_activations and op.input is None:
        skipped.append(f"the input of {path or node.name} (it is an index)")
    elif scheme.input_activations and op.input:
        site = make_site(path, prefix, "input", scheme.input_activations)
        if op.is_convolution and scheme.input_activations.strategy != "tensor":
            raise ValueError(
                f"{site.name}: strategy={site.args.strategy} needs the channels in the last dimension, where a "
                "convolution's input does not have them: use strategy=tensor"
            )
        value = op.input.get(node)
        if not find_probe(graph_module, value):
            yield _Read(site, value, node, op.input)
    if scheme.output_activations:
        site = make_site(path, prefix, "output", scheme.output_activations)
        probes = [probe for user in node.users if (probe := find_probe(graph_module, user))]
        if not any(site.name == s.name for probe in probes for s in probe.sites):
            yield _Read(site, node, node, None)


def _look_through_probe(graph_module: GraphModule, weight: object) -> object:
    """The parameter behind a probe, and behind rule 4's flatten and reshape; otherwise ``weight`` itself."""
    node = weight
    if isinstance(node, Node) and node.target is torch.reshape and find_probe(graph_module, node.args[0]):
        node = node.args[0]
    if not isinstance(node, Node) or not find_probe(graph_module, node):
        return weight
    source = node.args[0]
    return source.args[0] if isinstance(source, Node) and source.target is torch.flatten else source


def _identify_value(graph_module: GraphModule, read: _Read) -> object:
    if read.value.op != "get_attr":
        return read.value
    weight = get_attribute(graph_module, str(read.value.target))
    # Tied weights may be several Parameters of one storage; tensors without storage (meta) are told apart by identity.
    return (weight.data_ptr() or id(weight), weight.device, weight.shape, weight.stride())


def _check_fits(graph_module: GraphModule, read: _Read) -> None:
    """Raises ValueError now, where the graph knows, for what would fail while calibrating."""
    value = read.value.meta.get("val")
    if read.value.op == "get_attr":
        value = get_attribute(graph_module, str(read.value.target))
    if not isinstance(value, Tensor):
        return
    if not value.is_floating_point():
        raise ValueError(f"{read.site.name} has dtype {value.dtype}: expected a float dtype")
    try:
        shape = value.flatten(1).shape if read.is_convolution_weight else value.shape
        Layout.of(read.site.args, read.site.role).qparam_shape(shape)
    except ValueError as error:
        raise ValueError(f"{read.site.name}: {error}") from None


def _make_observer(site: Site) -> Observer:
    try:
        return Observer.load_from_registry(str(site.args.observer), base_name=site.role, args=site.args)
    except ValueError as error:
        raise ValueError(f"{site.name}: {error}") from None


def _find_free_name(name: str, taken: set[str]) -> str:
    candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _insert(graph_module: GraphModule, observation: _Observation) -> None:
    graph, first = graph_module.graph, observation.reads[0]
    _register_probe(graph_module, observation)
    if first.argument is None:
        with graph.inserting_after(first.value):
            probe = graph.call_module(observation.target, (first.value,))
        probe.meta = dict(first.value.meta)
        first.value.replace_all_uses_with(probe, delete_user_cb=lambda user: user is not probe)
        return
    # Tied weights have several get_attr nodes: the first reader's stands before every reader.
    with graph.inserting_before(first.reader):
        value = first.argument.get(first.reader)
        seen = graph.call_function(torch.flatten, (value, 1)) if first.is_convolution_weight else value
        probe = graph.call_module(observation.target, (seen,))
        probe.meta = dict(value.meta)
        if first.is_convolution_weight:
            shape = get_attribute(graph_module, str(value.target)).shape
            probe = graph.call_function(torch.reshape, (probe, list(shape)))
    for read in observation.reads:
        if read.argument is not None:
            read.argument.set(read.reader, probe)


def _register_probe(graph_module: GraphModule, observation: _Observation) -> None:
    sites = {read.site.name: read.site for read in observation.reads}
    parent, _, name = observation.target.rpartition(".")
    container = make_container(graph_module, parent)
    if hasattr(container, name):
        probe = getattr(container, name)
        probe.sites = tuple({**{site.name: site for site in probe.sites}, **sites}.values())
    else:
        container.add_module(name, Probe(observation.observer, tuple(sites.values())))
