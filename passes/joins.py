"""Ops that join several values, which some runtimes can run only in one scale."""

import operator
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

__all__ = ["JOINS", "find_joined_values"]

aten = torch.ops.aten

JOINS = {
    "cat": (torch.cat, torch.concat, torch.concatenate, aten.cat.default),
    "add": (operator.add, operator.iadd, torch.add, aten.add.Tensor, aten.add_.Tensor, "add", "add_"),
}
"""The targets of each op, by the name that options call it."""


def find_joined_values(graph_module: GraphModule, names: tuple[str, ...]) -> Iterator[list[Node]]:
    """The inputs and the output of each node that is one of the ops called ``names``, in the graph's order."""
    targets = [target for name in names for target in JOINS[name]]
    for node in graph_module.graph.nodes:
        if node.op in ("call_function", "call_method") and node.target in targets:
            yield [*node.all_input_nodes, node]
