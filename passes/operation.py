"""What an op that can be quantized is made of."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node

from fxmse.passes.weight_view import WeightView

__all__ = ["Argument", "Operand", "Operation", "Weight"]


@dataclass(frozen=True)
class Argument:
    """Where a call has an argument: at a position or under a name."""

    position: int
    name: str

    def get(self, node: Node) -> Any:
        """The argument of ``node``."""
        return node.args[self.position] if len(node.args) > self.position else node.kwargs.get(self.name)

    def set(self, node: Node, value: Node) -> None:
        """Replaces the argument, leaving the same node alone where it stands elsewhere in the call."""
        if len(node.args) > self.position:
            node.update_arg(self.position, value)
        else:
            node.update_kwarg(self.name, value)


@dataclass(frozen=True)
class Operand:
    """An activation that an operation reads.

    Attributes:
        role: "input", "q", "k" or "v".
        reader: the node that reads it: the operation, or the first of the ops that only move it there.
        argument: where.
        prefix: what tells it from other operands of its role.
        is_channels_last: whether its last dimension is the channels'; not so in a convolution.
    """

    role: str
    reader: Node
    argument: Argument
    prefix: str = ""
    is_channels_last: bool = True


@dataclass(frozen=True)
class Weight:
    """The parameter of an operation, or what it reads that is computed of parameters alone.

    Attributes:
        name: the dotted path that it is called after; of a computed one that of a parameter that it is computed of.
        value: its node: a get_attr node, or the one that computes it.
        reader: the node that reads it: the operation, or the first of the ops that only move it there.
        argument: where.
        view: how it becomes (out, in).
        is_observed: whether a probe stands between the two.
        as_read: of a parameter of which the op is known to read some rows or matrices alone, the weight that those are.
    """

    name: str
    value: Node
    reader: Node
    argument: Argument
    view: WeightView
    is_observed: bool
    as_read: "Weight | None" = None


@dataclass(frozen=True)
class Operation:
    """An op that can be quantized, where it stands in a graph.

    Attributes:
        node: the node whose value is the output.
        class_name: the class that stands for it in a config's targets: a module's, or a function's name for ops that
            have activations only.
        path: the dotted path of the module that it was traced from.
        module: a stand-in of that module (:mod:`fxmse.passes.stand_ins`).
        has_weight: whether one of its arguments is a weight.
        weight: where that is; None, too, where it depends on the data.
        operands: the activations that it reads; none for an embedding, which reads indices.
        is_meant_by_name: whether a target means it by its function's name alone, not by that of the module around it:
            one of the matrix products that attention is written out in, or the addition of a shortcut.
        bias: the argument that is added to the output's channels, of an op that has one.
    """

    node: Node
    class_name: str
    path: str
    module: nn.Module
    has_weight: bool
    weight: Weight | None
    operands: tuple[Operand, ...]
    is_meant_by_name: bool = False
    bias: Argument | None = None

    @property
    def is_attention(self) -> bool:
        """Whether it reads queries, keys and values."""
        return any(operand.role == "k" for operand in self.operands)
