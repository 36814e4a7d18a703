"""From a folder of float weights to a compressed-tensors checkpoint, part by part."""

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm.auto import tqdm

from fxmse.calibration.observing import check_batches, check_filled, observe_batches, split_batch
from fxmse.calibration.progress import Peeked
from fxmse.calibration.ranks import check_group, join
from fxmse.config import CONFIG_KEY, Config, Site, resolve_config
from fxmse.inputs.weights import Skeleton, load_skeleton
from fxmse.outputs.checkpoint import (
    check_extra_files,
    check_replaceable,
    copy_tokenizer,
    read_biases,
    read_sites,
    warn_of_dtype,
)
from fxmse.outputs.experts import Sites
from fxmse.outputs.reporting import SiteReport, report
from fxmse.outputs.shards import Shards
from fxmse.outputs.space import check_space
from fxmse.passes.move_to_device import MoveToDevice
from fxmse.passes.parts import Part, cut, make_entry
from fxmse.passes.probe import find_inputs, find_probes, list_sites
from fxmse.passes.references import Reference, make_reference
from fxmse.passes.trimming import observes_activations
from fxmse.pipeline import calibrate, convert, prepare
from fxmse.search.compiling import settled
from fxmse.streaming.activations import Activations
from fxmse.streaming.fingerprints import describe_run, hash_batches
from fxmse.streaming.memory import Memory
from fxmse.streaming.warming import compiling_meanwhile
from fxmse.streaming.work import Work

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Job", "StreamOptions", "Workers", "plan_job", "quantize_checkpoint", "run_job"]

_PART_SIZE = 1 << 29
_CPU = torch.device("cpu")
# Scales that a search evaluates, or more: it decides about compilation.
_CANDIDATES = 20


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How a model is quantized part by part.

    Attributes:
        dynamic_shapes: as for ``fxmse.prepare``.
        part_size: bytes of weights that a part has at most, where that can be: one weight is not cut, and layers that
            share an observer are calibrated together. By default 512 MiB; with ``propagate="quantized"`` parts are as
            small as can be, so that each weight is calibrated on what all before it compute.
        propagate: what a part is calibrated on: "float", the values of the float model, or "quantized", those that the
            quantized parts before it compute. Within a part values are those of its float weights. ``output_mse`` then
            looks for the least change of a layer's output from that of the float model, and corrected biases bring its
            mean back to that; the float model's values are computed for it, too.
        moe_calibrate_all_experts: as for ``fxmse.prepare``.
        bias_correction: as for ``fxmse.prepare``.
        reports: whether weights are measured once they are quantized.

    Raises:
        ValueError: an argument that is out of range.
    """

    dynamic_shapes: Any = None
    part_size: int | None = None
    propagate: str = "float"
    moe_calibrate_all_experts: bool = True
    bias_correction: bool = False
    reports: bool = False

    def __post_init__(self) -> None:
        if self.propagate not in ("float", "quantized"):
            raise ValueError(f"propagate={self.propagate!r}: expected 'float' or 'quantized'")
        if self.part_size is not None and (not isinstance(self.part_size, int) or self.part_size < 1):
            raise ValueError(f"part_size={self.part_size!r}: expected a number of bytes")

    @property
    def max_bytes(self) -> int:
        """Of the weights of a part."""
        return self.part_size or (_PART_SIZE if self.propagate == "float" else 1)


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What works on a model, none of which changes what comes out.

    Attributes:
        device: what parts are run and searched on; by default where transformers loads a model: the CPU.
        group: the processes that do it together, as for ``fxmse.calibrate``.
        timeout: with ``group``, how long one waits for another.

    Raises:
        ValueError: a device that torch does not know, or a group that this process is not in.
    """

    device: str | torch.device | None = None
    group: "ProcessGroup | None" = None
    timeout: timedelta = timedelta(minutes=30)

    def __post_init__(self) -> None:
        check_group(self.group)
        try:
            torch.device(self.device or "cpu")
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"device={self.device!r}: expected one that torch knows, as 'cuda': {reason}") from None

    @property
    def own_device(self) -> torch.device:
        """The device."""
        return torch.device(self.device or "cpu")


