"""Replaces int8 fake-quantize nodes by pairs that Inductor's int8 kernels take."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from torch import Tensor
from torch.fx import GraphModule, Node

from fxmse.capture.attributes import get_attribute, list_graphs
from fxmse.ops import FAKE_QUANTIZE, is_fake_quantize
from fxmse.passes.base import GraphPass
from fxmse.passes.int8_patterns import register_int8_patterns
from fxmse.passes.lowering import add_buffer, erase_unread, get_meta, get_name
from fxmse.passes.op_names import get_op_name

__all__ = ["LowerToQDQ"]

# Where Inductor's patterns begin: a dequantized value that one of these reads beside a dequantized weight.
_PRODUCTS = ("linear", "conv1d", "conv2d", "conv3d", "matmul", "mm", "addmm", "bmm", "baddbmm")
# How a weight's rows become the parameter again (WeightView).
_VIEWS = (torch.reshape, torch.transpose, torch.flatten, torch.unflatten)
_INT8_MIN = -128
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class LowerToQDQ(GraphPass):
    """Replaces static int8 fake-quantize nodes by ``quantized_decomposed`` quantize and dequantize nodes.

    Compiled without gradients while ``torch._inductor.config.freezing`` is set, Inductor runs products of two such
    values as int8 kernels on x86 CPUs. The pass registers torchao's patterns for them where torch has none of its own
    (2.14 and later), and warns where there are neither. Rules:

    1. An activation of 8 bits per tensor is quantized to uint8, zero points moved by 128 (which is what VNNI
       multiplies), or to int8, and dequantized once for each of its readers.
    2. A weight of up to 8 bits, symmetric, per channel or tensor, all of whose readers are products with such an
       activation (no addmm that scales by alpha or beta), is stored as int8 and dequantized per channel. The float
       parameter goes, unless something else reads it.
    3. Values in bfloat16 are dequantized in float32 and cast, as Inductor's patterns have it.
    4. Everything else stays as it is, and is listed with the reason in one warning.

    On a CPU without VNNI oneDNN adds pairs of products of these kernels in 16 bits, where weights of 8 bits saturate;
    those of 7 do not.

    What is quantized is what was before, but for ties: the quantize node multiplies by a reciprocal and rounds before
    it adds the zero point, so that a value half-way between two steps may fall to the other side.

    Attributes:
        activation_dtype: what activations are quantized to: torch.uint8, which Inductor's kernels multiply, or
            torch.int8, zero points as they are, which ExecuTorch's XNNPACK backend takes.
    """

    activation_dtype: torch.dtype = torch.uint8

    def __post_init__(self) -> None:
        if self.activation_dtype not in (torch.uint8, torch.int8):
            raise ValueError(f"activation_dtype={self.activation_dtype!r}: expected torch.uint8 or torch.int8")

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Applies the rules."""
        # Inductor registers the ops.
        import torch._inductor.decomposition

        nodes = [node for node in graph_module.graph.nodes if is_fake_quantize(node)]
        reasons = {node: _find_reason(graph_module, node) for node in nodes}
        for node in nodes:
            if not reasons[node] and _is_weight(node) and _is_transposed(node):
                reasons[node] = "there is no int8 kernel for transposed convolutions"
            elif not reasons[node] and _is_weight(node) and not _meets_int8_inputs(node, reasons):
                reasons[node] = "not every op that reads it multiplies it by an int8 activation"
            elif not reasons[node] and _is_weight(node) and _is_scaled(node):
                reasons[node] = "the product that reads it has a factor alpha or beta"
        lowered = [node for node in nodes if not reasons[node]]
        if lowered and self.activation_dtype == torch.uint8:
            register_int8_patterns()
        for node in lowered:
            if _is_weight(node):
                _lower_weight(graph_module, node)
            else:
                _lower_activation(graph_module, node, self.activation_dtype)
        # Rule 4.
        left = [f"{get_name(node)} ({reason})" for node, reason in reasons.items() if reason]
        inner = (node for graph in list_graphs(graph_module) for node in graph.graph.nodes if node not in reasons)
        left += [f"{get_name(node)} (in a branch or loop)" for node in inner if is_fake_quantize(node)]
        if left:
            warnings.warn(f"not lowered to int8, still fake-quantized: {'; '.join(left)}", UserWarning, stacklevel=3)
        return bool(lowered)


def _find_reason(graph_module: GraphModule, node: Node) -> str:
    """Why a node alone cannot be lowered; "" where it can."""
    if node.target is not FAKE_QUANTIZE:
        return "dynamic"
    _, scale, zero_point, global_scale, num_bits, type, strategy, *_ = node.args
    if type != "int" or global_scale is not None or strategy not in ("tensor", "channel"):
        return f"{type}{num_bits} {strategy}"
    dtype = _get_tensor(graph_module, scale).dtype
    if dtype not in _DTYPES:
        return f"{dtype}"
    if not _is_weight(node):
        if get_name(node).endswith("weight"):
            return "a weight that is computed in the graph"
        return "" if (num_bits, strategy) == (8, "tensor") else f"activation of {type}{num_bits} {strategy}"
    if zero_point is not None:
        return "asymmetric weight"
    if num_bits > 8:  # type: ignore[operator]
        return f"{type}{num_bits}"
    return "" if _evaluate(graph_module, node.args[0]).dim() == 2 else "weight of more than two dimensions"


def _get_tensor(graph_module: GraphModule, node: Any) -> Tensor:
    assert isinstance(node, Node)
    assert node.op == "get_attr"
    return get_attribute(graph_module, str(node.target))


