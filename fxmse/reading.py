"""Files that anybody may have written: what they may be, how large, and their text and JSON."""

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["check_file", "check_link", "check_nesting", "list_values", "quote", "read_json", "read_text"]

_TEXT_LIMIT = 2**26
"""Bytes of a config, an index or a report: a thousand times what the largest models need."""

_MAX_VALUES = 2**20
"""Values in a config or a batch: YAML's aliases and pickle's references make exponentially many of a few bytes."""

_MAX_DEPTH = 64


def check_file(path: Path, limit: int | None = None) -> int:
    """The size of a file in bytes.

    Raises:
        ValueError: nothing is there; a device or a pipe, which may have no end; more than ``limit`` bytes, or than the
            machine has memory.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is a {'folder' if path.is_dir() else 'device or a pipe'}: expected a file")
    if limit is None:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if found.st_size > limit:
        raise ValueError(f"{path} has {found.st_size} bytes: expected at most {limit}")
    return found.st_size


def check_link(path: Path, folder: Path) -> None:
    """Raises ValueError where a file of a folder is a link to elsewhere, whose content would be taken for the folder's.

    The Hub's cache has links of its own: from ``snapshots/<revision>`` to ``blobs``.
    """
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(parent) for parent in inside):
        raise ValueError(f"{path} is a link out of its folder, to {path.resolve()}: put the file itself there")


def read_text(path: Path, limit: int = _TEXT_LIMIT) -> str:
    """The text of a file.

    Raises:
        ValueError: as :func:`check_file`; bytes that are no UTF-8.
    """
    check_file(path, limit)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: as :func:`read_text`; what is no JSON, or no object.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {quote(content)}: expected a JSON object")
    return content


def check_nesting(value: Any, name: str) -> None:
    """Raises ValueError where nested lists, tuples and dicts, counted at each place that shows them, are too many."""
    count = 0
    remaining = [(value, 0)]
    while remaining:
        item, depth = remaining.pop()
        count += 1
        if count > _MAX_VALUES or depth > _MAX_DEPTH:
            raise ValueError(
                f"{name} holds more than {_MAX_VALUES} values, or lists in lists {_MAX_DEPTH} deep: expected neither"
            )
        remaining.extend((child, depth + 1) for child in _list_children(item))


def list_values(value: Any, suffix: str) -> Iterable[Any]:
    """What nested dicts have under keys that end in ``suffix``."""
    remaining = [value]
    while remaining:
        item = remaining.pop()
        if isinstance(item, dict):
            yield from (child for key, child in item.items() if str(key).endswith(suffix))
        remaining.extend(_list_children(item))


def _list_children(item: Any) -> Iterable[Any]:
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, list | tuple) else ()


def quote(value: Any) -> str:
    """A value of a file as a message shows it: short, on one line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
