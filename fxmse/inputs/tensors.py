"""Files of ``torch.save`` that hold tensors alone, in lists and dicts."""

import io
import pickletools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxmse.inputs.archive import join, read_members
from fxmse.reading import check_nesting

__all__ = ["load_tensors", "rewrite_tensors"]

# What torch makes tensors by. Its own list has bytearray and sets in it, which make of a number as many bytes.
_MODULES = ("torch", "torch._utils", "torch._tensor", "torch.storage", "torch.serialization", "torch.nn.parameter")
_KIND = "tensors alone"
_OTHERS = ("collections OrderedDict",)


def rewrite_tensors(content: memoryview | bytes, name: str) -> io.RawIOBase:
    """A file for torch.load of what ``content`` holds, and nothing else.

    Raises:
        ValueError: no archive of torch.save (:func:`fxmse.inputs.archive.read_members`); pickled objects that are not
            tensors.
    """
    members = read_members(content, name, _KIND)
    if "data.pkl" not in members:
        raise ValueError(f"{name} cannot be read as {_KIND}: it holds {', '.join(list(members)[:3])}, ...")
    try:
        needed = list(_list_globals(bytes(members["data.pkl"])))
    except Exception as error:  # pickletools raises many of what is none
        raise ValueError(f"{name} cannot be read as {_KIND}: {error}") from None
    foreign = [needs for needs in needed if needs.partition(" ")[0] not in _MODULES and needs not in _OTHERS]
    if foreign:
        raise ValueError(
            f"{name} cannot be read as {_KIND}: it has pickled objects ({foreign[0]}), which may run code: save tensors"
        )
    return join(members)


def _list_globals(content: bytes) -> Iterator[str]:
    """The functions and classes that unpickling calls, as "module name"."""
    for code, argument, _ in pickletools.genops(content):
        if code.name == "GLOBAL":
            yield str(argument)
        elif code.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):  # not of torch.save's protocol
            yield code.name


def load_tensors(content: memoryview | bytes, name: str) -> Any:
    """What ``torch.save`` saved.

    Raises:
        ValueError: as :func:`rewrite_tensors`; what torch.load does not take as weights alone; tensors of more than the
            file holds.
    """
    file = rewrite_tensors(content, name)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
    except Exception as error:  # its unpickler and zip reader raise many
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name} cannot be read as {_KIND} (torch.load, weights_only): {reason}") from None
    check_nesting(found, name)
    storages = {id(t.untyped_storage()): t.untyped_storage().nbytes() for t in _list_tensors(found)}
    if sum(storages.values()) > len(content):
        raise ValueError(f"{name} has tensors of more bytes than it has itself: {len(content)}")
    return found


def _list_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _list_tensors(item)
