"""Folds batch norms of evaluated graphs into the layers before them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxmse.capture.attributes import find_owner, get_attribute, list_graphs, replace_parameter
from fxmse.passes.base import GraphPass
from fxmse.passes.close_regions import CloseRegions
from fxmse.passes.functionalize_modules import FunctionalizeModules, has_plain_call
from fxmse.passes.inline_regions import InlineRegions
from fxmse.passes.op_names import get_op_name
from fxmse.passes.open_regions import OpenRegions, is_passed_in, list_open_graphs
from fxmse.passes.operation import Argument, Operation, Weight
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


def _make_signature(
    mean: int, weight: int, training: int | None, eps: int, *, eps_name: str = "eps", is_tuple: bool = False
) -> _Signature:
    return _Signature(
        Argument(mean, "running_mean"),
        Argument(mean + 1, "running_var"),
        Argument(weight, "weight"),
        Argument(weight + 1, "bias"),
        None if training is None else Argument(training, "training"),
        Argument(eps, eps_name),
        is_tuple,
    )


_ATEN = _make_signature(3, 1, 5, 7)
_NATIVE = _make_signature(3, 1, 5, 7, is_tuple=True)
_CUDNN = _make_signature(3, 1, 5, 7, eps_name="epsilon", is_tuple=True)
_NO_TRAINING = _make_signature(3, 1, None, 6, is_tuple=True)
_NORMS: dict[Any, _Signature] = {
    F.batch_norm: _make_signature(1, 3, 5, 7),
    torch.batch_norm: _ATEN,
    aten.batch_norm.default: _ATEN,
    aten.native_batch_norm.default: _NATIVE,
    aten.cudnn_batch_norm.default: _CUDNN,
    aten._native_batch_norm_legit_no_training.default: _NO_TRAINING,
    aten._batch_norm_no_update.default: _NO_TRAINING,
}
# The modules, and how many dimensions each takes; BatchNorm1d takes two or three.
_MODULES: dict[type[nn.Module], int | None] = {nn.BatchNorm1d: None, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
_DEFAULT_EPS = 1e-5
_INPUT = Argument(0, "input")


@dataclass(frozen=True)
class _LayerSignature:
    """Where a layer's weight and bias are; an op that has no bias becomes ``biased``, which has one."""

    weight: Argument
    bias: Argument
    biased: Any = None

    def get_bias(self, node: Node) -> Any:
        return None if self.biased else self.bias.get(node)


_LAYER = _LayerSignature(Argument(1, "weight"), Argument(2, "bias"))
_ADDMM = _LayerSignature(Argument(2, "mat2"), Argument(0, "input"))
# A product like others unless its right factor is a weight: what decomposed graphs have for linears.
_PRODUCTS: dict[Any, _LayerSignature] = {
    torch.addmm: _ADDMM,
    aten.addmm.default: _ADDMM,
    torch.mm: _LayerSignature(Argument(1, "mat2"), _ADDMM.bias, torch.addmm),
    aten.mm.default: _LayerSignature(Argument(1, "mat2"), _ADDMM.bias, aten.addmm.default),
}
_TRANSPOSES = ("t", "transpose", "permute")


