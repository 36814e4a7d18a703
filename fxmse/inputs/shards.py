"""The files of safetensors that a checkpoint's folder has."""

from collections.abc import Mapping
from pathlib import Path

from fxmse.config import read_mapping

__all__ = ["list_shards"]

_INDEX = "model.safetensors.index.json"


def list_shards(folder: Path) -> list[Path]:
    """One file or, by an index, several.

    Raises:
        ValueError: an index that is none, or names files outside of the folder; names it.
    """
    index = folder / _INDEX
    if not index.exists():
        return [folder / "model.safetensors"]
    names = read_mapping(index).get("weight_map")
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} has no weight_map: expected a mapping of tensors to the names of files")
    if elsewhere := [name for name in names.values() if Path(name).name != name]:
        raise ValueError(f"{index} names {elsewhere[0]!r}: expected the name of a file beside it")
    return [folder / name for name in sorted(set(names.values()))]
