"""Buffers that a graph writes, as a step counter or a key-value cache, while sample data runs through it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.fx import GraphModule

from fxmse.capture.attributes import get_attribute
from fxmse.passes.versions import Versions

__all__ = ["own_buffers"]


@contextmanager
def own_buffers(graph_module: GraphModule) -> Iterator[None]:
    """Has a graph write copies of its buffers within a ``with`` block, and read the buffers again behind it.

    So the model that the buffers belong to stays as it is, and so does the graph.
    """
    versions = Versions(graph_module)
    written = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr") if versions.is_written(node)}
    before = {target: get_attribute(graph_module, target) for target in sorted(written)}
    before = {target: value for target, value in before.items() if isinstance(value, Tensor)}
    copies = {id(value): value.detach().clone() for value in before.values()}
    try:
        for target, value in before.items():
            _set(graph_module, target, copies[id(value)])
        yield
    finally:
        for target, value in before.items():
            _set(graph_module, target, value)


def _set(graph_module: GraphModule, target: str, value: Tensor) -> None:
    path, _, name = target.rpartition(".")
    module = graph_module.get_submodule(path)
    if name in module._buffers:
        module._buffers[name] = value
    elif name in module._parameters:
        module._parameters[name] = value  # type: ignore[assignment]
    else:
        setattr(module, name, value)
