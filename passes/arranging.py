"""Which rows of an op's weight meet which of its tokens."""

from typing import Any

import torch
from torch.fx import Node

from fxmse.observers.arrangements import Arrangement, Experts, Patches
from fxmse.passes.op_names import get_op_name
from fxmse.passes.operation import Argument, Operand, Operation

__all__ = ["find_arrangement", "find_choices"]

aten = torch.ops.aten

_STRIDE, _PADDING, _DILATION = Argument(3, "stride"), Argument(4, "padding"), Argument(5, "dilation")
_OFFSETS = Argument(2, "offs")
_OFFSET_OPS = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
_MOVES = ("transpose", "permute", "mT", "to", "_to_copy", "contiguous", "clone", "getattr")
_CHOICES = ("index", "index_select", "getitem", "select")


def find_arrangement(operation: Operation, operand: Operand) -> tuple[Arrangement | None, tuple[Any, ...]]:
    """The arrangement, and what else its node is called with; None and nothing where all rows meet all tokens.

    Rules:

    1. A convolution's rows meet patches.
    2. Of experts' matrices (experts, out, in) that are chosen by an index, each entry of x's first dimension meets the
       one that is chosen for it; a grouped_mm has offsets; in a bmm each matrix meets its own.
    3. Experts that are chosen in another way meet the tokens of all.
    """
    weight = operation.weight
    assert weight
    if weight.view.layout == "convolution":
        return (_find_patches(operation.node, weight.view.shape), ()) if operand.role == "input" else (None, ())
    if len(weight.view.shape) != 3:
        return None, ()
    num_experts, name = weight.view.shape[0], get_op_name(operation.node)
    if name in _OFFSET_OPS:
        offsets = _OFFSETS.get(operation.node)
        return (Experts(num_experts, "offsets"), (offsets,)) if isinstance(offsets, Node) else (None, ())
    choices = _list_choices(operation)
    if len(choices) == 1 and choices[0] is not None:
        return Experts(num_experts, "index"), (choices[0],)
    is_batched = name in ("bmm", "baddbmm") and not choices
    return (Experts(num_experts, "batch"), ()) if is_batched else (None, ())


def find_choices(weight: Node, num_experts: int) -> list[tuple[Node, Experts, Node]]:
    """The products that read matrices of a weight by a choice, how it says which, and the choice."""
    found: list[tuple[Node, Experts, Node]] = []
    waiting: list[tuple[Node, Node | None]] = [(weight, None)]
    for node, choice in waiting:
        for user in node.users:
            name = get_op_name(user)
            if name in _OFFSET_OPS and isinstance(offsets := _OFFSETS.get(user), Node):
                found.append((user, Experts(num_experts, "offsets"), offsets))
            elif name in ("bmm", "baddbmm") and choice is not None:
                found.append((user, Experts(num_experts, "index"), choice))
            elif name in _CHOICES and choice is None and isinstance(own := _find_choice(user), Node):
                waiting.append((user, own))
            elif name in _MOVES:
                waiting.append((user, choice))
    return found


def _find_patches(node: Node, shape: tuple[int, ...]) -> Patches:
    """Rule 1; of a weight of this shape, (out, in / groups, *kernel)."""
    kernel_size = shape[2:]
    groups = Argument(8 if node.target is aten.convolution.default else 6, "groups").get(node)

    def repeat(value: Any, default: int) -> tuple[int, ...]:
        value = default if value is None else value
        sizes = (value,) if isinstance(value, int) else tuple(value)
        return sizes * len(kernel_size) if len(sizes) == 1 else sizes

    padding = _PADDING.get(node)
    return Patches(
        kernel_size,
        repeat(_STRIDE.get(node), 1),
        padding if isinstance(padding, str) else repeat(padding, 0),
        repeat(_DILATION.get(node), 1),
        1 if groups is None else groups,
    )


def _list_choices(operation: Operation) -> list[Any]:
    """What chooses among the matrices on the way from the parameter to the op; None for what is no plain choice."""
    return [_find_choice(node) for node in _find_way(operation) if get_op_name(node) in _CHOICES]


def _find_way(operation: Operation) -> list[Node]:
    """The ops that move the parameter's matrices to the op."""
    assert operation.weight
    for node in operation.node.all_input_nodes:
        way: list[Node] = []
        source: Any = node
        while isinstance(source, Node) and source.args and source is not operation.weight.value:
            way.append(source)
            if source is operation.weight.reader:
                return way
            source = source.args[0]
    return []


def _find_choice(node: Node) -> Any:
    name = get_op_name(node)
    if name in ("select", "index_select"):
        dim, choice = (*node.args[1:], None, None)[:2]
        return choice if dim == 0 else None
    choice = node.args[1]
    if not isinstance(choice, list | tuple):
        return choice if isinstance(choice, Node | int) else None
    first, *others = choice
    return first if all(other in (None, slice(None), ...) for other in others) else None
