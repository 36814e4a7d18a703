"""Has fused attention be the products that it is made of."""

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from fxmse.capture.attributes import list_graphs
from fxmse.passes.base import GraphPass

__all__ = ["DecomposeAttention"]


@dataclass(frozen=True)
class DecomposeAttention(GraphPass):
    """Writes out calls that hide the products of attention, as Dynamo's graphs have them, in functions of torch.

    Rules:

    1. ``F.multi_head_attention_forward`` becomes linears and ``scaled_dot_product_attention``, or, where its weights
       are asked for, a softmax between two products. Calls with keys of their own (``bias_k``, ``add_zero_attn``,
       ``static_k``), or of tensors whose shapes the graph does not know, stay.
    2. ``_transformer_encoder_layer_fwd``, the layer's fast path, becomes the same, with the layer's norms and its two
       other linears.
    3. The new nodes belong to the module that the call belonged to.

    What is computed is the same but for the order of sums.
    """

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Applies the rules, in branches and loops, too."""
        modified = False
        for graph in list_graphs(graph_module):
            for node in list(graph.graph.nodes):
                if node.target is F.multi_head_attention_forward and _is_plain(node):
                    _replace(node, _attend)
                    modified = True
                elif node.target in _LAYERS:
                    _replace(node, _run_layer)
                    modified = True
            graph.recompile()
        return modified


_LAYERS = (torch._transformer_encoder_layer_fwd, torch.ops.aten._transformer_encoder_layer_fwd.default)
_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def _get_value(node: object) -> Any:
    """An example of what a node gives, of which the shape and dtype count."""
    return node.meta.get("val", node.meta.get("example_value")) if isinstance(node, Node) else None


def _bind(node: Node) -> dict[str, Any]:
    bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _is_plain(node: Node) -> bool:
    """Rule 1."""
    call = _bind(node)
    has_own_keys = call["add_zero_attn"] or any(call[name] is not None for name in ("bias_k", "static_k", "static_v"))
    tensors = [call[name] for name in ("query", "key_padding_mask", "attn_mask") if call[name] is not None]
    is_known = all(isinstance(_get_value(tensor), Tensor) for tensor in tensors)
    return is_known and not has_own_keys and all(user.target is operator.getitem for user in node.users)


def _replace(node: Node, function: Callable[..., Any]) -> None:
    """Puts the nodes of ``function``, called with the node's arguments, in the place of ``node``."""
    graph = node.graph
    before = set(graph.nodes)
    tracer = GraphAppendingTracer(graph)

    def wrap(value: Any) -> Any:
        return Proxy(value, tracer) if isinstance(value, Node) else value

    with graph.inserting_before(node):
        outputs = function(node, wrap)
    for new in graph.nodes:
        if new not in before and "nn_module_stack" in node.meta:
            new.meta["nn_module_stack"] = node.meta["nn_module_stack"]  # rule 3
    if isinstance(outputs, Proxy):
        node.replace_all_uses_with(outputs.node)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(outputs[user.args[1]].node)
            graph.erase_node(user)
    graph.erase_node(node)


