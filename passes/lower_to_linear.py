"""Replaces fake-quantize nodes by linear quantize and dequantize nodes, as ONNX has them."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxmse.capture.attributes import get_attribute, list_graphs
from fxmse.formats.linear import LINEAR_TYPES, LinearScales, find_linear_type, spread_scales
from fxmse.ops import (
    DYNAMIC_FAKE_QUANTIZE,
    FAKE_QUANTIZE,
    calculate_codes,
    is_fake_quantize,
)
from fxmse.passes.base import GraphPass
from fxmse.passes.constants import evaluate, find_sources
from fxmse.passes.lowering import add_buffer, erase_unread, get_meta, get_name
from fxmse.passes.op_names import get_op_name
from fxmse.passes.operation import Argument
from fxmse.passes.versions import Versions

__all__ = ["LowerToLinear"]

# What may stand between a weight's rows and what reads them, and moves values only.
_VIEWS = frozenset({"reshape", "view", "transpose", "t", "permute", "flatten", "unflatten"})
# The input, the matrix and the bias of products.
_PRODUCTS = {
    "linear": (Argument(0, "input"), Argument(1, "weight"), Argument(2, "bias")),
    "addmm": (Argument(1, "mat1"), Argument(2, "mat2"), Argument(0, "input")),
}
_UINT8_SHIFT = 128
_FP8 = LINEAR_TYPES["FLOAT8E4M3FN"]


@dataclass(frozen=True)
class LowerToLinear(GraphPass):
    """Replaces fake-quantize nodes by ``fxmse::quantize_linear`` and ``fxmse::dequantize_linear`` nodes.

    These compute what ONNX's QuantizeLinear and DequantizeLinear do. Rules:

    1. A value that follows from the graph's attributes alone, as a weight does, is stored as codes in the smallest type
       that has them, in the shape in which it is read: views behind it are applied to the codes. The float parameter
       goes, unless something else reads it.
       A linear that reads it, or an addmm without factors, becomes a matrix product and an addition: that is what
       runtimes have kernels for, of codes as (in, out).
    2. Its scales are one, one for each index of an axis, or one for each block along an axis, the first of these that
       says it. Blocks of two axes become blocks of one, of which several have equal scales.
    3. Under a global scale, scales that are fp8 values are codes, too, and are dequantized by it.
    4. An activation that has one scale, or one for each index of a dimension, in a type of its own number of bits, is
       quantized and dequantized; int8 as uint8, zero points moved by 128, which is what CPUs multiply.
    5. A dynamic activation in asymmetric int8 per tensor becomes a ``fxmse::dynamic_quantize_linear`` node.
    6. Any other activation is divided by its scales and rounded by a pair whose scale is 1.

    What is quantized is what was before, but for ties: by rules 4 and 5 a value is rounded before its zero point is
    added, so that one half-way between two steps may fall to the other side.

    Raises:
        ValueError: what there is no type or no op for: activations in fp6, dynamic values with scales in fp8 or of the
            MX formats, and what is quantized in a branch or loop. All are named, and nothing is changed.
    """

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Applies the rules."""
        nodes = [node for node in graph_module.graph.nodes if is_fake_quantize(node)]
        versions = Versions(graph_module)
        constants = {node for node in nodes if _is_constant(graph_module, versions, node)}
        reasons = {node: "" if node in constants else _find_reason(graph_module, node) for node in nodes}
        inner = [node for graph in list_graphs(graph_module) for node in graph.graph.nodes if node not in reasons]
        reasons |= {node: "it is in a branch or loop" for node in inner if is_fake_quantize(node)}
        named = [f"{get_name(node)} ({reason})" for node, reason in reasons.items() if reason]
        if named:
            raise ValueError(f"ONNX has no ops for {'; '.join(named)}: leave them in float, or in another format")
        for node in nodes:
            if node in constants:
                for reader in list(node.users):
                    _spell_product(graph_module, reader, node)
                _store(graph_module, node)
            elif node.target is FAKE_QUANTIZE:
                _lower_activation(graph_module, node)
            else:
                _lower_dynamic(graph_module, node)
        return bool(nodes)


