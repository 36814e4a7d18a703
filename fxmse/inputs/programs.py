"""Programs from .pt2 files, which hold no code."""

import io
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

__all__ = ["load_program"]

_TENSOR_FOLDERS = ("data/weights/", "data/constants/")
# All that torch.export.save writes. Anything else (shared objects, older forms) may be run or unpickled by loading.
_MEMBERS = re.compile(
    r"(data/(weights|constants|sample_inputs)|models|extra|\.data)/.+|archive_format|archive_version|byteorder"
)
_OBJECT_PREFIXES = ("custom_obj_", "opaque_obj_")


def load_program(path: str | os.PathLike[str]) -> tuple[ExportedProgram, dict[str, str]]:
    """``torch.export.load`` of a file that is known to hold tensors and no pickled code; and its extra files.

    Raises:
        ValueError: a file that is cut off, no program, or one that loading would run code of.
    """
    _check_archive(Path(path))
    extra_files: dict[str, Any] = {"": ""}  # torch.export.load fills no empty dict
    try:
        program = torch.export.load(path, extra_files=extra_files)
    except Exception as error:  # whatever its deserialiser stumbles over
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} is no program that torch.export {torch.__version__} can load: {reason}") from error
    return program, {name: _decode(content) for name, content in extra_files.items() if name}


def _decode(content: str | bytes) -> str:
    return content.decode() if isinstance(content, bytes) else content


def _check_archive(path: Path) -> None:
    """Raises ValueError where torch.export.load would unpickle more than tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{path} is damaged: {damaged} does not have its checksum")
            names = archive.namelist()
            files = {name.partition("/")[2]: name for name in names}
            if not any(name.startswith("models/") for name in files):
                raise ValueError(f"{path} is no .pt2 of torch.export: it holds {', '.join(list(files)[:3])}, ...")
            unknown = [name for name in files if not _MEMBERS.fullmatch(name)]
            if unknown or len(files) < len(names):
                what = f"{unknown[0]!r}" if unknown else "two members of one name"
                raise ValueError(f"{path} has {what}, which torch.export.save does not write: export the model again")
            for name, full_name in files.items():
                _check_member(path, name, lambda full_name=full_name: archive.read(full_name))
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as a .pt2: {error}") from None


def _check_member(path: Path, name: str, read: Any) -> None:
    is_code = False
    if name.startswith(_TENSOR_FOLDERS) and name.endswith(".json"):
        entries = json.loads(read())["config"].values()
        is_code = any(e["use_pickle"] or e["path_name"].startswith(_OBJECT_PREFIXES) for e in entries)
    elif name.startswith(_TENSOR_FOLDERS) and name.endswith(".pt"):
        is_code = True  # a legacy form, unpickled as it is
    elif name.startswith("data/sample_inputs/"):
        try:
            torch.load(io.BytesIO(read()), weights_only=True)
        except Exception:
            is_code = True
    if is_code:
        raise ValueError(
            f"{path} has pickled objects in {name}, which may run code when they are loaded: export the model again, "
            "with tensors alone"
        )
