"""Folds batch norms of evaluated graphs into the layers before them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxmse.capture.attributes import get_attribute, list_graphs, make_container
from fxmse.passes.base import GraphPass
from fxmse.passes.functionalize_modules import FunctionalizeModules, has_plain_call
from fxmse.passes.inline_regions import InlineRegions
from fxmse.passes.op_names import get_op_name
from fxmse.passes.operation import Argument, Operation
from fxmse.passes.quantizable_ops import find_operations
from fxmse.passes.versions import Versions, identify_memory

__all__ = ["FoldBatchNorm"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Signature:
    """Where a batch norm's arguments are; ``training`` is None for an op that never trains."""

    mean: Argument
    var: Argument
    weight: Argument
    bias: Argument
    training: Argument | None
    eps: Argument
    has_several_outputs: bool = False


def _make_signature(mean: int, weight: int, training: int | None, eps: int, *, is_tuple: bool = False) -> _Signature:
    return _Signature(
        Argument(mean, "running_mean"),
        Argument(mean + 1, "running_var"),
        Argument(weight, "weight"),
        Argument(weight + 1, "bias"),
        None if training is None else Argument(training, "training"),
        Argument(eps, "eps"),
        is_tuple,
    )


_ATEN = _make_signature(3, 1, 5, 7)
_NATIVE = _make_signature(3, 1, 5, 7, is_tuple=True)
_NO_TRAINING = _make_signature(3, 1, None, 6, is_tuple=True)
_NORMS: dict[Any, _Signature] = {
    F.batch_norm: _make_signature(1, 3, 5, 7),
    torch.batch_norm: _ATEN,
    aten.batch_norm.default: _ATEN,
    aten.native_batch_norm.default: _NATIVE,
    aten.cudnn_batch_norm.default: _NATIVE,
    aten._native_batch_norm_legit_no_training.default: _NO_TRAINING,
    aten._batch_norm_no_update.default: _NO_TRAINING,
}
# The modules, and how many dimensions each takes; BatchNorm1d takes two or three.
_MODULES: dict[type[nn.Module], int | None] = {nn.BatchNorm1d: None, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
_DEFAULT_EPS = 1e-5
_INPUT, _BIAS = Argument(0, "input"), Argument(2, "bias")


@dataclass(frozen=True)
class FoldBatchNorm(GraphPass):
    """Folds batch norms of evaluation mode into the convolutions and linears whose output they read.

    With gamma, beta and the statistics of the norm, w' = w gamma / sqrt(var + eps) for each output channel and
    b' = (b - mean) gamma / sqrt(var + eps) + beta. An int8 kernel takes a relu behind the layer along,
    but no norm. Rules:

    1. Regions come into the graph first (:class:`InlineRegions`), and calls of layers become functional
       (:class:`FunctionalizeModules`). Norms are modules of torch's own classes, without hooks, or calls. Those in
       branches and loops stay.
    2. The norm does not train, and its statistics, weight and bias are attributes that nothing writes.
    3. The norm alone reads the output of a Linear, Conv1d, 2d, 3d or ConvTranspose1d, 2d, 3d, whose weight and bias are
       attributes that nothing writes and nothing else reads: not those of a layer that is called again, nor tied ones.
    4. The norm's channels are the layer's: the layer's output has two dimensions (Linear), or a batch dimension.
       Exported graphs know that, and so does a BatchNorm2d or 3d; of a traced BatchNorm1d or F.batch_norm it is known
       once ``torch.fx.passes.shape_prop.ShapeProp`` ran.
    5. The new weight and bias are parameters of the graph under the old names, in the old dtype, computed in float64.
       Tensors of the model are not written. A layer without bias gets one, called after the layer.

    A norm that does not meet the rules stays, and the graph computes what it did.
    """

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Applies the rules."""
        # Rule 1.
        modified = InlineRegions()(graph_module).modified
        modified |= FunctionalizeModules()(graph_module).modified
        norms = [node for node in graph_module.graph.nodes if _is_norm(graph_module, node)]
        if not norms:
            return modified
        constants = _Constants(graph_module)
        operations = find_operations(graph_module, constants.versions)
        layers = {operation.node: operation for operation in operations if _has_bias_argument(operation)}
        for node in norms:
            operation = layers.get(_get_input(node))
            norm = _find_norm(graph_module, constants, node)
            if operation and norm and _is_foldable(graph_module, constants, operation, node):
                _fold(graph_module, operation, norm)
                _erase(operation.node, node)
                modified = True
        return modified


class _Constants:
    """Which attributes of a graph nothing writes, and how many nodes read each."""

    def __init__(self, graph_module: GraphModule) -> None:
        self._graph_module = graph_module
        self.versions = Versions(graph_module)
        self._written: set[object] = set()
        self._num_readers: Counter[object] = Counter()
        for graph in list_graphs(graph_module):
            for node in graph.graph.nodes:
                for tensor in _list_tensors(graph, node):
                    self._num_readers[identify_memory(tensor)] += len(node.users) if node.op == "get_attr" else 1
        for node in graph_module.graph.find_nodes(op="get_attr"):
            if self.versions.is_written(node):
                self._written.update(map(identify_memory, _list_tensors(graph_module, node)))

    def is_constant(self, value: object) -> bool:
        """Whether ``value`` is None or a tensor, or a node that reads one, which nothing writes."""
        if isinstance(value, Node):
            value = get_attribute(self._graph_module, str(value.target)) if value.op == "get_attr" else value
        return value is None or (isinstance(value, Tensor) and identify_memory(value) not in self._written)

    def is_own(self, value: object) -> bool:
        """Whether ``value`` is None or a node that reads a constant which one node reads."""
        if not self.is_constant(value) or not isinstance(value, Node):
            return value is None
        memory = identify_memory(get_attribute(self._graph_module, str(value.target)))
        return self._num_readers[memory] <= 1  # 0: a parameter that this pass has made


def _list_tensors(graph_module: GraphModule, node: Node) -> Iterator[Tensor]:
    """What a node reads of the graph's attributes."""
    if node.op == "get_attr" and isinstance(value := get_attribute(graph_module, str(node.target)), Tensor):
        yield value
    elif node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        yield from module.parameters()
        yield from module.buffers()


def _is_norm(graph_module: GraphModule, node: Node) -> bool:
    if node.op != "call_module":
        return node.op == "call_function" and node.target in _NORMS
    module = graph_module.get_submodule(str(node.target))
    return type(module) in _MODULES and has_plain_call(module)


def _get_input(node: Node) -> Any:
    return _INPUT.get(node)


def _has_bias_argument(operation: Operation) -> bool:
    return operation.class_name != "Linear" or operation.node.target in (F.linear, aten.linear.default)


@dataclass(frozen=True)
class _Norm:
    """What a norm does to a channel: tensors of shape (channels,), or None."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def _find_norm(graph_module: GraphModule, constants: _Constants, node: Node) -> _Norm | None:
    """Rule 2."""
    values: tuple[Any, ...]
    if node.op == "call_module":
        module: Any = graph_module.get_submodule(str(node.target))
        values = (module.running_mean, module.running_var, module.weight, module.bias)
        is_training, eps = module.training, module.eps
    else:
        signature = _NORMS[node.target]
        places = (signature.mean, signature.var, signature.weight, signature.bias)
        values = tuple(place.get(node) for place in places)
        is_training = signature.training is not None and signature.training.get(node)
        eps = signature.eps.get(node)
        if signature.has_several_outputs and not all(_takes_first(user) for user in node.users):
            return None
    if is_training or values[0] is None or values[1] is None or not all(map(constants.is_constant, values)):
        return None
    mean, var, weight, bias = (
        get_attribute(graph_module, str(value.target)) if isinstance(value, Node) else value for value in values
    )
    return _Norm(mean, var, weight, bias, _DEFAULT_EPS if eps is None else eps)


def _takes_first(user: Node) -> bool:
    return not user.users or (get_op_name(user) == "getitem" and bool(user.args[1] == 0))


def _is_foldable(graph_module: GraphModule, constants: _Constants, operation: Operation, norm: Node) -> bool:
    """Rules 3 and 4."""
    layer, weight = operation.node, operation.weight
    if len(layer.users) != 1 or weight is None or weight.reader is not layer or weight.is_observed:
        return False
    if not constants.is_own(weight.value) or not constants.is_own(_BIAS.get(layer)):
        return False
    num_dims = 2 if operation.class_name == "Linear" else int(operation.class_name[-2]) + 2
    return _find_num_dims(graph_module, layer, norm) == num_dims


def _find_num_dims(graph_module: GraphModule, layer: Node, norm: Node) -> int | None:
    """How many dimensions a layer's output has; None where that is not known."""
    for key in ("val", "tensor_meta", "example_value"):
        if (value := layer.meta.get(key)) is not None:
            return len(value.shape)
    return _MODULES[type(graph_module.get_submodule(str(norm.target)))] if norm.op == "call_module" else None


@torch.no_grad()
def _fold(graph_module: GraphModule, operation: Operation, norm: _Norm) -> None:
    """Rule 5."""
    layer, weight = operation.node, operation.weight
    assert weight is not None
    path, _, name = str(weight.value.target).rpartition(".")
    container = make_container(graph_module, path)
    old = getattr(container, name)
    factor = (norm.var.double() + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight.double()
    rows = weight.view.apply(old.double()) * factor[:, None]
    _set_parameter(container, name, weight.view.revert(rows).to(old.dtype), old)

    bias_node = _BIAS.get(layer)
    if bias_node is None:
        target = f"{path}.{_find_free_name(container, name)}".lstrip(".")
        old_bias = old.new_zeros(len(factor))
    else:
        target = str(bias_node.target)
        old_bias = get_attribute(graph_module, target)
    bias = (old_bias.double() - norm.mean.double()) * factor
    bias = bias if norm.bias is None else bias + norm.bias.double()
    bias_path, _, bias_name = target.rpartition(".")
    _set_parameter(make_container(graph_module, bias_path), bias_name, bias.to(old_bias.dtype), old)
    if bias_node is None:
        with layer.graph.inserting_before(layer):
            _BIAS.set(layer, layer.graph.get_attr(target))


def _find_free_name(container: nn.Module, weight: str) -> str:
    """``bias`` beside ``weight``, or, where that is something else, one that is told by the weight's name."""
    name = "bias"
    while getattr(container, name, None) is not None:
        name = f"{weight}_{name}"
    return name


def _set_parameter(container: nn.Module, name: str, value: Tensor, old: Tensor) -> None:
    """Has ``container`` hold a new parameter in place of whatever it called so."""
    if hasattr(container, name):
        delattr(container, name)
    container.register_parameter(name, nn.Parameter(value.contiguous(), requires_grad=old.requires_grad))


def _erase(layer: Node, norm: Node) -> None:
    """Has what read the norm read the layer."""
    norms = [norm]
    if norm.op == "call_function" and _NORMS[norm.target].has_several_outputs:
        norms = [*norm.users, norm]
    for node in norms:
        # The node of several outputs itself has no users any more.
        node.replace_all_uses_with(layer)
        layer.graph.erase_node(node)
