"""Observed graphs in float: what the values that meet weights would be if nothing before them was quantized."""

from typing import Any, NamedTuple

from torch.fx import GraphModule, Node

from fxmse.capture.attributes import list_graphs
from fxmse.capture.front_ends import copy_graph_module
from fxmse.observers.arrangements import Experts
from fxmse.observers.inputs import Inputs
from fxmse.passes.probe import Probe, find_called, find_inputs
from fxmse.passes.trimming import return_as_written, trim

__all__ = ["Reference", "make_reference"]


class Reference(NamedTuple):
    """A copy of an observed graph that observes nothing.

    Attributes:
        graph_module: called as the observed graph is; returns the values of ``inputs``, a list each, and what that one
            returns.
        inputs: what looks at values that meet weights in the observed graph, and has a use for what they are in float;
            but for that which does in a branch or a loop.
    """

    graph_module: GraphModule
    inputs: list[Inputs]

    def run(self, *args: Any) -> tuple[Any, ...]:
        """What the graph returns; its values are what ``inputs`` expect to be shown next."""
        values, outputs = self.graph_module(*args)
        for inputs, own in zip(self.inputs, values, strict=True):
            inputs.expect(own)
        return outputs


def make_reference(observed: GraphModule) -> Reference:
    """The reference of an observed graph, whose parameters it shares."""
    copy = copy_graph_module(observed)
    nested = {inputs for node, inputs in find_inputs(observed) if node.graph is not observed.graph}
    values: dict[Inputs, list[Any]] = {}
    for graph in list_graphs(copy):
        for node in list(graph.graph.nodes):
            called = find_called(graph, node)
            if not isinstance(called, Probe | Inputs):
                continue
            if isinstance(called, Inputs) and called.takes_references and called not in nested:
                values.setdefault(called, []).append(_find_value(node, called))
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        graph.recompile()
    output = copy.graph.output_node()
    output.args = ((list(values.values()), output.args[0]),)
    return_as_written(copy.graph)
    # What nothing looks at may read what is not kept.
    return Reference(trim(copy, keep_outputs=True), list(values))


def _find_value(node: Node, inputs: Inputs) -> Any:
    """What is looked at: of experts what all of them are shown, as other tokens may be chosen where all is float."""
    shown = node.kwargs.get("shown", node.args[2] if len(node.args) > 2 else None)
    return shown or (None if isinstance(getattr(inputs, "arrangement", None), Experts) else node.args[0])