@torch.no_grad()
def quantize_checkpoint(
    folder: str | os.PathLike[str],
    config: Config,
    batches: Iterable[Any] = (),
    *,
    out: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    resume: bool = True,
    trust_remote_code: bool = False,
    progress: bool = True,
    extra_files: Mapping[str, str] | None = None,
    device: str | torch.device | None = None,
    group: "ProcessGroup | None" = None,
    timeout: timedelta = timedelta(minutes=30),
    **options: Any,
) -> None:
    """Quantizes a model that need not fit into memory: from a Hugging Face folder to a compressed-tensors checkpoint.

    The model is traced without its weights and cut into parts. Each reads its weights, is calibrated by all batches,
    folded, compressed and written, and forgotten. The tensors are those of ``fxmse.quantize`` and
    ``save_pretrained``, bit for bit. Memory holds one part's weights, one batch's activations, and not much else.

    A run that ends early leaves what it has done in a hidden folder beside ``out``: the same call goes on from there.

    With ``group`` several processes do it together, each of which calls this with its part of the data: searches are
    shared out, what they saw is merged as by ``fxmse.calibrate``, and the first one writes. They see one file system.

    Args:
        folder: config.json and safetensors, in one file or several.
        config: as for ``fxmse.prepare``.
        batches: as for ``fxmse.calibrate``. They are run through only where activations are observed; what passes
            between parts is kept in files beside ``out``. With ``group``, this process's part, at least one.
        out: the checkpoint's folder; a quantized checkpoint that is there is replaced once the new one is complete.
        dtype: of the model; by default what transformers would load it in.
        resume: go on with what an earlier call with the same arguments has done; otherwise that is removed.
        trust_remote_code: run the code that the folder has for models that transformers has no class of.
        progress: show a progress bar.
        extra_files: the contents of more files for the checkpoint, by name: none that it has itself, nor in a folder.
        device: what parts are run and searched on, as "cuda"; their weights are moved there one part after the other.
        group: the processes that do this together, as for ``fxmse.calibrate``.
        timeout: with ``group``, how long one waits for another.
        options: those of :class:`StreamOptions`.

    Raises:
        ValueError: as ``fxmse.quantize`` and ``save_pretrained``, where possible before the first weight is read;
            weights that are missing; another process that writes the same folder; an unfinished run with other
            arguments; before the first search, batches that have other inputs than the first, and too little space.
    """
    stream_options, out = StreamOptions(**options), Path(out)
    workers = Workers(device=device, group=group, timeout=timeout)
    check_batches(batches)
    check_extra_files(extra_files or {})
    check_replaceable(out, folder)
    config = resolve_config(config)
    skeleton = load_skeleton(Path(folder), dtype, trust_remote_code=trust_remote_code)
    peeked = Peeked(batches)
    with compiling_meanwhile(config, skeleton.model, workers.own_device):
        run_job(
            plan_job(skeleton, config, *peeked.first, options=stream_options),
            peeked,
            out,
            resume=resume,
            progress=progress,
            make_files=lambda _: extra_files or {},
            workers=workers,
        )


class Job(NamedTuple):
    """All that is known of a run before a weight is read.

    Attributes:
        skeleton: the model.
        config: what is quantized how.
        options: how.
        shards: the checkpoint to be.
        entry: takes a batch, gives the values of the graph's inputs.
        inputs: their names.
        parts: the graph, which runs in this order.
        sites: all that is quantized.
        is_observed: whether data is needed.
        num_bytes: of the checkpoint's tensors.
        example_bytes: of the batch that the graph was traced with.
    """

    skeleton: Skeleton
    config: QuantizationConfig
    options: StreamOptions
    shards: Shards
    entry: GraphModule
    inputs: list[str]
    parts: list[Part]
    sites: list[Site]
    is_observed: bool
    num_bytes: int
    example_bytes: int


def plan_job(skeleton: Skeleton, config: Config, example: Any = None, *, options: StreamOptions) -> Job:
    """Traces a model without its weights, finds its sites and cuts it into parts.

    Raises as :func:`quantize_checkpoint`.

    Args:
        skeleton: the model.
        config: as for ``fxmse.prepare``.
        example: a batch to trace with; by default what transformers has for the model.
        options: the options.
    """
    check_filled(example, 1)
    example = dict(skeleton.model.dummy_inputs) if example is None else example
    observed = prepare(
        skeleton.model,
        config,
        example,
        dynamic_shapes=options.dynamic_shapes,
        moe_calibrate_all_experts=options.moe_calibrate_all_experts,
        bias_correction=options.bias_correction,
    )
    resolved = observed.meta[CONFIG_KEY]
    sites = list_sites(observed)
    shards = Shards(skeleton.model, resolved, sites, skeleton.weights.conversions)
    warn_of_dtype(shards.model)
    return Job(
        skeleton,
        resolved,
        options,
        shards,
        make_entry(observed),
        [node.name for node in observed.graph.find_nodes(op="placeholder")],
        cut(observed, options.max_bytes, skeleton.weights.list_fused(skeleton.model)),
        sites,
        observes_activations(observed),
        shards.measure(),
        _measure(example),
    )


