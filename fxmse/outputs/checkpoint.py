"""compressed-tensors checkpoints, as transformers and vLLM load them."""

import copy
import json
import os
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.utils import match_named_modules
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxmse.capture.attributes import get_attribute
from fxmse.capture.front_ends import copy_graph_module
from fxmse.config import CONFIG_KEY
from fxmse.observers.base import QPARAMS
from fxmse.ops import DYNAMIC_FAKE_QUANTIZE, is_fake_quantize
from fxmse.outputs.files import replace_folder
from fxmse.passes.fold_fake_quant import SITES_KEY
from fxmse.passes.open_regions import OpenRegions, list_open_graphs

__all__ = ["check_replaceable", "save_pretrained"]

# What belongs to a tokenizer or processor, in the folder that a model was loaded from.
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece*",
    "chat_template*",
    "*processor_config.json",
)


@torch.no_grad()
def save_pretrained(
    quantized: GraphModule,
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Writes the checkpoint of a quantized model, compressed by compressed-tensors.

    The folder has the weights as integers or packed floats with their scales, ``quantization_config`` in config.json,
    and the tokenizer's files where ``model`` was loaded from a folder that has them. ``transformers`` loads it with
    ``from_pretrained``, vLLM by its path.

    Args:
        quantized: a folded graph of ``model``, from ``fxmse.convert``.
        model: the float model, a ``transformers.PreTrainedModel``; not changed, and its parameters are not copied.
        path: the folder; a quantized checkpoint that is there is replaced once the new one is complete.
        extra_files: the contents of more files for it, by name.

    Raises:
        ValueError: another kind of model; a graph that was not folded; values that such a checkpoint cannot hold
            (weights of experts and convolutions, outputs of functions; all are named; tied weights); shapes that do
            not fit; a folder that holds something else than a quantized checkpoint.
        OSError: the folder cannot be written; what was there before still is.
    """
    from compressed_tensors.compressors import ModelCompressor
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model is a {type(model).__name__}: expected a transformers.PreTrainedModel")
    check_replaceable(Path(path))
    sites = _read_sites(quantized)
    config = quantized.meta.get(CONFIG_KEY)
    if not sites or config is None:
        raise ValueError("the graph has no fake-quantize nodes that fxmse folded: make it with fxmse.convert")
    prepared = _share_parameters(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matches nothing was named when observers were inserted
        apply_quantization_config(prepared, _ignore_untouched(config, prepared, sites), show_progress=False)
    _check_untied(prepared, sites)
    _set_qparams(prepared, sites)
    _set_biases(prepared, quantized, sites)
    compressor = ModelCompressor.from_pretrained_model(prepared)
    compressor.compress_model(prepared)
    _warn_of_dtype(prepared)
    with replace_folder(Path(path)) as folder:
        prepared.save_pretrained(folder)
        compressor.update_config(str(folder))
        if model.name_or_path:
            _copy_tokenizer(Path(model.name_or_path), folder)
        for name, content in (extra_files or {}).items():
            (folder / name).write_text(content)


def check_replaceable(path: Path) -> None:
    """Raises ValueError where saving would remove what it did not write, such as the float model."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    config = path / "config.json"
    if not config.is_file() or "quantization_config" not in json.loads(config.read_text()):
        raise ValueError(f"{path} exists and holds no quantized checkpoint: choose a new folder, or empty it")


def _check_untied(model: nn.Module, sites: Mapping[str, object]) -> None:
    """Raises ValueError for a weight that two modules share, which from_pretrained would tie again in float."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    for tied in names.values():
        if len(tied) > 1 and any(name in sites for name in tied):
            raise ValueError(
                f"{' and '.join(tied)} are one tied parameter, of which a checkpoint cannot hold a quantized weight: "
                "put the module on the ignore list, or untie them"
            )


def _read_sites(quantized: GraphModule) -> dict[str, dict[str, Tensor | None]]:
    """Each site's qparams; None where there is none."""
    sites = {}
    opened = copy_graph_module(quantized)
    OpenRegions()(opened)
    for graph in list_open_graphs(opened):
        for node in filter(is_fake_quantize, graph.graph.nodes):
            inputs = [None, None, node.args[1]] if node.target is DYNAMIC_FAKE_QUANTIZE else node.args[1:4]
            qparams = {
                kind: get_attribute(graph, str(source.target)) if isinstance(source, Node) else None
                for kind, source in zip(QPARAMS, inputs, strict=True)
            }
            sites.update(dict.fromkeys(node.meta.get(SITES_KEY, ()), qparams))
    return sites


def _share_parameters(model: nn.Module) -> Any:
    """A copy of the modules that holds the same parameters and buffers."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _ignore_untouched(config: QuantizationConfig, model: nn.Module, sites: Mapping[str, object]) -> QuantizationConfig:
    """The config with the linears and embeddings that it targets but the graph leaves in float among its ignores."""
    touched = {name.rpartition(".")[0] for name in sites}
    targets = [target for scheme in config.config_groups.values() for target in scheme.targets]
    ignore = list(config.ignore or [])
    untouched = [
        name
        for name, module in match_named_modules(model, targets, ignore)
        if isinstance(module, nn.Linear | nn.Embedding) and name not in touched
    ]
    return config.model_copy(update={"ignore": ignore + untouched}, deep=True)


def _set_qparams(model: nn.Module, sites: Mapping[str, Mapping[str, Tensor | None]]) -> None:
    """Puts each site's qparams where compressed-tensors keeps them."""
    homeless = []
    for site, qparams in sites.items():
        path, _, role = site.rpartition(".")
        module = model.get_submodule(path)
        found = {kind: getattr(module, f"{role}_{kind}", None) for kind in QPARAMS}
        # transformers loads a quantized embedding as one in float.
        if (
            isinstance(module, nn.Embedding)
            or not hasattr(module, "quantization_scheme")
            or any(value is not None and found[kind] is None for kind, value in qparams.items())
        ):
            homeless.append(site)
            continue
        for kind, parameter in found.items():
            if parameter is None:
                continue
            value = qparams[kind]
            value = torch.zeros_like(parameter) if value is None else value  # a zero point of 0
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{site}_{kind} has shape {tuple(value.shape)}, compressed-tensors expects "
                    f"{tuple(parameter.shape)}: was the graph made of this model?"
                )
            parameter.data = value.detach().to(parameter.device).clone()
    if homeless:
        raise ValueError(
            f"a compressed-tensors checkpoint has no place for {'; '.join(homeless)}: it holds values of Linear "
            "and attention modules. Leave these out of the config, or save the graph as a .pt2"
        )


def _set_biases(model: nn.Module, quantized: GraphModule, sites: Iterable[str]) -> None:
    """Gives quantized modules the graph's biases, which may be corrected ones."""
    biases = dict(quantized.named_parameters(remove_duplicate=False))
    for path in {site.rpartition(".")[0] for site in sites}:
        module, bias = model.get_submodule(path), biases.get(f"{path}.bias")
        if bias is not None and isinstance(getattr(module, "bias", None), nn.Parameter):
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)


def _warn_of_dtype(model: Any) -> None:
    """Names what compressed-tensors cannot load again in the model's own dtype."""
    schemes = [getattr(module, "quantization_scheme", None) for module in model.modules()]
    has_fp4 = any(s and s.weights and (s.weights.type, s.weights.num_bits) == ("float", 4) for s in schemes)
    if has_fp4 and model.dtype != torch.bfloat16:
        warnings.warn(
            f"the model is {model.dtype}, but compressed-tensors decompresses fp4 weights to bfloat16: load it with "
            "dtype=torch.bfloat16",
            UserWarning,
            stacklevel=3,
        )


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for pattern in _TOKENIZER_FILES if source.is_dir() else ():
        for file in source.glob(pattern):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
