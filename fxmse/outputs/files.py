"""Files and folders that are there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replace_file", "replace_folder"]


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A new file to write, which takes the place of ``path`` at the end of a ``with`` block that raises nothing."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    new = Path(name)
    try:
        yield new
        os.chmod(new, 0o666 & ~_read_umask())  # a temporary file is for its owner alone
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of ``path`` at the end of a ``with`` block that raises nothing.

    A folder cannot replace another in one step: the old one is moved aside, and back if the new one cannot follow.
    """
    path = path.absolute()
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        new.mkdir()
        yield new
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            if old.exists():
                os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
