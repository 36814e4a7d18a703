"""Files that would run code, lead elsewhere or never end, for tests/test_trust.py.

Each attack writes one file, whatever the file is to be read as. What it runs touches a file called "ran" beside it.
"""

import functools
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

SPARSE = 2**43
"""Bytes of a file that is written in no time."""


class Payload:
    """Touches a file where it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self):
        return os.system, (f"touch {self.ran}",)


def write_code(ran: Path) -> Path:
    """A module that touches ``ran`` when it is imported."""
    code = ran.parent / "evil.py"
    code.write_text(f"import os\nos.system('touch {ran}')\nclass X: pass\n")
    return code


def _pickle(path: Path, ran: Path) -> None:
    torch.save({"x": Payload(ran)}, path)


def _legacy_pickle(path: Path, ran: Path) -> None:
    torch.save({"x": Payload(ran)}, path, _use_new_zipfile_serialization=False)


def _import_path(path: Path, ran: Path) -> None:
    weights = {"num_bits": 8, "observer": f"{write_code(ran)}:X"}
    path.write_text(json.dumps({"quantization_config": {"targets": ["Linear"], "weights": weights}}))


def _yaml_tag(path: Path, ran: Path) -> None:
    path.write_text(f'!!python/object/apply:os.system ["touch {ran}"]\n')


def _yaml_aliases(path: Path, ran: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    path.write_text("\n".join(lines) + "\ntargets: [Linear]\n")


def _yaml_loop(path: Path, ran: Path) -> None:
    path.write_text("&a [*a]")


def _pattern(path: Path, ran: Path) -> None:
    weights = {"num_bits": 8}
    path.write_text(json.dumps({"targets": ["re:(.*.*a)+$"], "weights": weights}))


def _remote_code(path: Path, ran: Path) -> None:
    write_code(ran)
    auto_map = {"AutoConfig": "evil.X", "AutoModel": "evil.X", "AutoTokenizer": ["evil.X", None]}
    path.write_text(json.dumps({"model_type": "evil", "auto_map": auto_map, "tokenizer_class": "EvilTokenizer"}))


def _downloaded_kernel(path: Path, ran: Path) -> None:
    path.write_text(json.dumps({"model_type": "llama", "attn_implementation": "evil/kernel"}))


def _traversal(path: Path, ran: Path) -> None:
    path.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))


def _link(path: Path, ran: Path) -> None:
    secret = path.absolute().parents[1] / "secret"
    secret.write_text('{"weight_map": {}}')
    path.symlink_to(secret)


def _device(path: Path, ran: Path) -> None:
    path.symlink_to("/dev/zero")


def _pipe(path: Path, ran: Path) -> None:
    os.mkfifo(path)


def _oversize(path: Path, ran: Path) -> None:
    with path.open("wb") as file:
        file.truncate(SPARSE)


def _deep(path: Path, ran: Path) -> None:
    path.write_text("[" * 100_000)


def _big_number(path: Path, ran: Path) -> None:
    path.write_text("1" * 10_000)


def _null(path: Path, ran: Path) -> None:
    path.write_text("null")


def _list(path: Path, ran: Path) -> None:
    path.write_text("[1, 2]")


def _junk(path: Path, ran: Path) -> None:
    path.write_bytes(bytes(range(256)) * 4)


def _empty(path: Path, ran: Path) -> None:
    path.write_bytes(b"")


def _postscript(path: Path, ran: Path) -> None:
    path.write_text(f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch {ran}) (w) file\n")


def _compressed(path: Path, ran: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(2**24))
        archive.writestr("a/models/model.json", bytes(2**24))


def _shared_members(path: Path, ran: Path) -> None:
    """A central directory of many members that are one in the file."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/models/model.json", bytes(2**16))
        first = archive.infolist()[0]
        for number in range(1000):
            other = zipfile.ZipInfo(f"a/data/weights/weight_{number}")
            other.CRC, other.file_size, other.compress_size = first.CRC, first.file_size, first.compress_size
            other.header_offset = first.header_offset
            archive.filelist.append(other)


