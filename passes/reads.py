"""Configs and graphs to reads: which values are quantized where, and what cannot be."""

import itertools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxmse.capture.attributes import find_place, find_regions, get_attribute
from fxmse.config import (
    LEFT_IN_FLOAT_KEY,
    MODULES_KEY,
    AllLeftInFloatError,
    Matches,
    Site,
    check_dynamic_shape,
    is_named,
    make_site,
    match_schemes,
)
from fxmse.formats.layout import Layout
from fxmse.passes.constants import measure_shape
from fxmse.passes.op_names import get_op_name
from fxmse.passes.open_regions import list_open_graphs
from fxmse.passes.operation import Argument, Operation, Weight
from fxmse.passes.probe import find_probe, find_probes
from fxmse.passes.quantizable_ops import find_fused, find_opaque_modules, find_operations
from fxmse.passes.routers import find_routers
from fxmse.passes.shortcuts import ADDITION, find_shortcuts
from fxmse.passes.stand_ins import list_modules
from fxmse.passes.versions import Versions, list_operands

__all__ = ["Read", "Request", "find_reads", "find_refused", "make_read"]

# Of these, a row's scale depends on other rows, too.
_SHARED_BY_ROWS = ("tensor", "block", "tensor_group")
_ROUTER = "a router, whose result chooses experts: a target that names it quantizes it"
_VMAP = "torch.vmap runs it, which hides a dimension of its activations: its weight alone could be quantized"


@dataclass(frozen=True)
class Read:
    """One site's reading of a value.

    Attributes:
        graph_module: the graph that reads it: the model's, or that of a branch or loop in it.
        site: the site.
        value: the node that is read; a weight's is its get_attr node, or the one that computes it.
        version: of the value, where the graph writes it in place (:class:`fxmse.passes.versions.Versions`).
        reader: the node that reads it.
        argument: where; None stands for every reader (an operation's output).
        operation: what the site belongs to.
        weight: what the value is the weight of.
    """

    graph_module: GraphModule
    site: Site
    value: Node
    version: int
    reader: Node
    argument: Argument | None
    operation: Operation
    weight: Weight | None = None


def find_reads(graph_module: GraphModule, config: QuantizationConfig) -> list[Read]:
    """What ``config`` quantizes in a graph and those in it, and has no probe yet, in the graphs' order.

    What stays float though a target names it is said in one warning, and kept in the graph's ``meta``. Routers do
    (:mod:`fxmse.passes.routers`) unless a target is their name or an expression for it: as runtimes have it.

    Raises:
        AllLeftInFloatError: nothing of what is targeted can be quantized.
        ValueError: values that cannot be quantized as the config asks; all are named, each with its reason.
    """
    reads, refused, left_in_float = _search(graph_module, config)
    left = "; ".join(f"{name} ({reason})" for name, reason in left_in_float)
    if left and not reads and not refused and not any(find_probes(graph_module)):
        raise AllLeftInFloatError(f"all that the config targets stays in float: {left}")
    if left:
        warnings.warn(f"left in float: {left}", UserWarning, stacklevel=2)
    graph_module.meta[LEFT_IN_FLOAT_KEY] = left_in_float
    if refused:
        names = "\n  ".join(dict.fromkeys(reason for _, reason in refused))
        raise ValueError(f"the config asks for what cannot be quantized so:\n  {names}")
    return reads


def find_refused(graph_module: GraphModule, config: QuantizationConfig) -> dict[str, str]:
    """The modules whose values cannot be quantized as ``config`` asks, each with the first reason.

    Raises:
        ValueError: there are no others.
    """
    reads, refused, _ = _search(graph_module, config)
    reasons: dict[str, str] = {}
    for path, reason in refused:
        reasons.setdefault(path, reason)
    if reasons and all(read.operation.path in reasons for read in reads):
        raise ValueError(f"nothing can be quantized so: {'; '.join(reasons.values())}")
    return reasons


