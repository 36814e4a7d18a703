"""Biases that make up for what the quantization of weights moves the means of outputs by."""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxmse.capture.attributes import find_owner, get_attribute, list_graphs, make_container, replace_parameter
from fxmse.config import FLOAT_BIASES_KEY
from fxmse.observers.arrangements import Patches
from fxmse.observers.inputs import Mean
from fxmse.passes.arranging import find_arrangement
from fxmse.passes.constants import evaluate
from fxmse.passes.operation import Operation
from fxmse.passes.versions import Versions, identify_memory

__all__ = ["BiasedOp", "correct_biases", "insert_means"]


@dataclass(frozen=True)
class BiasedOp:
    """An op whose weight is quantized.

    Attributes:
        graph_module: where it is.
        operation: the op.
        weight: the name of its weight's probe.
        mask: the graph's input that says which tokens count, if there is one.
    """

    graph_module: GraphModule
    operation: Operation
    weight: str
    mask: tuple[Node, ...]

    @property
    def bias(self) -> object:
        """What it reads as its bias."""
        return self.operation.bias.get(self.operation.node) if self.operation.bias else None


def insert_means(graph_module: GraphModule, ops: Iterable[BiasedOp]) -> None:
    """Puts a node on the input of each op whose bias can be corrected, which keeps the mean of its channels.

    Rules:

    1. The bias is a parameter that the op reads as it is, with an element for each of the weight's rows, and that
       nothing writes.
    2. All that reads it are ops of one weight: a layer, however often it is called. Each sees the layer's values.
    3. The op is a linear, an addmm without factors or a convolution, and in no branch or loop.

    A bias that does not meet the rules stays as it is; a warning names it.
    """
    biased = [op for op in ops if op.bias is not None]
    versions = Versions(graph_module)
    refused = {op: reason for op in biased if (reason := _find_fault(graph_module, versions, op))}
    # Rule 2.
    weights: defaultdict[object, set[str]] = defaultdict(set)
    fit = [op for op in biased if op not in refused]
    for op in fit:
        weights[_identify(op)].add(op.weight)
    known = {op.operation.node for op in fit}
    for graph in list_graphs(graph_module):
        for node in graph.graph.find_nodes(op="get_attr"):
            value = get_attribute(graph, str(node.target))
            if isinstance(value, torch.Tensor) and any(user not in known for user in node.users):
                weights[identify_memory(value)].add("")
    refused |= {op: "others read it, too" for op in fit if len(weights[_identify(op)]) > 1}
    if refused:
        names = dict.fromkeys(f"{_name(op)} ({reason})" for op, reason in refused.items())
        warnings.warn(f"biases that stay as they are: {'; '.join(names)}", UserWarning, stacklevel=2)
    for op in fit:
        if op not in refused:
            _insert(op)


def _find_fault(graph_module: GraphModule, versions: Versions, op: BiasedOp) -> str | None:
    """Rules 1 and 3."""
    operation, bias, weight = op.operation, op.bias, op.operation.weight
    assert weight
    if op.graph_module is not graph_module:
        return "in a branch or loop"
    if not isinstance(bias, Node) or bias.op != "get_attr":
        return "computed"
    parameter = get_attribute(graph_module, str(bias.target))
    if not isinstance(parameter, nn.Parameter) or versions.is_written(bias):
        return "no parameter that stays as it is"
    is_scaled = any(operation.node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta"))
    if (
        weight.view.layout == "transposed_convolution"
        or is_scaled
        or operation.operands[0].reader is not operation.node
    ):
        return f"of {operation.class_name}, whose outputs' mean is not known"
    is_matrix = len(weight.view.shape) == 2 or weight.view.layout == "convolution"
    num_rows = weight.view.shape[-1 if weight.view.layout == "columns" else 0]
    return None if is_matrix and parameter.shape == (num_rows,) else "not an element for each row of the weight"


def _identify(op: BiasedOp) -> object:
    assert isinstance(op.bias, Node)
    return identify_memory(get_attribute(op.graph_module, str(op.bias.target)))


def _name(op: BiasedOp) -> str:
    is_attribute = isinstance(op.bias, Node) and op.bias.op == "get_attr"
    return str(op.bias.target) if is_attribute else f"that of {op.weight.removesuffix('_observer')}"  # type: ignore[attr-defined]


def _insert(op: BiasedOp) -> None:
    (operand, *_), node, bias = op.operation.operands, op.operation.node, op.bias
    assert isinstance(bias, Node)
    target = f"{op.weight.removesuffix('_observer')}_{Mean.suffix}"
    path, _, name = target.rpartition(".")
    container = make_container(op.graph_module, path)
    arrangement, _ = find_arrangement(op.operation, operand)
    if not hasattr(container, name):
        patches = arrangement if isinstance(arrangement, Patches) else None
        container.add_module(name, Mean(str(bias.target), op.weight, patches))
    value = operand.argument.get(node)
    with node.graph.inserting_before(node):
        mean = node.graph.call_module(target, (value, *(() if arrangement else op.mask)))
    mean.meta = dict(value.meta)
    operand.argument.set(node, mean)


def correct_biases(means: Iterable[tuple[Node, Mean]], weights: Mapping[str, Node]) -> None:
    """Gives graphs new parameters in place of biases, each once, under their names and in their dtypes.

    The biases themselves are kept in the graphs' ``meta``.

    Args:
        means: the nodes that :func:`insert_means` put in, which are in the graphs no more.
        weights: the fake-quantize node of each weight by the name that its probe had.
    """
    owners = {mean: weights[mean.weight] for _, mean in means}
    for mean, weight in owners.items():
        graph_module = find_owner(weight)
        assert isinstance(weight.args[0], Node)
        rows, quantized = evaluate(graph_module, weight.args[0]), evaluate(graph_module, weight)
        bias = get_attribute(graph_module, mean.bias)
        corrected = mean.correct(bias.detach(), rows.detach(), quantized.detach())
        graph_module.meta.setdefault(FLOAT_BIASES_KEY, {})[mean.bias] = bias
        replace_parameter(graph_module, mean.bias, nn.Parameter(corrected, requires_grad=bias.requires_grad))