@torch.no_grad()
def run_job(
    job: Job,
    batches: Iterable[Any],
    out: Path,
    *,
    resume: bool,
    progress: bool,
    make_files: Callable[[list[SiteReport]], Mapping[str, str]],
    workers: Workers,
) -> list[SiteReport]:
    """Does what :func:`quantize_checkpoint` promises, and returns the reports of weights, where they were asked for.

    Args:
        job: from :func:`plan_job`; its parts are used up.
        batches: as for :func:`quantize_checkpoint`.
        out: the checkpoint's folder.
        resume: as for :func:`quantize_checkpoint`.
        progress: show a progress bar.
        make_files: called with the reports; gives the contents of more files for the checkpoint, by name.
        workers: what works on it; of several processes the first has the reports.
    """
    peeked = Peeked(batches)
    if job.is_observed and not peeked.first:
        raise ValueError("no batches: the config has values that data has to be shown to")
    path = job.skeleton.path
    num_errors = _CANDIDATES * sum(parameter.numel() for parameter in job.skeleton.model.parameters())
    together = join(check_group(workers.group), workers.timeout)
    with settled(num_errors), together as ranks, Work(out, ranks) as work:
        if not resume:
            work.clear()
        digest = hashlib.sha256()
        entered = _enter(work, job, hash_batches(peeked, digest)) if job.is_observed else 0
        data = ranks.meet(digest.hexdigest())
        facts = {"data": data, "dtype": job.skeleton.weights.dtype, **asdict(job.options)}
        work.resume(describe_run(path, job.config, **facts))
        run = _Run(work, job, workers)
        meanwhile = sum(ranks.meet(run.foresee_passing(entered / (job.example_bytes or 1))))
        check_space(out, max(job.num_bytes - work.num_written, 0), meanwhile)  # headers of files may be more
        sizes = [run.count(number) for number in range(len(run.own))]
        is_shown = progress and work.is_first
        with tqdm(total=sum(sizes), desc="quantize", unit="B", unit_scale=True, disable=not is_shown) as bar:
            for number, size in enumerate(sizes):
                if number >= len(work.done):
                    run.quantize(number)
                bar.update(size)
        reports = [SiteReport(**fields) for part in work.done for fields in part["reports"]]

        def write_rest(folder: Path) -> None:
            job.shards.write_index(folder, [file for part in work.done for file in part["files"]])
            copy_tokenizer(path, folder)
            for name, content in make_files(reports).items():
                (folder / name).write_text(content, encoding="utf-8")

        work.finish(write_rest)
    return reports


def _enter(work: Work, job: Job, batches: Iterable[Any]) -> int:
    """Keeps what passes to the first part: the batches' values, by the names of the graph's inputs.

    Returns:
        The bytes of the batches.
    """
    work.activations.drop(0)
    entered = 0
    for number, batch in enumerate(batches):
        args, kwargs = split_batch(job.entry, batch, number + 1)
        work.activations.write(0, number, dict(zip(job.inputs, job.entry(*args, **kwargs), strict=True)))
        entered += _measure(batch)
    return entered


def _measure(batch: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))


