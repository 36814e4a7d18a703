"""compressed-tensors checkpoints, as transformers and vLLM load them."""

import copy
import os
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    DynamicType,
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStrategy,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils import match_named_modules
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxmse.capture.attributes import get_attribute
from fxmse.capture.front_ends import check_graph, copy_graph_module
from fxmse.config import CONFIG_KEY, Site
from fxmse.observers.base import QPARAMS
from fxmse.ops import DYNAMIC_FAKE_QUANTIZE, FAKE_QUANTIZE, is_fake_quantize
from fxmse.outputs.experts import Sites, split_experts
from fxmse.outputs.files import check_apart, check_place, replace_folder
from fxmse.passes.fold_fake_quant import SITES_KEY
from fxmse.passes.open_regions import OpenRegions, list_open_graphs
from fxmse.reading import check_file, check_link, read_json

__all__ = [
    "check_extra_files",
    "check_model",
    "check_replaceable",
    "choose_format",
    "copy_tokenizer",
    "find_homes",
    "find_places",
    "find_tied",
    "foresee",
    "keep_others",
    "link",
    "make_compressor",
    "prepare_model",
    "read_biases",
    "read_sites",
    "save_pretrained",
    "warn_of_dtype",
]

_TOKENIZER_LIMIT = 2**30
"""Bytes of a file: a sparse one is copied with all its zeros."""
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
# What a checkpoint is made of. All else in a folder was put there by somebody: it stays.
_OWN_FILES = re.compile(r"(generation_)?config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_REPORTS = re.compile(r"fxmse_report\.(json|html)")


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
        path: the folder; a quantized checkpoint that is there is replaced once the new one is complete. Files in it
            that are no part of a checkpoint stay.
        extra_files: the contents of more files for it, by name: none that it has itself, nor in a folder.

    Raises:
        ValueError: another kind of model; a graph that was not folded; values that such a checkpoint cannot hold
            (weights of experts and convolutions, outputs of functions; all are named; tied weights); shapes that do
            not fit; a folder that holds something else than a quantized checkpoint, or the float model, or that cannot
            be replaced (a symbolic link, a file, a mount).
        OSError: the folder cannot be written; what was there before still is.
    """
    check_graph(quantized, "fxmse.convert")
    check_model(model)
    check_extra_files(extra_files or {})
    check_replaceable(Path(path), str(model.name_or_path or ""))
    sites, blocks = read_sites(quantized)
    config = quantized.meta.get(CONFIG_KEY)
    if not sites:
        raise ValueError("the graph has no fake-quantize nodes that fxmse folded: make it with fxmse.convert")
    if config is None:
        raise ValueError("the graph was quantized by a quantizer's annotations, which no checkpoint has: use a config")
    prepared, sites, ignored = prepare_model(_share_parameters(model), config, sites, blocks)
    _set_values(prepared, quantized, sites)
    compressor = make_compressor(prepared, ignored)
    compressor.compress_model(prepared)
    warn_of_dtype(prepared)
    with replace_folder(Path(path)) as folder:
        try:
            prepared.save_pretrained(folder)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        compressor.update_config(str(folder))
        if model.name_or_path:
            copy_tokenizer(Path(str(model.name_or_path)), folder)
        for name, content in (extra_files or {}).items():
            (folder / name).write_text(content, encoding="utf-8")
        if os.path.exists(path):
            keep_others(Path(path), folder)


def _set_values(prepared: nn.Module, quantized: GraphModule, sites: Sites) -> None:
    """Gives a prepared model the qparams and the biases of a folded graph."""
    for path, own in find_homes(prepared, sites).items():
        for name, value in own.items():
            parameter = prepared.get_submodule(path).get_parameter(name)
            parameter.data = value.to(parameter.device)
    for name, bias in read_biases(quantized, sites).items():
        module = prepared.get_submodule(name.rpartition(".")[0])
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            module.bias = nn.Parameter(bias, requires_grad=False)


def find_tied(config: QuantizationConfig, model: nn.Module) -> dict[str, str]:
    """The modules that a config quantizes though their weights are tied, each with the parameters that are one.

    Where a checkpoint is to be written they belong on the config's ignore list.
    """
    targets = [target for scheme in config.config_groups.values() if scheme.weights for target in scheme.targets]
    matched = {name for name, _ in match_named_modules(model, targets, config.ignore or [])}
    return {
        module: " and ".join(tied)
        for tied in _list_tied(model)
        for module, _, name in (parameter.rpartition(".") for parameter in tied)
        if module in matched and name == "weight"
    }


def check_model(model: nn.Module) -> None:
    """Raises ValueError for a model that is not of transformers, whose checkpoints these are."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model is a {type(model).__name__}: expected a transformers.PreTrainedModel")