@dataclass(frozen=True)
class FoldBatchNorm(GraphPass):
    """Folds batch norms of evaluation mode into the convolutions and linears whose output they read.

    With gamma, beta and the statistics of the norm, w' = w gamma / sqrt(var + eps) for each output channel and
    b' = (b - mean) gamma / sqrt(var + eps) + beta. An int8 kernel takes a relu behind the layer along,
    but no norm. Rules:

    1. Regions come into the graph first (:class:`InlineRegions`), and calls of layers become functional
       (:class:`FunctionalizeModules`). Norms are modules of torch's own classes, without hooks, or calls. Branches and
       loops are graphs of their own (:class:`OpenRegions`), whose norms are folded into the layers in them.
    2. The norm does not train, and its statistics, weight and bias are attributes that nothing writes.
    3. The norm alone reads the output of a Linear, Conv1d, 2d, 3d or ConvTranspose1d, 2d, 3d, whose weight and bias are
       attributes that nothing writes and nothing else reads: not those of a layer that is called again, nor tied ones.
       A Linear may be an ``addmm`` or ``mm`` with a transposed parameter on the right.
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
        if not any(_is_norm(graph, node) for graph in list_graphs(graph_module) for node in graph.graph.nodes):
            return modified
        OpenRegions()(graph_module)
        try:
            constants = _Constants(graph_module)
            for graph in list_open_graphs(graph_module):
                modified |= _fold_norms(graph, constants)
        finally:
            CloseRegions()(graph_module)
        return modified


def _fold_norms(graph_module: GraphModule, constants: "_Constants") -> bool:
    """Applies the rules to one graph."""
    modified = False
    operations = find_operations(graph_module, Versions(graph_module))
    layers = {operation.node: operation for operation in operations}
    for node in [node for node in graph_module.graph.nodes if _is_norm(graph_module, node)]:
        operation = layers.get(_get_input(node))
        norm = _find_norm(graph_module, constants, node)
        if operation and norm and _is_foldable(graph_module, constants, operation, node):
            _fold(constants, operation, norm)
            _erase(operation.node, node)
            modified = True
    if modified:
        graph_module.recompile()
    return modified


class _Constants:
    """The attributes of a graph and those in it: which nothing writes, and how many nodes read each."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.graphs = list(list_graphs(graph_module))
        self._written: set[object] = set()
        self._num_readers: Counter[object] = Counter()
        for graph in self.graphs:
            versions = Versions(graph)
            for node in graph.graph.nodes:
                for tensor in _list_tensors(graph, node):
                    self._num_readers[identify_memory(tensor)] += _count_readers(node)
                    if node.op == "get_attr" and versions.is_written(node):
                        self._written.add(identify_memory(tensor))

    def is_constant(self, value: object) -> bool:
        """Whether ``value`` is None or a tensor, or a node that reads one, which nothing writes."""
        if isinstance(value, Node):
            value = _get_tensor(value) if value.op == "get_attr" else value
        return value is None or (isinstance(value, Tensor) and identify_memory(value) not in self._written)

    def is_own(self, value: object) -> bool:
        """Whether ``value`` is None or a node that reads a constant which one node reads."""
        if not self.is_constant(value) or not isinstance(value, Node):
            return value is None
        return self._num_readers[identify_memory(_get_tensor(value))] <= 1  # 0: a parameter that this pass has made


def _get_tensor(node: Node) -> Any:
    return get_attribute(find_owner(node), str(node.target))


def _count_readers(node: Node) -> int:
    """How many nodes read what an attribute's node reads; a module's own call reads its tensors itself."""
    return sum(not is_passed_in(user, node) for user in node.users) if node.op == "get_attr" else 1


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


def _find_layer(operation: Operation) -> _LayerSignature | None:
    """Rule 3; None for a product that is no layer."""
    node = operation.node
    if operation.class_name != "Linear" or node.target in (F.linear, aten.linear.default):
        return _LAYER
    # Of addmm, alpha and beta are keywords.
    return None if node.kwargs else _PRODUCTS.get(node.target)


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
    mean, var, weight, bias = (_get_tensor(value) if isinstance(value, Node) else value for value in values)
    return _Norm(mean, var, weight, bias, _DEFAULT_EPS if eps is None else eps)


def _takes_first(user: Node) -> bool:
    return not user.users or (get_op_name(user) == "getitem" and bool(user.args[1] == 0))


