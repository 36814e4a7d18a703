"""Which version of a value a node reads: graphs may write values in place, between one reader and the next."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from fxmse.capture.attributes import find_regions, get_attribute
from fxmse.passes.op_names import get_op_name
from fxmse.passes.probe import Probe

__all__ = ["Versions", "identify_memory", "list_operands", "list_written", "may_share_memory"]

# What may give back its argument itself, though no schema says so.
_PASS_ON = frozenset(
    {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout"}
    | {"type", "type_as", "float", "half", "bfloat16", "double", "cuda", "requires_grad_", "_unsafe_view", "einsum"}
    | {"atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "meshgrid", "getitem", "getattr", "identity"}
)
_PASSING_MODULES = (nn.Identity, nn.modules.dropout._DropoutNd, nn.Flatten, nn.Unflatten, nn.ChannelShuffle, Probe)
# Python's names for x += y and x[i] = y.
_WRITING_OPERATORS = frozenset({"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "imatmul", "ipow"})
# What changes how a tensor is differentiated, but no value of it; an exported ``torch.tensor(...)`` is detached so.
_WRITING_NO_VALUES = frozenset({"detach_", "requires_grad_"})
_KNOWN_PACKAGES = ("torch", "operator", "_operator", "builtins", "math")


class Versions:
    """How often the memory of each of a graph's values is written, and where.

    Two nodes that read one value with a write between them read two values. What is written and what shares memory is
    what the ops' schemas say (their alias annotations); of calls without a schema it is what names and ``inplace``
    arguments say, and functions and modules that nothing is known of may give back whatever they are given. Taking two
    values for different that are the same costs an observer; the other way round would cost the result.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self._places = {node: place for place, node in enumerate(graph_module.graph.nodes)}
        self._memory: dict[Node, frozenset[object]] = {}
        self._writes: list[tuple[int, frozenset[object]]] = []
        for node, place in self._places.items():
            written, passed_on = _find_effects(graph_module, node)
            shared = (self._memory.get(source, frozenset()) for source in (*written, *passed_on))
            own = _identify_memory(graph_module, node) if node.op == "get_attr" else node
            self._memory[node] = frozenset({own}).union(*shared)
            if written:
                self._writes.append((place, frozenset().union(*(self._memory.get(node, ()) for node in written))))
        self._nodes = list(self._places)

    def find(self, value: Node, reader: Node) -> int:
        """The version of ``value`` that ``reader`` reads: equal for readers without a write to it between them."""
        end, memory = self._places[reader], self._memory[value]
        return sum(place < end and not memory.isdisjoint(written) for place, written in self._writes)

    def find_writers(self, values: Iterable[Node]) -> list[Node]:
        """The nodes that write the memory of any of ``values``."""
        memory = frozenset().union(*(self._memory[value] for value in values))
        return [self._nodes[place] for place, written in self._writes if not memory.isdisjoint(written)]

    def list_written(self) -> list[list[Node]]:
        """For each write the nodes whose value is in the memory that is written."""
        written = dict.fromkeys(memory for _, memory in self._writes)
        return [[node for node in self._nodes if not self._memory[node].isdisjoint(memory)] for memory in written]

    def is_written(self, value: Node) -> bool:
        """Whether anything writes the memory of ``value``."""
        return any(not self._memory[value].isdisjoint(written) for _, written in self._writes)

    def share_memory(self, one: Node, other: Node) -> bool:
        """Whether two values may share memory."""
        return not self._memory[one].isdisjoint(self._memory[other])


def list_written(graph_module: GraphModule, node: Node) -> list[Node]:
    """The inputs that a node writes in place."""
    return _find_effects(graph_module, node)[0]


def _identify_memory(graph_module: GraphModule, node: Node) -> object:
    """The memory behind an attribute, which may have several names and views."""
    value = get_attribute(graph_module, str(node.target))
    return identify_memory(value) if isinstance(value, Tensor) else node.target


