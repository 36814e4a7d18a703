"""How a graph's attributes are read, and where new ones are put."""

from typing import Any

from torch import nn
from torch.fx import GraphModule

__all__ = ["get_attribute", "make_container"]


def get_attribute(graph_module: GraphModule, target: str) -> Any:
    """What a get_attr node of ``target`` returns."""
    value: Any = graph_module
    for name in target.split("."):
        value = getattr(value, name)
    return value


def make_container(graph_module: GraphModule, path: str) -> nn.Module:
    """The submodule at ``path``, made of empty modules where there is none."""
    module: nn.Module = graph_module
    for name in filter(None, path.split(".")):
        if not hasattr(module, name):
            module.add_module(name, nn.Module())
        module = getattr(module, name)
    return module
