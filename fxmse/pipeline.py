"""The whole path: prepare, calibrate, convert, and quantize for the three in a row."""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from fxmse.capture import capture, copy_graph_module, split_inputs
from fxmse.config import Config
from fxmse.importance import Importance
from fxmse.observers import describe_non_finite
from fxmse.ops import is_fake_quantize
from fxmse.passes import FoldFakeQuant, InsertObservers
from fxmse.passes.probe import Probe, find_importances, find_probes, observe_weights

__all__ = ["calibrate", "convert", "observe_or_roll_back", "prepare", "quantize"]


def prepare(
    model: nn.Module | ExportedProgram,
    config: Config,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    share_across: tuple[str, ...] = (),
) -> GraphModule:
    """A graph of ``model`` with observers on the values that ``config`` wants quantized.

    Args:
        model: a GraphModule, an ExportedProgram, or any module together with ``example_inputs``; not changed.
        config: a config, a scheme, a preset's name, a mapping of a config's fields, or the path of a JSON or YAML file
            of one (:func:`fxmse.config.resolve_config`).
        example_inputs: a dict of keyword arguments, a tuple of positional ones, or a tensor.
        dynamic_shapes: for a module that is exported, as torch.export takes it; by default dimensions may vary.
        share_across: ops, "cat" or "add", whose observed inputs and output share their scale.

    Returns:
        The observed graph. It gives the same outputs as the model, and observes what runs through it.

    Raises:
        ValueError: a config that matches nothing or does not fit; a graph that was quantized already.
    """
    observed = capture(model, example_inputs, dynamic_shapes)
    InsertObservers(config, share_across)(observed)
    return observed


@torch.no_grad()
def calibrate(
    observed: GraphModule, batches: Iterable[Any] = (), *, compile: bool = False, progress: bool = True
) -> GraphModule:
    """Runs sample data through an observed graph; weights are observed first, once.

    Args:
        observed: a graph from :func:`prepare`; its observers are updated.
        batches: each a dict of keyword arguments, a tuple or list of positional ones, or a tensor. A scheme that
            quantizes weights only needs none.
        compile: compile model and observers together, as one graph for batches of any size; the first batch is run as
            it is. Pays where so many batches come that the model's own compilation does.
        progress: show a progress bar.

    Returns:
        ``observed``.

    Raises:
        ValueError: no batches where there are activations to observe; an empty batch; NaN or Inf in a weight or an
            activation. It names the sites, and the observers are as they were before that weight or batch, so that
            calibration can go on with the next.
    """
    probes = _get_probes(observed)
    weights = {probe.name: probe for probe in probes if probe.is_weight and not probe.waits_for_importance}
    observe_or_roll_back(weights, "the weights", lambda: observe_weights(observed))
    activations = [probe for probe in probes if not probe.is_weight]
    watchers: dict[str, Probe | Importance] = {probe.name: probe for probe in activations}
    watchers |= {str(node.target): importance for node, importance in find_importances(observed)}
    compiled = torch.compile(observed, fullgraph=True, dynamic=True) if compile else observed
    count = 0
    for count, batch in enumerate(tqdm(batches, desc="calibrate", unit="batch", disable=not progress), 1):
        args, kwargs = split_inputs(batch)
        if any(isinstance(leaf, Tensor) and leaf.numel() == 0 for leaf in tree_leaves((args, kwargs))):
            raise ValueError(f"batch {count} is empty: expected tensors of at least one element")
        # The first batch gives the observers their states, and what a graph is compiled for changes no more.
        run = compiled if count > 1 else observed
        uncompiled = functools.partial(observed, *args, **kwargs)
        observe_or_roll_back(watchers, f"batch {count}", functools.partial(run, *args, **kwargs), uncompiled)
    unseen = [probe.name for probe in activations if not probe.has_statistics]
    if unseen:
        raise ValueError(
            f"{count} batches of calibration data showed nothing to {'; '.join(unseen)}: pass batches that reach them"
        )
    return observed


def convert(observed: GraphModule) -> GraphModule:
    """The observed graph with fake-quantize nodes in place of its observers.

    Args:
        observed: a calibrated graph; not changed, so that its calibration can go on.

    Returns:
        A graph that shares the parameters. Its state dict has the qparams under compressed-tensors' names.

    Raises:
        ValueError: sites that saw nothing (all are named); a graph without observers.
    """
    _get_probes(observed)
    quantized = copy_graph_module(observed)
    FoldFakeQuant()(quantized)
    return quantized


def quantize(
    model: nn.Module | ExportedProgram,
    config: Config,
    batches: Iterable[Any] = (),
    *,
    dynamic_shapes: Any = None,
    share_across: tuple[str, ...] = (),
    compile: bool = False,
    progress: bool = True,
) -> GraphModule:
    """:func:`prepare`, :func:`calibrate` and :func:`convert` in a row; a module is exported with the first batch."""
    remaining = iter(batches)
    first = list(itertools.islice(remaining, 1))
    example = first[0] if first else None
    observed = prepare(model, config, example, dynamic_shapes=dynamic_shapes, share_across=share_across)
    total = len(batches) if isinstance(batches, Sized) else None
    bar = tqdm(itertools.chain(first, remaining), desc="calibrate", unit="batch", total=total, disable=not progress)
    return convert(calibrate(observed, bar, compile=compile, progress=False))


def _get_probes(observed: GraphModule) -> list[Probe]:
    probes = list(dict.fromkeys(probe for _, probe in find_probes(observed)))
    if probes:
        return probes
    if any(is_fake_quantize(node) for node in observed.graph.nodes):
        raise ValueError("the graph was folded already: it has fake-quantize nodes and no observers")
    raise ValueError("the graph has no observers: make it with fxmse.prepare")


def observe_or_roll_back(
    watchers: Mapping[str, Probe | Importance],
    what: str,
    run: Callable[[], object],
    uncompiled: Callable[[], object] | None = None,
) -> None:
    """Calls ``run``; whatever goes wrong, the states of ``watchers`` are as they were before."""
    before = {name: watcher.state for name, watcher in watchers.items()}
    try:
        run()
        _check_finite(watchers, before, what, uncompiled or run)
    except BaseException:
        _restore(watchers, before)
        raise


def _restore(watchers: Mapping[str, Probe | Importance], states: Mapping[str, Any]) -> None:
    for name, watcher in watchers.items():
        watcher.state = states[name]


def _check_finite(
    watchers: Mapping[str, Probe | Importance],
    before: Mapping[str, Any],
    what: str,
    run: Callable[[], object],
) -> None:
    """Raises ValueError naming the sites that saw NaN or Inf, and how many; one synchronisation where all is well."""
    tensors = [tensor.flatten() for watcher in watchers.values() for tensor in watcher.state.witnesses]
    if not tensors or torch.cat(tensors).isfinite().all():
        return
    bad = {n: w for n, w in watchers.items() if not all(tensor.isfinite().all() for tensor in w.state.witnesses)}
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
    sites = "; ".join(f"{name} {description}" for name, description in found.items())
    raise ValueError(f"NaN or Inf in {what}: {sites}. The observers are as they were before {what}")


def _note_non_finite(found: dict[str, str], name: str, watcher: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if not inputs[0].isfinite().all():
        found.setdefault(name, describe_non_finite(inputs[0]))