class _Run:
    """The parts of a model, and behind them what no part reads."""

    def __init__(self, work: Work, job: Job, workers: Workers) -> None:
        self.work, self.weights, self.shards = work, job.skeleton.weights, job.shards
        self.device = workers.own_device
        self.together: dict[str, Any] = {"group": workers.group, "timeout": workers.timeout, "progress": False}
        self.propagate = job.options.propagate if job.is_observed else ""
        # Whether what passes between parts passes in float, too.
        self.is_paired = self.propagate == "quantized" and any(_takes_references(part) for part in job.parts)
        # The bytes that pass to each part, and from the last one, of the example.
        self._passing = [job.example_bytes, *(part.carried_bytes * (1 + self.is_paired) for part in job.parts)]
        self.parts: list[Part | None] = list(job.parts)
        job.parts.clear()
        self.reports = job.options.reports
        self._memory = Memory()
        self._waiting = set(self.weights.names)
        # The names of what is written with each.
        self.own = [self._take(part.graph_module) for part in self.parts if part]
        self.own += [sorted(self._waiting)] if self._waiting else []

    def _take(self, graph_module: GraphModule) -> list[str]:
        names = set(self._list_parameters(graph_module)) & self._waiting
        self._waiting -= names
        return sorted(names)

    def _list_parameters(self, graph_module: GraphModule) -> dict[str, nn.Parameter]:
        return {self.weights.find(p): p for p in graph_module.parameters() if p.numel()}

    def count(self, number: int) -> int:
        """The bytes of the float tensors that are written with a part."""
        return sum(self.weights.sizes[name] for name in self.own[number])

    def foresee_passing(self, num_examples: float) -> int:
        """About how many bytes more than now will pass between parts, of this process's data, when they are most.

        What passes to a part stays until what passes from it is there. Values are taken to grow as batches do.

        Args:
            num_examples: how many times the size of the traced example all batches have.
        """
        most = max(map(sum, itertools.pairwise(self._passing[len(self.work.done) :])), default=0)
        return max(round(most * num_examples) - self.work.num_passing, 0)

    def quantize(self, number: int) -> None:
        """Calibrates a part, writes what it has of the checkpoint, and forgets it."""
        start = time.perf_counter()
        loaded: dict[str, Tensor] = {}
        sites: Sites = {}
        reports: list[SiteReport] = []
        if number < len(self.parts):
            loaded, sites, reports = self._calibrate(number)
        self._memory.give_back(self.count(number))  # what is to be written needs room itself
        known = {site for part in self.work.done for site in part["sites"]}
        sites = {site: qparams for site, qparams in sites.items() if site not in known}
        files = []
        if self.work.is_first and (self.own[number] or sites):
            loaded |= self.weights.load([name for name in self.own[number] if name not in loaded])
            own = {name: loaded[name] for name in self.own[number]}
            files = [f"model-{number + 1:05}-of-{len(self.own):05}.safetensors"]
            self.shards.write(own, sites, self.work.folder / files[0])
        note = {
            "sites": sorted(sites),
            "seconds": round(time.perf_counter() - start, 3),
            "reports": [asdict(report) for report in reports],
        }
        self.work.note(note, files, number + 1)

    def _calibrate(self, number: int) -> tuple[dict[str, Tensor], Sites, list[SiteReport]]:
        """The weights that a part reads, the qparams of its sites, and their reports; what later parts need is kept."""
        part, self.parts[number] = self.parts[number], None  # its observers go with it
        assert part
        parameters = self._list_parameters(part.graph_module)
        hollow = {name: parameter.data for name, parameter in parameters.items()}
        observes = bool(self.propagate) and observes_activations(part.graph_module)
        runs = bool(self.propagate) and (observes or bool(part.carried))
        MoveToDevice(self.device)(part.graph_module)
        tensors = self.weights.fill(parameters, align=runs, device=self.device)
        for activations in (self.work.activations, self.work.floats):
            activations.drop(number + 1)  # of a run that was ended
        try:
            reference = make_reference(part.graph_module) if self.is_paired and runs else None
            feed = _Feed(self.work, number, part, self.device, reference)
            on_outputs = feed.keep if self.propagate == "float" else None
            has_probes = any(find_probes(part.graph_module))
            if has_probes:
                calibrate(part.graph_module, feed if runs else (), on_outputs=on_outputs, **self.together)
            elif runs and on_outputs:
                observe_batches(part.graph_module, feed, False, on_outputs)
            quantized = convert(part.graph_module, **self.together) if has_probes else part.graph_module
            if runs and self.propagate == "quantized":
                observe_batches(quantized, feed, False, feed.keep)
            sites = read_sites(quantized)[0] if has_probes else {}
            biases = read_biases(quantized, sites)
            tensors |= {name: bias for name, bias in biases.items() if name in tensors}
            reports = report(quantized) if self.reports and self.work.is_first and has_probes else []
            return _move(tensors, _CPU), _move(sites, _CPU), reports
        finally:
            for name, parameter in parameters.items():
                parameter.data = hollow[name]


class _Feed:
    """A part's inputs, batch by batch, as often as they are asked for; and what becomes of what it returns."""

    def __init__(self, work: Work, number: int, part: Part, device: torch.device, reference: Reference | None) -> None:
        self.work, self.number, self.part, self.device = work, number, part, device
        self._reference = reference
        self._values: dict[str, Any] = {}
        self._batch = -1

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for batch, values in enumerate(self.work.activations.read_all(self.number)):
            if self._reference:
                self._refer(self._reference, batch)
            self._batch, self._values = batch, values
            yield self._select(values)
        self._reference = None  # all is kept, and whoever asks again has no use for it

    def _select(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(_move(values.get(name), self.device) for name in self.part.inputs)

    def _refer(self, reference: Reference, batch: int) -> None:
        """Runs the part in float, which observers expect then, and keeps what passes to the next part."""
        # What goes into the first part is what it is.
        values = (self.work.floats if self.number else self.work.activations).read(self.number, batch)
        outputs = reference.run(*self._select(values))
        self._keep(self.work.floats, batch, values, outputs)

    def keep(self, outputs: tuple[Any, ...]) -> None:
        """Keeps what passes to the next part: of this part's outputs, and of what passed to it."""
        self._keep(self.work.activations, self._batch, self._values, outputs)

    def _keep(self, activations: Activations, batch: int, values: Mapping[str, Any], outputs: tuple[Any, ...]) -> None:
        known = {**values, **dict(zip(self.part.outputs, _move(outputs, _CPU), strict=True))}
        activations.write(self.number + 1, batch, {name: known[name] for name in self.part.carried})


def _takes_references(part: Part) -> bool:
    return any(inputs.takes_references for _, inputs in find_inputs(part.graph_module))


def _move(values: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), values)