def _search(
    graph_module: GraphModule, config: QuantizationConfig
) -> tuple[list[Read], list[tuple[str, str]], list[tuple[str, str]]]:
    """What is to be quantized, the modules with what cannot be so, and what stays float though it is targeted."""
    graphs = [(graph, Versions(graph)) for graph in list_open_graphs(graph_module)]
    found = [(*entry, operation) for entry in graphs for operation in _list_operations(config, *entry)]
    operations = [operation for _, _, operation in found]
    weighted = {(o.path, o.class_name): o.module for o in operations if o.has_weight}
    hidden = _find_hidden(graph_module, {path for path, _ in weighted}, _list_weights(found))
    matches = match_schemes(
        config,
        {**weighted, **{key: module for key, (module, _) in hidden.items()}},
        {(o.path, o.class_name): o.module for o in operations if not o.has_weight},
    )
    left_in_float = [(key[0], reason) for key, (_, reason) in hidden.items() if key in matches.modules]
    refused: list[tuple[str, str]] = []
    reads = []
    routers = _find_unnamed_routers(config, operations)
    left_in_float += [(o.path or n.name, _ROUTER) for n, o in routers.items() if _find_scheme(o, matches, None)]
    vmapped = set(itertools.chain.from_iterable(_find_vmapped(graph) for graph, _ in graphs))
    for graph, versions, operation in found:
        scheme = None if operation.node in routers else _find_scheme(operation, matches, config.kv_cache_scheme)
        if scheme is None:
            continue
        is_hidden = operation.node in vmapped and bool(scheme.input_activations or scheme.output_activations)
        left_in_float += _list_left_in_float(graph, operation, scheme, is_hidden)
        if is_hidden or (scheme.weights and operation.has_weight and not _has_values(graph, operation)):
            continue  # an input alone would bring an error without any gain
        for request in _list_requests(graph, operation, scheme):
            try:
                reads.append(make_read(graph, versions, operation, request))
            except ValueError as error:
                refused.append((operation.path, str(error)))
    if config.kv_cache_scheme and not any(operation.is_attention for operation in operations):
        left_in_float.append(("the kv cache", "no scaled_dot_product_attention or softmax(q k) v is in the graph"))
    return reads, refused, list(dict.fromkeys(left_in_float))


def _list_operations(config: QuantizationConfig, graph_module: GraphModule, versions: Versions) -> list[Operation]:
    operations = find_operations(graph_module, versions)
    if any(ADDITION in scheme.targets for scheme in config.config_groups.values()):
        operations += find_shortcuts(graph_module, versions, operations)
    return operations


def _find_vmapped(graph_module: GraphModule) -> Iterator[Node]:
    """What stands between the nodes by which torch.vmap begins and ends."""
    depth = 0
    for node in graph_module.graph.nodes:
        name = get_op_name(node)
        depth += (name == "_vmap_increment_nesting") - (name == "_vmap_decrement_nesting")
        if depth:
            yield node


def _find_unnamed_routers(config: QuantizationConfig, operations: list[Operation]) -> dict[Node, Operation]:
    routers = find_routers(operations)
    return {o.node: o for o in operations if o.node in routers and not is_named(config, o.path)}


def _find_hidden(
    graph_module: GraphModule, seen: set[str], weights: list[Tensor]
) -> dict[tuple[str, str], tuple[nn.Module, str]]:
    """Modules that a config may target but whose ops are not ``seen`` in the graph, and why, by path and class.

    One that is tied to another, whose ``weights`` are seen, is read under that one's name.
    """
    found = {
        key: (module, "its hooks, options or own forward hide its weight")
        for key, module in find_opaque_modules(graph_module).items()
    }
    fused = itertools.chain.from_iterable(map(find_fused, list_open_graphs(graph_module)))
    for path, class_name, module, function in fused:
        found.setdefault((path, class_name), (module, f"{function} reads its weight, one call of several products"))
    for graph in list_open_graphs(graph_module):
        for path, operator_name, operation in _list_closed_regions(graph):
            if path not in seen:
                reason = f"{operator_name} runs it, whose graphs are not quantized"
                found.setdefault((path, operation.class_name), (operation.module, reason))
    named = seen.union(path for path, _ in found)
    read = {find_place(weight) for weight in weights}
    for path, module in {**list_modules(graph_module), **graph_module.meta.get(MODULES_KEY, {})}.items():
        matrices = _list_matrices(graph_module, path, module)
        if path not in named and not all(find_place(matrix) in read for matrix in matrices):
            reason = "no op of the graph that can be quantized reads its weight"
            found[path, type(module).__name__] = module, reason
    return found


def _list_weights(found: list[tuple[GraphModule, Versions, Operation]]) -> list[Tensor]:
    values = [(graph, operation.weight.value) for graph, _, operation in found if operation.weight]
    return [get_attribute(graph, str(value.target)) for graph, value in values if value.op == "get_attr"]


def _list_matrices(graph_module: GraphModule, path: str, module: nn.Module) -> list[nn.Parameter]:
    """The matrices among a module's own parameters; of a stand-in's, what the graph has in its place."""
    if not vars(module):
        try:
            module = graph_module.get_submodule(path)
        except AttributeError:
            return []
    return [parameter for parameter in module.parameters(recurse=False) if parameter.dim() > 1]


def _list_closed_regions(graph_module: GraphModule) -> Iterator[tuple[str, str, Operation]]:
    """The operations with a weight in regions that are not open: whose they are, and what runs them."""
    for node in graph_module.graph.nodes:
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        for region in find_regions(graph_module, node):
            placeholders = region.graph.find_nodes(op="placeholder")
            operands = dict(zip(placeholders[::-1], list_operands(node)[::-1], strict=False))
            for operation in find_operations(region, Versions(region)):
                if operation.has_weight:
                    yield _find_owner(operation, operands), node.target.name(), operation
            yield from _list_closed_regions(region)


