"""torch.compile as the calibration step: a backend that observes, and runs the quantized graph once it is folded."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxmse.calibration.observing import observe_or_roll_back
from fxmse.capture.attributes import find_owner
from fxmse.capture.evaluation import refuse_training
from fxmse.capture.front_ends import copy_graph_module
from fxmse.capture.lifted import Lifted, bind_parameters, find_lifted
from fxmse.config import AllLeftInFloatError, Config, NothingMatchedError, resolve_config
from fxmse.observers.base import QPARAMS
from fxmse.observers.inputs import Inputs
from fxmse.passes import FoldFakeQuant, InlineRegions, InsertObservers
from fxmse.passes.probe import Probe, find_inputs, find_probes

__all__ = ["Calibration"]


class Calibration:
    """A torch.compile backend that calibrates.

    ::

        calibration = fxmse.Calibration("W8A8")
        step = torch.compile(model, backend=calibration)
        for batch in batches:
            step(batch)  # the model's own outputs; values are observed
        calibration.fold()
        step(batch)  # the quantized model, compiled by Inductor
        calibration.qparams["fc.weight_scale"]

    Each graph that Dynamo makes (one for each part between graph breaks, one more for shapes it has to compile anew)
    gets observers; a value that several graphs hold is observed by one. Parameters that Dynamo lifts to inputs are
    recognised as weights, and values are named after the modules that Dynamo traced them from. Gradients pass straight
    through the quantized model.

    Args:
        config: as :func:`fxmse.prepare` takes it. Graphs that it matches nothing of stay as they are.
        model: the model whose names count. Needed where a graph breaks inside of a submodule, whose part Dynamo traces
            as a model of its own.

    Raises:
        ValueError: a config that is none. While ``step`` runs: NaN or Inf (what was observed before is kept), a
            second model under one calibration, and before :meth:`fold` a graph that computes as in training mode.
    """

    def __init__(self, config: Config, model: nn.Module | None = None) -> None:
        self._config = resolve_config(config)
        self._model = model  # as long as it is held, no other parameter has the id of one of its own
        self._names = {} if model is None else {id(p): name for name, p in model.named_parameters()}
        self._graphs: list[_Graph] = []
        self._probes: dict[str, Probe] = {}
        self._parameters: dict[str, Tensor] = {}
        self._nothing_matched: NothingMatchedError | None = None
        self._is_folded = False

    def __call__(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """What Dynamo runs in place of a graph."""
        observed = copy_graph_module(graph_module)
        if not self._is_folded:
            refuse_training(observed, "Call model.eval() before the calibration")
        InlineRegions()(observed)  # before parameters are bound, which are inputs of regions, too
        bound = self._bind_parameters(observed, example_inputs)
        try:
            InsertObservers(self._config)(observed)
        except NothingMatchedError as error:
            self._nothing_matched = error
            if isinstance(error, AllLeftInFloatError):
                warnings.warn(f"in one of the model's graphs {error}", UserWarning, stacklevel=2)
            return _Plain(graph_module, self).run
        self._share_probes(observed)
        graph = _Graph(observed, bound)
        self._graphs.append(graph)
        if self._is_folded:
            graph.replace(graph.make_quantized())
        return graph.run

    @property
    def is_folded(self) -> bool:
        """Whether ``step`` runs the quantized model."""
        return self._is_folded

    def fold(self) -> None:
        """Ends the calibration: from now on ``step`` runs the quantized graphs.

        Raises:
            ValueError: nothing was run yet, the config matched nothing in any graph, or values were never seen (all
                are named); the calibration can go on.
        """
        if self._is_folded:
            return
        if not self._graphs:
            if self._nothing_matched:
                raise self._nothing_matched
            raise ValueError(
                "no graph was calibrated: run the compiled model on sample data before fold(). If it ran, Dynamo "
                "compiled nothing of it, as with recurrent layers and data-dependent indices that break its graphs: "
                "use fxmse.prepare with a traced or exported model"
            )
        quantized = [graph.make_quantized() for graph in self._graphs]
        for graph, graph_module in zip(self._graphs, quantized, strict=True):
            graph.replace(graph_module)
        self._is_folded = True

    @property
    def qparams(self) -> dict[str, Tensor]:
        """Scales, zero points and global scales, by compressed-tensors' names: ``fc.weight_scale``.

        Raises:
            ValueError: before :meth:`fold`.
        """
        if not self._is_folded:
            raise ValueError("the calibration goes on: call fold() first")
        return {
            name: buffer
            for graph in self._graphs
            for name, buffer in graph.quantized.named_buffers()
            if name.endswith(tuple(f"_{kind}" for kind in QPARAMS))
        }

    def _bind_parameters(
        self, graph_module: GraphModule, example_inputs: Sequence[Any]
    ) -> dict[int, tuple[str, nn.Parameter]]:
        """Puts get_attr nodes in place of lifted parameters.

        Returns:
            the name of each such parameter and the parameter, by its place among the inputs.
        """
        parameters: dict[Lifted, tuple[str, nn.Parameter]] = {}
        for lifted in find_lifted(graph_module):
            if self._model is None and "___stack" in lifted.root:
                raise ValueError(
                    f"the graph breaks inside of a submodule, so that the full name of {lifted.name} is unknown: pass "
                    "the model, Calibration(config, model)"
                )
            value = example_inputs[lifted.place]
            parameters[lifted] = self._find_name(value, lifted.name), value
        bind_parameters(graph_module, parameters)
        return {lifted.place: named for lifted, named in parameters.items()}

    def _find_name(self, parameter: Tensor, relative: str) -> str:
        """A parameter's name, which is that of one parameter alone."""
        if self._model is not None:
            if id(parameter) not in self._names:
                raise ValueError(
                    f"{relative} is no parameter of the model that this Calibration was made for: make one for each "
                    "model"
                )
            return self._names[id(parameter)]
        known = self._parameters.setdefault(relative, parameter)
        if known is not parameter:
            raise ValueError(
                f"two parameters are called {relative}: this is a second model, which needs a Calibration of its own, "
                "or a submodule in which the graph breaks; then pass the model, Calibration(config, model)"
            )
        return relative

    def _share_probes(self, observed: GraphModule) -> None:
        """Has a value that an earlier graph holds, too, be observed by that one's observer and weighed as there."""
        shared: dict[Inputs, Inputs] = {}
        for node, probe in find_probes(observed):
            known = self._probes.setdefault(f"{probe.name} {probe.sites[0].args}", probe)
            if known is not probe:
                find_owner(node).set_submodule(str(node.target), known)
                if probe.inputs is not None and known.inputs is not None:
                    shared[probe.inputs] = known.inputs
        for node, inputs in find_inputs(observed):
            if inputs in shared:
                find_owner(node).set_submodule(str(node.target), shared[inputs])


