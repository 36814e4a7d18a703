"""The node that an observer is in a graph."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxmse.config import Site
from fxmse.observers import Observer
from fxmse.passes.base import get_attribute

__all__ = ["Probe", "find_probe", "find_probes", "observe_weights"]


class Probe(nn.Module):
    """An observer as a node of a graph: shows it the value and passes the value on.

    Returning the value keeps the node in the data flow; a node without users would be removed as dead code.

    Args:
        observer: the observer.
        sites: the sites that read the value.
    """

    def __init__(self, observer: Observer, sites: tuple[Site, ...]) -> None:
        super().__init__()
        self.observer = observer
        self.sites = sites
        self._version_seen: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The sites' names."""
        return ", ".join(site.name for site in self.sites)

    @property
    def is_weight(self) -> bool:
        """Whether the value is a weight, which is observed once and again only after it was changed."""
        return self.observer.base_name == "weight"

    def forward(self, value: Tensor) -> Tensor:
        """Returns ``value`` as it is."""
        if not (self.is_weight and self._is_known(value)):
            try:
                self.observer.observe(value)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from error
        return value

    def _is_known(self, weight: Tensor) -> bool:
        if torch.compiler.is_compiling():
            return self.observer.has_statistics
        # Inference tensors have no version: those are known by their place alone.
        version = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        is_known = self.observer.has_statistics and version == self._version_seen
        self._version_seen = version
        return is_known

    def extra_repr(self) -> str:
        """What the probe looks at."""
        return self.name


def find_probe(graph_module: GraphModule, node: object) -> Probe | None:
    """The probe that ``node`` calls; None for everything else."""
    if not isinstance(node, Node) or node.op != "call_module":
        return None
    module = graph_module.get_submodule(str(node.target))
    return module if isinstance(module, Probe) else None


def find_probes(graph_module: GraphModule) -> Iterator[tuple[Node, Probe]]:
    """The nodes that call probes, in the graph's order."""
    for node in graph_module.graph.nodes:
        if probe := find_probe(graph_module, node):
            yield node, probe


def observe_weights(graph_module: GraphModule) -> None:
    """Shows the weights' observers their weights, as running the graph would; known weights cost nothing."""
    for node, probe in find_probes(graph_module):
        if probe.is_weight:
            source = node.args[0]
            assert isinstance(source, Node)
            if source.op == "get_attr":
                probe(get_attribute(graph_module, str(source.target)))
            else:  # a convolution's weight, as rows
                parameter = source.args[0]
                assert isinstance(parameter, Node)
                probe(get_attribute(graph_module, str(parameter.target)).flatten(1))
