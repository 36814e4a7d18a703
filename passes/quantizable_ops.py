"""Which nodes can be quantized, and where their weight and input are."""

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

__all__ = ["Argument", "QuantizableOp", "find_module", "find_op", "find_opaque_modules"]

aten = torch.ops.aten


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
class QuantizableOp:
    """An op with a weight.

    Attributes:
        class_name: the module class that stands for it in a config's targets.
        weight: where the weight is.
        input: where the activation is; None where it is no float (an embedding's indices).
        is_convolution: the weight is (out, in / groups, *kernel) and is quantized as (out, the rest); the input's
            channels are not its last dimension.
    """

    class_name: str
    weight: Argument
    input: Argument | None
    is_convolution: bool = False


_LINEAR = QuantizableOp("Linear", Argument(1, "weight"), Argument(0, "input"))
_CONVOLUTIONS = {
    d: QuantizableOp(f"Conv{d}d", Argument(1, "weight"), Argument(0, "input"), is_convolution=True) for d in (1, 2, 3)
}

_OPS: dict[Callable[..., Any], QuantizableOp] = {
    F.linear: _LINEAR,
    aten.linear.default: _LINEAR,
    F.embedding: QuantizableOp("Embedding", Argument(1, "weight"), None),
    aten.embedding.default: QuantizableOp("Embedding", Argument(0, "weight"), None),
    F.conv1d: _CONVOLUTIONS[1],
    aten.conv1d.default: _CONVOLUTIONS[1],
    aten.conv1d.padding: _CONVOLUTIONS[1],
    F.conv2d: _CONVOLUTIONS[2],
    aten.conv2d.default: _CONVOLUTIONS[2],
    aten.conv2d.padding: _CONVOLUTIONS[2],
    F.conv3d: _CONVOLUTIONS[3],
    aten.conv3d.default: _CONVOLUTIONS[3],
    aten.conv3d.padding: _CONVOLUTIONS[3],
}


def find_op(node: Node) -> QuantizableOp | None:
    """What can be quantized of ``node``; None for every other node."""
    return _OPS.get(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]


def find_opaque_modules(graph_module: GraphModule) -> dict[str, nn.Module]:
    """Modules that would be quantizable ops but are called as a whole, by path: their weights are not in the graph."""
    classes = tuple(getattr(nn, op.class_name) for op in _OPS.values())
    calls = graph_module.graph.find_nodes(op="call_module")
    modules = {str(node.target): graph_module.get_submodule(str(node.target)) for node in calls}
    return {path: module for path, module in modules.items() if isinstance(module, classes)}


def find_module(graph_module: GraphModule, node: Node, op: QuantizableOp) -> tuple[str, nn.Module]:
    """The dotted path and a stand-in of the module that ``node`` was traced from.

    The stand-in has the class of the module (exported graphs know only its name), so that compressed-tensors can
    match it. Where the class is not the op's own, as with a functional call in a module written by hand, it
    answers to the op's class as well.
    """
    stack = node.meta.get("nn_module_stack") or {}
    innermost: tuple[str, type | str] = next(reversed(stack.values()), ("", type(graph_module)))
    path, module_class = innermost
    path = re.sub(r"@\d+", "", path)  # torch.export numbers the calls of a module that is called again
    return path, _make_stand_in(module_class, op.class_name)


@functools.cache
def _make_stand_in(module_class: type | str, op_class_name: str) -> nn.Module:
    op_class = getattr(nn, op_class_name)
    resolved = _resolve_class(module_class) if isinstance(module_class, str) else module_class
    if not issubclass(resolved, op_class):
        resolved = type(resolved.__name__, (resolved, op_class), {})
    return object.__new__(resolved)


def _resolve_class(qualified_name: str) -> type:
    module_name, _, name = qualified_name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError):
        found = None  # a class made inside a function, or in a module that is gone
    return found if isinstance(found, type) and issubclass(found, nn.Module) else type(name, (nn.Module,), {})
