"""The modules that nodes were traced from, as compressed-tensors' matching wants to see them."""

import functools
import re
import sys

from torch import nn
from torch.fx import GraphModule, Node

__all__ = ["find_call", "find_module", "list_modules", "make_stand_in"]


def find_call(node: Node) -> str:
    """The module call that ``node`` belongs to; torch.export numbers the calls of a module that is called again."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()), ("", ""))[0]


def find_module(
    graph_module: GraphModule, node: Node, class_name: str, parameter: str | None = None
) -> tuple[str, nn.Module]:
    """The dotted path and a stand-in of the module that ``node`` was traced from.

    The stand-in has the class of the module (exported graphs know only its name), so that compressed-tensors can
    match it. Where the class is not the op's own, as with a functional call in a module written by hand, it
    answers to the op's class as well. A module that calls an op with the parameter of a module inside it is taken for
    that one.

    Args:
        graph_module: the graph.
        node: the node.
        class_name: the op's class.
        parameter: the dotted path of its weight.
    """
    stack = node.meta.get("nn_module_stack") or {}
    innermost: tuple[str, type | str] = next(reversed(stack.values()), ("", type(graph_module)))
    path, module_class = innermost
    path = re.sub(r"@\d+", "", path)
    owner = parameter.rpartition(".")[0] if parameter else path
    if owner != path and f"{owner}.".startswith(f"{path}." if path else ""):
        return owner, make_stand_in(class_name, class_name)
    return path, make_stand_in(module_class, class_name)


def list_modules(graph_module: GraphModule) -> dict[str, nn.Module]:
    """Stand-ins of the modules that nodes were traced from, by their dotted paths."""
    calls = dict(
        call for node in graph_module.graph.nodes for call in (node.meta.get("nn_module_stack") or {}).values()
    )
    return {re.sub(r"@\d+", "", path): make_stand_in(module_class, "Module") for path, module_class in calls.items()}


@functools.cache
def make_stand_in(module_class: type | str, op_class_name: str) -> nn.Module:
    """A module of a class, or one of that name, that answers to the op's class as well."""
    op_class = getattr(nn, op_class_name, None) or type(op_class_name, (nn.Module,), {})
    resolved = _resolve_class(module_class) if isinstance(module_class, str) else module_class
    if not issubclass(resolved, op_class):
        resolved = type(resolved.__name__, (resolved, op_class), {})
    return object.__new__(resolved)


def _resolve_class(qualified_name: str) -> type:
    """The class, where its module is imported already: a program may name any, and importing would run it."""
    module_name, _, name = qualified_name.rpartition(".")
    # Not by getattr, for which some modules import others.
    found = vars(sys.modules[module_name]).get(name) if module_name in sys.modules else None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else type(name, (nn.Module,), {})
