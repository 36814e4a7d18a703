"""Graphs as short text that does not change with paths, symbols or pytrees."""

import torch
from torch.fx import GraphModule, Node


def print_graph(graph_module: GraphModule) -> str:
    """One line a node; parameters and buffers are written where they are read."""
    lines = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            lines.append(f"{node.name} = input")
        elif node.op in ("call_function", "call_method", "call_module") and node.target != "_guards_fn":
            lines.append(f"{node.name} = {_name(node)}({_print_arguments(node)})")
        elif node.op == "output":
            lines.append(f"return {_print(node.args[0])}")
    return "\n".join(lines)


def _name(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.replace("::", ".")
    if node.op == "call_function":
        return node.target.__name__
    return f"self.{node.target}" if node.op == "call_module" else f".{node.target}"


def _print_arguments(node: Node) -> str:
    positional = [_print(argument) for argument in node.args]
    return ", ".join([*positional, *(f"{name}={_print(value)}" for name, value in node.kwargs.items())])


def _print(argument: object) -> str:
    if isinstance(argument, Node):
        return f"self.{argument.target}" if argument.op == "get_attr" else argument.name
    if isinstance(argument, tuple | list):
        return "[" + ", ".join(_print(item) for item in argument) + "]"
    return str(argument)
