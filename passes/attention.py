"""Where attention reads its queries, keys and values, fused or written out."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fxmse.passes.operation import Argument, Operand

__all__ = ["find_attention"]

aten = torch.ops.aten

_FUSED = (F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default)
_QUERY_KEY_VALUE = {"q": Argument(0, "query"), "k": Argument(1, "key"), "v": Argument(2, "value")}

# Written out it is softmax(q k) v, with scaling, masks, casts and dropout between.
_SOFTMAX = (F.softmax, torch.softmax, aten.softmax.int, aten._softmax.default, "softmax")
_BEHIND_SOFTMAX = {
    *(F.dropout, torch.dropout, aten.dropout.default, aten.to.dtype, aten._to_copy.default, aten.clone.default),
    *(aten.contiguous.default, "to", "type_as", "clone", "contiguous"),
}
_BEFORE_SOFTMAX = {
    *(operator.add, operator.iadd, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul),
    *(torch.div, torch.where, torch.masked_fill, torch.tanh, torch.clamp),
    *(aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar),
    *(aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.where.self, aten.masked_fill.Scalar),
    *(aten.masked_fill.Tensor, aten.tanh.default, aten.clamp.default, aten.to.dtype, aten._to_copy.default),
    *(aten.view.default, aten.reshape.default, "add", "sub", "mul", "div", "masked_fill", "to", "float", "view"),
}
_TRANSPOSES = (
    *(torch.transpose, torch.permute, torch.swapaxes, aten.transpose.int, aten.permute.default, aten.mT.default),
    *("transpose", "permute", "swapaxes"),
)


def find_attention(
    node: Node, get_factors: Callable[[Node], tuple[Argument, Argument] | None], prefix: str
) -> tuple[Operand, ...]:
    """The queries, keys and values that ``node`` attends to; none where it is something else.

    Heads that are repeated for grouped queries are taken from before they are: a cache holds, and a runtime
    quantizes, each head once.

    Args:
        node: the fused op, or the product of the probabilities and the values.
        get_factors: where a node has the two factors of a matrix product; None for all other nodes.
        prefix: of the operands.
    """
    found: dict[str, tuple[Node, Argument]] = {}
    if node.target in _FUSED:
        found = {role: (node, argument) for role, argument in _QUERY_KEY_VALUE.items()}
    elif factors := get_factors(node):
        softmax = _go_back(factors[0].get(node), _BEHIND_SOFTMAX)
        if softmax is not None and softmax.target in _SOFTMAX:
            scores = _find_scores(softmax.args[0], get_factors)
            score_factors = scores and get_factors(scores)
            if scores is not None and score_factors:
                keys = score_factors[1].get(scores)
                found = {"q": (scores, score_factors[0]), "k": (scores, score_factors[1]), "v": (node, factors[1])}
                if isinstance(keys, Node) and keys.target in _TRANSPOSES:
                    found["k"] = (keys, Argument(0, "input"))
    return tuple(Operand(role, *_look_through_repeats(*read), prefix) for role, read in found.items())


def _go_back(value: Any, targets: set) -> Node | None:
    while isinstance(value, Node) and value.target in targets:
        value = value.args[0]
    return value if isinstance(value, Node) else None


def _find_scores(value: Any, get_factors: Callable[[Node], object]) -> Node | None:
    """The matrix product that ``value`` comes from by elementwise ops; masks and scales come from others."""
    waiting, seen = [value], set()
    while waiting:
        candidate = waiting.pop()
        if not isinstance(candidate, Node) or candidate in seen:
            continue
        seen.add(candidate)
        if get_factors(candidate):
            return candidate
        if candidate.target in _BEFORE_SOFTMAX:
            waiting += reversed(candidate.all_input_nodes)
    return None


_REPEATS = (
    *(aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.view.default, aten._unsafe_view.default),
    *(aten.clone.default, aten.contiguous.default, aten.slice.Tensor, torch.unsqueeze, torch.reshape, operator.getitem),
    *("unsqueeze", "expand", "reshape", "view", "clone", "contiguous"),
)


def _look_through_repeats(node: Node, argument: Argument) -> tuple[Node, Argument]:
    """Who reads the heads before they are repeated; ``node`` itself where they are not."""
    repeated = argument.get(node)
    shape = _shape_of(repeated)
    reader = node
    source = repeated
    while isinstance(source, Node) and source.target in _REPEATS and isinstance(source.args[0], Node):
        reader, source = source, source.args[0]
        found = _shape_of(source)
        is_same = len(found) == len(shape) == 4 and all(str(found[dim]) == str(shape[dim]) for dim in (0, 2, 3))
        if is_same and str(found[1]) != str(shape[1]):
            return reader, Argument(0, "input")
    return node, argument


def _shape_of(node: object) -> tuple:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()