def _attend(node: Node, wrap: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Rule 1: what ``F.multi_head_attention_forward`` gives."""
    call = _bind(node)
    query, key, value = (wrap(call[name]) for name in ("query", "key", "value"))
    example = _get_value(call["query"])
    is_batched = example.dim() == 3
    padding = _make_mask(call["key_padding_mask"], example.dtype, wrap)
    if not is_batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        padding = None if padding is None else padding.unsqueeze(0)
    is_causal = call["is_causal"] and padding is None and not call["need_weights"]
    mask = None if is_causal else _make_mask(call["attn_mask"], example.dtype, wrap)
    if mask is not None and _get_value(call["attn_mask"]).dim() == 3:
        mask = mask.unflatten(0, (-1, call["num_heads"]))
    if padding is not None:
        padding = padding.unsqueeze(1).unsqueeze(1)
        mask = padding if mask is None else mask + padding
    dropout = call["dropout_p"] if call["training"] else 0.0

    # (length, batch, heads * channels) -> (batch, heads, length, channels)
    q, k, v = (
        projected.unflatten(-1, (call["num_heads"], -1)).permute(1, 2, 0, 3)
        for projected in _project(call, query, key, value, wrap)
    )
    weights = None
    if call["need_weights"]:
        scale = (example.shape[-1] // call["num_heads"]) ** -0.5
        scores = torch.matmul(q * scale, k.transpose(-2, -1))
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        if dropout:
            weights = F.dropout(weights, dropout)
        attended = torch.matmul(weights, v)
        weights = weights.mean(1) if call["average_attn_weights"] else weights
        weights = weights if is_batched else weights.squeeze(0)
    else:
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
    output = F.linear(
        attended.permute(2, 0, 1, 3).flatten(2), wrap(call["out_proj_weight"]), wrap(call["out_proj_bias"])
    )
    return output if is_batched else output.squeeze(1), weights


def _make_mask(mask: Node | None, dtype: torch.dtype, wrap: Callable[[Any], Any]) -> Any:
    """What is added to the scores; where a mask of bools is true, nothing is attended to."""
    if mask is None or _get_value(mask).dtype != torch.bool:
        return wrap(mask)
    return torch.zeros_like(wrap(mask), dtype=dtype).masked_fill(wrap(mask), float("-inf"))


def _project(call: dict[str, Any], query: Any, key: Any, value: Any, wrap: Callable[[Any], Any]) -> Any:
    """Queries, keys and values; what is projected of one tensor is one product."""
    bias = wrap(call["in_proj_bias"])
    biases: Any = (None, None, None) if bias is None else bias.chunk(3)
    inputs = (query, key, value)
    if call["use_separate_proj_weight"]:
        weights = [wrap(call[f"{name}_proj_weight"]) for name in "qkv"]
    elif call["query"] is call["key"] is call["value"]:
        projected = F.linear(query, wrap(call["in_proj_weight"]), bias).chunk(3, -1)
        return [projected[i] for i in range(3)]
    else:
        chunks = wrap(call["in_proj_weight"]).chunk(3)
        weights = [chunks[i] for i in range(3)]
    return [F.linear(inputs[i], weights[i], biases[i]) for i in range(3)]


def _run_layer(node: Node, wrap: Callable[[Any], Any]) -> Any:
    """Rule 2: what ``_transformer_encoder_layer_fwd`` gives."""
    schema = torch.ops.aten._transformer_encoder_layer_fwd.default._schema
    call: dict[str, Any] = {argument.name: argument.default_value for argument in schema.arguments}
    call.update(zip(call, node.args, strict=False))
    call = {name: wrap(argument) for name, argument in {**call, **node.kwargs}.items()}
    shape = (call["embed_dim"],)

    def normalize(x: Any, number: int) -> Any:
        return F.layer_norm(x, shape, call[f"norm_weight_{number}"], call[f"norm_bias_{number}"], call["eps"])

    def attend(x: Any) -> Any:
        projected = F.linear(x, call["qkv_weight"], call["qkv_bias"]).chunk(3, -1)
        q, k, v = (projected[i].unflatten(-1, (call["num_heads"], -1)).transpose(1, 2) for i in range(3))
        mask = call["mask"]
        if mask is not None:
            mask = mask.to(torch.bool).logical_not()
            mask = mask.unsqueeze(1).unsqueeze(1) if call["mask_type"] == 1 else mask  # of keys: (batch, length)
        attended = F.scaled_dot_product_attention(q, k, v, mask)
        return F.linear(attended.transpose(1, 2).flatten(2), call["proj_weight"], call["proj_bias"])

    def feed_forward(x: Any) -> Any:
        activate = F.gelu if call["use_gelu"] else F.relu
        hidden = activate(F.linear(x, call["ffn_weight_1"], call["ffn_bias_1"]))
        return F.linear(hidden, call["ffn_weight_2"], call["ffn_bias_2"])

    x = call["src"]
    if call["norm_first"]:
        x = x + attend(normalize(x, 1))
        return x + feed_forward(normalize(x, 2))
    x = normalize(x + attend(x), 1)
    return normalize(x + feed_forward(x), 2)
