"""What quantization did to each value of a graph."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxmse.calibration.buffers import own_buffers
from fxmse.capture.attributes import get_attribute
from fxmse.capture.front_ends import copy_graph_module, split_inputs
from fxmse.observers.arrangements import Experts
from fxmse.observers.base import Observer
from fxmse.ops import DYNAMIC_FAKE_QUANTIZE, is_fake_quantize
from fxmse.passes.arranging import find_choices
from fxmse.passes.fold_fake_quant import SITES_KEY
from fxmse.passes.open_regions import OpenRegions, list_open_graphs

__all__ = ["SiteReport", "describe_format", "report"]


@dataclass(frozen=True)
class SiteReport:
    """One fake-quantize node, over the batches it was shown.

    Attributes:
        module: the module that the value was named after; "" is the root.
        role: "weight", "input", "output", "q", "k" or "v".
        format: the grid, symmetry and strategy in words, as in "int8 asymmetric tensor".
        num_scales: how many scales there are; 0 where each value brings its own (dynamic).
        scale_min: the smallest of their magnitudes, in units of the value; None where they are dynamic.
        scale_max: the largest.
        sqnr: signal to quantization noise in dB: 10 log10(sum(x ** 2) / sum((fake_quantize(x) - x) ** 2)); NaN of a
            value that the batches did not reach, in a branch that was not run.
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
def report(quantized: GraphModule, batches: Iterable[Any]) -> list[SiteReport]:
    """Runs batches through a folded graph and compares each fake-quantize node's output with its input.

    Args:
        quantized: a graph from ``fxmse.convert``; not changed.
        batches: as for ``fxmse.calibrate``; at least one.

    Returns:
        One report a node, in the graph's order.

    Raises:
        ValueError: a graph without fake-quantize nodes, or no batches.
    """
    watched = copy_graph_module(quantized)
    OpenRegions()(watched)
    recorders = []
    for graph in list_open_graphs(watched):
        recorders += [_watch(graph, node) for node in list(graph.graph.nodes) if is_fake_quantize(node)]
        graph.recompile()
    if not recorders:
        raise ValueError("the graph has no fake-quantize nodes: make it with fxmse.convert")
    with own_buffers(watched):
        for batch in batches:
            args, kwargs = split_inputs(batch)
            watched(*args, **kwargs)
    if not any(recorder.has_seen for recorder in recorders):
        raise ValueError("no batches: a report needs at least one")
    return [recorder.summarise() for recorder in recorders]


def describe_format(args: QuantizationArgs) -> str:
    """A format in words, as in "int8 asymmetric tensor"."""
    symmetry = "symmetric" if args.symmetric else "asymmetric"
    size = f" {args.group_size}" if args.group_size else ""
    dynamic = " dynamic" if args.dynamic else ""
    return f"{args.type}{args.num_bits} {symmetry} {args.strategy}{size}{dynamic}"


class _Recorder(nn.Module):
    """Adds up what a fake-quantize node changes."""

    def __init__(self, module: str, role: str, args: QuantizationArgs, scale: Tensor | None) -> None:
        super().__init__()
        self.module, self.role, self.args = module, role, args
        self.scale = None if scale is None else scale.abs()
        self.observer = None
        if scale is not None:
            self.observer = Observer.load_from_registry("static_minmax", base_name=role, args=args)
        self.has_seen = False
        self.signal = self.noise = 0.0
        self.counters: list[_Counter] = []

    def forward(self, x: Tensor, quantized: Tensor) -> Tensor:
        self.has_seen = True
        if self.observer:
            self.observer(x)
        self.signal += x.double().square().sum().item()
        self.noise += (quantized.double() - x.double()).square().sum().item()
        return quantized

    def summarise(self) -> SiteReport:
        scale = self.scale
        return SiteReport(
            module=self.module,
            role=self.role,
            format=describe_format(self.args),
            num_scales=0 if scale is None else scale.numel(),
            scale_min=None if scale is None else scale.min().item(),
            scale_max=None if scale is None else scale.max().item(),
            sqnr=self._calculate_sqnr(),
            range_ratio=self._calculate_range_ratio(),
            tokens_per_expert=self._sum_counts(),
        )

    def _sum_counts(self) -> tuple[int, ...] | None:
        counts = [counter.counts for counter in self.counters if counter.counts is not None]
        return tuple(torch.stack(counts).sum(0).tolist()) if counts else None

    def _calculate_sqnr(self) -> float:
        if not self.has_seen:
            return math.nan
        return 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else math.inf

    def _calculate_range_ratio(self) -> float:
        if not self.has_seen:
            return math.nan
        if self.observer is None or self.scale is None:
            return 1.0
        qparams = self.observer.get_qparams()
        minmax_scale = qparams["scale"]
        assert minmax_scale is not None
        if qparams["global_scale"] is not None:
            minmax_scale = minmax_scale / qparams["global_scale"]
        return (self.scale / minmax_scale).double().mean().item()


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


def _watch(graph_module: GraphModule, node: Node) -> _Recorder:
    """Puts a recorder behind a fake-quantize node."""
    is_dynamic = node.target is DYNAMIC_FAKE_QUANTIZE
    arguments: dict[str, Any] = dict(zip(_DYNAMIC_NAMES if is_dynamic else _NAMES, node.args, strict=False))
    x, scale, global_scale = (arguments.pop(name, None) for name in ("x", "scale", "global_scale"))
    if is_dynamic:
        arguments["dynamic"] = "local" if global_scale is not None else True
    else:
        arguments["symmetric"] = arguments.pop("zero_point") is None
        arguments["scale_dtype"] = None if global_scale is None else torch.float8_e4m3fn
    if arguments.get("block_structure"):
        arguments["block_structure"] = list(arguments["block_structure"])
    args = QuantizationArgs.model_validate(arguments)
    module, role = _find_site(node)
    tensor = None if is_dynamic else get_attribute(graph_module, str(scale.target))
    if isinstance(global_scale, Node) and tensor is not None:
        tensor = tensor / get_attribute(graph_module, str(global_scale.target))
    recorder = _Recorder(module, role, args, tensor)
    name = f"{node.name}_recorder"
    graph_module.add_submodule(name, recorder)
    with graph_module.graph.inserting_after(node):
        watched = graph_module.graph.call_module(name, (x, node))
    node.replace_all_uses_with(watched, delete_user_cb=lambda user: user is not watched)
    if role == "weight" and tensor is not None and tensor.dim() == 3:
        for reader, experts, choice in find_choices(watched, len(tensor)):
            counter = _Counter(experts)
            graph_module.add_submodule(f"{name}_of_{reader.name}", counter)
            with graph_module.graph.inserting_before(reader):
                graph_module.graph.call_module(f"{name}_of_{reader.name}", (choice,))
            recorder.counters.append(counter)
    return recorder


def _find_site(node: Node) -> tuple[str, str]:
    """The module and the role that a fake-quantize node is named after: by its scale's buffer, or as folding noted."""
    scale = node.args[1]
    if isinstance(scale, Node):
        name = str(scale.target).removesuffix("_global_scale").removesuffix("_scale")
    else:
        name = node.meta.get(SITES_KEY, (node.name.removesuffix("_fake_quant"),))[0]
    module, _, buffer = name.rpartition(".")
    return module, buffer.rpartition("_")[2]
