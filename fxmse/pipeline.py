"""The whole path: prepare, calibrate, convert, and quantize for the three in a row."""

import functools
import itertools
from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from fxmse.capture import capture, copy_graph_module, split_inputs
from fxmse.observers import State, describe_non_finite
from fxmse.ops import FAKE_QUANTIZE
from fxmse.passes import FoldFakeQuant, InsertObservers
from fxmse.passes.probe import Probe, find_probes, observe_weights

__all__ = ["calibrate", "convert", "prepare", "quantize"]


def prepare(
    model: nn.Module | ExportedProgram,
    config: QuantizationConfig | QuantizationScheme | str,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
) -> GraphModule:
    """A graph of ``model`` with observers on the values that ``config`` wants quantized.

    Args:
        model: a GraphModule, an ExportedProgram, or any module together with ``example_inputs``; not changed.
        config: a config, a scheme, or a preset's name.
        example_inputs: a dict of keyword arguments, a tuple of positional ones, or a tensor.
        dynamic_shapes: for a module that is exported, as torch.export takes it; by default dimensions may vary.

    Returns:
        The observed graph. It gives the same outputs as the model, and observes what runs through it.

    Raises:
        ValueError: a config that matches nothing or does not fit; a graph that was quantized already.
    """
    observed = capture(model, example_inputs, dynamic_shapes)
    InsertObservers(config)(observed)
    return observed


@torch.no_grad()
def calibrate(observed: GraphModule, batches: Iterable[Any] = (), *, progress: bool = True) -> GraphModule:
    """Runs sample data through an observed graph; weights are observed first, once.

    Args:
        observed: a graph from :func:`prepare`; its observers are updated.
        batches: each a dict of keyword arguments, a tuple or list of positional ones, or a tensor. A scheme that
            quantizes weights only needs none.
        progress: show a progress bar.

    Returns:
        ``observed``.

    Raises:
        ValueError: no batches where there are activations to observe; an empty batch; NaN or Inf in a weight or an
            activation. It names the sites, and the observers are as they were before that weight or batch, so that
            calibration can go on with the next.
    """
    probes = _get_probes(observed)
    _observe_or_roll_back([p for p in probes if p.is_weight], "the weights", lambda: observe_weights(observed))
    activations = [probe for probe in probes if not probe.is_weight]
    count = 0
    for count, batch in enumerate(tqdm(batches, desc="calibrate", unit="batch", disable=not progress), 1):
        args, kwargs = split_inputs(batch)
        if any(isinstance(leaf, Tensor) and leaf.numel() == 0 for leaf in tree_leaves((args, kwargs))):
            raise ValueError(f"batch {count} is empty: expected tensors of at least one element")
        _observe_or_roll_back(activations, f"batch {count}", functools.partial(observed, *args, **kwargs))
    unseen = [probe.name for probe in activations if not probe.observer.has_statistics]
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
    observe_weights(quantized)
    FoldFakeQuant()(quantized)
    return quantized


def quantize(
    model: nn.Module | ExportedProgram,
    config: QuantizationConfig | QuantizationScheme | str,
    batches: Iterable[Any] = (),
    *,
    dynamic_shapes: Any = None,
    progress: bool = True,
) -> GraphModule:
    """:func:`prepare`, :func:`calibrate` and :func:`convert` in a row; a module is exported with the first batch."""
    remaining = iter(batches)
    first = list(itertools.islice(remaining, 1))
    observed = prepare(model, config, first[0] if first else None, dynamic_shapes=dynamic_shapes)
    total = len(batches) if isinstance(batches, Sized) else None
    bar = tqdm(itertools.chain(first, remaining), desc="calibrate", unit="batch", total=total, disable=not progress)
    return convert(calibrate(observed, bar, progress=False))


def _get_probes(observed: GraphModule) -> list[Probe]:
    probes = list(dict.fromkeys(probe for _, probe in find_probes(observed)))
    if probes:
        return probes
    if any(node.target is FAKE_QUANTIZE for node in observed.graph.nodes):
        raise ValueError("the graph was folded already: it has fake-quantize nodes and no observers")
    raise ValueError("the graph has no observers: make it with fxmse.prepare")


def _observe_or_roll_back(probes: list[Probe], what: str, run: Callable[[], object]) -> None:
    """Calls ``run``; whatever goes wrong, the observers of ``probes`` are as they were before."""
    before = [probe.observer.state for probe in probes]
    try:
        run()
        _check_finite(probes, before, what, run)
    except BaseException:
        for probe, state in zip(probes, before, strict=True):
            probe.observer.state = state
        raise


def _check_finite(probes: list[Probe], before: list[State], what: str, run: Callable[[], object]) -> None:
    """Raises ValueError naming the sites that saw NaN or Inf, and how many; one synchronisation where all is well."""
    tensors = [tensor.flatten() for probe in probes for tensor in probe.observer.state.tensors]
    if not tensors or torch.cat(tensors).isfinite().all():
        return
    bad = [probe for probe in probes if not all(t.isfinite().all() for t in probe.observer.state.tensors)]
    # The values themselves are gone: look at them again while the same data runs once more.
    found: dict[str, str] = {}

    def look(probe: Probe, inputs: tuple[Tensor]) -> None:
        if not inputs[0].isfinite().all():
            found.setdefault(probe.name, describe_non_finite(inputs[0]))

    for probe, state in zip(probes, before, strict=True):
        probe.observer.state = state
    hooks = [probe.register_forward_pre_hook(look) for probe in bad]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    sites = "; ".join(f"{name} {description}" for name, description in found.items())
    raise ValueError(f"NaN or Inf in {what}: {sites}. The observers are as they were before {what}")
