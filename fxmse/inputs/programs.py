"""Programs from .pt2 files, of which no code is run."""

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from fxmse.inputs.archive import Members, join, map_file, read_members
from fxmse.inputs.program_json import ATTRIBUTE, clean_program
from fxmse.inputs.tensors import load_tensors, rewrite_tensors
from fxmse.reading import quote

__all__ = ["load_program"]

_PROGRAM = "models/model.json"
_WEIGHTS, _CONSTANTS = "data/weights/", "data/constants/"
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_PAYLOADS = {_WEIGHTS: "model_weights_config.json", _CONSTANTS: "model_constants_config.json"}
# All that torch.export.save writes. Anything else (shared objects, older forms) may be run or unpickled by loading.
_MEMBERS = re.compile(
    r"models/model\.json|data/sample_inputs/model\.pt|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|extra/[^\x00-\x1f]+"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id|alignment)"
)
_MAX_EXPANSION = 2**24
"""Elements that a tensor may have beyond its bytes: an expanded one repeats them."""


def load_program(path: str | os.PathLike[str]) -> tuple[ExportedProgram, dict[str, str]]:
    """``torch.export.load`` of a file of which nothing is run; and its extra files.

    Every member is checked, the program's JSON and the sample inputs are written anew from what was checked, and torch
    loads that (:func:`fxmse.inputs.archive.join`); tensors are read from the file once.

    Raises:
        ValueError: a file that is cut off, no program, or one with anything in it that torch.export.save does not
            write of tensors and operators (:func:`fxmse.inputs.program_json.clean_program`).
    """
    path = Path(path)
    members = read_members(map_file(path), str(path), "a .pt2")
    if _PROGRAM not in members:
        raise ValueError(f"{path} is no .pt2 of torch.export: it holds {', '.join(list(members)[:3])}, ...")
    checked = join(_check_members(path, members))
    extra_files: dict[str, Any] = {"": ""}  # torch.export.load fills no empty dict
    try:
        program = torch.export.load(checked, extra_files=extra_files)  # type: ignore[arg-type]
    except Exception as error:  # whatever its deserialiser stumbles over
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} is no program that torch.export {torch.__version__} can load: {reason}") from error
    return program, {name: _decode(content) for name, content in extra_files.items() if name}


def _decode(content: str | bytes) -> str:
    return content.decode(errors="replace") if isinstance(content, bytes) else content


def _check_members(path: Path, members: Members) -> Members:
    """The members that may be loaded, those that hold more than tensors written anew."""
    checked: dict[str, memoryview | bytes] = {}
    for name, content in members.items():
        if not _MEMBERS.fullmatch(name):
            raise ValueError(
                f"{path} has {quote(name)}, which torch.export.save does not write of tensors: export the model again"
            )
        if name == _SAMPLE_INPUTS and content:
            load_tensors(content, f"{path}, {name}")  # torch unpickles what is more than tensors
            checked[name] = rewrite_tensors(content, name).read()
            continue
        folder, _, file = name.rpartition("/")
        try:
            if name == _PROGRAM:
                checked[name] = clean_program(bytes(content))
            elif file == _PAYLOADS.get(f"{folder}/"):
                checked[name] = _clean_payloads(bytes(content), f"{folder}/", members)
            else:
                checked[name] = content
        except ValueError as error:
            raise ValueError(f"{path} has {error} (in {name}): export the model again, with tensors alone") from None
    return checked


def _clean_payloads(content: bytes, folder: str, members: Members) -> bytes:
    """The list of a program's tensors, each by a name and in a file of this archive.

    Raises:
        ValueError: pickled tensors and objects; a tensor of more than its file holds.
    """
    try:
        entries = json.loads(content)["config"]
        payloads = {name: _clean_payload(name, entry, folder, members) for name, entry in entries.items()}
    except (TypeError, KeyError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"no list of tensors ({type(error).__name__}: {error})") from None
    return json.dumps({"config": payloads}).encode()


def _clean_payload(name: str, entry: dict[str, Any], folder: str, members: Members) -> dict[str, Any]:
    if not ATTRIBUTE.fullmatch(name):
        raise ValueError(f"{quote(name)} as the name of a tensor")
    file, meta = entry["path_name"], entry["tensor_meta"]
    if entry["use_pickle"] is not False or not meta or not _MEMBERS.fullmatch(f"{folder}{file}"):
        raise ValueError(f"pickled objects ({name} in {quote(file)}), which may run code")
    if f"{folder}{file}" not in members:
        raise ValueError(f"{name} in {quote(file)}, which is not there")
    num_bytes = len(members[f"{folder}{file}"])
    sizes, strides = _read_integers(meta["sizes"]), _read_integers(meta["strides"])
    # torch makes a tensor of its own of what has no bytes.
    if math.prod(sizes) > (num_bytes + _MAX_EXPANSION if num_bytes else 0):
        raise ValueError(f"{name} of shape {sizes} in {num_bytes} bytes")
    device = meta["device"]
    return {
        "path_name": file,
        "is_param": bool(entry["is_param"]),
        "use_pickle": False,
        "tensor_meta": {
            "dtype": int(meta["dtype"]),
            "sizes": [{"as_int": size} for size in sizes],
            "requires_grad": bool(meta["requires_grad"]),
            "device": {"type": str(device["type"]), "index": device["index"]},
            "strides": [{"as_int": stride} for stride in strides],
            "storage_offset": {"as_int": _read_integers([meta["storage_offset"]])[0]},
            "layout": int(meta["layout"]),
        },
    }


def _read_integers(values: Iterable[Any]) -> list[int]:
    found = [value["as_int"] for value in values]
    if not all(type(value) is int and 0 <= value < 2**63 for value in found):
        raise ValueError(f"{quote(found)} as a shape")
    return found
