"""What is done with weights once all data was seen: those that wait for it, and global scales that are shared."""

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxmse.observers.states import State, plain_modes
from fxmse.passes.constants import find_weights
from fxmse.passes.probe import Probe

__all__ = ["Searches", "finish_weights"]

Searches: TypeAlias = Callable[[Mapping[Probe, Tensor], Callable[[Mapping[Probe, Tensor]], None]], None]
"""Has weights searched: it is called with them, and with what searches the weights that it is called with."""


def finish_weights(graph_module: GraphModule, run: Searches = lambda weights, search: search(weights)) -> None:
    """What can be done with weights only after all data was seen: those that wait for it, and shared global scales.

    Args:
        graph_module: an observed graph.
        run: has weights searched: it is called with them, and with what searches the weights that it is called with.

    Raises:
        ValueError: an observer that needs inputs and is strict about it.
    """
    weights = {probe: rows for probe, rows in find_weights(graph_module).items() if probe.given is None}
    run({probe: rows for probe, rows in weights.items() if not probe.knows(rows)}, _search)
    by_name: defaultdict[str, list[Probe]] = defaultdict(list)
    for probe in weights:
        if probe.global_group and probe.state.global_range is not None:
            by_name[probe.global_group].append(probe)
    groups = {group[0]: group for group in by_name.values() if not all(_share_scale(p, group[0].state) for p in group)}
    before = {probe: probe.state for group in groups.values() for probe in group}
    # The range that a group shares is for a moment the state of its first probe.
    run({first: weights[first] for first in groups}, functools.partial(_find_shared, groups, weights))
    shared = {probe: first.state for first, group in groups.items() for probe in group}
    for probe, state in before.items():
        probe.state = state
    run({p: weights[p] for p in shared if not _share_scale(p, shared[p])}, functools.partial(_rescale, shared))


def _search(weights: Mapping[Probe, Tensor]) -> None:
    for probe, rows in weights.items():
        if probe.waits_for_inputs:
            probe.state = State()
        probe.observe_weight(rows)


def _share_scale(probe: Probe, state: State) -> bool:
    own, other = probe.state.global_range, state.global_range
    return own is not None and other is not None and all(map(torch.equal, own, other))


def _find_shared(
    groups: Mapping[Probe, list[Probe]], weights: Mapping[Probe, Tensor], firsts: Mapping[Probe, Tensor]
) -> None:
    for first in firsts:
        observers = [probe.observer for probe in groups[first] if probe.observer]
        with plain_modes(weights[first]):
            range = observers[0].find_shared_global_range(observers, [weights[probe] for probe in groups[first]])
        first.state = State().with_global_range(range)


def _rescale(shared: Mapping[Probe, State], weights: Mapping[Probe, Tensor]) -> None:
    for probe, rows in weights.items():
        global_range = shared[probe].global_range
        assert probe.observer
        assert global_range
        with plain_modes(rows):
            probe.state = probe.observer.update_with_global(State(), rows, global_range)
