"""The qparams of a compressed-tensors checkpoint, in place of a calibration."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor, nn
from torch.fx import GraphModule

from fxmse.capture.attributes import replace_parameter
from fxmse.capture.front_ends import check_graph
from fxmse.inputs.folders import list_weight_files, load_safetensors
from fxmse.observers.base import QPARAMS
from fxmse.passes.constants import find_weights
from fxmse.passes.probe import Probe, find_probes

__all__ = ["load_qparams"]

_QPARAM_SUFFIXES = tuple(f"_{kind}" for kind in QPARAMS)
_SITE = re.compile(r"((?:.*\.)?(?:weight|input|output|q|k|v))(?:_global)?_scale")


@torch.no_grad()
def load_qparams(observed: GraphModule, path: str | os.PathLike[str]) -> GraphModule:
    """Takes the qparams of a compressed-tensors checkpoint in place of a calibration.

    So a checkpoint is a plain PyTorch graph: ``prepare`` the float model with the checkpoint's config.json, load, and
    ``convert``. Quantized layers get its biases, too, which may be corrected ones.

    Args:
        observed: a graph from ``fxmse.prepare``, observers on the values that the checkpoint quantizes; its observers
            are not asked any more.
        path: the checkpoint's folder.

    Returns:
        ``observed``.

    Raises:
        ValueError: a file that is no checkpoint or cut off; sites whose qparams it does not have or has in another
            shape, and qparams it has for values that are not observed (all are named); readers of one value whose
            qparams differ. The graph is as it was.
    """
    check_graph(observed, "fxmse.prepare")
    tensors = dict(_read_tensors(Path(path)))
    probes = list(dict.fromkeys(probe for _, probe in find_probes(observed)))
    if not probes:
        raise ValueError("the graph has no observers: make it with fxmse.prepare")
    if reordered := [name for name in tensors if name.endswith("_g_idx")]:
        raise ValueError(
            f"{path} has {reordered[0]}: its columns are in groups of another order (actorder=group), which is not "
            "implemented"
        )
    schemes = _list_schemes(probes)
    qparams = _decompress(tensors, schemes)
    weights = find_weights(observed)
    problems, given = [], {}
    for probe in probes:
        try:
            given[probe] = _pick(probe, qparams)
            _check_shape(probe, given[probe]["scale"], weights.get(probe))
        except ValueError as error:
            problems.append(str(error))
    wanted = {site.name for probe in probes for site in probe.sites}
    unused = sorted({match[1] for match in map(_SITE.fullmatch, qparams) if match} - wanted)
    if unused:
        problems.append(f"the checkpoint quantizes {', '.join(unused)}, which the graph does not observe")
    if problems:
        raise ValueError(f"{path} does not fit the graph: {'; '.join(problems)}")
    for probe, found in given.items():
        probe.given = found
    parameters = dict(observed.named_parameters(remove_duplicate=False))
    for name in (f"{module}.bias" for module in schemes):
        if name in tensors and name in parameters and tensors[name].shape == parameters[name].shape:
            bias = tensors[name].to(parameters[name])
            replace_parameter(observed, name, nn.Parameter(bias, requires_grad=parameters[name].requires_grad))
    return observed


def _read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint, of one file or several."""
    for file in list_weight_files(folder):
        yield from load_safetensors(file).items()


def _list_schemes(probes: list[Probe]) -> dict[str, QuantizationScheme]:
    """The scheme of each module that has a quantized weight, as its sites say."""
    roles: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for probe in probes:
        for site in probe.sites:
            roles[site.module][site.role] = site.args
    return {
        module: QuantizationScheme(targets=[module], weights=args["weight"], input_activations=args.get("input"))
        for module, args in roles.items()
        if "weight" in args
    }


def _decompress(tensors: dict[str, Tensor], schemes: Mapping[str, QuantizationScheme]) -> dict[str, Tensor]:
    """The qparams by their names, as they were before compressed-tensors packed them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format

    modules: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        module, _, key = name.rpartition(".")
        modules[module][key] = tensor
    qparams = {}
    for module, state in modules.items():
        scheme = schemes.get(module)
        if scheme and "weight_scale" in state:
            compressor = BaseCompressor.get_value_from_registry(infer_module_format(nn.Linear, scheme).value)
            try:
                state = compressor.decompress(state, scheme)
            except (KeyError, RuntimeError, ValueError, AttributeError) as error:
                raise ValueError(f"{module}: its weight cannot be decompressed as {scheme.weights}: {error}") from None
        qparams.update({f"{module}.{key}": value for key, value in state.items() if key.endswith(_QPARAM_SUFFIXES)})
    return qparams


def _pick(probe: Probe, qparams: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """A probe's qparams; those of its sites have to be equal."""
    args = probe.sites[0].args
    kinds = {
        "scale": not args.dynamic,
        "zero_point": not args.dynamic and not args.symmetric,
        "global_scale": args.strategy == "tensor_group" and args.dynamic is not True,
    }
    found: dict[str, Tensor | None] = dict.fromkeys(QPARAMS)
    for kind in (kind for kind, is_wanted in kinds.items() if is_wanted):
        names = [f"{site.name}_{kind}" for site in probe.sites]
        missing = [name for name in names if name not in qparams]
        if missing:
            raise ValueError(f"there is no {', '.join(missing)}")
        values = [qparams[name] for name in names]
        if not all(torch.equal(values[0], value) for value in values[1:]):
            raise ValueError(f"{', '.join(names)} differ, but are of one value")
        found[kind] = values[0]
    return found


def _check_shape(probe: Probe, scale: Tensor | None, rows: Tensor | None) -> None:
    """Raises ValueError where a weight's scales are of another shape than its own would be."""
    if scale is None or rows is None or probe.observer is None:
        return
    expected = probe.observer.layout.qparam_shape(rows.shape)
    if scale.shape != torch.Size(expected):
        raise ValueError(
            f"{probe.name}_scale has shape {tuple(scale.shape)}, the graph's weight needs {tuple(expected)}"
        )
