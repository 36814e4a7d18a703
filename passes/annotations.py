"""A quantizer of torchao's and a graph to reads: which values it annotates, and which of them share their qparams."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn
from torch.fx import GraphModule, Node

from fxmse.config import LEFT_IN_FLOAT_KEY, NothingMatchedError
from fxmse.passes.op_names import get_op_name
from fxmse.passes.open_regions import list_open_graphs
from fxmse.passes.operation import Argument, Operand, Operation
from fxmse.passes.quantizable_ops import find_operations
from fxmse.passes.reads import Read, Request, make_read
from fxmse.passes.stand_ins import find_module
from fxmse.passes.versions import Versions

if TYPE_CHECKING:
    from torchao.quantization.pt2e.quantizer import Quantizer

__all__ = ["AnnotatedReads", "find_annotated_reads"]

_DTYPES = (torch.int8, torch.uint8)
_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
_PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_symmetric)
_QSCHEMES = (*_SYMMETRIC, *_PER_CHANNEL, torch.per_tensor_affine)
# The dimension of a weight's channels, by its view's layout.
_CHANNELS = {"rows": 0, "convolution": 0, "columns": 1, "transposed_convolution": 1}


class AnnotatedReads(NamedTuple):
    """What a quantizer wants quantized.

    Attributes:
        reads: in the graph's order.
        joined: values that share their qparams.
    """

    reads: list[Read]
    joined: list[list[Node]]


@dataclass(frozen=True)
class _Edge(Argument):
    """Wherever a node reads a value: in a list of arguments, too."""

    value: Node

    def get(self, node: Node) -> Node:
        """The value."""
        return self.value

    def set(self, node: Node, value: Node) -> None:
        """Has the node read another value instead."""
        node.replace_input_with(self.value, value)


class _Observation(NamedTuple):
    """What PT2E has put into a graph: an observer, the value that it sees, and the nodes that read it behind it."""

    observer: nn.Module
    value: Node
    readers: list[Node]
    is_requantized: bool


def find_annotated_reads(graph_module: GraphModule, quantizer: "Quantizer") -> AnnotatedReads:
    """What ``quantizer`` annotates, in its own words: PT2E puts its observers in, and they are taken out again.

    So shared and implicitly shared specs mean here what they mean to ``prepare_pt2e``, which transforms the graph for
    the quantizer and folds batch norms, too. Specs of int8 and uint8 have compressed-tensors' int8: zero points moved
    by 128, and -128 in a range that ends at -127. The observer is the one that
    :func:`fxmse.pt2e.use_observer` put into the spec, otherwise fxmse's default.

    What is annotated but stays float is said in one warning, and kept in the graph's ``meta``.

    Raises:
        NothingMatchedError: nothing is annotated that can be quantized.
        ValueError: a quantizer that makes another graph of this one.
    """
    observations = _annotate(graph_module, quantizer)
    left_in_float = list(_list_hidden(graph_module))
    versions = Versions(graph_module)
    operations = find_operations(graph_module, versions)
    order = {node: place for place, node in enumerate(graph_module.graph.nodes)}
    reads: list[Read] = []
    by_observer: dict[nn.Module, list[Node]] = {}
    for observation in observations:
        try:
            args = _make_args(observation)
            found = [
                make_read(graph_module, versions, *_make_request(graph_module, operations, observation, reader, args))
                for reader in observation.readers
            ]
        except ValueError as error:
            left_in_float.append((observation.value.name, str(error)))
            continue
        reads += found
        if not args.dynamic:
            by_observer.setdefault(observation.observer, []).append(observation.value)
    left = "; ".join(f"{name} ({reason})" for name, reason in left_in_float)
    if not reads:
        annotated = f"nothing that can be quantized: {left}" if left else "nothing"
        raise NothingMatchedError(
            f"{type(quantizer).__name__} annotates {annotated}: expected a quantizer with a configuration (set_global) "
            "for ops of an exported program"
        )
    if left:
        warnings.warn(f"left in float: {left}", UserWarning, stacklevel=2)
    graph_module.meta[LEFT_IN_FLOAT_KEY] = left_in_float
    return AnnotatedReads(sorted(reads, key=lambda read: order[read.reader]), list(by_observer.values()))


def _list_hidden(graph_module: GraphModule) -> Iterator[tuple[str, str]]:
    """What a quantizer does not look at."""
    for graph in list_open_graphs(graph_module):
        for operation in find_operations(graph, Versions(graph)) if graph is not graph_module else ():
            if operation.has_weight:
                yield operation.path or operation.node.name, "in a branch or loop, which quantizers do not annotate"


def _annotate(graph_module: GraphModule, quantizer: "Quantizer") -> list[_Observation]:
    """Has PT2E put its observers in, takes them out, and says which those were."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    graph = graph_module.graph
    before = {name for name, _ in graph_module.named_modules(remove_duplicate=False)}
    prepared = prepare_pt2e(graph_module, quantizer)
    if prepared.graph is not graph:
        raise ValueError(
            f"{type(quantizer).__name__}.transform_for_annotation returns another graph: expected it to change the one "
            "that it is given, or none"
        )
    graph.owning_module = graph_module
    inserted = [node for node in graph.find_nodes(op="call_module") if node.target not in before]
    observers = {node: graph_module.get_submodule(str(node.target)) for node in inserted}
    found = []
    for node, observer in observers.items():
        value = node.all_input_nodes[0]
        source = value
        while source in observers:
            source = source.all_input_nodes[0]
        readers = [reader for reader in node.users if reader not in observers]
        found.append(_Observation(observer, source, readers, value is not source))
    for node in reversed(observers):
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)
    for node in observers:
        graph_module.delete_submodule(str(node.target))
    graph_module.recompile()
    return found


