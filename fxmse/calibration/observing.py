"""An observed graph looks at weights and batches, and goes back to what it knew before one that is refused."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from fxmse.calibration.buffers import own_buffers
from fxmse.calibration.progress import visit_weights
from fxmse.capture.attributes import list_graphs
from fxmse.capture.front_ends import split_inputs
from fxmse.observers.base import describe_non_finite
from fxmse.observers.inputs import Inputs
from fxmse.observers.states import are_finite, hold
from fxmse.ops import is_fake_quantize
from fxmse.passes.open_regions import find_open
from fxmse.passes.probe import Probe, find_inputs, find_probes
from fxmse.passes.trimming import trim

__all__ = [
    "check_batches",
    "check_filled",
    "check_seen",
    "get_probes",
    "observe_batches",
    "observe_or_roll_back",
    "observe_weights",
    "split_batch",
]


def get_probes(observed: GraphModule) -> list[Probe]:
    """The probes of a graph, each once; raises ValueError where it has none."""
    probes = list(dict.fromkeys(probe for _, probe in find_probes(observed)))
    if probes:
        return probes
    if any(is_fake_quantize(node) for graph in list_graphs(observed) for node in graph.graph.nodes):
        raise ValueError("the graph was folded already: it has fake-quantize nodes and no observers")
    raise ValueError("the graph has no observers: make it with fxmse.prepare")


def check_seen(observed: GraphModule, num_batches: int) -> None:
    """Raises ValueError for the activations that so many batches showed nothing to; names them all."""
    unseen = [probe.name for probe in get_probes(observed) if not probe.is_weight and not probe.has_statistics]
    if unseen:
        raise ValueError(
            f"{num_batches} batches of calibration data showed nothing to {'; '.join(unseen)}: pass batches that reach "
            "them"
        )


def check_batches(batches: object) -> None:
    """Raises ValueError where ``batches`` is a single one, whose rows or names would be taken for batches."""
    if isinstance(batches, Tensor | Mapping):
        kind = "tensor" if isinstance(batches, Tensor) else "dict"
        raise ValueError(f"batches is one {kind}: expected a list or another iterable of batches, [{kind}]")


def check_filled(batch: Any, number: int) -> None:
    """Raises ValueError where the batch of that number, from 1, has a tensor without elements."""
    if any(isinstance(leaf, Tensor) and leaf.numel() == 0 for leaf in tree_leaves(batch)):
        raise ValueError(f"batch {number} is empty: expected tensors of at least one element")


def split_batch(graph_module: GraphModule, batch: Any, number: int) -> tuple[tuple, dict[str, Any]]:
    """The positional and keyword arguments of the batch of that number, from 1.

    Raises:
        ValueError: it is empty, or has other inputs than the graph takes.
    """
    check_filled(batch, number)
    args, kwargs = split_inputs(batch)
    signature = inspect.signature(graph_module.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"batch {number} has other inputs than {', '.join(signature.parameters)}, which the graph takes: {error}. "
            "Give each batch those"
        ) from None
    return args, kwargs


def observe_weights(weights: Mapping[Probe, Tensor], is_shown: bool = False) -> None:
    """Shows probes their weights, beside a progress bar where that ``is_shown``."""
    if on_meta := [probe.name for probe, rows in weights.items() if rows.is_meta]:
        raise ValueError(
            f"{', '.join(on_meta)} on the meta device, without values: load the weights before the calibration"
        )
    with hold(probe.lock for probe in weights):
        unknown = {probe: rows for probe, rows in weights.items() if not probe.knows(rows)}
        for probe in unknown:
            probe.forget()
        probes = {probe.name: probe for probe in unknown}
        run = functools.partial(visit_weights, unknown, lambda probe, rows: probe(rows), is_shown)
        observe_or_roll_back(probes, "the weights", run)


def observe_batches(
    observed: GraphModule, batches: Iterable[Any], compile: bool, on_outputs: Callable[[Any], None] | None = None
) -> int:
    """Runs batches through an observed graph, whose weights are known; returns how many.

    None is run where nothing looks at them, and one where all values are dynamic: whether their groups fit is seen
    with it.

    Args:
        observed: the graph. What neither its observers nor its outputs need is not run.
        batches: the batches.
        compile: as in ``fxmse.calibrate``.
        on_outputs: called with what the graph returns for each batch; without it outputs are not computed.
    """
    observed = trim(observed, keep_outputs=on_outputs is not None)
    watchers: dict[str, Probe | Inputs] = {p.name: p for _, p in find_probes(observed) if not p.is_weight}
    watchers |= {str(node.target): inputs for node, inputs in find_inputs(observed)}
    looking = [watcher for watcher in watchers.values() if isinstance(watcher, Inputs) or watcher.given is None]
    if on_outputs is None and not any(isinstance(watcher, Inputs) or watcher.observer for watcher in looking):
        batches = itertools.islice(batches, 1 if looking else 0)
    # Which branch is run, and how often a loop, is known in Python alone: around those the graph is compiled in parts.
    is_whole = not find_open(observed)
    compiled = torch.compile(observed, fullgraph=is_whole, dynamic=True) if compile else observed
    count = 0
    # Another thread's values come before or after all of these.
    with hold(watcher.lock for watcher in watchers.values()), own_buffers(observed):
        for count, batch in enumerate(batches, 1):
            args, kwargs = split_batch(observed, batch, count)
            # The first batch gives the observers their states, and what a graph is compiled for changes no more.
            run = compiled if count > 1 else observed
            uncompiled = functools.partial(observed, *args, **kwargs)
            outputs = observe_or_roll_back(
                watchers, f"batch {count}", functools.partial(run, *args, **kwargs), uncompiled
            )
            if on_outputs:
                on_outputs(outputs)
    return count


def observe_or_roll_back(
    watchers: Mapping[str, Probe | Inputs],
    what: str,
    run: Callable[[], object],
    uncompiled: Callable[[], object] | None = None,
) -> object:
    """What ``run`` returns; whatever goes wrong, the states of ``watchers`` are as they were before."""
    with hold(watcher.lock for watcher in watchers.values()):
        before = {name: watcher.state for name, watcher in watchers.items()}
        try:
            result = run()
            _check_finite(watchers, before, what, uncompiled or run)
            return result
        except BaseException:
            _restore(watchers, before)
            raise


def _restore(watchers: Mapping[str, Probe | Inputs], states: Mapping[str, Any]) -> None:
    for name, watcher in watchers.items():
        watcher.go_back(states[name])


def _check_finite(
    watchers: Mapping[str, Probe | Inputs],
    before: Mapping[str, Any],
    what: str,
    run: Callable[[], object],
) -> None:
    """Raises ValueError naming the sites that saw NaN or Inf, and how many; one synchronisation where all is well."""
    if are_finite(tensor for watcher in watchers.values() for tensor in watcher.state.witnesses):
        return
    bad = {name: watcher for name, watcher in watchers.items() if not are_finite(watcher.state.witnesses)}
    # The values themselves are gone: look at them again while the same data runs once more.
    found: dict[str, str] = {}
    _restore(watchers, before)
    hooks = [
        watcher.register_forward_pre_hook(functools.partial(_note_non_finite, found, name))
        for name, watcher in bad.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    found |= dict.fromkeys([name for name in bad if name not in found], "has sums that are beyond float32")
    sites = "; ".join(f"{name} {description}" for name, description in found.items())
    raise ValueError(f"NaN or Inf in {what}: {sites}. The observers are as they were before {what}")


def _note_non_finite(found: dict[str, str], name: str, watcher: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if not inputs[0].isfinite().all():
        found.setdefault(name, describe_non_finite(inputs[0]))