class _Plain:
    """A graph that nothing is quantized in; compiled once the others are."""

    def __init__(self, graph_module: GraphModule, calibration: Calibration) -> None:
        self._graph_module, self._calibration = graph_module, calibration

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        return torch.compile(self._graph_module)

    def run(self, *inputs: Any) -> Any:
        """Dynamo calls this."""
        return (self._compiled if self._calibration.is_folded else self._graph_module)(*inputs)


class _Graph:
    """A graph that is observed, and quantized once it is folded."""

    def __init__(self, observed: GraphModule, bound: Mapping[int, tuple[str, Tensor]]) -> None:
        self._observed, self._bound = observed, bound
        self._watchers: dict[str, Probe | Inputs] = {probe.name: probe for _, probe in find_probes(observed)}
        self._watchers |= {str(node.target): inputs for node, inputs in find_inputs(observed)}
        self._num_batches = 0
        self._compiled: Callable[..., Any] | None = None
        self.quantized = observed

    def run(self, *inputs: Any) -> Any:
        """Dynamo calls this."""
        for place, (name, parameter) in self._bound.items():
            if inputs[place] is not parameter:
                raise ValueError(
                    f"{name} is not the parameter that was calibrated: a second model needs a Calibration of its own, "
                    "and so does one whose parameters were replaced"
                )
        if self._compiled is not None:
            return self._compiled(*inputs)
        self._num_batches += 1
        outputs = None

        def observe() -> None:
            nonlocal outputs
            outputs = self._observed(*inputs)

        observe_or_roll_back(self._watchers, f"batch {self._num_batches}", observe)
        return outputs

    @torch.no_grad()
    def make_quantized(self) -> GraphModule:
        """The graph with what its observers found."""
        quantized = copy_graph_module(self._observed)
        FoldFakeQuant()(quantized)
        return quantized

    def replace(self, quantized: GraphModule) -> None:
        """Has :meth:`run` run the quantized graph."""
        self.quantized = quantized
        self._compiled = torch.compile(quantized)
