"""What each format of each value costs a model: by its gradient, and one value at a time."""

import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

from fxmse.analysis.candidates import fit, name_candidates
from fxmse.analysis.divergences import Drawn, Sums, check_divergence, make_divergence
from fxmse.analysis.layers import find_groups
from fxmse.analysis.meters import Meter, instrument
from fxmse.analysis.results import Analysis, DepthError, SiteError
from fxmse.calibration.buffers import own_buffers
from fxmse.calibration.observing import check_batches
from fxmse.capture.attributes import find_owner
from fxmse.capture.front_ends import capture, split_inputs
from fxmse.config import Config, describe_format
from fxmse.passes import InsertObservers
from fxmse.passes.probe import check_unobserved
from fxmse.passes.stand_ins import find_module
from fxmse.passes.versions import Versions
from fxmse.pipeline import calibrate

__all__ = ["AnalysisOptions", "Runs", "analyze", "analyze_candidates", "prepare_runs"]


@dataclass(frozen=True, kw_only=True)
class AnalysisOptions:
    """How a model is analyzed.

    Attributes:
        exact: measure each value's error, too, with it alone quantized. That takes a run of the model for each value,
            candidate and batch; with ``progress`` it is said before how many these are and how long they may take.
        loss: called with what the model returns and the batch (a mapping of inputs by their names), gives a float
            tensor of one element. Its change takes the place of the divergence; ``model_error`` is the mean over
            batches of its squared change to first order.
        divergence: "kl", between the distributions that logits stand for, or "squared", of outputs over their squares.
            By default "kl" where the model's outputs have "logits".
        output: the name of the output that counts; by default the logits, or else all of them.
        mask: the name of the input that is 0 where a token is padding, whose outputs do not count.
        dtype: that a checkpoint has floats in, for sizes; by default that of each weight.
        dynamic_shapes: as for :func:`fxmse.prepare`.
        moe_calibrate_all_experts: as for :func:`fxmse.prepare`.
        seed: of the random gradients.
        progress: show progress bars.

    Raises:
        ValueError: options that go together with none of the others.
    """

    exact: bool = False
    loss: Callable[[Any, Any], Tensor] | None = None
    divergence: str | None = None
    output: str | None = None
    mask: str | None = None
    dtype: torch.dtype | None = None
    dynamic_shapes: Any = None
    moe_calibrate_all_experts: bool = True
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        check_divergence(self.divergence, self.loss, self.output)


def analyze(
    model: nn.Module | ExportedProgram, config: Config | Sequence[Config], batches: Iterable[Any], **options: Any
) -> Analysis:
    """Which values suffer from which formats: the error of each value, of its op's output, and of the model's.

    The formats of all candidates are searched in one calibration. One run forwards and backwards of the float graph a
    batch then gives the model's errors of all values and candidates at once, to second order: the outputs are given
    random gradients whose covariance is the divergence's curvature, and (gradient . change) ** 2 is added up, change
    being what quantization does to a row of the value.

    Args:
        model: as for :func:`fxmse.prepare`; not changed.
        config: a config, or a list or tuple of candidates. What a candidate does not fit is left out of it; a warning
            names it.
        batches: as for :func:`fxmse.calibrate`, at least one. A module is exported with the first.
        options: those of :class:`fxmse.analysis.sensitivity.AnalysisOptions`.

    Raises:
        ValueError: as of :func:`fxmse.prepare` and :func:`fxmse.calibrate`; no batches; candidates that are the same;
            a loss or outputs that are not finite.
    """
    several = isinstance(config, list | tuple)
    candidates = name_candidates(config if several else [config])  # type: ignore[arg-type]
    return analyze_candidates(model, candidates, batches, AnalysisOptions(**options))


@torch.no_grad()
def analyze_candidates(
    model: nn.Module | ExportedProgram,
    candidates: dict[str, QuantizationConfig],
    batches: Iterable[Any],
    options: AnalysisOptions,
) -> Analysis:
    """:func:`analyze` of configs by their names."""
    clock = _Clock()
    runs = prepare_runs(model, candidates, batches, options)
    clock.note("calibration")
    totals, depth = runs.measure_depth()
    clock.note("depth")
    errors = runs.measure_gradients()
    clock.note("gradients")
    exact_errors = {}
    if options.exact:
        exact_errors = runs.measure_each(clock.seconds["depth"])
        clock.note("exact")
    sites = tuple(runs.describe(meter, errors[meter], exact_errors.get(meter)) for meter in runs.meters)
    num_batches = len(runs.batches)
    return Analysis(runs.divergence.unit, runs.names, sites, depth, totals, runs.groups, num_batches, clock.seconds)