def _is_constant(graph_module: GraphModule, versions: Versions, node: Node) -> bool:
    return node.target is FAKE_QUANTIZE and find_sources(graph_module, versions, node.args[0]) is not None


def _find_reason(graph_module: GraphModule, node: Node) -> str:
    """Why an activation cannot be lowered; "" where it can."""
    num_bits, type = node.args[4:6] if node.target is FAKE_QUANTIZE else node.args[2:4]
    if (type, num_bits) == ("float", 6):
        return "there is no type of fp6 to quantize to"
    if node.target is FAKE_QUANTIZE and node.args[6] == "block":
        return "its blocks are of a value that is computed"
    scale_dtype = node.args[7] if node.target is DYNAMIC_FAKE_QUANTIZE and len(node.args) > 7 else None
    if scale_dtype in (torch.uint8, torch.float8_e4m3fn):
        return "its scales are rounded to 8 bits while the graph runs"
    return ""


def _get_tensor(graph_module: GraphModule, node: Any) -> Tensor | None:
    """What a get_attr node reads, or None."""
    return get_attribute(graph_module, str(node.target)).detach() if isinstance(node, Node) else None


class _Builder:
    """Puts nodes in the place of a fake-quantize node, and buffers beside those that it reads."""

    def __init__(self, graph_module: GraphModule, node: Node) -> None:
        self.graph_module, self.node, self.meta = graph_module, node, get_meta(node)
        self.prefix = self._find_prefix()

    def _find_prefix(self) -> str:
        """What the node's own buffers are called after: its name where it has none."""
        own = [source for source in self.node.args[1:] if isinstance(source, Node) and source.op == "get_attr"]
        if not own:
            return self.node.name
        name = str(own[0].target)
        return name.removesuffix("_global_scale").removesuffix("_scale")

    def add(self, target: Any, *args: Any) -> Node:
        """A call of an op or a function before the node."""
        with self.graph_module.graph.inserting_before(self.node):
            node = self.graph_module.graph.call_function(target, args)
        node.meta = dict(self.meta)
        return node

    def hold(self, suffix: str, tensor: Tensor) -> Node:
        """A node that reads a new buffer, whose name begins as the others' do."""
        target = f"{self.prefix}_{suffix}"
        path, _, name = target.rpartition(".")
        while hasattr(self.graph_module.get_submodule(path), name):
            name = f"{name}_"
        with self.graph_module.graph.inserting_before(self.node):
            return add_buffer(self.graph_module, f"{path}.{name}".lstrip("."), tensor.contiguous())

    def finish(self, result: Node, last: Node | None = None) -> None:
        """Has ``result`` take the node's place, or that of the last of the views behind it."""
        last = last or self.node
        last.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
        erase_unread(self.graph_module, last)


