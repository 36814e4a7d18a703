"""Which nodes can be quantized, and where their weight and their activations are."""

import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxmse.capture.attributes import get_attribute
from fxmse.passes.attention import find_attention
from fxmse.passes.constants import find_sources, is_moved, list_attributes, measure_shape
from fxmse.passes.movement import find_parameter, skip_transposes
from fxmse.passes.op_names import get_op_name
from fxmse.passes.operation import Argument, Operand, Operation, Weight
from fxmse.passes.stand_ins import find_call, find_module
from fxmse.passes.versions import Versions
from fxmse.passes.weight_view import WeightView

__all__ = ["find_fused", "find_opaque_modules", "find_operations"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Signature:
    """Where an op's arguments are; ``layout`` is a :class:`WeightView` layout."""

    class_name: str
    weight: Argument
    input: Argument | None
    layout: str = "rows"
    groups: Argument | None = None
    bias: Argument | None = None


_INPUT, _BIAS = Argument(0, "input"), Argument(2, "bias")
_LINEAR = _Signature("Linear", Argument(1, "weight"), _INPUT, bias=_BIAS)


def _convolution(dimensions: int) -> _Signature:
    return _Signature(f"Conv{dimensions}d", Argument(1, "weight"), _INPUT, "convolution", bias=_BIAS)


def _transposed_convolution(dimensions: int) -> _Signature:
    groups = Argument(6, "groups")
    return _Signature(
        f"ConvTranspose{dimensions}d", Argument(1, "weight"), _INPUT, "transposed_convolution", groups, _BIAS
    )


_WITH_WEIGHT: dict[Callable[..., Any], _Signature] = {
    F.linear: _LINEAR,
    aten.linear.default: _LINEAR,
    F.embedding: _Signature("Embedding", Argument(1, "weight"), None),
    aten.embedding.default: _Signature("Embedding", Argument(0, "weight"), None),
    F.conv1d: _convolution(1),
    aten.conv1d.default: _convolution(1),
    aten.conv1d.padding: _convolution(1),
    F.conv2d: _convolution(2),
    aten.conv2d.default: _convolution(2),
    aten.conv2d.padding: _convolution(2),
    F.conv3d: _convolution(3),
    aten.conv3d.default: _convolution(3),
    aten.conv3d.padding: _convolution(3),
    F.conv_transpose1d: _transposed_convolution(1),
    aten.conv_transpose1d.default: _transposed_convolution(1),
    F.conv_transpose2d: _transposed_convolution(2),
    aten.conv_transpose2d.input: _transposed_convolution(2),
    F.conv_transpose3d: _transposed_convolution(3),
    aten.conv_transpose3d.input: _transposed_convolution(3),
}

_SWAPPED = {"rows": "columns", "columns": "rows"}
_UNSQUEEZES = (torch.unsqueeze, aten.unsqueeze.default, "unsqueeze")

# Matrix products. The second factor may be a weight (in, out), experts' (experts, in, out) or an activation.
_MATMUL = _Signature("matmul", Argument(1, "other"), _INPUT, "columns")
_MM = _Signature("mm", Argument(1, "mat2"), _INPUT, "columns")
_BMM = _Signature("bmm", Argument(1, "mat2"), _INPUT, "columns")
_ADDMM = _Signature("addmm", Argument(2, "mat2"), Argument(1, "mat1"), "columns", bias=_INPUT)
_BADDBMM = _Signature("baddbmm", Argument(2, "batch2"), Argument(1, "batch1"), "columns")
_GROUPED_MM = _Signature("grouped_mm", Argument(1, "mat2"), Argument(0, "self"), "columns")
# By its name, since it is there only once transformers is imported, which registers it for devices without grouped_mm.
_GROUPED_MM_FALLBACK = "transformers.grouped_mm_fallback.default"
_PRODUCTS: dict[Callable[..., Any] | str, _Signature] = {
    **dict.fromkeys((torch.matmul, operator.matmul, aten.matmul.default, "matmul"), _MATMUL),
    **dict.fromkeys((torch.mm, aten.mm.default, "mm"), _MM),
    **dict.fromkeys((torch.bmm, aten.bmm.default, "bmm"), _BMM),
    **dict.fromkeys((torch.addmm, aten.addmm.default, "addmm"), _ADDMM),
    **dict.fromkeys((torch.baddbmm, aten.baddbmm.default, "baddbmm"), _BADDBMM),
    **dict.fromkeys((aten._grouped_mm.default,), _GROUPED_MM),
    **dict.fromkeys((F.grouped_mm, torch._grouped_mm), replace(_GROUPED_MM, weight=Argument(1, "mat_b"))),
    _GROUPED_MM_FALLBACK: replace(_GROUPED_MM, input=Argument(0, "input"), weight=Argument(1, "weight")),
}

# What is several products in one call, none of which can be told apart in the graph.
_FUSED = {
    *("multi_head_attention_forward", "_transformer_encoder_layer_fwd", "_native_multi_head_attention", "bilinear"),
    *("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "einsum"),
}


def find_operations(graph_module: GraphModule, versions: Versions) -> list[Operation]:
    """What can be quantized, in the graph's order."""
    operations: list[Operation] = []
    # A module's attention may be called again, but a second one in the same call is another.
    attention_calls: set[str] = set()
    for node in graph_module.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        call = find_call(node)
        prefix = f"{node.name}_" if call in attention_calls else ""
        if operands := find_attention(node, _get_factors, prefix):
            attention_calls.add(call)
            class_name = "scaled_dot_product_attention"
            path, module = find_module(graph_module, node, class_name)
            operations.append(Operation(node, class_name, path, module, False, None, operands))
        if signature := _find_signature(graph_module, node):
            operations.append(_make_weighted(graph_module, versions, node, signature))
        elif signature := _find_product(node):
            operations.append(_make_product(graph_module, versions, node, signature))
    inner = _find_inner(operations)
    attention_nodes = {
        node for o in operations if o.is_attention for node in (o.node, *(operand.reader for operand in o.operands))
    }
    return [
        replace(o, is_meant_by_name=o.node in attention_nodes and not o.is_attention and not o.has_weight)
        for o in operations
        if o not in inner
    ]


def _find_inner(operations: list[Operation]) -> list[Operation]:
    """Products that do nothing but compute another op's weight, which is quantized as computed."""
    computations: dict[Node, Node] = {}  # a node, and the op whose weight it computes
    for operation in operations:
        waiting = [operation.weight.value] if operation.weight else []
        while waiting:
            node = waiting.pop()
            computations.setdefault(node, operation.weight.reader)  # type: ignore[union-attr]
            waiting += node.all_input_nodes
    return [
        o
        for o in operations
        if o.node in computations and all(u in computations or u is computations[o.node] for u in o.node.users)
    ]


def _find_signature(graph_module: GraphModule, node: Node) -> _Signature | None:
    """Where an op has its weight, if it has one; of a product it depends on what the factors are."""
    if node.target is not aten.convolution.default:
        return _WITH_WEIGHT.get(node.target)  # type: ignore[arg-type]
    # Of any number of dimensions, transposed or not: what decomposed graphs have for all convolutions.
    is_transposed, stride = node.args[6], node.args[3]
    num_dims = len(stride)  # type: ignore[arg-type]
    return (
        replace(_transposed_convolution(num_dims), groups=Argument(8, "groups"))
        if is_transposed
        else _convolution(num_dims)
    )


def _get_factors(node: Node) -> tuple[Argument, Argument] | None:
    signature = _find_product(node)
    return (signature.input, signature.weight) if signature and signature.input else None


def _find_product(node: Node) -> _Signature | None:
    return _PRODUCTS.get(node.target) or _PRODUCTS.get(str(node.target))


def _make_weighted(graph_module: GraphModule, versions: Versions, node: Node, signature: _Signature) -> Operation:
    weight = _find_weight(graph_module, versions, node, signature)
    path, module = find_module(graph_module, node, signature.class_name, weight.name if weight else None)
    operands: tuple[Operand, ...] = ()
    if signature.input:
        is_channels_last = signature.layout in ("rows", "columns")
        operands = (Operand("input", node, signature.input, is_channels_last=is_channels_last),)
    return Operation(node, signature.class_name, path, module, True, weight, operands, bias=signature.bias)


def _make_product(graph_module: GraphModule, versions: Versions, node: Node, signature: _Signature) -> Operation:
    assert signature.input
    if _is_parameter(graph_module, node, signature):
        return _make_weighted(graph_module, versions, node, replace(signature, class_name="Linear"))
    # Weights (out, in) on the left, times columns of activations.
    swapped = replace(signature, class_name="Linear", weight=signature.input, input=signature.weight, layout="rows")
    if _is_parameter(graph_module, node, swapped):
        operation = _make_weighted(graph_module, versions, node, swapped)
        return replace(operation, operands=(_look_through_column(signature.weight, node),), bias=None)
    path, module = find_module(graph_module, node, signature.class_name)
    # There may be many in a module, so each is told by its node's name.
    operands = (
        Operand("input", node, signature.input, f"{node.name}_"),
        Operand("input", node, signature.weight, f"{node.name}_other_"),
    )
    return Operation(node, signature.class_name, path, module, False, None, operands)


def _is_parameter(graph_module: GraphModule, node: Node, signature: _Signature) -> bool:
    """Whether the factor is a matrix of a parameter: no vector, no constant as the frequencies of rotary embeddings.

    What a parameter becomes by other ops than moves is a value like others here: queries may be learned, too.
    """
    factor = signature.weight.get(node)
    if found := find_parameter(graph_module, node, factor):
        parameter = get_attribute(graph_module, str(found.parameter.target))
        return isinstance(parameter, nn.Parameter) and (found.is_observed or parameter.dim() > 1)
    if not isinstance(factor, Node) or not is_moved(factor):
        return False
    sources = [get_attribute(graph_module, str(source.target)) for source in list_attributes(factor)]
    is_parameter = all(isinstance(source, nn.Parameter) for source in sources)
    return is_parameter and bool(sources) and measure_shape(graph_module, factor).dim() > 1


def _look_through_column(argument: Argument, node: Node) -> Operand:
    """The right factor; where it is one column, the vector that it was, whose last dimension is the channels'."""
    column = argument.get(node)
    is_unsqueezed = isinstance(column, Node) and column.target in _UNSQUEEZES and column.args[1:] == (-1,)
    if is_unsqueezed:
        return Operand("input", column, Argument(0, "input"))
    return Operand("input", node, argument, is_channels_last=False)


def _find_weight(graph_module: GraphModule, versions: Versions, node: Node, signature: _Signature) -> Weight | None:
    """The parameter whose rows are the weight's; else the weight as it is read, where it follows from parameters."""
    value, layout = signature.weight.get(node), signature.layout
    groups = (signature.groups and signature.groups.get(node)) or 1
    found = find_parameter(graph_module, node, value, is_matrix=layout in _SWAPPED)
    if found is None or versions.is_written(found.parameter):
        return _find_computed(graph_module, versions, node, signature, groups)
    parameter = get_attribute(graph_module, str(found.parameter.target))
    view = WeightView(_SWAPPED[layout] if found.is_transposed else layout, tuple(parameter.shape), groups)
    return Weight(
        _name_parameter(found.parameter),
        found.parameter,
        found.reader,
        signature.weight if found.reader is node else Argument(0, "input"),
        view,
        found.is_observed,
        _find_computed(graph_module, versions, node, signature, groups) if found.is_picked else None,
    )


def _find_computed(
    graph_module: GraphModule, versions: Versions, node: Node, signature: _Signature, groups: int
) -> Weight | None:
    """The weight as it is read; None where it does not follow from parameters."""
    value, layout = signature.weight.get(node), signature.layout
    sources = find_sources(graph_module, versions, value)
    if not sources or not isinstance(value, Node):
        return None
    reader = node
    if layout in _SWAPPED:
        reader, value, is_transposed = skip_transposes(node, value, measure_shape(graph_module, value).dim())
        layout = _SWAPPED[layout] if is_transposed else layout
    view = WeightView(layout, tuple(measure_shape(graph_module, value).shape), groups)
    name = max(sources, key=lambda source: get_attribute(graph_module, str(source.target)).numel())
    argument = signature.weight if reader is node else Argument(0, "input")
    return Weight(_name_parameter(name), value, reader, argument, view, is_observed=False)


def _name_parameter(attribute: Node) -> str:
    """The dotted path of a parameter; of one that a parametrization is computed of, that of what it stands for."""
    return re.sub(r"parametrizations\.(\w+)\.original\d*$", r"\1", str(attribute.target))


def find_opaque_modules(graph_module: GraphModule) -> dict[tuple[str, str], nn.Module]:
    """Modules that would be quantizable ops but are called as a whole, by path and class.

    Their weights are not in the graph.
    """
    names = {signature.class_name for signature in _WITH_WEIGHT.values()}
    classes = tuple(getattr(nn, name) for name in sorted(names))
    return {
        (f"{path}.{name}".rstrip("."), type(module).__name__): module
        for path, call in _list_calls(graph_module)
        for name, module in call.named_modules()
        if isinstance(module, classes)
    }


def _list_calls(graph_module: GraphModule) -> Iterator[tuple[str, nn.Module]]:
    for node in graph_module.graph.find_nodes(op="call_module"):
        yield str(node.target), graph_module.get_submodule(str(node.target))


def find_fused(graph_module: GraphModule) -> Iterator[tuple[str, str, nn.Module, str]]:
    """Whose weights calls read that are several ops in one: path, class, module, and the function's name."""
    for node in graph_module.graph.nodes:
        function = get_op_name(node)
        if function not in _FUSED:
            continue
        for source in node.all_input_nodes:
            found = find_parameter(graph_module, node, source)
            parameter = get_attribute(graph_module, str(found.parameter.target)) if found else None
            if found and isinstance(parameter, nn.Parameter) and parameter.dim() > 1:
                path, module = find_module(graph_module, node, "Linear", str(found.parameter.target))
                yield path, "Linear", module, function
