"""Hidden folders beside what is to be replaced: locked while their run lives, cleared by the next one."""

import fcntl
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["MOVED_ASIDE", "make_workplace"]

MOVED_ASIDE = "old"
"""The name in a workplace of what was at the path. Whatever has this name is complete."""

_MEMBERS = re.compile(rf"new(\.\w+)?|{MOVED_ASIDE}")
_RANDOM = r"[a-z0-9_]{8}"  # as tempfile.mkdtemp has it


@contextmanager
def make_workplace(path: Path) -> Iterator[Path]:
    """A folder beside ``path``, on its file system, to write "new" in; gone at the end of the ``with`` block.

    Rules:

    1. A workplace is locked by its process, so that one without a lock was left by a run that was killed.
    2. Workplaces of ``path`` that were left are cleared first.
    3. Where nothing is at ``path`` at the end, and the workplace has what was (:data:`MOVED_ASIDE`), that goes back.
    4. Where no lock can be had (some network file systems), what may have been left stays, and is named.

    Args:
        path: what is to be replaced, resolved.

    Raises:
        OSError: the folder of ``path`` cannot be written. An OSError of the ``with`` block gets a name if it has none.
    """
    _clear_left(path)
    work, lock = _make_locked(path)
    try:
        yield work
    except OSError as error:
        if error.errno is not None:  # a write does not know of what
            error.filename = error.filename or str(path)
        raise
    finally:
        _clear(work, path)
        with suppress(OSError):  # the work is done
            os.close(lock)


def _make_locked(path: Path) -> tuple[Path, int]:
    while True:
        work = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
        with suppress(FileNotFoundError):
            lock = os.open(work, os.O_RDONLY)
            with suppress(OSError):  # rule 4
                fcntl.flock(lock, fcntl.LOCK_EX)
            if work.exists():
                return work, lock
            os.close(lock)  # another run found it before it had its lock, and cleared it


def _clear_left(path: Path) -> None:
    """Rule 2."""
    name = re.compile(re.escape(_prefix(path)) + _RANDOM)
    for work in [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)]:
        with suppress(FileNotFoundError, NotADirectoryError):
            lock = os.open(work, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                if _is_ours(work, lock) and _is_left(work, lock) and _clear(work, path):
                    warnings.warn(f"{path} is back as it was before a run that was killed", UserWarning, stacklevel=6)
            finally:
                os.close(lock)


def _is_ours(work: Path, lock: int) -> bool:
    """Whether this user made it, and nobody put anything else into it."""
    is_own = os.fstat(lock).st_uid == os.geteuid()
    return is_own and all(_MEMBERS.fullmatch(entry.name) for entry in work.iterdir())


def _is_left(work: Path, lock: int) -> bool:
    """Rules 1 and 4."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        warnings.warn(
            f"{work} is of another run: remove it if that has ended; {work / MOVED_ASIDE}, if there, is what was there "
            "before",
            UserWarning,
            stacklevel=7,
        )
        return False
    return True


def _clear(work: Path, path: Path) -> bool:
    """Rule 3; returns whether anything went back. What cannot be removed is the next run's to clear."""
    old = work / MOVED_ASIDE
    is_lost = os.path.lexists(old) and not os.path.lexists(path)
    if is_lost:
        os.rename(old, path)
    with suppress(OSError):  # shutil's ignore_errors lets some of them out
        shutil.rmtree(work)
    return is_lost


def _prefix(path: Path) -> str:
    return f".{path.name}.fxmse-"