def prepare_model(
    model: Any, config: QuantizationConfig, sites: Sites, blocks: Mapping[str, Sequence[int]]
) -> tuple[Any, Sites, list[str]]:
    """Makes places for the qparams of sites.

    Args:
        model: a copy whose modules may change.
        config: what the sites are of.
        sites: with their qparams.
        blocks: the block structure of those in blocks.

    Returns:
        The model, the sites with experts as linears, and what is to be ignored besides, as no module is.
    """
    sites, split_config = split_experts(model, sites, blocks, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matches nothing was named when observers were inserted
        apply_quantization_config(model, _ignore_untouched(split_config, model, sites), show_progress=False)
    for module in model.modules():
        choose_format(module)
    for tied in _list_tied(model):
        if any(name in sites for name in tied):
            # from_pretrained would tie it again in float.
            raise ValueError(
                f"{' and '.join(tied)} are one tied parameter, of which a checkpoint cannot hold a quantized weight: "
                "put the module on the ignore list, or untie them"
            )
    return model, sites, [name for name in split_config.ignore or [] if name not in (config.ignore or [])]


def make_compressor(prepared: Any, ignored: Iterable[str]) -> Any:
    """compressed-tensors' ``ModelCompressor`` of a prepared model, whose config ignores all that stays in float.

    Args:
        prepared: as is ``ignored``, from :func:`prepare_model`.
        ignored: see above.
    """
    from compressed_tensors.compressors import ModelCompressor

    compressor = ModelCompressor.from_pretrained_model(prepared)
    config = compressor.quantization_config
    if config is not None:
        # It lists modules, which experts that stay in float are not, and of the classes that are quantized alone.
        targets = [target for scheme in config.config_groups.values() for target in scheme.targets]
        matched = match_named_modules(prepared, targets, config.ignore)
        config.ignore += [*ignored, *(name for name, module in matched if not is_module_quantized(module))]
    return compressor


def choose_format(module: Any) -> None:
    """Says in a quantized module's scheme how it is stored, where the config does not.

    compressed-tensors would say it by the module's exact class, and leave subclasses of Linear in float.
    """
    scheme = getattr(module, "quantization_scheme", None)
    if isinstance(scheme, QuantizationScheme):
        module_class = nn.Linear if isinstance(module, nn.Linear) else type(module)
        scheme.format = CompressionFormat(scheme.format or infer_module_format(module_class, scheme))


def foresee(sites: Iterable[Site]) -> tuple[Sites, dict[str, Sequence[int]]]:
    """What :func:`read_sites` will find of sites, without values."""
    args = {site.name: site.args for site in sites}
    foreseen: Sites = {name: dict.fromkeys(_foresee_qparams(own)) for name, own in args.items()}
    return foreseen, {name: own.block_structure for name, own in args.items() if own.block_structure}


def _foresee_qparams(args: QuantizationArgs) -> list[str]:
    """Which qparams a value will have."""
    has_global = args.strategy == QuantizationStrategy.TENSOR_GROUP
    if args.dynamic:
        return ["global_scale"] if args.dynamic == DynamicType.LOCAL else []
    return ["scale", *(["global_scale"] if has_global else []), *([] if args.symmetric else ["zero_point"])]


def check_replaceable(path: Path, source: str | os.PathLike[str]) -> None:
    """Raises ValueError where saving would fail, or remove what it did not write, such as the float model.

    Args:
        path: where the checkpoint shall be.
        source: where the float model is from, if that is a folder.
    """
    check_place(path, is_folder=True)
    if path.exists() and any(path.iterdir()):
        _check_quantized(path)
    if os.path.isdir(source):
        check_apart(path, Path(source))


def check_extra_files(files: Mapping[str, str]) -> None:
    """Raises ValueError for what cannot be written into a checkpoint's folder, or would replace a part of it."""
    for name, content in files.items():
        if not isinstance(content, str):
            raise ValueError(f"extra_files[{name!r}] is a {type(content).__name__}: expected the text of a file")
        if name == ".." or Path(name).parts != (name,):
            raise ValueError(f"extra_files has {name!r}: expected a file's name alone, which has no folder in it")
        if _OWN_FILES.fullmatch(name):
            raise ValueError(f"extra_files has {name!r}, which the checkpoint has itself: choose another name")


def _check_quantized(path: Path) -> None:
    """Raises ValueError for a folder that holds something else than a checkpoint of compressed-tensors."""
    config = path / "config.json"
    found = read_json(config).get("quantization_config") if config.is_file() else None
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} exists and holds no quantized checkpoint: choose a new folder, or empty it")
    if found.get("quant_method", "compressed-tensors") != "compressed-tensors":
        raise ValueError(
            f"{path} holds a checkpoint of {found['quant_method']}, which fxmse did not write: choose a new folder, or "
            "empty it"
        )


