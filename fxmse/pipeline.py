"""The whole path: prepare, calibrate, convert, and quantize for the three in a row."""

import functools
import itertools
from collections.abc import Iterable, Sized
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from tqdm.auto import tqdm

from fxmse.calibration.merging import agree_on_weights, check_alike, describe, merge_states, share_searches
from fxmse.calibration.observing import check_batches, get_probes, observe_batches, observe_weights
from fxmse.calibration.ranks import Ranks, check_group
from fxmse.capture.front_ends import capture, copy_graph_module
from fxmse.config import Config
from fxmse.passes import FoldBatchNorm, FoldFakeQuant, InsertObservers
from fxmse.passes.constants import find_free_weights, find_weights
from fxmse.passes.finishing import finish_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["calibrate", "convert", "prepare", "quantize"]


def prepare(
    model: nn.Module | ExportedProgram,
    config: Config,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    share_across: tuple[str, ...] = (),
    fold_batch_norm: bool = False,
    bias_correction: bool = False,
) -> GraphModule:
    """A graph of ``model`` with observers on the values that ``config`` wants quantized.

    Args:
        model: a GraphModule, an ExportedProgram, or any module together with ``example_inputs``; not changed.
        config: a config, a scheme, a preset's name, a mapping of a config's fields, or the path of a JSON or YAML file
            of one (:func:`fxmse.config.resolve_config`).
        example_inputs: a dict of keyword arguments, a tuple of positional ones, or a tensor.
        dynamic_shapes: for a module that is exported, as torch.export takes it; by default dimensions may vary.
        share_across: ops, "cat" or "add", whose observed inputs and output share their scale.
        fold_batch_norm: fold batch norms into the layers before them first, whose weights are then quantized with them
            (:class:`fxmse.passes.FoldBatchNorm`): what int8 kernels want.
        bias_correction: have :func:`convert` add E[x] (w - q(w)) to the bias of each layer whose weight w is quantized,
            x its inputs: so quantized weights do not move the means of outputs. Needs data; layers without a bias stay.

    Returns:
        The observed graph. It gives the same outputs as the model (with folded norms up to rounding), and observes
        what runs through it.

    Raises:
        ValueError: a config that matches nothing or does not fit; a graph that was quantized already.
    """
    observed = capture(model, example_inputs, dynamic_shapes)
    if fold_batch_norm:
        FoldBatchNorm()(observed)
    InsertObservers(config, share_across, bias_correction)(observed)
    return observed


@torch.no_grad()
def calibrate(
    observed: GraphModule,
    batches: Iterable[Any] = (),
    *,
    compile: bool = False,
    progress: bool = True,
    group: "ProcessGroup | None" = None,
    timeout: timedelta = timedelta(minutes=30),
) -> GraphModule:
    """Runs sample data through an observed graph; weights are observed first, once.

    With ``group`` that is the work of several processes, each of which calls this with an equal graph and a part of the
    data. What they saw is merged: counts, minima and maxima are those of one process that is shown everything, bit for
    bit; moving averages are averaged, each weighed by how many batches it is of. All ranks end with equal observers,
    which have seen this call's data once and what they had seen before once.

    Args:
        observed: a graph from :func:`prepare`; its observers are updated.
        batches: each a dict of keyword arguments, a tuple or list of positional ones, or a tensor. A scheme that
            quantizes weights only needs none. With ``group``, this rank's part: as many as there are, or none.
        compile: compile model and observers together, as one graph for batches of any size; the first batch is run as
            it is. Pays where so many batches come that the model's own compilation does.
        progress: show a progress bar (of a group, on its first rank).
        group: the processes that calibrate together, of any backend, as ``torch.distributed.group.WORLD`` (which is
            None before ``init_process_group``). Their connections of gloo's are made for this call.
        timeout: with ``group``, how long a rank waits for another one: at least as long as the slowest may come, or
            have to do, after the fastest.

    Returns:
        ``observed``.

    Raises:
        ValueError: no batches where there are activations to observe; an empty batch; NaN or Inf in a weight or an
            activation. It names the sites, and the observers are as they were before that weight or batch, so that
            calibration can go on with the next. With ``group``, those of activations are as they were before this
            call, on every rank, after any error. Or the ranks' graphs or states differ; it names the first difference.
        RuntimeError: another rank failed, with its number and what it said; or its process ended, or did not answer
            in time.
    """
    check_batches(batches)
    group = check_group(group)
    is_shown = progress and (group is None or group.rank() == 0)
    bar = tqdm(batches, desc="calibrate", unit="batch", disable=not is_shown)
    if group is None:
        observe_weights(find_free_weights(observed))
        num_batches = observe_batches(observed, bar, compile)
    else:
        with Ranks(group, timeout) as ranks:
            check_alike(ranks, {"the call": "calibrate", **describe(observed)})
            weights = find_free_weights(observed)
            agree_on_weights(ranks, weights)
            unknown = {probe: rows for probe, rows in weights.items() if not probe.knows(rows)}
            share_searches(ranks, unknown, observe_weights)
            run = functools.partial(observe_batches, observed, ranks.watch(bar), compile)
            num_batches = merge_states(ranks, observed, run)
    unseen = [probe.name for probe in get_probes(observed) if not probe.is_weight and not probe.has_statistics]
    if unseen:
        raise ValueError(
            f"{num_batches} batches of calibration data showed nothing to {'; '.join(unseen)}: pass batches that reach "
            "them"
        )
    return observed


@torch.no_grad()
def convert(
    observed: GraphModule, *, group: "ProcessGroup | None" = None, timeout: timedelta = timedelta(minutes=30)
) -> GraphModule:
    """The observed graph with fake-quantize nodes in place of its observers.

    Args:
        observed: a calibrated graph; not changed, so that its calibration can go on.
        group: as in :func:`calibrate`, after which all ranks can convert alone, too: some weights are searched here, by
            the importance of their channels or for the global scale that they share, and a group shares them out.
        timeout: as in :func:`calibrate`.

    Returns:
        A graph that shares the parameters. Its state dict has the qparams under compressed-tensors' names.

    Raises:
        ValueError: sites that saw nothing (all are named); a graph without observers; with ``group``, ranks whose
            graphs or states differ.
        RuntimeError: as in :func:`calibrate`.
    """
    get_probes(observed)
    if group := check_group(group):
        with Ranks(group, timeout) as ranks:
            check_alike(ranks, {"the call": "convert", **describe(observed)})
            agree_on_weights(ranks, find_weights(observed))
            finish_weights(observed, functools.partial(share_searches, ranks))
            ranks.leave()
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
    fold_batch_norm: bool = False,
    bias_correction: bool = False,
    compile: bool = False,
    progress: bool = True,
) -> GraphModule:
    """:func:`prepare`, :func:`calibrate` and :func:`convert` in a row; a module is exported with the first batch."""
    check_batches(batches)
    remaining = iter(batches)
    first = list(itertools.islice(remaining, 1))
    example = first[0] if first else None
    observed = prepare(
        model,
        config,
        example,
        dynamic_shapes=dynamic_shapes,
        share_across=share_across,
        fold_batch_norm=fold_batch_norm,
        bias_correction=bias_correction,
    )
    total = len(batches) if isinstance(batches, Sized) else None
    bar = tqdm(itertools.chain(first, remaining), desc="calibrate", unit="batch", total=total, disable=not progress)
    return convert(calibrate(observed, bar, compile=compile, progress=False))