def _find_owner(operation: Operation, operands: Mapping[Node, Node]) -> str:
    """The module whose parameter an operation in a region reads, which is an operand of the region."""
    for source in operation.node.all_input_nodes:
        while source.op == "call_function" and source.args and isinstance(source.args[0], Node):
            source = source.args[0]
        operand = operands.get(source)
        if operand is not None and operand.op == "get_attr":
            return str(operand.target).rpartition(".")[0]
    return operation.path


def _find_scheme(
    operation: Operation, matches: Matches, kv_cache_scheme: QuantizationArgs | None
) -> QuantizationScheme | None:
    if operation.has_weight:
        return matches.modules.get((operation.path, operation.class_name))
    scheme = matches.functions.get((operation.path, operation.class_name))
    if scheme and operation.is_meant_by_name and operation.class_name not in scheme.targets:
        return None
    if scheme is None and kv_cache_scheme and operation.is_attention:
        return QuantizationScheme(targets=[], input_activations=kv_cache_scheme)
    return scheme


def _has_values(graph_module: GraphModule, operation: Operation) -> bool:
    """Whether an operation's weight is there and not empty."""
    return operation.weight is not None and measure_shape(graph_module, operation.weight.value).numel() > 0


def _list_left_in_float(
    graph_module: GraphModule, operation: Operation, scheme: QuantizationScheme, is_hidden: bool
) -> Iterator[tuple[str, str]]:
    where = operation.path or operation.node.name
    if is_hidden:
        yield where, _VMAP
        return
    if scheme.weights and operation.has_weight and not operation.weight:
        yield where, "its weight depends on the data, or the graph writes it"
        return
    if scheme.weights and operation.has_weight and not _has_values(graph_module, operation):
        yield where, "its weight is empty"
    if scheme.input_activations and not operation.operands:
        yield f"the input of {where}", "it is an index"


@dataclass(frozen=True)
class Request:
    """What a scheme asks for, before it is known whether it can be done.

    Attributes:
        role: the site's.
        prefix: the site's.
        args: the format.
        value: a node, or whatever else stands where an activation should.
        reader: the node that reads it.
        argument: where; None stands for every reader.
        weight: what the value is the weight of.
        is_channels_last: whether the last dimension of an activation is the channels'.
    """

    role: str
    prefix: str
    args: QuantizationArgs
    value: Any
    reader: Node
    argument: Argument | None
    weight: Weight | None = None
    is_channels_last: bool = True


def _list_requests(graph_module: GraphModule, operation: Operation, scheme: QuantizationScheme) -> Iterator[Request]:
    node, weight = operation.node, operation.weight
    if weight and weight.as_read and scheme.weights and scheme.weights.strategy in _SHARED_BY_ROWS:
        weight = weight.as_read  # rows that it does not read shall not have a say
    leaf = weight.name.rpartition(".")[2] if weight else "weight"
    prefix = "" if leaf == "weight" else f"{leaf}_"
    if scheme.weights and weight and not weight.is_observed:
        yield Request("weight", prefix, scheme.weights, weight.value, weight.reader, weight.argument, weight)
    for operand in operation.operands:
        value = operand.argument.get(operand.reader)
        # A kv cache, whose scheme has no targets, holds no queries.
        is_wanted = scheme.input_activations and (scheme.targets or operand.role != "q")
        if is_wanted and scheme.input_activations and not find_probe(graph_module, value):
            yield Request(
                operand.role,
                f"{prefix}{operand.prefix}",
                scheme.input_activations,
                value,
                operand.reader,
                operand.argument,
                is_channels_last=operand.is_channels_last,
            )
    if scheme.output_activations:
        probes = [probe for user in node.users if (probe := find_probe(graph_module, user))]
        if not any(site.role == "output" for probe in probes for site in probe.sites):
            yield Request("output", prefix, scheme.output_activations, node, node, None)


def make_read(graph_module: GraphModule, versions: Versions, operation: Operation, request: Request) -> Read:
    """What an operation is asked for; raises ValueError for what cannot be, as far as the graph knows now."""
    site = make_site(operation.path, request.prefix, request.role, request.args)
    if not request.is_channels_last and site.args.strategy != "tensor":
        raise ValueError(
            f"{site.name}: strategy={site.args.strategy} needs the channels in the last dimension, where a "
            "convolution's input does not have them: use strategy=tensor"
        )
    value = request.value
    if not isinstance(value, Node):
        raise ValueError(f"{site.name} is {value!r}: expected a tensor")
    tensor = value.meta.get("val")
    if request.weight:
        # Its shape and dtype are enough, and cost no copy.
        tensor = request.weight.view.apply(measure_shape(graph_module, value))
    if isinstance(tensor, Tensor):
        if not tensor.is_floating_point():
            raise ValueError(f"{site.name} has dtype {tensor.dtype}: expected a float dtype")
        try:
            if site.is_dynamic:
                check_dynamic_shape(site.args, tensor.shape)
            else:
                Layout.of(site.args, site.role).qparam_shape(tensor.shape)
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from None
    version = versions.find(value, request.reader)
    return Read(graph_module, site, value, version, request.reader, request.argument, operation, request.weight)