def _spell_product(graph_module: GraphModule, reader: Node, weight: Node) -> None:
    """Rule 1: x @ weight.T + bias for a linear, x @ weight + bias for an addmm; nothing for another reader."""
    signature = _PRODUCTS.get(get_op_name(reader))
    if signature is None or any(reader.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        return
    x, matrix, bias = (argument.get(reader) for argument in signature)
    if matrix is not weight or x is weight or bias is weight:
        return
    graph, meta = graph_module.graph, get_meta(reader)
    with graph.inserting_before(reader):
        if get_op_name(reader) == "linear":
            matrix = graph.call_function(torch.transpose, (matrix, 0, 1))
        result = graph.call_function(torch.matmul, (x, matrix))
        result = result if bias is None else graph.call_function(torch.add, (result, bias))
    for node in (result, *result.all_input_nodes):
        node.meta = node.meta or dict(meta)
    reader.replace_all_uses_with(result)
    graph.erase_node(reader)


def _store(graph_module: GraphModule, node: Node) -> None:
    """Rules 1 to 3."""
    build = _Builder(graph_module, node)
    rows = evaluate(graph_module, node.args[0]).detach()  # type: ignore[arg-type]
    scale, zero_point, global_scale = (_get_tensor(graph_module, source) for source in node.args[1:4])
    assert scale is not None
    num_bits, type, *layout = node.args[4:]
    linear = find_linear_type(num_bits, type)  # type: ignore[arg-type]
    codes = calculate_codes(rows, scale, zero_point, global_scale, num_bits, type, *layout)  # type: ignore[arg-type]
    codes, places, last = _move(node, codes.to(linear.dtype), _find_places(scale, rows, *layout))
    scales = LinearScales.of(places)
    form = (linear.name, scales.axis, scales.block_size)
    shift = None if zero_point is None else zero_point.flatten()[scales.places].to(linear.dtype)
    result = build.add(
        torch.ops.fxmse.dequantize_linear.default,
        build.hold("quantized", codes),
        _hold_scales(build, scales, scale, global_scale),
        None if shift is None else build.hold("quantized_zero_point", shift),
        *form,
    )
    if layout[0] in ("group", "tensor_group") and rows.dtype != scale.dtype:
        result = build.add(torch.ops.aten.to.dtype, result, rows.dtype)
    build.finish(result, last)


def _find_places(
    scale: Tensor, rows: Tensor, strategy: Any, group_size: Any = None, block_structure: Any = None
) -> Tensor:
    """Which of the scales each element of the rows has; int32, shape of rows."""
    places = torch.arange(scale.numel(), dtype=torch.int32, device=scale.device).view(scale.shape)
    if strategy == "block":
        for dim, size in zip((-2, -1), block_structure, strict=True):
            places = spread_scales(places, rows, dim, size)
    elif strategy in ("group", "tensor_group"):
        places = spread_scales(places, rows, -1, group_size)
    return places.expand_as(rows)


def _move(node: Node, codes: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Node]:
    """Rule 1: both as the views behind ``node`` show them, up to the last view, which is returned, too.

    Views are left alone where that would take more scales, as blocks that a kernel's elements are cut into do.
    """
    num_scales, last = LinearScales.of(places).places.numel(), node
    for view in _list_views(node):
        moved = _apply(view, places)
        if LinearScales.of(moved).places.numel() > num_scales:
            break
        codes, places, last = _apply(view, codes), moved, view
    return codes, places, last


def _list_views(node: Node) -> Iterator[Node]:
    """The views behind a node, each of the one before it, which nothing else reads."""
    while len(node.users) == 1:
        [user] = node.users
        if get_op_name(user) not in _VIEWS or user.all_input_nodes != [node] or user.args[0] is not node:
            return
        yield user
        node = user


def _apply(view: Node, tensor: Tensor) -> Tensor:
    if view.op == "call_method":
        return getattr(tensor, str(view.target))(*view.args[1:], **view.kwargs)
    return view.target(tensor, *view.args[1:], **view.kwargs)  # type: ignore[operator]


def _hold_scales(build: _Builder, scales: LinearScales, scale: Tensor, global_scale: Tensor | None) -> Node:
    """Rules 2 and 3; a node that gives the scales."""
    chosen = scale.flatten()[scales.places]
    if global_scale is None:
        return build.hold("quantized_scale", chosen)
    codes = chosen.to(_FP8.dtype)
    global_places = torch.arange(global_scale.numel(), device=scale.device).view(global_scale.shape)
    places = global_places.expand_as(scale).flatten()[scales.places]
    if not torch.equal(codes.to(scale.dtype), chosen):
        return build.hold("quantized_scale", chosen / global_scale.flatten()[places].to(scale.dtype))
    own = LinearScales.of(places)
    inverse = (1 / global_scale.flatten()[own.places]).to(scale.dtype)
    return build.add(
        torch.ops.fxmse.dequantize_linear.default,
        build.hold("quantized_scale", codes),
        build.hold("quantized_inverse_global_scale", inverse),
        None,
        _FP8.name,
        own.axis,
        own.block_size,
    )


def _lower_activation(graph_module: GraphModule, node: Node) -> None:
    """Rules 4 and 6."""
    build = _Builder(graph_module, node)
    x, scale_node, zero_point_node, global_node, num_bits, type, strategy, *rest = node.args
    scale, zero_point, global_scale = (_get_tensor(graph_module, n) for n in (scale_node, zero_point_node, global_node))
    assert scale is not None
    if global_scale is not None:
        scale = scale / global_scale
    linear = find_linear_type(num_bits, type)  # type: ignore[arg-type]
    wide = [dim for dim, size in enumerate(scale.shape) if size != 1]
    if linear.bits != num_bits or len(wide) > 1 or strategy in ("group", "tensor_group"):
        shift_node = None if zero_point is None else build.hold("quantized_shift", zero_point.to(scale.dtype))
        grid = (num_bits, type, strategy, *rest)
        build.finish(_round_by_units(build, build.hold("quantized_scale", scale), shift_node, *grid))
        return
    shift = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point.to(torch.int32)
    if linear.name == "INT8":
        linear, shift = LINEAR_TYPES["UINT8"], shift + _UINT8_SHIFT
    shape = [scale.numel()] if wide else []
    qparams = (
        build.hold("quantized_scale", scale.reshape(shape)),
        build.hold("quantized_zero_point", shift.reshape(shape).to(linear.dtype)),
    )
    form = (*qparams, linear.name, wide[0] - scale.dim() if wide else 0)
    codes = build.add(torch.ops.fxmse.quantize_linear.default, x, *form)
    build.finish(build.add(torch.ops.fxmse.dequantize_linear.default, codes, *form))


def _lower_dynamic(graph_module: GraphModule, node: Node) -> None:
    """Rules 5 and 6."""
    build = _Builder(graph_module, node)
    x, global_scale, num_bits, type, symmetric, strategy, *rest = node.args
    if (global_scale, num_bits, type, symmetric, strategy) == (None, 8, "int", False, "tensor"):
        outputs = build.add(torch.ops.fxmse.dynamic_quantize_linear.default, x)
        parts = [build.add(operator.getitem, outputs, place) for place in range(3)]
        dequantized = build.add(torch.ops.fxmse.dequantize_linear.default, *parts, "UINT8")
        build.finish(build.add(torch.ops.aten.type_as.default, dequantized, x))
        return
    outputs = build.add(torch.ops.fxmse.dynamic_qparams.default, *node.args)
    scale = build.add(operator.getitem, outputs, 0)
    if global_scale is not None:
        scale = build.add(torch.div, scale, global_scale)
    zero_point = None if symmetric else build.add(operator.getitem, outputs, 1)
    build.finish(_round_by_units(build, scale, zero_point, num_bits, type, strategy, *rest[:1]))


def _round_by_units(
    build: _Builder, scale: Node, shift: Node | None, num_bits: Any, type: Any, strategy: Any, group_size: Any = None
) -> Node:
    """Rule 6: in the order of :func:`fxmse.ops.fake_quantize`, so that the result is the same."""
    linear, x = find_linear_type(num_bits, type), build.node.args[0]
    is_grouped = strategy in ("group", "tensor_group")
    value = build.add(torch.unflatten, x, -1, (-1, group_size)) if is_grouped else x
    if is_grouped:
        scale = build.add(torch.unsqueeze, scale, -1)
        shift = None if shift is None else build.add(torch.unsqueeze, shift, -1)
    scaled = build.add(torch.div, value, scale)
    if shift is not None:
        scaled = build.add(torch.add, scaled, shift)
    if linear.bits != num_bits:
        limit = 2 ** (num_bits - 1)
        scaled = build.add(torch.clamp, scaled, -limit, limit - 1)
    unit = build.add(torch.ops.aten.new_ones.default, scaled, [])
    zero = build.hold("quantized_zero_point", torch.zeros((), dtype=linear.dtype))
    codes = build.add(torch.ops.fxmse.quantize_linear.default, scaled, unit, zero, linear.name)
    result = build.add(torch.ops.fxmse.dequantize_linear.default, codes, unit, zero, linear.name)
    if shift is not None:
        result = build.add(torch.sub, result, shift)
    result = build.add(torch.mul, result, scale)
    if is_grouped:
        result = build.add(torch.ops.aten.type_as.default, build.add(torch.flatten, result, -2, -1), x)
    return result