def prepare_runs(
    model: nn.Module | ExportedProgram,
    candidates: dict[str, QuantizationConfig],
    batches: Iterable[Any],
    options: AnalysisOptions,
) -> "Runs":
    """A model's graph, calibrated for all candidates, with all that measures in it."""
    check_unobserved(model)
    check_batches(batches)
    batches = list(batches)
    if not batches:
        raise ValueError("no batches: what a format costs the model is seen with data alone")
    observed = capture(model, batches[0], options.dynamic_shapes)
    configs, refused = fit(observed, candidates)
    if refused:
        left = "; ".join(f"{name} without {modules}" for name, modules in refused.items())
        warnings.warn(f"candidates that do not fit all modules: {left}", UserWarning, stacklevel=4)
    first, *others = configs.values()
    insert = InsertObservers(first, moe_calibrate_all_experts=options.moe_calibrate_all_experts, others=tuple(others))
    insert(observed)
    calibrate(observed, _Copied(observed, batches), progress=options.progress)
    return Runs(observed, tuple(candidates), batches, options)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def note(self, what: str) -> None:
        """Time since the last note went by with ``what``."""
        now = time.perf_counter()
        self.seconds[what], self._last = now - self._last, now


class _Copied:
    """Batches for a graph that may be run with them again: copies, where it writes its inputs."""

    def __init__(self, graph_module: GraphModule, batches: list[Any]) -> None:
        versions = Versions(graph_module)
        inputs = graph_module.graph.find_nodes(op="placeholder")
        self.is_written = any(versions.is_written(node) for node in inputs)
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return map(self.copy, self._batches)

    def copy(self, batch: Any) -> Any:
        """A batch that the graph may write."""
        return tree_map_only(Tensor, torch.clone, batch) if self.is_written else batch


