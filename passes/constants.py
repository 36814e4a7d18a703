"""Values of a graph that follow from its parameters alone: views, pieces and combinations of them."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxmse.capture.attributes import find_owner, get_attribute
from fxmse.passes.op_names import get_op_name
from fxmse.passes.probe import Probe, find_probe, find_probes
from fxmse.passes.versions import Versions, may_share_memory

__all__ = [
    "describe",
    "evaluate",
    "find_free_weights",
    "find_sources",
    "find_weights",
    "is_moved",
    "list_attributes",
    "measure_shape",
]

_COPIES = frozenset({"clone", "repeat", "repeat_interleave", "tile", "_to_copy", "flip", "roll", "stack", "cat"})
_RANDOM = re.compile(r"(rand|(alpha_|feature_|native_)*dropout).*|(bernoulli|multinomial|normal|poisson|rrelu)_?")


def find_sources(graph_module: GraphModule, versions: Versions, value: object) -> list[Node] | None:
    """The attributes that ``value`` is computed of; None where it depends on anything else.

    That is an input, random numbers, memory that the graph writes, or a call of a module.
    """
    if not isinstance(value, Node):
        return []
    found: dict[Node, None] = {}
    waiting, seen = [value], set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "get_attr" and isinstance(get_attribute(graph_module, str(node.target)), Tensor):
            if versions.is_written(node):
                return None
            found[node] = None
        elif _is_pure(graph_module, node):
            waiting += node.all_input_nodes
        else:
            return None
    return list(found)


def list_attributes(value: Node) -> list[Node]:
    """The attributes behind a value that :func:`is_moved`."""
    return (
        [value] if value.op == "get_attr" else [n for source in value.all_input_nodes for n in list_attributes(source)]
    )


def is_moved(value: Node) -> bool:
    """Whether nothing but views and copies are on the way from attributes to ``value``."""
    if value.op == "get_attr":
        return True
    name = get_op_name(value)
    return (name in _COPIES or may_share_memory(name)) and all(map(is_moved, value.all_input_nodes))


def describe(graph_module: GraphModule, value: Node) -> str:
    """What a value is computed of and how, in words that are equal for equal computations.

    A view of one attribute is what it shows: its place, shape and strides, however it was made.
    """
    if is_moved(value) and (view := _find_view(graph_module, value)):
        return view
    inputs = [f"({describe(graph_module, node)})" for node in value.all_input_nodes]
    rest = map_arg((value.args, value.kwargs), lambda _: None)
    return f"{value.target} {rest} {' '.join(inputs)}"


def _find_view(graph_module: GraphModule, value: Node) -> str | None:
    """Which memory of an attribute ``value`` shows; None where it has memory of its own."""
    targets = {str(node.target) for node in list_attributes(value)}
    tensors = [get_attribute(graph_module, target) for target in targets]
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
        return None
    source = tensors[0]
    base = _forget(source)
    shown = _evaluate(graph_module, value, lambda _: base, {})
    if shown.untyped_storage()._cdata != base.untyped_storage()._cdata:
        return None
    start = shown.storage_offset() * source.element_size()
    # Tensors without storage (meta) are told apart by identity.
    place = source.data_ptr() + start if source.data_ptr() else f"{id(source)}+{start}"
    return f"{place} {source.device} {source.dtype} {tuple(shown.shape)} {shown.stride()}"


def _is_pure(graph_module: GraphModule, node: Node) -> bool:
    if find_probe(graph_module, node):
        return True
    if node.op == "call_method":
        return not _RANDOM.fullmatch(str(node.target)) and not str(node.target).endswith("_")
    if node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        is_random = torch.Tag.nondeterministic_seeded in node.target.tags
        # What is detached in place is a copy, if it is not the attribute itself.
        is_detached_copy = node.target is torch.ops.aten.detach_.default and node.all_input_nodes[0].op != "get_attr"
        return not is_random and (is_detached_copy or not node.target._schema.is_mutable)
    name = get_op_name(node)
    return not _RANDOM.fullmatch(name) and (not name.endswith("_") or name.endswith("__"))


def evaluate(graph_module: GraphModule, node: Node) -> Any:
    """What ``node`` gives, of which :func:`find_sources` finds the sources."""
    return _evaluate(graph_module, node, lambda tensor: tensor, {})


def measure_shape(graph_module: GraphModule, node: Node) -> Tensor:
    """A tensor without data that has the shape and dtype that ``node`` gives."""
    return _evaluate(graph_module, node, _forget, {})


def _forget(tensor: Tensor) -> Tensor:
    empty = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _evaluate(graph_module: GraphModule, node: Node, load: Callable[[Tensor], Tensor], known: dict[Node, Any]) -> Any:
    if node in known:
        return known[node]
    if node.op == "get_attr":
        known[node] = load(get_attribute(graph_module, str(node.target)))
        return known[node]

    def evaluate_input(source: Node) -> Any:
        return _evaluate(graph_module, source, load, known)

    args, kwargs = map_arg(node.args, evaluate_input), map_arg(node.kwargs, evaluate_input)
    if node.op == "call_module":  # a probe, which passes its argument on
        known[node] = args[0]
    elif node.op == "call_method":
        known[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known[node]


def find_weights(graph_module: GraphModule) -> dict[Probe, Tensor]:
    """The rows that each weight's probe looks at."""
    weights = {}
    for node, probe in find_probes(graph_module):
        if probe.view:
            assert isinstance(node.args[0], Node)
            weights[probe] = evaluate(find_owner(node), node.args[0])
    return weights


def find_free_weights(graph_module: GraphModule) -> dict[Probe, Tensor]:
    """Of :func:`find_weights`, those that are searched as they are, whatever the data."""
    weights = find_weights(graph_module)
    return {p: rows for p, rows in weights.items() if p.given is None and not p.waits_for_inputs}
