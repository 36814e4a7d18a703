"""Folders of checkpoints, of which transformers loads configs, models, tokenizers and processors."""

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fxmse.reading import check_file, check_link, list_values, quote, read_json

__all__ = ["check_folder", "list_weight_files", "load_pretrained", "load_safetensors"]

_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
_FILE = re.compile(r"[\w-][\w.-]*\.safetensors")
# A name of transformers' own, as "sdpa" or "paged|flash_attention_2"; others are downloaded and run.
_IMPLEMENTATION = re.compile(r"[\w|]*")
_ADAPTER = "adapter_config.json"
# What transformers takes a config, a model's, a tokenizer's and a processor's, from.
_CODE_FILES = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def check_folder(folder: Path) -> None:
    """Raises ValueError for a folder that leads elsewhere.

    That is: links out of it, devices and pipes; weights in other folders; kernels that transformers would download and
    run; adapters, which name the model that they belong to by a path or by its name on the Hub.
    """
    for file in folder.iterdir():
        check_link(file, folder)
        if not file.is_dir():
            check_file(file)
    if (folder / _ADAPTER).exists():
        raise ValueError(f"{folder / _ADAPTER} makes this an adapter of another model: merge it into the model first")
    for file in (folder / name for name in _CODE_FILES):
        for name in list_values(read_json(file), "_implementation") if file.exists() else ():
            names = name.values() if isinstance(name, dict) else [name]
            if not all(name is None or _IMPLEMENTATION.fullmatch(str(name)) for name in names):
                raise ValueError(f"{file} asks for {quote(name)}, which is downloaded and run: remove it there")
    if (folder / _INDEX).exists():
        list_weight_files(folder)


def list_weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that hold its weights.

    Raises:
        ValueError: an index that is none, or that names a file outside of the folder; a link out of it.
    """
    names = {_WEIGHTS}
    index = folder / _INDEX
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has weight_map={quote(weight_map)}: expected a file's name for each tensor")
        foreign = [name for name in weight_map.values() if not isinstance(name, str) or not _FILE.fullmatch(name)]
        if foreign:
            raise ValueError(f"{index} names {quote(foreign[0])}: expected .safetensors files in its own folder")
        names = set(weight_map.values())
    files = [folder / name for name in sorted(names)]
    for file in files:
        check_link(file, folder)
        check_file(file)
    return files


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file; raises ValueError for any other file."""
    check_file(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None


def load_pretrained(auto_class: Any, folder: Path, *, trust_remote_code: bool = False, **arguments: Any) -> Any:
    """``from_pretrained`` of a folder: nothing is downloaded, no code of the folder is run, nobody is asked.

    Args:
        auto_class: a class of transformers.
        folder: a checkpoint's.
        trust_remote_code: run code of the folder, where transformers has none of its own.
        arguments: of ``from_pretrained``.

    Raises:
        ValueError: what transformers cannot load; code of the folder's own; as :func:`check_folder`.
    """
    check_folder(folder)
    try:
        # None, the default, has transformers ask on standard input.
        return auto_class.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code, **arguments
        )
    except Exception as error:  # whatever transformers stumbles over
        if not trust_remote_code and any(_has_code(folder / name) for name in _CODE_FILES):
            raise ValueError(f"{folder} has code of its own (auto_map): --trust-remote-code runs it") from None
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder} cannot be loaded by transformers ({type(error).__name__}): {reason}") from error


def _has_code(file: Path) -> bool:
    return file.exists() and "auto_map" in read_json(file)