def identify_memory(tensor: Tensor) -> object:
    """What is equal for tensors that share memory, and for no others."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):  # as of tensor subclasses without storage
        return id(tensor)


def _find_effects(graph_module: GraphModule, node: Node) -> tuple[list[Node], list[Node]]:
    """The inputs that a node writes in place, and those whose memory its output may share."""
    if node.op == "call_module":
        return _find_effects_of_module(graph_module.get_submodule(str(node.target)), node)
    if node.op not in ("call_function", "call_method"):
        return [], []
    if isinstance(node.target, torch._ops.OpOverload):
        return _find_effects_by_schema(node.target._schema, node)
    if isinstance(node.target, torch._ops.HigherOrderOperator) or any(find_regions(graph_module, node)):
        return _find_effects_of_regions(graph_module, node), node.all_input_nodes
    return _find_effects_by_name(node)


def _find_effects_by_schema(schema: torch.FunctionSchema, node: Node) -> tuple[list[Node], list[Node]]:
    written, passed_on = [], []
    for place, argument in enumerate(schema.arguments):
        value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        sources = _list_nodes(value)
        if argument.alias_info is None:
            passed_on += sources if _passes_on(schema.name.rpartition("::")[2], sources) else []
        elif argument.alias_info.is_write and schema.name.rpartition("::")[2] not in _WRITING_NO_VALUES:
            written += sources
        else:
            passed_on += sources
    return written, passed_on


def _find_effects_by_name(node: Node) -> tuple[list[Node], list[Node]]:
    name = get_op_name(node)
    first = _list_nodes(node.args[0] if node.args else node.kwargs.get("input"))
    written = first if _is_in_place(name) or _get_inplace_argument(node) else []
    written = written + _list_nodes(node.kwargs.get("out"))
    if not isinstance(node.target, str) and not _is_known(node.target):
        return written, node.all_input_nodes
    if name in _PASS_ON:  # some take several values and give back each
        return written, node.all_input_nodes if _passes_on(name, node.all_input_nodes) else []
    return written, first if may_share_memory(name) else []


def _passes_on(name: str, sources: list[Node]) -> bool:
    """Whether what no schema knows of gives back an argument: of an einsum a permuted one, but no product."""
    return name in _PASS_ON if name != "einsum" else len(sources) == 1


def may_share_memory(name: str) -> bool:
    """Whether an op called so, in aten or in torch, may give back memory of its argument."""
    return name in _PASS_ON or name in _WRITING_NO_VALUES or name in _list_views()


def _is_in_place(name: str) -> bool:
    is_named_so = name.endswith("_") and not name.endswith("__") and name not in _WRITING_NO_VALUES
    return name in _WRITING_OPERATORS or is_named_so


def _get_inplace_argument(node: Node) -> bool:
    """Whether a function such as F.relu is called with ``inplace=True``."""
    if node.kwargs.get("inplace"):
        return True
    if isinstance(node.target, str) or not node.args:
        return False
    place = _find_inplace_parameter(node.target)
    return place is not None and place < len(node.args) and bool(node.args[place])


@functools.cache
def _find_inplace_parameter(function: Callable[..., Any]) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def _is_known(function: Callable[..., Any]) -> bool:
    package = (getattr(function, "__module__", None) or "torch").partition(".")[0]
    return package in _KNOWN_PACKAGES


@functools.cache
def _list_views() -> frozenset[str]:
    """The names of all aten ops that may give back memory of an argument."""
    return frozenset(
        schema.name.partition("::")[2]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("aten::")
        and any(returned.alias_info and not returned.alias_info.is_write for returned in schema.returns)
    )


def _find_effects_of_module(module: nn.Module, node: Node) -> tuple[list[Node], list[Node]]:
    inputs = node.all_input_nodes
    written = inputs[:1] if getattr(module, "inplace", False) else []
    is_known = type(module).__module__.startswith("torch.nn.") and not isinstance(module, _PASSING_MODULES)
    return written, [] if is_known else inputs


def _find_effects_of_regions(graph_module: GraphModule, node: Node) -> list[Node]:
    """The operands of a region's node (cond, while_loop, no_grad, ...) that the graphs in it write."""
    written = []
    for region in find_regions(graph_module, node):
        inner = Versions(region)
        placeholders = region.graph.find_nodes(op="placeholder")
        operands = list_operands(node)
        # Operands are passed in order; of a loop that carries more than its condition reads, to all the same.
        for placeholder, operand in zip(placeholders, operands[-len(placeholders) :], strict=False):
            if inner.is_written(placeholder):
                written.append(operand)
    return written


def list_operands(node: Node) -> list[Node]:
    """The nodes among a node's arguments, in order; of a region's the operands come last."""
    return [leaf for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, Node)]


def _list_nodes(value: object) -> list[Node]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Node)]
