"""Which modules have to have one format, and how many bits their weights take in each."""

import functools
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle import initialize_module_for_quantization
from torch import nn
from torch.fx import GraphModule, Node

from fxmse.analysis.candidates import FLOAT
from fxmse.analysis.results import LayerGroup
from fxmse.config import Site
from fxmse.passes.constants import describe, measure_shape
from fxmse.passes.insert_observers import CONFIG_NUMBER_KEY
from fxmse.passes.open_regions import list_open_graphs
from fxmse.passes.probe import find_probes, skip_probes
from fxmse.passes.quantizable_ops import find_operations
from fxmse.passes.versions import Versions

__all__ = ["find_groups", "measure_bits"]

_EXPERT = re.compile(r"(.*\bexperts)\.\d+\..*")
_PACKED = "pack-quantized"


@dataclass
class _Layer:
    """A module that has a weight.

    Attributes:
        weights: the shape of each as rows, and its dtype, by what it is computed of.
        keys: what it has in common with those that have to have its format.
        sites: by the number of the config, and then by role.
    """

    weights: dict[str, tuple[torch.Size, torch.dtype]] = field(default_factory=dict)
    keys: set[Hashable] = field(default_factory=set)
    sites: defaultdict[int, dict[str, Site]] = field(default_factory=lambda: defaultdict(dict))


def find_groups(
    observed: GraphModule, candidates: Sequence[str], dtype: torch.dtype | None = None
) -> tuple[LayerGroup, ...]:
    """The groups of an observed graph, in its order.

    Rules:

    1. Linears that read the same value are one group: runtimes run them as one (q/k/v, gate/up).
    2. So are modules of one weight (tied), of one probe (an input's scale), and the experts of a layer.
    3. A group has the candidates that all of its modules have.

    Args:
        observed: the graph; its regions are open.
        candidates: the names of its configs.
        dtype: that a checkpoint has floats in; None takes each weight's own.
    """
    layers = {path: layer for path, layer in _find_layers(observed).items() if layer.sites}
    groups = []
    for paths in _join({path: layer.keys for path, layer in layers.items()}):
        own = [layers[path] for path in paths]
        weights = {key: (layer, *weight) for layer in own for key, weight in layer.weights.items()}
        bits: dict[str, float] = {}
        for number, name in enumerate(candidates):
            if all(number in layer.sites for layer in own):  # rule 3
                schemes = {id(layer): _make_scheme(layer.sites[number]) for layer in own}
                bits[name] = sum(_measure(shape, schemes[id(la)], dtype or own) for la, shape, own in weights.values())
        bits[FLOAT] = sum(shape.numel() * (dtype or own).itemsize * 8 for _, shape, own in weights.values())
        groups.append(LayerGroup(tuple(paths), sum(shape.numel() for _, shape, _ in weights.values()), bits))
    return tuple(groups)


def _find_layers(observed: GraphModule) -> dict[str, _Layer]:
    layers: defaultdict[str, _Layer] = defaultdict(_Layer)
    for graph in list_open_graphs(observed):
        versions = Versions(graph)
        for operation in find_operations(graph, versions):
            weight = operation.weight
            if weight is None:
                continue
            layer = layers[operation.path]
            tensor = weight.view.apply(measure_shape(graph, weight.value))
            identity = describe(graph, weight.value)
            layer.weights[identity] = tensor.shape, tensor.dtype
            layer.keys.add(identity)
            if operation.operands and weight.view.layout in ("rows", "columns"):  # rule 1
                operand = operation.operands[0]
                value = skip_probes(graph, operand.argument.get(operand.reader))
                if isinstance(value, Node):
                    layer.keys.add((graph, value, versions.find(value, operand.reader)))
            if expert := _EXPERT.fullmatch(operation.path):
                layer.keys.add(expert[1])
    for node, probe in find_probes(observed):
        for site in probe.sites:
            if site.module in layers:
                layers[site.module].sites[node.meta[CONFIG_NUMBER_KEY]][site.role] = site
                layers[site.module].keys.add(probe)  # rule 2
    return layers


def _join(keys: Mapping[str, Iterable[Hashable]]) -> list[list[str]]:
    """The names in groups of those that have a key in common, directly or by others."""
    groups: dict[str, list[str]] = {name: [name] for name in keys}
    owners: dict[Hashable, str] = {}
    for name, own in keys.items():
        for key in own:
            first, group = groups[owners.setdefault(key, name)], groups[name]
            if first is not group:
                first += group
                groups.update(dict.fromkeys(group, first))
    places = {name: place for place, name in enumerate(keys)}
    unique = {id(group): group for group in groups.values()}
    return [sorted(group, key=places.__getitem__) for group in unique.values()]


def _make_scheme(sites: Mapping[str, Site]) -> QuantizationScheme:
    def find(role: str) -> QuantizationArgs | None:
        return sites[role].args.model_copy(deep=True) if role in sites else None

    return QuantizationScheme(targets=["Linear"], weights=find("weight"), input_activations=find("input"))


def _measure(shape: torch.Size, scheme: QuantizationScheme, dtype: torch.dtype) -> float:
    """The bits of a weight as rows, which may be several matrices."""
    num_matrices = shape[:-2].numel()
    return num_matrices * measure_bits((shape[-2] if len(shape) > 1 else 1, shape[-1]), scheme, dtype)


def measure_bits(shape: tuple[int, int], scheme: QuantizationScheme, dtype: torch.dtype) -> int:
    """The bits that a checkpoint has of a Linear without bias: its packed weight, scales, zero points and shape.

    Args:
        shape: (out, in).
        scheme: how it is quantized.
        dtype: of its weight, and of scales that have none of their own.
    """
    return _measure_bits(shape, scheme.model_dump_json(), dtype)


@functools.lru_cache(4096)
def _measure_bits(shape: tuple[int, int], fields: str, dtype: torch.dtype) -> int:
    scheme = QuantizationScheme.model_validate_json(fields)
    linear = nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=dtype)
    if scheme.weights is None:
        return linear.weight.nbytes * 8
    initialize_module_for_quantization(linear, scheme)
    format = infer_module_format(nn.Linear, scheme).value
    compressor = BaseCompressor.get_value_from_registry(format)
    tensors = compressor.compress(dict(linear.named_parameters()), scheme)
    num_bits = sum(tensor.nbytes * 8 for tensor in tensors.values())
    zero_point = tensors.get("weight_zero_point")
    if format == _PACKED and zero_point is not None and zero_point.dtype != torch.int32:
        # Without values it is not packed yet, which is along its rows.
        words = -(-len(zero_point) * scheme.weights.num_bits // 32)
        num_bits += words * zero_point.shape[1] * 32 - zero_point.nbytes * 8
    return num_bits
