"""The node that an observer is in a graph."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxmse.capture.attributes import list_graphs
from fxmse.config import Site, check_dynamic_shape
from fxmse.observers.base import Observer
from fxmse.observers.input_aware import InputAwareObserver
from fxmse.observers.inputs import Inputs
from fxmse.observers.states import State
from fxmse.passes.weight_view import WeightView

__all__ = [
    "Probe",
    "find_called",
    "find_inputs",
    "find_probe",
    "find_probes",
    "skip_probes",
    "sum_bits",
]

_UNKNOWN = (-1, -1)  # no weight's version
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_A_TIME = 1 << 22  # elements whose bits are held as int64 at a time


class Probe(nn.Module):
    """An observer as a node of a graph: shows it the value and passes the value on.

    Returning the value keeps the node in the data flow; a node without users would be removed as dead code.

    Args:
        observer: the observer; None for a dynamic value, whose probe only holds its place.
        sites: the sites that read the value.
        view: of a weight, how it becomes the rows that are observed.
        is_computed: of a weight, whether each run of the graph computes it anew, of parameters.
        global_group: weights of one name share their global scale; "" shares with none.
    """

    def __init__(
        self,
        observer: Observer | None,
        sites: tuple[Site, ...],
        view: WeightView | None = None,
        global_group: str = "",
        *,
        is_computed: bool = False,
    ) -> None:
        super().__init__()
        self.observer = observer
        self.sites = sites
        self.view = view
        self.is_computed = is_computed
        self.global_group = global_group
        self.given: dict[str, Tensor | None] | None = None  # qparams that take the place of the observer's
        self._version_seen: tuple[int, int] | None = None  # None: what is known of the weight comes from elsewhere
        self._inputs_seen: Tensor | None = None
        if observer:
            observer.name = self.name

    @property
    def name(self) -> str:
        """The sites' names."""
        return ", ".join(site.name for site in self.sites)

    @property
    def is_weight(self) -> bool:
        """Whether the value is a weight, which is observed once and again only after it was changed."""
        return self.view is not None

    @property
    def has_statistics(self) -> bool:
        """Whether all that can be observed has been seen."""
        return self.observer is None or self.given is not None or self.observer.has_statistics

    @property
    def state(self) -> State:
        """The observer's state."""
        return self.observer.state if self.observer else State()

    @state.setter
    def state(self, state: State) -> None:
        if self.observer:
            self.observer.state = state

    def go_back(self, state: State) -> None:
        """Goes back to an earlier state; a weight that was observed since then is unknown."""
        if any(now is not then for now, then in zip(self.state, state, strict=True)):
            self.state, self._version_seen = state, _UNKNOWN

    @property
    def waits_for_inputs(self) -> bool:
        """Whether the weight can be searched only after the activations were seen."""
        return self.observer is not None and self.observer.needs_inputs

    def forward(self, value: Tensor, shown: Tensor | None = None) -> Tensor:
        """Returns ``value`` as it is.

        Args:
            value: what is to be quantized.
            shown: what the observer is shown in its place, where that is more.
        """
        if self.given is not None or self.waits_for_inputs or (self.is_weight and self._is_known(value)):
            return value
        try:
            if self.observer:
                self.observer.observe(value if shown is None else shown)
            else:
                check_dynamic_shape(self.sites[0].args, value.shape)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        return value

    def _is_known(self, weight: Tensor) -> bool:
        if torch.compiler.is_compiling():
            return self.has_statistics
        is_known = self.knows(weight)
        self.remember(weight)
        return is_known

    def knows(self, weight: Tensor) -> bool:
        """Whether the weight was observed as it is now, with the inputs that are known now."""
        is_seen = self._version_seen in (None, self._find_version(weight)) and self._inputs_seen is self._sums
        return is_seen and self.has_statistics

    def remember(self, weight: Tensor) -> None:
        """Takes what was observed for that of the weight and its inputs as they are now."""
        self._version_seen, self._inputs_seen = self._find_version(weight), self._sums

    def _find_version(self, weight: Tensor) -> tuple[int, int]:
        if self.is_computed:
            return 0, sum_bits(weight) or 0
        # Inference tensors have no version: those are known by their place alone.
        return weight.data_ptr(), 0 if weight.is_inference() else weight._version

    @property
    def inputs(self) -> Inputs | None:
        """What is kept of the values that meet a weight, where its observer asks for that."""
        return self.observer.inputs if isinstance(self.observer, InputAwareObserver) else None

    @property
    def _sums(self) -> Tensor | None:
        return None if self.inputs is None else self.inputs.sums

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._version_seen = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """What the probe looks at."""
        return self.name


def sum_bits(weight: Tensor) -> int | None:
    """A sum that every order of adding up gives, on every device; None for a weight without values."""
    if weight.is_meta:
        return None
    bits = weight.detach().contiguous().view(_INTEGERS[weight.element_size()]).flatten()
    return sum(int(part.sum(dtype=torch.int64)) for part in bits.split(_AT_A_TIME))


def find_called(graph_module: GraphModule, node: object) -> nn.Module | None:
    """The module that ``node`` calls; None for everything else."""
    if not isinstance(node, Node) or node.op != "call_module":
        return None
    return graph_module.get_submodule(str(node.target))


def find_probe(graph_module: GraphModule, node: object) -> Probe | None:
    """The probe that ``node`` calls; None for everything else."""
    module = find_called(graph_module, node)
    return module if isinstance(module, Probe) else None


def find_probes(graph_module: GraphModule) -> Iterator[tuple[Node, Probe]]:
    """The nodes that call probes, in the graph's order, and then those in branches and loops."""
    for graph in list_graphs(graph_module):
        for node in graph.graph.nodes:
            if probe := find_probe(graph, node):
                yield node, probe


def find_inputs(graph_module: GraphModule) -> Iterator[tuple[Node, Inputs]]:
    """The nodes that look at the values that meet weights, in the same order."""
    for graph in list_graphs(graph_module):
        for node in graph.graph.nodes:
            module = find_called(graph, node)
            if isinstance(module, Inputs):
                yield node, module


def skip_probes(graph_module: GraphModule, value: object) -> object:
    """What ``value`` was before probes and inputs passed it on."""
    while isinstance(value, Node) and isinstance(find_called(graph_module, value), Probe | Inputs):
        value = value.args[0]
    return value
