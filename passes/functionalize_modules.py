"""Makes the weights of traced modules visible."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxmse.passes.base import GraphPass

__all__ = ["FunctionalizeModules", "has_plain_call"]

_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
_TRANSPOSED_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}


@dataclass(frozen=True)
class FunctionalizeModules(GraphPass):
    """Replaces calls of modules by functional calls whose weights are get_attr nodes.

    ``torch.fx.symbolic_trace`` leaves leaf modules as call_module nodes, which hide the weight. Rules:

    1. Linear, Conv1d, Conv2d, Conv3d (zero padding), ConvTranspose1d, 2d, 3d (called without an output size) and
       Embedding (without max_norm, which would change the weight) become F.linear, F.conv*d, F.conv_transpose*d and
       F.embedding of the same arguments.
    2. Subclasses, modules with hooks and modules whose forward was replaced on the instance keep their call: something
       else than the layer's own forward may run.
    3. Parameters stay where they are in the state dict, but in an empty module of the graph's own, so that what
       later passes add there does not end up in the user's model. So does what else the module holds, which others may
       read.
    4. A node remembers the module's path and class in ``nn_module_stack``.
    """

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Applies the rules."""
        calls = [
            (node, module)
            for node in graph_module.graph.find_nodes(op="call_module")
            if _is_replaceable(node, module := graph_module.get_submodule(str(node.target)))
        ]
        for node, module in calls:
            _replace(graph_module.graph, node, module)
        for path, module in {str(node.target): module for node, module in calls}.items():
            graph_module.set_submodule(path, _copy_parameters(module))
        return bool(calls)


def has_plain_call(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs its class's ``forward`` and nothing else."""
    # Hooks (and parametrizations) run around a module's call and would be lost.
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _is_replaceable(node: Node, module: nn.Module) -> bool:
    """Rules 1 and 2."""
    if not has_plain_call(module):
        return False
    if type(module) is nn.Embedding:
        return module.max_norm is None
    if type(module) in _CONVOLUTIONS:
        return module.padding_mode == "zeros"
    if type(module) in _TRANSPOSED_CONVOLUTIONS:
        return len(node.args) + len(node.kwargs) == 1
    return type(module) is nn.Linear


def _replace(graph: Graph, node: Node, module: nn.Module) -> None:
    path = str(node.target)
    value = node.args[0] if node.args else node.kwargs["input"]
    with graph.inserting_before(node):
        weight = graph.get_attr(f"{path}.weight")
        bias = graph.get_attr(f"{path}.bias") if getattr(module, "bias", None) is not None else None
        if isinstance(module, nn.Linear):
            new = graph.call_function(F.linear, (value, weight, bias))
        elif isinstance(module, nn.Embedding):
            options = {"padding_idx": module.padding_idx, "scale_grad_by_freq": module.scale_grad_by_freq}
            new = graph.call_function(F.embedding, (value, weight), {**options, "sparse": module.sparse})
        else:
            padding: Any = (module.padding, module.output_padding) if module.transposed else (module.padding,)
            spacing: Any = (module.groups, module.dilation) if module.transposed else (module.dilation, module.groups)
            function = {**_CONVOLUTIONS, **_TRANSPOSED_CONVOLUTIONS}[type(module)]
            geometry: Any = (module.stride, *padding, *spacing)
            new = graph.call_function(function, (value, weight, bias, *geometry))
    new.meta = dict(node.meta)
    # Rule 4.
    stack = new.meta.get("nn_module_stack") or {}
    new.meta["nn_module_stack"] = {**stack, path: (path, type(module))}
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _copy_parameters(module: nn.Module) -> nn.Module:
    """Rule 3."""
    container = torch.nn.Module()
    for name, parameter in module.named_parameters(recurse=False):
        container.register_parameter(name, parameter)
    for name, buffer in module.named_buffers(recurse=False):
        container.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
    for name, child in module.named_children():
        container.add_module(name, child)
    for name, tensor in vars(module).items():
        if isinstance(tensor, torch.Tensor):
            setattr(container, name, tensor)
    container.training = module.training
    return container
