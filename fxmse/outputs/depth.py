"""How the error grows through a model's depth: outputs of the quantized graph against those of the float one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxmse.calibration.buffers import own_buffers
from fxmse.capture.attributes import get_attribute, replace_parameter
from fxmse.capture.front_ends import copy_graph_module, split_inputs
from fxmse.config import FLOAT_BIASES_KEY
from fxmse.ops import is_fake_quantize
from fxmse.outputs.noise import Noise, sum_noise
from fxmse.outputs.reporting import find_site
from fxmse.passes.constants import find_sources
from fxmse.passes.open_regions import OpenRegions, list_open_graphs
from fxmse.passes.versions import Versions

__all__ = ["DepthPoint", "measure_depth"]

_SAMPLED = 1 << 16
"""Elements of an output that are compared, evenly spread."""


@dataclass(frozen=True)
class DepthPoint:
    """How far the output of an op with a quantized weight is from the float model's, after all that was quantized.

    Attributes:
        module: the module that the weight was named after.
        sqnr: in dB; infinite where the outputs are equal, NaN where one of the runs did not reach it.
    """

    module: str
    sqnr: float


@torch.no_grad()
def measure_depth(quantized: GraphModule, batch: Any) -> list[DepthPoint]:
    """Runs a batch through a graph twice, as it is and in float; a point an op with a quantized weight, in order.

    Rules:

    1. In the float run each fake-quantize node passes on what it reads, and corrected biases are those of the model.
    2. What is compared is what the first op gives that reads the weight and something of the batch.
    3. An op that runs several times is compared run by run, as far as both graphs run it.
    4. Experts are left out: the two runs may choose different ones, and have their tokens in another order.
    """
    watched = copy_graph_module(quantized)
    OpenRegions()(watched)
    run, taps = _Run(), []
    for graph in list_open_graphs(watched):
        versions = Versions(graph)
        weights = {node: find_sources(graph, versions, node) for node in graph.graph.nodes if is_fake_quantize(node)}
        layers = [node for node, found in weights.items() if found is not None and not _is_of_experts(graph, node)]
        readers = dict(_find_readers(graph, versions, layers))
        for node in weights:
            _insert(graph, node, _Switch(run), (node.args[0], node))
        for reader, module in readers.items():
            taps.append(_Tap(run, module))
            _insert(graph, reader, taps[-1], (reader,))
        graph.recompile()
    args, kwargs = split_inputs(batch)
    with own_buffers(watched), _float_biases(watched):
        watched(*args, **kwargs)
    run.is_float = False
    with own_buffers(watched):
        watched(*args, **kwargs)
    return [tap.summarise() for tap in taps]


class _Run:
    """Which of the two runs it is."""

    is_float = True


class _Switch(nn.Module):
    """Rule 1."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor, quantized: Tensor) -> Tensor:
        return x.to(quantized.dtype) if self.run.is_float else quantized


class _Tap(nn.Module):
    """Keeps an output of the float run, and compares it with that of the other."""

    def __init__(self, run: _Run, module: str) -> None:
        super().__init__()
        self.run, self.module = run, module
        self.expected: list[Tensor] = []
        self.noise: Noise | None = None

    def forward(self, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return output
        flat = output.reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLED)]
        if self.run.is_float:
            self.expected.append(sample.clone())
        elif self.expected and len(sample) == len(self.expected[0]):  # rule 3
            self.noise = (self.noise or Noise()).plus(sum_noise(self.expected.pop(0), sample))
        return output

    def summarise(self) -> DepthPoint:
        return DepthPoint(self.module, float("nan") if self.noise is None else self.noise.sqnr)


def _insert(graph_module: GraphModule, node: Node, watcher: nn.Module, arguments: tuple[Any, ...]) -> None:
    name = f"{node.name}_{type(watcher).__name__.strip('_').lower()}"
    graph_module.add_submodule(name, watcher)
    with graph_module.graph.inserting_after(node):
        inserted = graph_module.graph.call_module(name, arguments)
    node.replace_all_uses_with(inserted, delete_user_cb=lambda user: user is not inserted)


def _find_readers(graph_module: GraphModule, versions: Versions, weights: list[Node]) -> Iterator[tuple[Node, str]]:
    """Rule 2: each op with a quantized weight and the weight's module, in the graph's order."""
    found: dict[Node, str] = {}
    for weight in weights:
        module, _ = find_site(weight)
        waiting, seen = [weight], {weight}
        for node in waiting:
            for user in node.users:
                if user.op == "output" or user in seen:
                    continue
                seen.add(user)
                if find_sources(graph_module, versions, user) is None:
                    found.setdefault(user, module)
                else:
                    waiting.append(user)
    order = {node: place for place, node in enumerate(graph_module.graph.nodes)}
    yield from sorted(found.items(), key=lambda item: order[item[0]])


def _is_of_experts(graph_module: GraphModule, weight: Node) -> bool:
    """Rule 4."""
    scale = weight.args[1]
    return isinstance(scale, Node) and get_attribute(graph_module, str(scale.target)).dim() == 3


@contextmanager
def _float_biases(graph_module: GraphModule) -> Iterator[None]:
    """Rule 1, within a ``with`` block."""
    biases = graph_module.meta.get(FLOAT_BIASES_KEY, {})
    corrected = {name: get_attribute(graph_module, name) for name in biases}
    for name, bias in biases.items():
        replace_parameter(graph_module, name, bias)
    try:
        yield
    finally:
        for name, bias in corrected.items():
            replace_parameter(graph_module, name, bias)
