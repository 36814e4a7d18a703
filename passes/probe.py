"""The node that an observer is in a graph."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxmse.capture.attributes import list_graphs
from fxmse.config import Site, check_dynamic_shape
from fxmse.observers.base import Observer
from fxmse.observers.fingerprints import find_fingerprint, has_values
from fxmse.observers.input_aware import InputAwareObserver
from fxmse.observers.inputs import Inputs
from fxmse.observers.states import Described, Lock, State
from fxmse.passes.weight_view import WeightView

__all__ = [
    "Probe",
    "check_unobserved",
    "find_called",
    "find_inputs",
    "find_probe",
    "find_probes",
    "list_sites",
    "skip_probes",
]

_FINGERPRINT, _UNKNOWN = "fingerprint", "unknown"


@dataclass(frozen=True)
class _Seen:
    """The weight that was observed.

    Attributes:
        place: where it lay, and which version of it that was; None where nothing says.
        facts: its shape, its dtype and what it held, in words; empty for no weight.
    """

    place: tuple[int, int] | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


class Probe(Described):
    """An observer as a node of a graph: shows it the value and passes the value on.

    Returning the value keeps the node in the data flow; a node without users would be removed as dead code.

    A weight is observed once, and again only after it was changed. Of one that lies where it lay, and whose version
    is what it was, a run of the graph takes that for granted. What follows from weights asks what they hold
    (:meth:`knows`): ``calibrate`` and ``convert`` do, since no version says what was written through ``.data``, through
    numpy or in inference mode.

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
        self.lock = observer.lock if observer else Lock()
        self.given: dict[str, Tensor | None] | None = None  # qparams that take the place of the observer's
        self._seen: _Seen | None = _Seen()  # None: a state that was loaded does not say what it is of
        self._inputs_seen: Tensor | None = None
        if observer:
            observer.name = self.name

    @property
    def name(self) -> str:  # type: ignore[override]
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
            self.state, self._seen = state, _Seen()

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
        if self.given is not None or self.waits_for_inputs:
            return value
        if not self.is_weight:
            self._observe(value if shown is None else shown)
        elif not has_values(value):
            if not self.has_statistics:
                self._observe(value)
        else:
            with self.lock:
                if not self._is_unchanged(value):
                    self.observe_weight(value)
        return value

    def observe_weight(self, weight: Tensor) -> None:
        """Observes a weight, whatever is known of it."""
        self._observe(weight)
        self.remember(weight)

    def _observe(self, value: Tensor) -> None:
        try:
            if self.observer:
                self.observer.observe(value)
            else:
                check_dynamic_shape(self.sites[0].args, value.shape)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def _is_unchanged(self, weight: Tensor) -> bool:
        """:meth:`knows`, which takes a weight that no version says was changed for unchanged."""
        place = self._find_place(weight)
        is_same = self._seen is not None and place is not None and self._seen.place == place
        return self.has_statistics and self._has_seen_inputs if is_same else self.knows(weight)

    def knows(self, weight: Tensor) -> bool:
        """Whether the weight was observed as it is now, with the inputs that are known now."""
        if not (self.has_statistics and self._has_seen_inputs):
            return False
        if self._seen is None:
            self.remember(weight)
        elif not self._seen.facts or self._seen.facts != _describe_weight(weight):
            return False
        else:
            self._seen = replace(self._seen, place=self._find_place(weight))
        return True

    def remember(self, weight: Tensor) -> None:
        """Takes what was observed for that of the weight and its inputs as they are now."""
        facts = _describe_weight(weight)
        seen = facts if _FINGERPRINT in facts else {}
        self._seen, self._inputs_seen = _Seen(self._find_place(weight), seen), self._sums

    def forget(self) -> None:
        """Has the weight be observed anew where it is seen next."""
        self._seen = _Seen()

    def _find_place(self, weight: Tensor) -> tuple[int, int] | None:
        """Where a weight lies and which version of it that is; None where that says nothing."""
        if self.is_computed or weight.is_inference():
            return None
        return weight.data_ptr(), weight._version

    @property
    def inputs(self) -> Inputs | None:
        """What is kept of the values that meet a weight, where its observer asks for that."""
        return self.observer.inputs if isinstance(self.observer, InputAwareObserver) else None

    @property
    def _sums(self) -> Tensor | None:
        return None if self.inputs is None else self.inputs.sums

    @property
    def _has_seen_inputs(self) -> bool:
        return self._inputs_seen is self._sums

    def describe(self) -> dict[str, str]:
        """The weight that was observed: its shape, its dtype and what it holds; of an activation nothing."""
        if not self.is_weight or self.observer is None or not self.observer.has_statistics or self._seen is None:
            return {}
        return dict(self._seen.facts) or {_FINGERPRINT: _UNKNOWN}

    def find_difference(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """None: a probe does not know its weight; :meth:`compare_weight` does."""
        return None

    def compare_weight(
        self, state_dict: Mapping[str, Any], prefix: str, weight: Tensor, *, is_loaded: bool
    ) -> str | None:
        """As :meth:`find_difference`, for the weight that the probe sees.

        Args:
            state_dict: as of :meth:`find_difference`, as is ``prefix``.
            prefix: see above.
            weight: as it is now.
            is_loaded: whether the state dict has the weight's values, too.
        """
        there, here = self.read_facts(state_dict, prefix), _describe_weight(weight)
        if is_loaded or there.get(_FINGERPRINT) == _UNKNOWN:
            here.pop(_FINGERPRINT, None)
        return self._compare(there, here)

    def _make_room(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        facts = self.read_facts(state_dict, prefix)
        is_unknown = facts.get(_FINGERPRINT) == _UNKNOWN
        self._seen, self._inputs_seen = _Seen(facts={} if is_unknown else facts) if facts else None, None

    def extra_repr(self) -> str:
        """What the probe looks at."""
        return self.name


def _describe_weight(weight: Tensor) -> dict[str, str]:
    """Its shape, its dtype and, where it has values, their fingerprint."""
    facts = {"shape": str(tuple(weight.shape)), "dtype": str(weight.dtype)}
    fingerprint = find_fingerprint(weight)
    return facts if fingerprint is None else {**facts, _FINGERPRINT: str(fingerprint)}


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


def list_sites(graph_module: GraphModule) -> list[Site]:
    """All that the probes of an observed graph look at, in their order."""
    return [site for _, probe in find_probes(graph_module) for site in probe.sites]


def check_unobserved(model: object) -> None:
    """Raises ValueError for a graph that has observers."""
    if isinstance(model, GraphModule) and any(True for _ in find_probes(model)):
        raise ValueError("the graph has observers already: calibrate it, and fold it with fxmse.convert")


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
