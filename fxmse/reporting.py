"""What quantization did to each value of a graph."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxmse.capture import copy_graph_module, split_inputs
from fxmse.observers import Observer
from fxmse.ops import FAKE_QUANTIZE
from fxmse.passes.base import get_attribute

__all__ = ["SiteReport", "report"]


@dataclass(frozen=True)
class SiteReport:
    """One fake-quantize node, over the batches it was shown.

    Attributes:
        module: the module that the value was named after; "" is the root.
        role: "weight", "input" or "output".
        format: the grid, symmetry and strategy in words, as in "int8 asymmetric tensor".
        num_scales: how many scales there are.
        sqnr: signal to quantization noise in dB: 10 log10(sum(x ** 2) / sum((fake_quantize(x) - x) ** 2)).
        range_ratio: the scale over the one that the smallest and largest value would give, averaged over the scales.
    """

    module: str
    role: str
    format: str
    num_scales: int
    sqnr: float
    range_ratio: float


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
    recorders = [_watch(watched, node) for node in list(watched.graph.nodes) if node.target is FAKE_QUANTIZE]
    if not recorders:
        raise ValueError("the graph has no fake-quantize nodes: make it with fxmse.convert")
    watched.recompile()
    for batch in batches:
        args, kwargs = split_inputs(batch)
        watched(*args, **kwargs)
    if not recorders[0].observer.has_statistics:
        raise ValueError("no batches: a report needs at least one")
    return [recorder.summarise() for recorder in recorders]


class _Recorder(nn.Module):
    """Adds up what a fake-quantize node changes."""

    def __init__(self, module: str, role: str, args: QuantizationArgs, scale: Tensor) -> None:
        super().__init__()
        self.module, self.role, self.args, self.scale = module, role, args, scale
        self.observer = Observer.load_from_registry("static_minmax", base_name=role, args=args)
        self.signal = self.noise = 0.0

    def forward(self, x: Tensor, quantized: Tensor) -> Tensor:
        self.observer(x)
        self.signal += x.double().square().sum().item()
        self.noise += (quantized.double() - x.double()).square().sum().item()
        return quantized

    def summarise(self) -> SiteReport:
        qparams = self.observer.get_qparams()
        minmax_scale = qparams["scale"]
        assert minmax_scale is not None
        if qparams["global_scale"] is not None:
            minmax_scale = minmax_scale / qparams["global_scale"]
        args = self.args
        symmetry = "symmetric" if args.symmetric else "asymmetric"
        size = f" {args.group_size}" if args.group_size else ""
        return SiteReport(
            module=self.module,
            role=self.role,
            format=f"{args.type}{args.num_bits} {symmetry} {args.strategy}{size}",
            num_scales=self.scale.numel(),
            sqnr=10 * math.log10(self.signal / self.noise) if self.noise and self.signal else math.inf,
            range_ratio=(self.scale / minmax_scale).double().mean().item(),
        )


def _watch(graph_module: GraphModule, node: Node) -> _Recorder:
    """Puts a recorder behind a fake-quantize node."""
    arguments: tuple[Any, ...] = (*node.args, None, None)[:9]
    x, scale, zero_point, global_scale, num_bits, type_, strategy, group_size, block_structure = arguments
    args = QuantizationArgs.model_validate(
        {
            "num_bits": num_bits,
            "type": type_,
            "strategy": strategy,
            "group_size": group_size,
            "block_structure": block_structure and list(block_structure),
            "symmetric": zero_point is None,
            "scale_dtype": None if global_scale is None else torch.float8_e4m3fn,
        }
    )
    module, _, buffer = str(scale.target).rpartition(".")
    role = next(role for role in ("weight", "input", "output") if buffer.endswith(f"{role}_scale"))
    tensor = get_attribute(graph_module, str(scale.target))
    if isinstance(global_scale, Node):
        tensor = tensor / get_attribute(graph_module, str(global_scale.target))
    recorder = _Recorder(module, role, args, tensor)
    name = f"{node.name}_recorder"
    graph_module.add_submodule(name, recorder)
    with graph_module.graph.inserting_after(node):
        watched = graph_module.graph.call_module(name, (x, node))
    node.replace_all_uses_with(watched, delete_user_cb=lambda user: user is not watched)
    return recorder
