"""What quantization did to each value of a graph."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxmse.calibration.buffers import own_buffers
from fxmse.calibration.observing import check_batches
from fxmse.capture.attributes import get_attribute
from fxmse.capture.front_ends import check_graph, copy_graph_module, split_inputs
from fxmse.config import describe_format
from fxmse.observers.arrangements import Experts
from fxmse.observers.base import QPARAMS, Observer
from fxmse.ops import DYNAMIC_FAKE_QUANTIZE, FAKE_QUANTIZE, is_fake_quantize
from fxmse.outputs.noise import Noise, find_scale, measure_weight, sum_noise
from fxmse.passes.arranging import find_choices
from fxmse.passes.constants import evaluate, find_sources
from fxmse.passes.fold_fake_quant import SITES_KEY
from fxmse.passes.open_regions import OpenRegions, list_open_graphs
from fxmse.passes.versions import Versions

__all__ = ["Recorder", "SiteReport", "describe_format", "find_site", "report", "watch"]


@dataclass(frozen=True)
class SiteReport:
    """One fake-quantize node: of a weight as it is, of other values over the batches they were shown.

    Attributes:
        module: the module that the value was named after; "" is the root.
        role: "weight", "input", "output", "q", "k" or "v".
        format: the grid, symmetry and strategy in words, as in "int8 asymmetric tensor".
        num_scales: how many scales there are; 0 where each value brings its own (dynamic).
        scale_min: the smallest of their magnitudes, in units of the value; None where they are dynamic.
        scale_max: the largest.
        sqnr: signal to quantization noise in dB: 10 log10(sum(x ** 2) / sum((fake_quantize(x) - x) ** 2)); NaN of a
            value that no batch reached: there were none, or it is in a branch that was not run.
        range_ratio: the scale's magnitude over the scale that the smallest and largest value would give, averaged over
            the scales; 1 where they are dynamic, NaN where ``sqnr`` is.
        tokens_per_expert: of a weight of experts, how many tokens the router sent to each; None of all other values.
    """

    module: str
    role: str
    format: str
    num_scales: int
    scale_min: float | None
    scale_max: float | None
    sqnr: float
    range_ratio: float
    tokens_per_expert: tuple[int, ...] | None = None


@torch.no_grad()
def report(quantized: GraphModule, batches: Iterable[Any] | None = None) -> list[SiteReport]:
    """Compares each fake-quantize node's output with its input.

    A weight is measured once, block by block. Other values are measured while batches run through the graph, and
    none is run where there are no such values.

    Args:
        quantized: a graph from ``fxmse.convert``; not changed.
        batches: as for ``fxmse.calibrate``, at least one; None measures weights alone.

    Returns:
        One report a node, in the graph's order.

    Raises:
        ValueError: a model, a graph without fake-quantize nodes, or no batches, or a single one.
    """
    return watch(quantized, batches)


def watch(
    quantized: GraphModule, batches: Iterable[Any] | None, make_recorder: "Callable[..., Recorder] | None" = None
) -> list[SiteReport]:
    """:func:`report`, with recorders of another class where ``make_recorder`` is given."""
    check_graph(quantized, "fxmse.convert")
    check_batches(batches)
    watched = copy_graph_module(quantized)
    OpenRegions()(watched)
    reports: list[SiteReport | Recorder] = []
    for graph in list_open_graphs(watched):
        versions = Versions(graph)
        for node in [node for node in graph.graph.nodes if is_fake_quantize(node)]:
            recorder = _make_recorder(graph, node, make_recorder or Recorder)
            if _is_weight(graph, versions, node):
                recorder.measure(*map_arg(node.args, functools.partial(evaluate, graph)))
                if batches is not None:
                    _count_choices(graph, node, recorder)
                reports.append(recorder if recorder.counters else recorder.summarise())
            else:
                _watch(graph, node, recorder)
                reports.append(recorder)
        graph.recompile()
    if not reports:
        raise ValueError("the graph has no fake-quantize nodes: make it with fxmse.convert")
    if batches is not None:
        _run(watched, batches, is_needed=any(isinstance(found, Recorder) for found in reports))
    return [found if isinstance(found, SiteReport) else found.summarise() for found in reports]


def _run(watched: GraphModule, batches: Iterable[Any], *, is_needed: bool) -> None:
    first = list(itertools.islice(remaining := iter(batches), 1))
    if not first:
        raise ValueError("no batches: a report needs at least one")
    with own_buffers(watched):
        for batch in itertools.chain(first, remaining) if is_needed else ():
            args, kwargs = split_inputs(batch)
            watched(*args, **kwargs)


class Recorder(nn.Module):
    """Adds up what a fake-quantize node changes.

    Args:
        module: as in :class:`SiteReport`.
        role: as there.
        args: the format.
        scale: less the global one; None where it is dynamic.
        zero_point: as it is stored; None for 0.
        global_scale: of a dynamic value whose scales have one.
    """

    def __init__(
        self,
        module: str,
        role: str,
        args: QuantizationArgs,
        scale: Tensor | None,
        zero_point: Tensor | None,
        global_scale: Tensor | None,
    ) -> None:
        super().__init__()
        self.module, self.role, self.args = module, role, args
        self.signed_scale, self.zero_point, self.global_scale = scale, zero_point, global_scale
        self.scale = None if scale is None else scale.abs()
        self.has_seen = False
        self.noise = Noise()
        self.minmax_scale: Tensor | None = None
        self.counters: list[_Counter] = []
        self.observer = None
        if scale is not None:
            self.observer = Observer.load_from_registry("static_minmax", base_name=role, args=args)

    def measure(self, weight: Tensor, *arguments: Any) -> None:
        """Looks at a weight, once; takes the arguments of its node."""
        self.has_seen = True
        self.noise, self.minmax_scale = measure_weight(weight, arguments[:3], self.args)

    def forward(self, x: Tensor, quantized: Tensor) -> Tensor:
        """Looks at a value, and passes on what it was quantized to."""
        self.has_seen = True
        if self.observer:
            self.observer(x)
        self.noise = self.noise.plus(sum_noise(x, quantized))
        return quantized

    def summarise(self) -> SiteReport:
        """The report on all that was seen."""
        scale = self.scale
        return SiteReport(
            module=self.module,
            role=self.role,
            format=describe_format(self.args),
            num_scales=0 if scale is None else scale.numel(),
            scale_min=None if scale is None else scale.min().item(),
            scale_max=None if scale is None else scale.max().item(),
            sqnr=self.noise.sqnr if self.has_seen else math.nan,
            range_ratio=self._calculate_range_ratio(),
            tokens_per_expert=self._sum_counts(),
        )

    def _sum_counts(self) -> tuple[int, ...] | None:
        counts = [counter.counts for counter in self.counters if counter.counts is not None]
        return tuple(torch.stack(counts).sum(0).tolist()) if counts else None

    def _calculate_range_ratio(self) -> float:
        if not self.has_seen:
            return math.nan
        if self.observer is None or self.scale is None:
            return 1.0
        scale = find_scale(self.observer) if self.minmax_scale is None else self.minmax_scale
        return (self.scale / scale).double().mean().item()


class _Counter(nn.Module):
    """Counts the tokens of each expert."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts
        self.counts: Tensor | None = None

    def forward(self, choice: Tensor) -> None:
        counts = self.experts.count(choice)
        self.counts = counts if self.counts is None else self.counts + counts