def _is_foldable(graph_module: GraphModule, constants: _Constants, operation: Operation, norm: Node) -> bool:
    """Rules 3 and 4."""
    layer, weight, signature = operation.node, operation.weight, _find_layer(operation)
    if signature is None or len(layer.users) != 1 or weight is None or weight.is_observed:
        return False
    if not _reads_whole(layer, signature, weight):
        return False
    if not constants.is_own(weight.value) or not constants.is_own(signature.get_bias(layer)):
        return False
    num_dims = 2 if operation.class_name == "Linear" else int(operation.class_name[-2]) + 2
    return _find_num_dims(graph_module, layer, norm) == num_dims


def _reads_whole(layer: Node, signature: _LayerSignature, weight: Weight) -> bool:
    """Whether a layer's weight is a parameter as it is, or one that is transposed for this layer alone."""
    factor = signature.weight.get(layer)
    if factor is weight.value:
        return True
    is_matrix = len(weight.view.shape) == 2
    return is_matrix and factor is weight.reader and get_op_name(factor) in _TRANSPOSES and len(factor.users) == 1


def _find_num_dims(graph_module: GraphModule, layer: Node, norm: Node) -> int | None:
    """How many dimensions a layer's output has; None where that is not known."""
    for key in ("val", "tensor_meta", "example_value"):
        if (value := layer.meta.get(key)) is not None:
            return len(value.shape)
    return _MODULES[type(graph_module.get_submodule(str(norm.target)))] if norm.op == "call_module" else None


@torch.no_grad()
def _fold(constants: _Constants, operation: Operation, norm: _Norm) -> None:
    """Rule 5."""
    layer, weight, signature = operation.node, operation.weight, _find_layer(operation)
    assert weight is not None
    assert signature is not None
    bias_node = signature.get_bias(layer)
    old, target = _get_tensor(weight.value), str(weight.value.target)
    holders = [graph for graph in constants.graphs if _find(graph, target) is old]
    factor = (norm.var.double() + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight.double()
    rows = weight.view.apply(old.double()) * factor[:, None]

    bias_target = str(bias_node.target) if bias_node else _find_free_name(holders, target)
    old_bias = _get_tensor(bias_node) if bias_node else old.new_zeros(len(factor))
    bias = (old_bias.double() - norm.mean.double()) * factor
    bias = bias if norm.bias is None else bias + norm.bias.double()
    bias_holders = [graph for graph in constants.graphs if _find(graph, bias_target) is old_bias]
    _set_parameter(holders, target, weight.view.revert(rows).to(old.dtype), old)
    _set_parameter(bias_holders if bias_node else holders, bias_target, bias.to(old_bias.dtype), old)
    if bias_node is None:
        with layer.graph.inserting_before(layer):
            bias_node = layer.graph.get_attr(bias_target)
        if signature.biased:
            layer.target, layer.args = signature.biased, (bias_node, *layer.args)
        else:
            signature.bias.set(layer, bias_node)


def _find(graph_module: GraphModule, target: str) -> Any:
    """What a graph holds under a name; None if that is nothing."""
    try:
        return get_attribute(graph_module, target)
    except AttributeError:
        return None


def _find_free_name(holders: list[GraphModule], weight: str) -> str:
    """``bias`` beside ``weight``, or, where that is something else, one that is told by the weight's name."""
    path, _, leaf = weight.rpartition(".")
    name = "bias"
    while any(_find(graph, f"{path}.{name}".lstrip(".")) is not None for graph in holders):
        name = f"{leaf}_{name}"
    return f"{path}.{name}".lstrip(".")


def _set_parameter(holders: list[GraphModule], target: str, value: Tensor, old: Tensor) -> None:
    """Has graphs hold one new parameter in place of whatever they called so."""
    parameter = nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
    for graph in holders:
        replace_parameter(graph, target, parameter)


def _erase(layer: Node, norm: Node) -> None:
    """Has what read the norm read the layer."""
    norms = [norm]
    if norm.op == "call_function" and _NORMS[norm.target].has_several_outputs:
        norms = [*norm.users, norm]
    for node in norms:
        # The node of several outputs itself has no users any more.
        node.replace_all_uses_with(layer)
        layer.graph.erase_node(node)
