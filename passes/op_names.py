"""The name that an op goes by, whichever way a graph calls it."""

import torch
from torch.fx import Node

__all__ = ["get_op_name"]


def get_op_name(node: Node) -> str:
    """``add_`` for a call of ``torch.ops.aten.add_.Tensor``, of ``torch.Tensor.add_`` or of the method."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2]
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