def keep_others(old: Path, new: Path) -> None:
    """Links what is in the old folder beside a checkpoint into the new one; what that has itself goes first."""
    for entry in old.iterdir():
        target = new / entry.name
        if _OWN_FILES.fullmatch(entry.name) or _REPORTS.fullmatch(entry.name) or os.path.lexists(target):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target, symlinks=True, copy_function=link)
        else:
            link(entry, target)


def link(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Another name for a file, or a copy."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links, or another one
        shutil.copy2(source, target, follow_symlinks=False)


def _list_tied(model: nn.Module) -> Iterator[list[str]]:
    """The names of each parameter that has several."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    yield from (tied for tied in names.values() if len(tied) > 1)


def read_sites(quantized: GraphModule) -> tuple[Sites, dict[str, Sequence[int]]]:
    """Each site's qparams, None where there is none; and the block structure of those in blocks."""
    sites: Sites = {}
    blocks: dict[str, Sequence[int]] = {}
    opened = copy_graph_module(quantized)
    OpenRegions()(opened)
    for graph in list_open_graphs(opened):
        for node in filter(is_fake_quantize, graph.graph.nodes):
            inputs = [None, None, node.args[1]] if node.target is DYNAMIC_FAKE_QUANTIZE else node.args[1:4]
            qparams = {
                kind: get_attribute(graph, str(source.target)) if isinstance(source, Node) else None
                for kind, source in zip(QPARAMS, inputs, strict=True)
            }
            names = node.meta.get(SITES_KEY, ())
            sites.update(dict.fromkeys(names, qparams))
            if node.target is FAKE_QUANTIZE and len(node.args) > 8 and node.args[8]:
                blocks.update(dict.fromkeys(names, node.args[8]))
    return sites, blocks


def _share_parameters(model: nn.Module) -> Any:
    """A copy of the modules that holds the same parameters and buffers."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _ignore_untouched(config: QuantizationConfig, model: nn.Module, sites: Collection[str]) -> QuantizationConfig:
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


def find_places(model: nn.Module, sites: Mapping[str, Collection[str]]) -> dict[str, dict[str, nn.Parameter | None]]:
    """Where compressed-tensors keeps each site's qparams; raises ValueError where it has no place for some."""
    places: dict[str, dict[str, nn.Parameter | None]] = {}
    homeless = []
    for site, kinds in sites.items():
        path, _, role = site.rpartition(".")
        module = model.get_submodule(path)
        places[site] = {kind: getattr(module, f"{role}_{kind}", None) for kind in QPARAMS}
        scheme = getattr(module, "quantization_scheme", None)
        # transformers loads a quantized embedding as one in float.
        if (
            isinstance(module, nn.Embedding)
            or scheme is None
            or (role == "weight" and scheme.format == CompressionFormat.dense)
            or any(places[site][kind] is None for kind in kinds)
        ):
            homeless.append(site)
    if homeless:
        raise ValueError(
            f"a compressed-tensors checkpoint has no place for {'; '.join(homeless)}: it holds values of Linear "
            "and attention modules. Leave these out of the config, or save the graph as a .pt2"
        )
    return places


def find_homes(model: nn.Module, sites: Sites) -> dict[str, dict[str, Tensor]]:
    """Of each module the qparams that it keeps, by the names under which compressed-tensors does.

    Args:
        model: a prepared one.
        sites: with their qparams.

    Raises:
        ValueError: as :func:`find_places`; a shape that does not fit.
    """
    homes: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    kinds = {site: [kind for kind in QPARAMS if qparams[kind] is not None] for site, qparams in sites.items()}
    for site, places in find_places(model, kinds).items():
        path, _, role = site.rpartition(".")
        for kind, parameter in places.items():
            if parameter is None:
                continue
            value = sites[site][kind]
            # A zero point of 0. What several modules have is written as often.
            value = torch.zeros_like(parameter, device="cpu") if value is None else value.detach().clone()
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{site}_{kind} has shape {tuple(value.shape)}, compressed-tensors expects "
                    f"{tuple(parameter.shape)}: was the graph made of this model?"
                )
            homes[path][f"{role}_{kind}"] = value
    return homes


def read_biases(quantized: GraphModule, sites: Iterable[str]) -> dict[str, Tensor]:
    """The biases of a folded graph's quantized modules, which may be corrected ones, by their names."""
    biases = dict(quantized.named_parameters(remove_duplicate=False))
    names = {f"{site.rpartition('.')[0]}.bias" for site in sites}
    return {name: biases[name].detach() for name in sorted(names & biases.keys())}


def warn_of_dtype(model: Any) -> None:
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


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files of a tokenizer or processor that ``folder`` has none of."""
    for pattern in _TOKENIZER_FILES if source.is_dir() else ():
        for file in source.glob(pattern):
            if file.is_file() and not (folder / file.name).exists():
                check_link(file, source)
                check_file(file, _TOKENIZER_LIMIT)
                shutil.copyfile(file, folder / file.name)