class Runs:
    """The runs of a calibrated graph in which values are quantized on demand.

    Args:
        observed: the graph.
        names: of its configs.
        batches: at least one.
        options: how it is analyzed.
    """

    def __init__(
        self, observed: GraphModule, names: tuple[str, ...], batches: list[Any], options: AnalysisOptions
    ) -> None:
        self.names, self.batches, self.progress = names, batches, options.progress
        self.groups = find_groups(observed, names, options.dtype)
        self.instruments = instrument(observed)
        self.graph_module, self.meters = self.instruments.graph_module, self.instruments.meters
        self._copied = _Copied(observed, batches)
        self._inputs = [str(node.target) for node in self.graph_module.graph.find_nodes(op="placeholder")]
        # On the CPU, so that a seed means the same on every device.
        self.generator = torch.Generator().manual_seed(options.seed)
        self.divergence = make_divergence(
            self.run(batches[0]), options.divergence, options.loss, options.output, options.mask
        )

    def run(self, batch: Any, meters: Sequence[Meter] = ()) -> Any:
        """What the model gives with some values quantized; the graph's buffers stay as they are."""
        args, kwargs = split_inputs(self._copied.copy(batch))
        for meter in meters:
            meter.is_active = True
        try:
            with own_buffers(self.graph_module):
                return self.graph_module(*args, **kwargs)
        finally:
            for meter in meters:
                meter.is_active = False

    def measure(self, expected: Any, batch: Any, meters: Sequence[Meter]) -> Sums:
        """What these values' quantization moves the model's outputs by, from ``expected``."""
        return self.divergence.measure(expected, self.run(batch, meters), self._name_inputs(batch))

    def measure_depth(self) -> tuple[dict[str, float], tuple[DepthError, ...]]:
        """Over the first batch, the model's error of each candidate and that of each op; and ops' of each value."""
        taps, batch = self.instruments.taps, self.batches[0]
        for tap in taps.values():
            tap.begin("keep")
        for replay in self.instruments.replays:
            replay.is_measuring = True
        expected = self.run(batch)
        for replay in self.instruments.replays:
            replay.is_measuring = False
        totals, depth = {}, []
        for number, name in enumerate(self.names):
            for tap in taps.values():
                tap.begin("compare")
            own = [meter for meter in self.meters if meter.number == number]
            totals[name] = self.measure(expected, batch, own).mean
            for node, tap in taps.items():
                module = find_module(find_owner(node), node, "Linear")[0]
                depth.append(DepthError(name, module, node.name, tap.error.mean))
        for tap in taps.values():
            tap.begin("")
            tap.kept.clear()
        return totals, tuple(depth)

    def measure_gradients(self) -> dict[Meter, float]:
        """The model's error of each value alone, to second order."""
        size, factor = 0.0, 1.0
        reached: set[Meter] = set()
        for batch in tqdm(self.batches, desc="gradients", unit="batch", disable=not self.progress):
            drawn = self._go_back(batch, reached)
            size, factor = size + drawn.size, drawn.factor
        unreached = [meter for meter in self.meters if meter not in reached]
        if unreached:
            names = ", ".join(dict.fromkeys(site.name for meter in unreached for site in meter.sites))
            warnings.warn(
                f"no gradient reaches {names}: their errors count as 0; exact=True measures them",
                UserWarning,
                stacklevel=3,
            )
        return {meter: factor * meter.change / size if size else 0.0 for meter in self.meters}

    def _go_back(self, batch: Any, reached: set[Meter]) -> Drawn:
        with torch.inference_mode(False), torch.enable_grad(), _recording(self.meters):
            outputs = self.run(batch)
            drawn = self.divergence.draw(outputs, self._name_inputs(batch), self.generator)
        if not all(tensor.isfinite().all() for tensor in drawn.tensors):
            raise ValueError("NaN or Inf in the model's outputs: there is no error to compare")
        leaves = {id(leaf): leaf for meter in self.meters for leaf, _ in meter.recorded}
        ends = [place for place, tensor in enumerate(drawn.tensors) if tensor.requires_grad]
        gradients: Sequence[Tensor | None] = [None] * len(leaves)
        if ends:
            own = drawn.gradients and [drawn.gradients[place] for place in ends]
            tensors = [drawn.tensors[place] for place in ends]
            try:
                gradients = torch.autograd.grad(tensors, list(leaves.values()), own, allow_unused=True)
            except RuntimeError as error:
                reason = re.split(r"\n|: \[| Hint", str(error))[0]
                raise ValueError(f"the model cannot be run backwards, as autograd says: {reason}") from error
        found = dict(zip(leaves, gradients, strict=True))
        reached.update([meter for meter in self.meters if meter.take(found)])
        return drawn

    def measure_each(self, seconds: float) -> dict[Meter, float]:
        """The model's error with each value alone quantized.

        Args:
            seconds: that a batch took for all candidates and twice more.
        """
        num_runs = len(self.meters) * len(self.batches)
        if self.progress:
            minutes = num_runs * seconds / (len(self.names) + 2) / 60
            tqdm.write(
                f"exact: {len(self.meters)} values and formats x {len(self.batches)} batches are {num_runs} runs of "
                f"the model, about {minutes:.1f} minutes"
            )
        sums = dict.fromkeys(self.meters, Sums())
        with tqdm(total=num_runs, desc="exact", unit="run", disable=not self.progress) as bar:
            for batch in self.batches:
                expected = self.run(batch)
                for meter in self.meters:
                    sums[meter] = sums[meter].plus(self.measure(expected, batch, [meter]))
                    bar.update()
        return {meter: found.mean for meter, found in sums.items()}

    def _name_inputs(self, batch: Any) -> Mapping[str, Any]:
        args, kwargs = split_inputs(batch)
        return {**dict(zip(self._inputs, args, strict=False)), **kwargs}

    def describe(self, meter: Meter, error: float, exact_error: float | None) -> SiteError:
        """What was measured of a value."""
        site, value_error = meter.sites[0], meter.value_error.mean
        output_error = float("nan") if meter.output_error is None else meter.output_error.mean
        return SiteError(
            name=site.name,
            names=tuple(site.name for site in meter.sites),
            module=site.module,
            role=site.role,
            candidate=self.names[meter.number],
            format=describe_format(site.args),
            num_elements=meter.num_elements,
            squared_error=meter.value_error.error,
            value_error=value_error,
            output_error=value_error if site.role == "output" else output_error,
            model_error=error,
            exact_error=exact_error,
        )


@contextmanager
def _recording(meters: Sequence[Meter]) -> Iterator[None]:
    """Values get to know their gradients within a ``with`` block."""
    for meter in meters:
        meter.is_recording = True
    try:
        yield
    finally:
        for meter in meters:
            meter.is_recording = False