def _find_source(node: Any) -> Node:
    """Behind the views of a weight, the node that reads the parameter; of an activation something else."""
    assert isinstance(node, Node)
    while node.target in _VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _is_weight(node: Node) -> bool:
    return _find_source(node.args[0]).op == "get_attr"


def _evaluate(graph_module: GraphModule, node: Any) -> Tensor:
    """The rows that a weight's node quantizes."""
    if node.op == "get_attr":
        return _get_tensor(graph_module, node).detach()
    return node.target(_evaluate(graph_module, node.args[0]), *node.args[1:])


def _find_readers(node: Node) -> Iterator[tuple[Node, Node]]:
    """The ops that read a weight, and what each reads: the node itself or a view of it."""
    for user in node.users:
        if user.target in _VIEWS:
            yield from _find_readers(user)
        else:
            yield user, node


def _meets_int8_inputs(weight: Node, reasons: dict[Node, str]) -> bool:
    """Whether all readers of a weight are products with an activation that is lowered."""
    return all(
        get_op_name(reader).lstrip("_") in _PRODUCTS
        and any(other is not weight and reasons.get(other, "-") == "" for other in reader.all_input_nodes)
        for reader, _ in _find_readers(weight)
    )


def _is_transposed(weight: Node) -> bool:
    """Whether a reader of a weight is a transposed convolution."""
    return any(
        get_op_name(reader).startswith("conv_transpose")
        or (reader.target is torch.ops.aten.convolution.default and reader.args[6])
        for reader, _ in _find_readers(weight)
    )


def _is_scaled(weight: Node) -> bool:
    """Whether a reader of a weight is an addmm with factors, which int8 kernels do not have."""
    factors = (reader.kwargs.get(name, 1) for reader, _ in _find_readers(weight) for name in ("alpha", "beta"))
    return any(factor != 1 for factor in factors)


def _lower_activation(graph_module: GraphModule, node: Node, dtype: torch.dtype) -> None:
    """Rule 1: zero points of int8 are those of uint8 less 128."""
    ops, graph = torch.ops.quantized_decomposed, graph_module.graph
    x, scale, zero_point = node.args[:3]
    scale_tensor = _get_tensor(graph_module, scale)
    shift = 0 if zero_point is None else int(_get_tensor(graph_module, zero_point).item())
    limits = torch.iinfo(dtype)
    qparams = (scale_tensor.item(), shift + limits.min - _INT8_MIN, limits.min, limits.max, dtype)
    with graph.inserting_before(node):
        quantized = graph.call_function(ops.quantize_per_tensor.default, (x, *qparams))
        quantized.meta = get_meta(node)
    for user in list(node.users):
        with graph.inserting_before(user):
            dequantized = graph.call_function(ops.dequantize_per_tensor.default, (quantized, *qparams))
            dequantized = _cast(dequantized, node, scale_tensor.dtype)
        user.replace_input_with(node, dequantized)
    graph.erase_node(node)
    erase_unread(graph_module, scale, zero_point)


def _cast(dequantized: Node, node: Node, dtype: torch.dtype) -> Node:
    """Rule 3."""
    dequantized.meta = get_meta(node)
    if dtype == torch.float32:
        return dequantized
    cast = dequantized.graph.call_method("to", (dequantized, dtype))
    cast.meta = get_meta(node)
    return cast


def _lower_weight(graph_module: GraphModule, node: Node) -> None:
    """Rule 2."""
    graph, rows_node, scale_node = graph_module.graph, node.args[0], node.args[1]
    rows, scale = _evaluate(graph_module, rows_node), _get_tensor(graph_module, scale_node)
    num_bits, num_channels = int(node.args[4]), len(rows)  # type: ignore[arg-type]
    args = QuantizationArgs(num_bits=num_bits, strategy=node.args[6])
    quantized = quantize(rows, scale, None, args, dtype=torch.int8)
    # A convolution's rows become its weight before they are dequantized: that is what Inductor looks for.
    views = _list_reshapes(node, num_channels)
    for view in views:
        quantized = view.target(quantized, *view.args[1:])  # type: ignore[operator]
    last = views[-1] if views else node
    prefix = str(scale_node.target).removesuffix("_scale")  # type: ignore[union-attr]
    tensors = {
        f"{prefix}_quantized": quantized.contiguous(),
        f"{prefix}_channel_scale": scale.detach().float().flatten().expand(num_channels).contiguous(),
        f"{prefix}_channel_zero_point": torch.zeros(num_channels, dtype=torch.int64, device=scale.device),
    }
    limit = 2 ** (num_bits - 1)
    with graph.inserting_before(node):
        inputs = [add_buffer(graph_module, name, tensor) for name, tensor in tensors.items()]
        dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default
        dequantized = graph.call_function(dequantize, (*inputs, 0, -limit, limit - 1, torch.int8))
        dequantized = _cast(dequantized, node, scale.dtype)
    last.replace_all_uses_with(dequantized)
    for replaced in (*reversed(views), node):
        graph.erase_node(replaced)
    erase_unread(graph_module, rows_node, scale_node)


def _list_reshapes(node: Node, num_channels: int) -> list[Node]:
    """The reshapes that make a convolution's weight of its rows, one behind the other; channels stay first."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not torch.reshape or users[0].args[1][0] != num_channels:  # type: ignore[index]
        return []
    return [users[0], *_list_reshapes(users[0], num_channels)]
