"""The whole path: prepare, calibrate, convert, and quantize for the three in a row."""

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from datetime import timedelta
from operator import length_hint
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from fxmse.calibration.merging import agree_on_weights, check_alike, describe, merge_states, share_searches
from fxmse.calibration.observing import (
    check_batches,
    check_filled,
    check_seen,
    get_probes,
    observe_batches,
    observe_weights,
)
from fxmse.calibration.progress import Peeked, show_batches, visit_weights
from fxmse.calibration.ranks import Ranks, check_group
from fxmse.capture.evaluation import refuse_training
from fxmse.capture.front_ends import capture, check_graph, copy_graph_module
from fxmse.config import Config
from fxmse.passes import FoldBatchNorm, FoldFakeQuant, InsertObservers
from fxmse.passes.constants import find_free_weights, find_weights
from fxmse.passes.finishing import finish_weights
from fxmse.passes.probe import Probe, check_unobserved

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torchao.quantization.pt2e.quantizer import Quantizer

__all__ = ["calibrate", "convert", "prepare", "quantize"]


def prepare(
    model: nn.Module | ExportedProgram,
    config: Config | None = None,
    example_inputs: Any = None,
    *,
    quantizer: "Quantizer | None" = None,
    dynamic_shapes: Any = None,
    share_across: tuple[str, ...] = (),
    fold_batch_norm: bool = False,
    moe_calibrate_all_experts: bool = True,
    bias_correction: bool = False,
) -> GraphModule:
    """A graph of ``model`` with observers on the values that ``config`` wants quantized.

    Args:
        model: a GraphModule, an ExportedProgram, or any module together with ``example_inputs``; not changed.
        config: a config, a scheme, a preset's name, a mapping of a config's fields, or the path of a JSON or YAML file
            of one (:func:`fxmse.config.resolve_config`).
        example_inputs: a dict of keyword arguments, a tuple of positional ones, or a tensor.
        quantizer: one of torchao's, as X86InductorQuantizer, instead of ``config``: what it annotates is quantized, and
            batch norms are folded first, as ``prepare_pt2e`` does.
        dynamic_shapes: for a module that is exported, as torch.export takes it; by default dimensions may vary.
        share_across: ops, "cat" or "add", whose observed inputs and output share their scale.
        fold_batch_norm: fold batch norms into the layers before them first, whose weights are then quantized with them
            (:class:`fxmse.passes.FoldBatchNorm`): what int8 kernels want.
        moe_calibrate_all_experts: show observers of what experts read all tokens at all experts, as llm-compressor
            does; outputs stay those of the experts that were chosen. Costs running all experts in each batch, where
            anything is observed there.
        bias_correction: have :func:`convert` add E[x] (w - q(w)) to the bias of each layer whose weight w is quantized,
            x its inputs: so quantized weights do not move the means of outputs. Needs data; layers without a bias stay.

    Returns:
        The observed graph. It gives the same outputs as the model (with folded norms up to rounding), and observes
        what runs through it.

    Raises:
        ValueError: a config that matches nothing or does not fit; a graph that has observers, or was quantized already.
    """
    check_unobserved(model)
    insert = InsertObservers(
        config, share_across, moe_calibrate_all_experts, bias_correction=bias_correction, quantizer=quantizer
    )
    observed = capture(model, example_inputs, dynamic_shapes)
    if fold_batch_norm or quantizer is not None:
        FoldBatchNorm()(observed)
    insert(observed)
    return observed


