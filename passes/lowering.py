"""What the passes that lower fake-quantize nodes do alike."""

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from fxmse.passes.fold_fake_quant import SITES_KEY

__all__ = ["add_buffer", "erase_unread", "get_meta", "get_name"]


def get_name(node: Node) -> str:
    """The sites of a fake-quantize node."""
    return ", ".join(node.meta.get(SITES_KEY, (node.name,)))


def get_meta(node: Node) -> dict[str, Any]:
    """What of a node's meta is true of whatever takes its place."""
    return {key: value for key, value in node.meta.items() if key not in ("val", "tensor_meta", "example_value")}


def add_buffer(graph_module: GraphModule, target: str, tensor: Tensor) -> Node:
    """A node that reads a new buffer, at the graph's insertion point."""
    path, _, name = target.rpartition(".")
    graph_module.get_submodule(path).register_buffer(name, tensor)
    return graph_module.graph.get_attr(target)


def erase_unread(graph_module: GraphModule, *nodes: Any) -> None:
    """Removes nodes that nothing reads any more, what only they read, and the tensors that nothing else is of."""
    waiting = [node for node in nodes if isinstance(node, Node)]
    while waiting:
        node = waiting.pop()
        if node.users or node.op in ("placeholder", "output"):
            continue
        waiting += [source for source in node.all_input_nodes if source not in waiting]
        graph_module.graph.erase_node(node)
        if node.op == "get_attr" and not graph_module.graph.find_nodes(op="get_attr", target=node.target):
            path, _, name = str(node.target).rpartition(".")
            delattr(graph_module.get_submodule(path), name)