def make_program(path: Path) -> Path:
    """A program of dynamic shapes, with guards, weights and sample inputs."""
    path.write_bytes(_export())
    return path


@functools.cache
def _export() -> bytes:

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 3)

        def forward(self, x, scale="one"):
            return self.fc(x[: x.shape[0] // 2]) * x.shape[0]

    model = Halves()
    shapes = {"x": {0: torch.export.Dim.AUTO}, "scale": None}
    content = io.BytesIO()
    torch.export.save(torch.export.export(model, (torch.ones(4, 2), "one"), dynamic_shapes=shapes), content)
    return content.getvalue()


def rewrite(source: Path, target: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """A copy of an archive with members that ``change`` has changed, by their names without the folder."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name.partition("/")[2], old.read(name)))
    return target


def write_two_directories(shown: Path, loaded: Path, target: Path) -> Path:
    """An archive that is ``shown`` to Python's zipfile and ``loaded`` to torch's reader.

    zipfile takes the directory that stands before the end record; torch that at the offset which the record tells.
    """
    (first, evil), (second, harmless) = (_split(path.read_bytes()) for path in (loaded, shown))
    assert len(evil) == len(harmless)
    start = len(first) + len(second)
    # zipfile adds the difference of the two places to every offset.
    harmless = _move(harmless, len(first) - len(evil))
    count = evil.count(b"PK\1\2")
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, len(evil), start, 0)
    target.write_bytes(first + second + evil + harmless + end)
    return target


def _split(content: bytes) -> tuple[bytes, bytes]:
    size, offset = struct.unpack_from("<II", content, len(content) - 10)
    return content[:offset], content[offset : offset + size]


def _move(directory: bytes, distance: int) -> bytes:
    moved, place = bytearray(directory), 0
    while place < len(moved):
        name, extra, comment = struct.unpack_from("<HHH", moved, place + 28)
        struct.pack_into("<I", moved, place + 42, struct.unpack_from("<I", moved, place + 42)[0] + distance)
        place += 46 + name + extra + comment
    return bytes(moved)


def write_evil_program(path: Path, ran: Path) -> Path:
    """A program whose sample inputs run code, with members of the same names and sizes of names."""
    payload = ran.parent / "payload.pt"
    torch.save(((Payload(ran),), {}), payload)
    source = make_program(path.with_name("source.pt2"))
    return rewrite(source, path, lambda name, old: payload.read_bytes() if "sample_inputs" in name else old)


def _evil_program(path: Path, ran: Path) -> None:
    write_evil_program(path, ran)


def _two_directories(path: Path, ran: Path) -> None:
    evil = write_evil_program(path.with_name("evil.pt2"), ran)
    harmless = rewrite(path.with_name("source.pt2"), path.with_name("harmless.pt2"), lambda name, old: old)
    write_two_directories(harmless, evil, path)
    for other in ("source.pt2", "evil.pt2", "harmless.pt2"):
        path.with_name(other).unlink()


ATTACKS: dict[str, Callable[[Path, Path], None]] = {
    "pickle": _pickle,
    "pickle of before torch 1.6": _legacy_pickle,
    "observer by the path of a file": _import_path,
    "YAML tag": _yaml_tag,
    "YAML aliases": _yaml_aliases,
    "YAML that holds itself": _yaml_loop,
    "pattern that never ends": _pattern,
    "code of a folder": _remote_code,
    "kernel to download": _downloaded_kernel,
    "weights in another folder": _traversal,
    "link to another folder": _link,
    "device": _device,
    "pipe": _pipe,
    "sparse file": _oversize,
    "lists in lists": _deep,
    "long number": _big_number,
    "null": _null,
    "list": _list,
    "junk": _junk,
    "nothing": _empty,
    "PostScript": _postscript,
    "compressed archive": _compressed,
    "members that share their bytes": _shared_members,
    "program with code": _evil_program,
    "two directories": _two_directories,
}
