"""Files and folders that are there whole or not at all."""

import ctypes
import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fxmse.outputs.workplaces import MOVED_ASIDE, make_workplace

__all__ = ["check_apart", "check_place", "replace_file", "replace_folder"]

_CURRENT_FOLDER = -100  # AT_FDCWD of <fcntl.h>
_EXCHANGE = 2  # RENAME_EXCHANGE of <linux/fs.h>


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A name for a new file, which takes the place of ``path`` at the end of a ``with`` block that raises nothing.

    At every instant the old file or the new one is at ``path``, complete and on the disk; raises as
    :func:`check_place`, and OSError where the new one cannot be written.
    """
    check_place(path, is_folder=False)
    path = path.resolve()
    with make_workplace(path) as work:
        new = work / f"new{path.suffix}"
        yield new
        _flush(new)
        os.replace(new, path)
        _flush_replaced(path)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of ``path`` at the end of a ``with`` block that raises nothing.

    At every instant the old folder or the new one is at ``path``, complete and on the disk. Where the file system
    cannot exchange two names (some of networks), the old one is moved aside for an instant: a run that is killed then
    leaves ``path`` without either, and the next one puts it back.

    Raises:
        ValueError: as :func:`check_place`.
        OSError: the new one cannot be written; the old one is at ``path``.
    """
    check_place(path, is_folder=True)
    path = path.resolve()
    with make_workplace(path) as work:
        new = work / "new"
        new.mkdir()
        yield new
        _flush_tree(new)
        if not path.exists():
            os.rename(new, path)
        elif not _exchange(new, path):
            old = work / MOVED_ASIDE
            os.rename(path, old)
            os.rename(new, path)
            with suppress(OSError):  # the work is done
                os.rename(old, new)  # it is about to be removed, and no longer what would have to go back
        _flush_replaced(path)


def check_place(path: Path, *, is_folder: bool) -> None:
    """Raises ValueError where a file or a folder cannot take the place of ``path``, or should not: before any work.

    What a killed run moved aside is put back first.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link to {os.readlink(path)}: give the path of that, or another one")
    path = path.resolve()
    try:
        with make_workplace(path):
            pass
    except OSError as error:
        raise ValueError(f"{path}: {path.parent} is no folder that can be written: {error.strerror or error}") from None
    if not is_folder:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'no file'}: expected a file")
        return
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: expected a folder")
    if path.is_mount():
        raise ValueError(f"{path} is where a file system is mounted, and cannot be replaced: choose a folder in it")
    if Path.cwd().is_relative_to(path):
        raise ValueError(f"{path} has the current folder in it, which cannot be replaced: run from another one")


def check_apart(path: Path, source: Path) -> None:
    """Raises ValueError where what is read is at ``path``, or in it, or around it, however both are spelt."""
    place, read = path.resolve(), source.resolve()
    for inner, outer, relation in ((place, read, "in"), (read, place, "around")):
        if any(_is_same(folder, outer) for folder in (inner, *inner.parents)):
            relation = "the same as" if _is_same(place, read) else relation
            raise ValueError(f"{path} is {relation} {source}, which is read: choose a path beside it")


def _is_same(path: Path, other: Path) -> bool:
    return path == other or (path.exists() and other.exists() and path.samefile(other))


def _exchange(path: Path, other: Path) -> bool:
    """Exchanges two names in one step; returns False where the system or the file system cannot.

    Why it cannot makes no difference: renaming in two steps will do, or say why not.
    """
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:  # C libraries of before 2018
        return False
    return rename(_CURRENT_FOLDER, os.fsencode(path), _CURRENT_FOLDER, os.fsencode(other), _EXCHANGE) == 0


def _flush_tree(folder: Path) -> None:
    """Has everything that was written into a folder on the disk."""
    for root, _, names in os.walk(folder):
        for file in (Path(root) / name for name in names):
            # What has another name was linked here, and written before.
            if file.is_file() and not file.is_symlink() and file.stat().st_nlink == 1:
                _flush(file)
        _flush(Path(root))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has nothing to flush
            raise
    finally:
        os.close(handle)


def _flush_replaced(path: Path) -> None:
    """Has a name's new meaning on the disk; where that fails, it has it nevertheless, so that this is no error."""
    try:
        _flush(path.parent)
    except OSError as error:
        warnings.warn(f"{path} is complete, but may not outlast a power cut: {error}", UserWarning, stacklevel=4)