_NAMES = ("x", "scale", "zero_point", "global_scale", "num_bits", "type", "strategy", "group_size", "block_structure")
_DYNAMIC_NAMES = ("x", "global_scale", "num_bits", "type", "symmetric", "strategy", "group_size", "scale_dtype")


def _is_weight(graph_module: GraphModule, versions: Versions, node: Node) -> bool:
    """Whether a node quantizes a weight that is the same in every run."""
    is_static = node.target is FAKE_QUANTIZE and find_sources(graph_module, versions, node) is not None
    return is_static and find_site(node)[1] == "weight"


def _make_recorder(graph_module: GraphModule, node: Node, make: Callable[..., Recorder]) -> Recorder:
    """What looks at a fake-quantize node."""
    is_dynamic = node.target is DYNAMIC_FAKE_QUANTIZE
    arguments: dict[str, Any] = dict(zip(_DYNAMIC_NAMES if is_dynamic else _NAMES, node.args, strict=False))
    scale, zero_point, global_scale = (
        get_attribute(graph_module, str(found.target)) if isinstance(found, Node) else None
        for found in (arguments.pop(name, None) for name in QPARAMS)
    )
    arguments.pop("x")
    if is_dynamic:
        arguments["dynamic"] = "local" if global_scale is not None else True
    else:
        arguments["symmetric"] = zero_point is None
        arguments["scale_dtype"] = None if global_scale is None else torch.float8_e4m3fn
    if arguments.get("block_structure"):
        arguments["block_structure"] = list(arguments["block_structure"])
    args = QuantizationArgs.model_validate(arguments)
    module, role = find_site(node)
    if scale is not None and global_scale is not None:
        scale, global_scale = scale / global_scale, None
    return make(module, role, args, scale, zero_point, global_scale)


def _watch(graph_module: GraphModule, node: Node, recorder: Recorder) -> None:
    """Has a recorder look at what a fake-quantize node reads and gives in each run."""
    name = f"{node.name}_recorder"
    graph_module.add_submodule(name, recorder)
    with graph_module.graph.inserting_after(node):
        watched = graph_module.graph.call_module(name, (node.args[0], node))
    node.replace_all_uses_with(watched, delete_user_cb=lambda user: user is not watched)


def _count_choices(graph_module: GraphModule, node: Node, recorder: Recorder) -> None:
    """Has a recorder of experts' weights count the tokens of each expert in each run."""
    if recorder.scale is None or recorder.scale.dim() != 3:
        return
    for reader, experts, choice in find_choices(node, len(recorder.scale)):
        counter = _Counter(experts)
        name = f"{node.name}_counter_of_{reader.name}"
        graph_module.add_submodule(name, counter)
        with graph_module.graph.inserting_before(reader):
            graph_module.graph.call_module(name, (choice,))
        recorder.counters.append(counter)


def find_site(node: Node) -> tuple[str, str]:
    """The module and the role that a fake-quantize node is named after: by its scale's buffer, or as folding noted."""
    scale = node.args[1]
    if isinstance(scale, Node):
        name = str(scale.target).removesuffix("_global_scale").removesuffix("_scale")
    else:
        name = node.meta.get(SITES_KEY, (node.name.removesuffix("_fake_quant"),))[0]
    module, _, buffer = name.rpartition(".")
    return module, buffer.rpartition("_")[2]
