"""Names of quantities: those of the modules that they belong to, unless the model or another quantity has them."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

from torch.fx import GraphModule

from fxmse.config import Site
from fxmse.observers.base import QPARAMS
from fxmse.observers.inputs import Importance, Products
from fxmse.passes.probe import find_probes
from fxmse.passes.reads import Read

__all__ = ["Names"]

_SUFFIXES = (*QPARAMS, "observer", Importance.suffix, Products.suffix)


class Names:
    """Who is called what in a graph.

    A quantity is a value at one version, or a parameter in one way of being read. Its sites are called after their
    modules: ``fc.weight``. Where two quantities would be called the same, as a parameter that is read as it is and
    transposed, or the model has attributes of such a name (``fc.input_scale``), the op's node is told, too:
    ``fc.linear_1_weight``.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self._graph_module = graph_module
        self._owners: dict[str, object] = {
            site.name: probe for _, probe in find_probes(graph_module) for site in probe.sites
        }
        self._sites: dict[tuple[str, int], Site] = {}

    def find(self, read: Read, quantity: object) -> Site:
        """The site of ``read``, with a name that is its own or of ``quantity`` already."""
        key = (read.site.name, id(quantity))
        if key not in self._sites:
            free = (site for site in _list_names(read) if self._is_free(site, quantity))
            self._sites[key] = next(free)
            self._owners[self._sites[key].name] = quantity
        return self._sites[key]

    def _is_free(self, site: Site, quantity: object) -> bool:
        if site.name in self._owners:
            return self._owners[site.name] is quantity
        try:
            module = self._graph_module.get_submodule(site.module)
        except AttributeError:
            return True
        return not any(hasattr(module, f"{site.prefix}{site.role}_{suffix}") for suffix in _SUFFIXES)


def _list_names(read: Read) -> Iterator[Site]:
    site = read.site
    yield site
    by_node = f"{read.operation.node.name}_"
    prefix = site.prefix if site.prefix.startswith(by_node) else f"{by_node}{site.prefix}"
    yield replace(site, prefix=prefix)
    yield from (replace(site, prefix=f"{prefix}{number}_") for number in itertools.count(2))
