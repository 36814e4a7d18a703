"""Zip archives as torch writes them: read once, and handed on as what was read."""

import bisect
import io
import itertools
import mmap
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from fxmse.reading import check_file, quote

__all__ = ["Members", "join", "map_file", "read_members"]

Members = Mapping[str, memoryview | bytes]
"""The content of each member, by its path in the archive's one folder."""

_ROOT = "archive"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_IS_ENCRYPTED = 1


def map_file(path: Path) -> memoryview:
    """A file's content, of which nothing is read before it is looked at.

    Raises:
        ValueError: as :func:`fxmse.reading.check_file`; an empty file.
    """
    if not check_file(path):
        raise ValueError(f"{path} cannot be read: it is empty")
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def read_members(content: memoryview | bytes, name: str, kind: str) -> dict[str, memoryview]:
    """The members of an archive, as views of it.

    torch compresses nothing, so that an archive's members are never more than the archive itself: those that are, by
    what they declare or by what they share, are refused before anything of their size is made.

    Args:
        content: the archive.
        name: what it is called in messages.
        kind: what it should be, in messages.

    Raises:
        ValueError: what is no zip archive, or is cut off; what torch does not write: compression, encryption, a member
            outside of one folder, two of one name; a member without its checksum.
    """
    view = memoryview(content)
    try:
        with zipfile.ZipFile(_open(view)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error) as error:
        raise ValueError(f"{name} cannot be read as {kind}: {error}") from None
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _IS_ENCRYPTED for entry in entries):
        raise ValueError(f"{name} is compressed or encrypted, which torch.save and torch.export.save never do")
    if sum(entry.file_size for entry in entries) > len(view):
        raise ValueError(f"{name} has members of more bytes than it has itself: {len(view)}")
    members: dict[str, memoryview] = {}
    for entry in entries:
        root, _, path = entry.filename.partition("/")
        if not path or path in members or root != entries[0].filename.partition("/")[0]:
            raise ValueError(
                f"{name} has {quote(entry.filename)}, which torch does not write: expected one folder, each name once"
            )
        members[path] = _read(view, entry, name)
    return members


def _open(view: memoryview) -> io.BufferedIOBase | io.RawIOBase:
    return _JoinedFile([view])


def _read(view: memoryview, entry: zipfile.ZipInfo, name: str) -> memoryview:
    header = view[entry.header_offset : entry.header_offset + _LOCAL_HEADER.size]
    if len(header) == _LOCAL_HEADER.size:
        magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        content = view[start : start + entry.file_size]
        if magic == b"PK\3\4" and len(content) == entry.file_size and zlib.crc32(content) == entry.CRC:
            return content
    raise ValueError(f"{name} is damaged: {entry.filename} does not have its checksum")


def join(members: Members) -> io.RawIOBase:
    """A file of an archive of these members and nothing else, of which no second copy is made.

    So a reader that finds its way in an archive differently from this one, by another directory or past a gap, finds
    what was checked all the same.
    """
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", allowZip64=True) as archive:
        for path, content in members.items():
            with archive.open(zipfile.ZipInfo(f"{_ROOT}/{path}"), "w", force_zip64=True) as member:
                member.write(content)
    return _JoinedFile(sink.parts)


class _Sink(io.RawIOBase):
    """Keeps what is written by reference."""

    def __init__(self) -> None:
        self.parts: list[memoryview] = []

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        self.parts.append(memoryview(data))
        return len(self.parts[-1])


class _JoinedFile(io.RawIOBase):
    """A file to read whose content is that of several buffers in a row."""

    def __init__(self, parts: list[memoryview]) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._ends[-1] if self._ends else 0}[whence]
        if start + offset < 0:
            raise OSError(f"seek to {start + offset}: expected at least 0")
        self._place = start + offset
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        target = memoryview(buffer).cast("B")
        filled = 0
        number = bisect.bisect_right(self._ends, self._place)
        while filled < len(target) and number < len(self._parts):
            part = self._parts[number]
            begin = self._place - (self._ends[number] - len(part))
            some = part[begin : begin + len(target) - filled]
            target[filled : filled + len(some)] = some
            filled += len(some)
            self._place += len(some)
            number += 1
        return filled
