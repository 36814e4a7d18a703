"""One calibration by several processes, each with a part of the data.

1. They check that they observe alike: the same sites, formats, observers and weights, and the same states before.
2. Each weight is searched by one of them.
3. Each shows its observers its own part of the data.
4. What they saw is merged in the order of the ranks, and all end with equal states, bit for bit.
"""

import functools
import hashlib
import heapq
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.fx import GraphModule

from fxmse.calibration.ranks import Ranks, Tensors
from fxmse.observers.base import Observer
from fxmse.observers.fingerprints import find_fingerprint
from fxmse.observers.inputs import Inputs, InputState
from fxmse.observers.states import State
from fxmse.passes.constants import find_weights
from fxmse.passes.probe import Probe, find_inputs, find_probes

__all__ = ["agree_on_weights", "check_alike", "describe", "merge_states", "share_out", "share_searches"]

_CPU = torch.device("cpu")


def check_alike(ranks: Ranks, described: Mapping[str, str]) -> None:
    """Raises ValueError on every rank, naming the first difference, unless all pass the same."""
    digests = ranks.meet(hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest())
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return
    notes = ranks.meet(described if ranks.rank in (0, other) else None)
    here, there = notes[0], notes[other]
    fact = next(fact for fact in {**here, **there} if here.get(fact) != there.get(fact))
    raise ValueError(
        f"the ranks do not do the same: {fact} is {here.get(fact, 'missing')} on rank 0 and "
        f"{there.get(fact, 'missing')} on rank {other}. All need the same model, config and loaded state"
    )


def describe(observed: GraphModule) -> dict[str, str]:
    """What has to be the same wherever an observed graph is calibrated, fact by fact."""
    facts: dict[str, object] = {}
    weights = find_weights(observed)
    for place, probe in enumerate(dict.fromkeys(probe for _, probe in find_probes(observed))):
        facts[f"{probe.name}: place"] = place
        args = probe.sites[0].args.model_dump(mode="json", exclude={"observer_kwargs"})
        own = probe.observer.describe() if probe.observer else args
        facts |= {f"{probe.name}: {name}": value for name, value in own.items()}
        if probe.given is not None:
            facts[f"{probe.name}: qparams that were loaded"] = _digest(probe.given)
        if probe in weights:
            facts[f"{probe.name}: shape"] = tuple(weights[probe].shape)
            facts[f"{probe.name}: dtype"] = weights[probe].dtype
            facts[f"{probe.name}: checksum"] = find_fingerprint(weights[probe])
        else:
            facts[f"{probe.name}: state"] = _digest(probe.state._asdict())
    for node, inputs in find_inputs(observed):
        facts[f"{node.target}: state"] = _digest(inputs.state._asdict())
    return {name: str(fact) for name, fact in facts.items()}


def _digest(tensors: Mapping[str, Tensor | None]) -> str:
    present = {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
    return hashlib.sha256(safetensors.torch.save(present)).hexdigest()[:12] if present else "empty"


def share_out(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """The rank that each of several jobs goes to: the largest first, to who has least to do."""
    loads = [(0, rank) for rank in range(num_ranks)]
    owners = [0] * len(sizes)
    for job in sorted(range(len(sizes)), key=lambda job: -sizes[job]):
        load, rank = heapq.heappop(loads)
        owners[job] = rank
        heapq.heappush(loads, (load + sizes[job], rank))
    return owners


def agree_on_weights(ranks: Ranks, weights: Mapping[Probe, Tensor]) -> None:
    """Has all ranks know the same of the weights: nothing, where they do not know the same already."""
    known = ranks.meet([[probe.knows(rows), _digest(probe.state._asdict())] for probe, rows in weights.items()])
    if any(note != known[0] for note in known):
        _forget(weights)


def share_searches(
    ranks: Ranks, weights: Mapping[Probe, Tensor], search: Callable[[Mapping[Probe, Tensor]], None]
) -> None:
    """Has each weight searched by one rank, and its state known to all.

    Args:
        ranks: the processes.
        weights: equal on all ranks.
        search: shows probes their weights; called with the part that falls to this rank.
    """
    owners = dict(zip(weights, share_out([rows.numel() for rows in weights.values()], ranks.size), strict=True))
    try:
        search({probe: rows for probe, rows in weights.items() if owners[probe] == ranks.rank})
        ranks.meet()
        for probe, rows in weights.items():
            tensors = ranks.share(_to_tensors(probe.state), owners[probe])
            probe.state = State(**{name: tensor.to(rows.device) for name, tensor in tensors.items()})
            probe.remember(rows)
    except BaseException:
        _forget(weights)
        raise


def _forget(weights: Iterable[Probe]) -> None:
    for probe in weights:
        probe.state = State()


def merge_states(ranks: Ranks, observed: GraphModule, run: Callable[[], int]) -> int:
    """Shows a graph's observers their data, and has them end as if each had been shown that of all ranks.

    Args:
        ranks: the processes.
        observed: equal on all ranks, states included.
        run: shows the observers this rank's part of the data, and returns of how many batches it was.

    Returns:
        How many batches there were in all.
    """
    watchers = _find_watchers(observed)
    default = next((parameter.device for parameter in observed.parameters()), _CPU)
    before = [watcher.state for watcher in watchers]
    try:
        for watcher in watchers:
            watcher.state = watcher.init()
        num_batches = sum(ranks.meet(run()))
        devices = [_find_device(watcher.state, default) for watcher in watchers]
        for watcher, earlier in zip(watchers, before, strict=True):
            seen = _to_tensors(watcher.state)
            if ranks.rank == 0:
                seen = _merge(watcher, _to_tensors(earlier), seen)
            watcher.state = _to_state(watcher, ranks.fold(seen, functools.partial(_merge, watcher)), _CPU)
        for watcher, own_device in zip(watchers, devices, strict=True):
            watcher.state = _to_state(watcher, ranks.share(_to_tensors(watcher.state), ranks.size - 1), own_device)
        ranks.leave()
    except BaseException as error:
        for watcher, state in zip(watchers, before, strict=True):
            watcher.state = state
        error.add_note("On every rank the observers of activations are as they were before this call of calibrate.")
        raise
    return num_batches


def _find_watchers(observed: GraphModule) -> list[Observer | Inputs]:
    probes = [probe for _, probe in find_probes(observed) if not probe.is_weight and probe.given is None]
    observers = [probe.observer for probe in probes if probe.observer]
    return list(dict.fromkeys([*observers, *(inputs for _, inputs in find_inputs(observed))]))


def _merge(watcher: Observer | Inputs, first: Tensors, second: Tensors) -> Tensors:
    return _to_tensors(watcher.merge(_to_state(watcher, first, _CPU), _to_state(watcher, second, _CPU)))


def _find_device(state: State | InputState, default: torch.device) -> torch.device:
    return next((tensor.device for tensor in state if tensor is not None), default)


def _to_tensors(state: State | InputState) -> Tensors:
    return {name: tensor.cpu() for name, tensor in state._asdict().items() if tensor is not None}


def _to_state(watcher: Observer | Inputs, tensors: Tensors, device: torch.device) -> Any:
    return watcher.state_class(**{name: tensor.to(device) for name, tensor in tensors.items()})