@torch.no_grad()
def calibrate(
    observed: GraphModule,
    batches: Iterable[Any] = (),
    *,
    compile: bool = False,
    progress: bool = True,
    on_outputs: Callable[[Any], None] | None = None,
    group: "ProcessGroup | None" = None,
    timeout: timedelta = timedelta(minutes=30),
) -> GraphModule:
    """Runs sample data through an observed graph; weights are observed first, once.

    Where no activations are observed, no batch is run.

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
        progress: show progress bars, over weights and over batches (of a group, on its first rank).
        on_outputs: called with what the graph returns for each batch. Without it what only the outputs need is not run,
            as a language model's head.
        group: the processes that calibrate together, of any backend, as ``torch.distributed.group.WORLD`` (which is
            None before ``init_process_group``). Their connections of gloo's are made for this call.
        timeout: with ``group``, how long a rank waits for another one: at least as long as the slowest may come, or
            have to do, after the fastest.

    Returns:
        ``observed``.

    Raises:
        ValueError: no batches where there are activations to observe; an empty batch; a graph that computes as in
            training mode; a default dtype other than float32; NaN or Inf in a weight or an activation. It names the
            sites, and the observers are as they were before that weight or batch, so that calibration can go on with
            the next. With ``group``, those of activations are as they were before this call, on every rank, after any
            error. Or the ranks' graphs or states differ; it names the first difference.
        RuntimeError: another rank failed, with its number and what it said; or its process ended, or did not answer
            in time.
    """
    check_graph(observed, "fxmse.prepare")
    check_batches(batches)
    refuse_training(observed, "Make the observed graph with fxmse.prepare, or trace the model after model.eval()")
    group = check_group(group)
    is_shown = progress and (group is None or group.rank() == 0)
    # Closed whatever happens, so that what is printed next begins a line of its own.
    with closing(show_batches(batches, is_shown)) as bar:
        if group is None:
            if length_hint(batches, 1) == 0:
                check_seen(observed, 0)  # before the search
            observe_weights(find_free_weights(observed), is_shown)
            num_batches = observe_batches(observed, bar, compile, on_outputs)
        else:
            with Ranks(group, timeout) as ranks:
                check_alike(ranks, {"the call": "calibrate", **describe(observed)})
                weights = find_free_weights(observed)
                agree_on_weights(ranks, weights)
                unknown = {probe: rows for probe, rows in weights.items() if not probe.knows(rows)}
                share_searches(ranks, unknown, functools.partial(observe_weights, is_shown=is_shown))
                run = functools.partial(observe_batches, observed, ranks.watch(bar), compile, on_outputs)
                num_batches = merge_states(ranks, observed, run)
    check_seen(observed, num_batches)
    return observed


@torch.inference_mode(False)
@torch.no_grad()
def convert(
    observed: GraphModule,
    *,
    progress: bool = True,
    group: "ProcessGroup | None" = None,
    timeout: timedelta = timedelta(minutes=30),
) -> GraphModule:
    """The observed graph with fake-quantize nodes in place of its observers.

    Args:
        observed: a calibrated graph; not changed, so that its calibration can go on.
        progress: show a progress bar over the weights that are searched here.
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
    check_graph(observed, "fxmse.prepare")
    probes = get_probes(observed)
    group = check_group(group)
    is_shown = progress and (group is None or group.rank() == 0)

    def search_each(weights: Mapping[Probe, Tensor], search: Callable[[Mapping[Probe, Tensor]], None]) -> None:
        visit_weights(weights, lambda probe, rows: search({probe: rows}), is_shown)

    if group:
        with Ranks(group, timeout) as ranks:
            check_alike(ranks, {"the call": "convert", **describe(observed)})
            agree_on_weights(ranks, find_weights(observed))
            finish_weights(
                observed,
                lambda weights, search: share_searches(ranks, weights, lambda own: search_each(own, search)),
            )
            ranks.leave()
    elif all(probe.is_weight or probe.has_statistics for probe in probes):  # otherwise folding says what saw nothing
        finish_weights(observed, search_each)
    quantized = copy_graph_module(observed)
    FoldFakeQuant()(quantized)
    return quantized


def quantize(
    model: nn.Module | ExportedProgram,
    config: Config | None = None,
    batches: Iterable[Any] = (),
    *,
    quantizer: "Quantizer | None" = None,
    dynamic_shapes: Any = None,
    share_across: tuple[str, ...] = (),
    fold_batch_norm: bool = False,
    moe_calibrate_all_experts: bool = True,
    bias_correction: bool = False,
    compile: bool = False,
    progress: bool = True,
) -> GraphModule:
    """:func:`prepare`, :func:`calibrate` and :func:`convert` in a row; a module is exported with the first batch."""
    check_batches(batches)
    peeked = Peeked(batches)
    example = peeked.first[0] if peeked.first else None
    check_filled(example, 1)
    observed = prepare(
        model,
        config,
        example,
        quantizer=quantizer,
        dynamic_shapes=dynamic_shapes,
        share_across=share_across,
        fold_batch_norm=fold_batch_norm,
        moe_calibrate_all_experts=moe_calibrate_all_experts,
        bias_correction=bias_correction,
    )
    return convert(calibrate(observed, peeked, compile=compile, progress=progress), progress=progress)
