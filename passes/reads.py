"""Configs and graphs to reads: which values are quantized where, and what cannot be."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch import Tensor
from torch.fx import GraphModule, Node

from fxmse.capture.attributes import get_attribute
from fxmse.config import Matches, Site, check_dynamic_shape, make_site, match_schemes
from fxmse.formats.layout import Layout
from fxmse.passes.operation import Argument, Operation, Weight
from fxmse.passes.probe import find_probe
from fxmse.passes.quantizable_ops import find_opaque_modules, find_operations

__all__ = ["Read", "find_reads"]


@dataclass(frozen=True)
class Read:
    """One site's reading of a value.

    Attributes:
        site: the site.
        value: the node that is read; a weight's is its get_attr node.
        reader: the node that reads it.
        argument: where; None stands for every reader (an operation's output).
        operation: what the site belongs to.
        weight: what the value is the parameter of.
    """

    site: Site
    value: Node
    reader: Node
    argument: Argument | None
    operation: Operation
    weight: Weight | None = None


def find_reads(graph_module: GraphModule, config: QuantizationConfig) -> list[Read]:
    """What ``config`` quantizes in a graph and has no probe yet, in the graph's order.

    What stays float though a target names it is said in one warning.

    Raises:
        ValueError: values that cannot be quantized as the config asks; all are named, each with its reason.
    """
    operations = find_operations(graph_module)
    opaque = find_opaque_modules(graph_module)
    matches = match_schemes(
        config,
        {**{(o.path, o.class_name): o.module for o in operations if o.has_weight}, **opaque},
        {(o.path, o.class_name): o.module for o in operations if not o.has_weight},
    )
    hidden = [key[0] for key in opaque if key in matches.modules]
    left_in_float = [f"{path} (its hooks, options or own forward hide its weight)" for path in hidden]
    refused, reads = [], []
    for operation in operations:
        scheme = _find_scheme(operation, matches, config.kv_cache_scheme)
        if scheme is None:
            continue
        left_in_float += _list_left_in_float(operation, scheme)
        for request in _list_requests(graph_module, operation, scheme):
            try:
                reads.append(_make_read(graph_module, operation, request))
            except ValueError as error:
                refused.append(str(error))
    if config.kv_cache_scheme and not any(operation.is_attention for operation in operations):
        left_in_float.append("the kv cache (no scaled_dot_product_attention or softmax(q k) v is in the graph)")
    if left_in_float:
        warnings.warn(f"left in float: {'; '.join(dict.fromkeys(left_in_float))}", UserWarning, stacklevel=2)
    if refused:
        names = "\n  ".join(dict.fromkeys(refused))
        raise ValueError(f"the config asks for what cannot be quantized so:\n  {names}")
    return reads


def _find_scheme(
    operation: Operation, matches: Matches, kv_cache_scheme: QuantizationArgs | None
) -> QuantizationScheme | None:
    if operation.has_weight:
        return matches.modules.get((operation.path, operation.class_name))
    scheme = matches.functions.get((operation.path, operation.class_name))
    if scheme and operation.is_part_of_attention and operation.class_name not in scheme.targets:
        return None  # a target that names the module means its attention
    if scheme is None and kv_cache_scheme and operation.is_attention:
        return QuantizationScheme(targets=[], input_activations=kv_cache_scheme)
    return scheme


def _list_left_in_float(operation: Operation, scheme: QuantizationScheme) -> Iterator[str]:
    where = operation.path or operation.node.name
    if scheme.weights and operation.has_weight and not operation.weight:
        yield f"the weight of {where} (it is computed in the graph)"
    if scheme.input_activations and not operation.operands:
        yield f"the input of {where} (it is an index)"


@dataclass(frozen=True)
class _Request:
    """What a scheme asks for, before it is known whether it can be done."""

    role: str
    prefix: str
    args: QuantizationArgs
    value: Any  # a node, or whatever else stands where an activation should
    reader: Node
    argument: Argument | None
    weight: Weight | None = None
    is_channels_last: bool = True


def _list_requests(graph_module: GraphModule, operation: Operation, scheme: QuantizationScheme) -> Iterator[_Request]:
    node, weight = operation.node, operation.weight
    leaf = str(weight.parameter.target).rpartition(".")[2] if weight else "weight"
    prefix = "" if leaf == "weight" else f"{leaf}_"
    if scheme.weights and weight and not weight.is_observed:
        yield _Request("weight", prefix, scheme.weights, weight.parameter, weight.reader, weight.argument, weight)
    for operand in operation.operands:
        value = operand.argument.get(operand.reader)
        # A kv cache, whose scheme has no targets, holds no queries.
        is_wanted = scheme.input_activations and (scheme.targets or operand.role != "q")
        if is_wanted and scheme.input_activations and not find_probe(graph_module, value):
            yield _Request(
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
            yield _Request("output", prefix, scheme.output_activations, node, node, None)


def _make_read(graph_module: GraphModule, operation: Operation, request: _Request) -> Read:
    """Raises ValueError for what cannot be, as far as the graph knows now."""
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
        parameter = get_attribute(graph_module, str(value.target))
        tensor = request.weight.view.apply(torch.empty_like(parameter, device="meta"))
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
    return Read(site, value, request.reader, request.argument, operation, request.weight)