def _make_args(observation: _Observation) -> QuantizationArgs:
    """The format of a spec in compressed-tensors' words; raises ValueError for what has none."""
    from torchao.quantization.pt2e.observer import UniformQuantizationObserverBase

    observer: Any = observation.observer
    if observation.is_requantized:
        raise ValueError("it is quantized by another spec already")
    is_dynamic = bool(getattr(observer, "is_dynamic", False))
    dtype, qscheme = getattr(observer, "dtype", None), getattr(observer, "qscheme", None)
    is_searched = isinstance(observer, UniformQuantizationObserverBase)
    if not (is_searched or is_dynamic) or dtype not in _DTYPES or qscheme not in _QSCHEMES:
        raise ValueError(f"{type(observer).__name__} of {dtype}: expected int8 or uint8 with scales to be found")
    limits = torch.iinfo(observer.dtype)
    low = limits.min if observer.quant_min is None else observer.quant_min
    high = limits.max if observer.quant_max is None else observer.quant_max
    # Of PT2EObserver, which is on a floor below.
    name, kwargs = getattr(observer, "requested", (None, None))
    return QuantizationArgs(
        num_bits=(high - low).bit_length(),
        strategy="channel" if qscheme in _PER_CHANNEL else "tensor",
        symmetric=qscheme in _SYMMETRIC,
        dynamic=is_dynamic,
        observer=None if is_dynamic else name,
        observer_kwargs=kwargs or {},
    )


def _make_request(
    graph_module: GraphModule,
    operations: list[Operation],
    observation: _Observation,
    reader: Node,
    args: QuantizationArgs,
) -> tuple[Operation, Request]:
    """The weight of an operation, one of its operands, or, of any other node, a value that it reads."""
    value = observation.value
    for operation in operations:
        weight = operation.weight
        if weight and (weight.reader, weight.value) == (reader, value):
            axis = getattr(observation.observer, "ch_axis", None)
            if args.strategy == "channel" and axis != _CHANNELS[weight.view.layout]:
                raise ValueError(f"ch_axis={axis}: expected {_CHANNELS[weight.view.layout]}, the output channels")
            return operation, Request("weight", "", args, value, reader, weight.argument, weight)
        for operand in operation.operands:
            if operand.reader is reader and operand.argument.get(reader) is value:
                return operation, _read(operand, args, value)
    if reader.op == "output":
        operation = _make_operation(graph_module, value, ())
        return operation, Request("output", f"{value.name}_", args, value, reader, _Edge(0, "", value))
    place = reader.all_input_nodes.index(value)
    prefix = f"{reader.name}_{place}_" if place else f"{reader.name}_"
    operand = Operand("input", reader, _Edge(0, "", value), prefix, is_channels_last=False)
    return _make_operation(graph_module, reader, (operand,)), _read(operand, args, value)


def _read(operand: Operand, args: QuantizationArgs, value: Node) -> Request:
    return Request(
        operand.role,
        operand.prefix,
        args,
        value,
        operand.reader,
        operand.argument,
        is_channels_last=operand.is_channels_last,
    )


def _make_operation(graph_module: GraphModule, node: Node, operands: tuple[Operand, ...]) -> Operation:
    """Of a node that is quantized though it has no weight and is no product."""
    name = get_op_name(node)
    path, module = find_module(graph_module, node, name)
    return Operation(node, name, path, module, False, None, operands)
