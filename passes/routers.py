"""Routers: products whose result chooses experts, found by what becomes of it."""

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch.fx import Node

from fxmse.passes.constants import is_moved
from fxmse.passes.op_names import get_op_name
from fxmse.passes.operation import Operation

__all__ = ["find_routers", "list_indices"]

# Ops that give the places of the largest values, and where: the node itself, or the second of what it gives.
_INDICES = ("argmax", "argsort")
_VALUES_AND_INDICES = ("topk", "sort", "max")
_SELECTIONS = ("index", "index_select", "gather", "take_along_dim", "getitem", "embedding")
_FACTORS = ("mul", "mul_", "imul")


def find_routers(operations: Sequence[Operation]) -> set[Node]:
    """The nodes of products with a weight whose result chooses experts.

    Rules:

    1. The places of the largest values (``topk``) are taken of the result, with no other product in between.
    2. These places reach a product (as the ends of its groups, or in its weight), choose of a parameter, or become
       factors of what other products gave. What they choose of activations ends the search, and an embedding is no
       expert: so the head of a language model chooses tokens, and that of a detector queries.
    """
    by_node = {operation.node: operation for operation in operations}
    routers = set()
    for operation in operations:
        if not operation.has_weight:
            continue
        result = _follow([operation.node], lambda _, user: user not in by_node)  # Rule 1.
        indices = list(itertools.chain.from_iterable(map(list_indices, result)))
        if indices and _choose_experts(indices, operation.node, by_node):
            routers.add(operation.node)
    return routers


def list_indices(node: Node) -> list[Node]:
    """The nodes that have the places of largest values, if ``node`` finds them."""
    name = get_op_name(node)
    if name in _INDICES:
        return [node]
    if name not in _VALUES_AND_INDICES:
        return []
    return [
        user for user in node.users if get_op_name(user) in ("getitem", "getattr") and user.args[1] in (1, "indices")
    ]


def _choose_experts(indices: list[Node], router: Node, by_node: dict[Node, Operation]) -> bool:
    """Rule 2."""

    def is_followed(node: Node, user: Node) -> bool:
        return user not in by_node and not (_is_selection(user) and user.args[0] is not node)

    chosen = _follow(indices, is_followed)
    readers = {user for node in chosen for user in node.users}
    if any(user in by_node and by_node[user].class_name != "Embedding" for user in readers):
        return True
    if any(_chooses_of_weight(user, chosen) for user in readers - by_node.keys()):
        return True
    factors = {source for user in readers if get_op_name(user) in _FACTORS for source in user.all_input_nodes}
    if not factors:
        return False
    given = _follow((other for other in by_node if other is not router), lambda _, user: user is not router)
    return any(factor in given and factor not in chosen for factor in factors)


def _chooses_of_weight(user: Node, chosen: Collection[Node]) -> bool:
    source = user.args[0] if user.args else None
    return _is_selection(user) and isinstance(source, Node) and source not in chosen and _is_weight(source)


def _is_selection(node: Node) -> bool:
    return get_op_name(node) in _SELECTIONS


def _is_weight(source: Node) -> bool:
    return source.op == "get_attr" or (source.op != "placeholder" and is_moved(source))


def _follow(starts: Iterable[Node], is_followed: Callable[[Node, Node], bool]) -> Collection[Node]:
    """The nodes ``starts`` and all that is computed of them, or written with them, as far as ``is_followed`` says."""
    found = dict.fromkeys(starts)
    waiting = list(found)
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if not is_followed(node, user):
                continue
            reached = [user, user.args[0]] if _writes_first(user) else [user]
            new = [node for node in reached if isinstance(node, Node) and node not in found]
            found.update(dict.fromkeys(new))
            waiting += new
    return found


def _writes_first(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
