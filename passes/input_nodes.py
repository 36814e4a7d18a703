"""Nodes on the values that meet weights, for observers of weights that take these into account."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule, Node

from fxmse.capture.attributes import make_container
from fxmse.observers.arrangements import Arrangement
from fxmse.observers.input_aware import InputAwareObserver
from fxmse.observers.inputs import Products
from fxmse.passes.operation import Operand
from fxmse.passes.probe import skip_probes
from fxmse.passes.versions import Versions

__all__ = ["Meeting", "insert_input_nodes"]


@dataclass(frozen=True)
class Meeting:
    """A weight that meets a value.

    Attributes:
        observer: of the weight.
        name: of the weight.
        graph_module: the graph in which they meet.
        operand: the value; None for what an observer can make no use of.
        mask: the graph's input that says which tokens count, if there is one.
        arrangement: which of the weight's rows meet which tokens, where not all meet all.
        choice: what the node is called with to know that.
    """

    observer: InputAwareObserver
    name: str
    graph_module: GraphModule
    operand: Operand | None
    mask: tuple[Node, ...]
    arrangement: Arrangement | None = None
    choice: tuple[Any, ...] = ()

    @property
    def others(self) -> tuple[Any, ...]:
        """What the node is called with beside the value: tokens that are chosen for experts are in another order."""
        return self.choice if self.arrangement else self.mask


def insert_input_nodes(meetings: Iterable[Meeting], order: Mapping[Node, int]) -> None:
    """Shows each value to what is kept of it, once, for all weights that meet the same values and no others.

    Args:
        meetings: of weights and values, whose probes are in the graphs already.
        order: the place of each reader in its graph.
    """
    by_observer: dict[InputAwareObserver, list[Meeting]] = {}
    for meeting in meetings:
        by_observer.setdefault(meeting.observer, []).append(meeting)
    versions: dict[GraphModule, Versions] = {}
    by_values: dict[object, list[Meeting]] = {}
    for observer, own in by_observer.items():
        own = _agree(observer, own, order)
        values = frozenset((_identify(meeting, versions), meeting.others) for meeting in own if meeting.operand)
        form = observer.inputs and observer.inputs.form
        by_values.setdefault((form, values) if values else observer, []).extend(own)
    for group in by_values.values():
        _insert(group, versions, order)


def _agree(observer: InputAwareObserver, own: list[Meeting], order: Mapping[Node, int]) -> list[Meeting]:
    """Tells the observer's inputs how its weight meets tokens.

    Of different ways each row meets all tokens; patches of different convolutions are no tokens.
    """
    if not isinstance(observer.inputs, Products):
        return [replace(meeting, arrangement=None) for meeting in own]
    ways = {meeting.arrangement for meeting in own if meeting.operand}
    is_known = all(
        order[choice] < order[meeting.operand.reader]
        for meeting in own
        for choice in meeting.choice
        if isinstance(choice, Node) and meeting.operand
    )
    arrangement = next(iter(ways)) if len(ways) == 1 and is_known else None
    observer.inputs.arrangement = arrangement
    if arrangement is None:
        own = [replace(m, operand=m.operand if m.operand and m.operand.is_channels_last else None) for m in own]
    return [replace(meeting, arrangement=arrangement) for meeting in own]


def _identify(meeting: Meeting, versions: dict[GraphModule, Versions]) -> tuple[GraphModule, object, int]:
    """The value, as readers with equal ones can share it."""
    graph_module, operand = meeting.graph_module, meeting.operand
    assert operand is not None
    if graph_module not in versions:
        versions[graph_module] = Versions(graph_module)
    value = operand.argument.get(operand.reader)
    return graph_module, skip_probes(graph_module, value), versions[graph_module].find(value, operand.reader)


def _insert(group: list[Meeting], versions: dict[GraphModule, Versions], order: Mapping[Node, int]) -> None:
    inputs = group[0].observer.inputs
    assert inputs is not None
    for observer in dict.fromkeys(meeting.observer for meeting in group):
        observer.share_inputs(inputs)
    target = f"{group[0].name}_{inputs.suffix}"
    parent, _, name = target.rpartition(".")
    by_value: dict[object, list[Meeting]] = {}
    for meeting in group:
        container = make_container(meeting.graph_module, parent)
        if not hasattr(container, name):
            container.add_module(name, inputs)
            inputs.name = target
        if meeting.operand:
            by_value.setdefault((_identify(meeting, versions), meeting.others), []).append(meeting)
    for readers in by_value.values():
        operands = [meeting.operand for meeting in readers if meeting.operand]
        first = min(operands, key=lambda operand: order[operand.reader])
        value = first.argument.get(first.reader)
        graph = readers[0].graph_module.graph
        with graph.inserting_before(first.reader):
            node = graph.call_module(target, (value, *readers[0].others))
        node.meta = dict(value.meta)
        # Others may read the value behind a probe of their own: it has been seen all the same.
        for operand in operands:
            if operand.argument.get(operand.reader) is value:
                operand.argument.set(operand.reader, node)
