"""Graphs that were traced on one device compute on another."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from fxmse.capture.attributes import get_attribute, list_graphs
from fxmse.passes.base import GraphPass
from fxmse.passes.op_names import get_op_name

__all__ = ["MoveToDevice"]

_OF_DEVICE_TYPES = ("_enter_autocast", "autocast")


@dataclass(frozen=True)
class MoveToDevice(GraphPass):
    """Has a graph compute on another device than the one that it was traced on.

    Rules:

    1. Devices that nodes name become the new one: what is made there (``arange``, ``full``), what is moved there.
    2. Autocast is that of the new device's type.
    3. Buffers and constants that nodes read are moved. Those that another graph shares stay there as they are.
    4. Parameters are not moved: whoever runs the graph fills them.
    5. So it goes for the graphs in the graph.

    Attributes:
        device: what inputs and parameters will be on.
    """

    device: str | torch.device

    def rewrite(self, graph_module: GraphModule) -> bool:
        """See the class."""
        device = torch.device(self.device)
        modified = False
        for graph in list_graphs(graph_module):  # rule 5
            for node in graph.graph.nodes:
                if node.op == "get_attr":
                    modified |= _move_tensor(graph, node, device)
                else:
                    modified |= _rename(node, device)
            graph.recompile()
        return modified


def _rename(node: Node, device: torch.device) -> bool:
    """Rules 1 and 2."""
    is_autocast = get_op_name(node) in _OF_DEVICE_TYPES

    def rename(value: Any) -> Any:
        if isinstance(value, torch.device):
            return device
        # A type is all that autocast wants.
        return device.type if is_autocast and isinstance(value, str) and _is_device_type(value) else value

    args, kwargs = map_aggregate(node.args, rename), map_aggregate(node.kwargs, rename)
    if isinstance(kwargs.get("device"), str):
        kwargs = {**kwargs, "device": device}
    if (args, kwargs) == (node.args, node.kwargs):
        return False
    node.args, node.kwargs = args, kwargs
    return True


def _is_device_type(value: str) -> bool:
    try:
        return torch.device(value).index is None
    except RuntimeError:
        return False


def _move_tensor(graph_module: GraphModule, node: Node, device: torch.device) -> bool:
    """Rules 3 and 4."""
    path, _, name = str(node.target).rpartition(".")
    value = get_attribute(graph_module, str(node.target))
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or value.device == device:
        return False
    setattr(graph_module.get_submodule(path), name, value.to(device))
    return True
