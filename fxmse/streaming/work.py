"""The folder of a run that is not done, which the next one goes on with."""

import errno
import fcntl
import json
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TextIO

from fxmse.calibration.ranks import Alone, Ranks
from fxmse.outputs.checkpoint import keep_others, link
from fxmse.outputs.files import replace_file, replace_folder
from fxmse.reading import read_json
from fxmse.streaming.activations import Activations
from fxmse.streaming.fingerprints import find_difference

__all__ = ["Work"]

_RECORD = "run.json"
_LOCK = "lock"
_CHECKPOINT = "checkpoint"


class Work:
    """A hidden folder beside the checkpoint to be, held by one process at a time, or by those of one group.

    The first of these keeps the record and writes the checkpoint; each has activations of its own. The folder holds
    what the record lists and what is in progress: all else that a run that was killed has left is removed by the next.

    Args:
        out: where the checkpoint will be.
        ranks: the processes that work on it.

    Attributes:
        folder: where the parts' files are until they become the checkpoint.
        activations: what passes between parts, of this process's data.
        floats: the same of the float model, where activations are those of the quantized one.
        done: what was noted of each part that is finished.

    Raises:
        ValueError: another process works on the same checkpoint.
    """

    def __init__(self, out: Path, ranks: Ranks | Alone) -> None:
        self.out = out
        self._ranks = ranks
        self._base = _find_base(out)
        self._base.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self._base / _LOCK, out) if self.is_first else None
        self.folder = self._base / _CHECKPOINT
        self.activations, self.floats = (Activations(self._base / name) for name in _name_passing(ranks.rank))
        self.done: list[dict[str, Any]] = []
        self._facts: dict[str, str] = {}

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self._ranks.rank == 0

    @staticmethod
    def is_begun(out: Path) -> bool:
        """Whether a run left something for ``out`` that the next one can go on with."""
        return (_find_base(out) / _RECORD).exists()

    def resume(self, facts: Mapping[str, str]) -> None:
        """Takes what an earlier run of the same facts has finished, and removes all else that is there.

        What passes to the first part may have been written before.

        Raises:
            ValueError: there is an unfinished run of other facts.
        """
        record = self._read_record() if self.is_first else None
        if record and (difference := find_difference(facts, record["facts"])):
            raise ValueError(
                f"{self._base} has {len(record['parts'])} finished parts of a run with something else as {difference}: "
                "give the same arguments to go on with it, or start anew (resume=False, --no-resume)"
            )
        self._facts = dict(facts)
        self.folder.mkdir(exist_ok=True)
        self.done = []
        sizes = {file.name: file.stat().st_size for file in self.folder.iterdir() if file.is_file()}
        for part in record["parts"] if record else ():
            if not part["files"].items() <= sizes.items():
                break
            self.done.append(part)
        self.done = self._ranks.meet(self.done)[0]
        kept = self._ranks.meet(self._list_sizes(len(self.done)))
        if self.done and kept != self.done[-1]["activations"]:
            warnings.warn(f"{self._base} has lost what its finished parts pass on: starting anew", stacklevel=2)
            self.done = []
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Removes what no part that is done has written or passes on."""
        for activations in (self.activations, self.floats):
            activations.keep(len(self.done))
        if self.is_first:
            _keep(self.folder, self._list_files())
            passing = [name for rank in range(self._ranks.size) for name in _name_passing(rank)]
            _keep(self._base, {_LOCK, _RECORD, _CHECKPOINT, *passing})

    def _list_files(self) -> set[str]:
        """The files of the parts that are done."""
        return {name for part in self.done for name in part["files"]}

    def note(self, part: Mapping[str, Any], files: list[str], following: int) -> None:
        """Notes that a part is finished.

        Args:
            part: what to note of it.
            files: that it wrote.
            following: the number of the next part, whose activations are kept.
        """
        passed = self._ranks.meet(self._list_sizes(following))  # all have written what the next part needs
        sizes = {name: (self.folder / name).stat().st_size for name in files}
        self.done.append({**part, "files": sizes, "activations": passed})
        if self.is_first:
            with replace_file(self._base / _RECORD) as new:
                new.write_text(json.dumps({"facts": self._facts, "parts": self.done}))
        self._ranks.meet()  # and what this one was made of is needed no more
        for activations in (self.activations, self.floats):
            activations.keep(following)

    @property
    def num_written(self) -> int:
        """Bytes of the files of the parts that are done."""
        return sum(size for part in self.done for size in part["files"].values())

    @property
    def num_passing(self) -> int:
        """Bytes that pass to the first part that is not done, of this process's data."""
        return sum(self._list_sizes(len(self.done)))

    def _list_sizes(self, part: int) -> list[int]:
        return [*self.activations.list_sizes(part), *self.floats.list_sizes(part)]

    def clear(self) -> None:
        """Forgets all that is there."""
        if self.is_first:
            (self._base / _RECORD).unlink(missing_ok=True)  # without it a run that is killed here has left nothing
            _keep(self._base, {_LOCK})
        self._ranks.meet()
        self.done = []

    def finish(self, write_rest: Callable[[Path], object]) -> None:
        """Puts the checkpoint in its place.

        Args:
            write_rest: called by the first process with a folder that has the parts' files; writes the others there.
        """
        if self.is_first:
            with replace_folder(self.out) as new:
                # A run that is killed here is gone on with from the parts, which stay until all is in its place.
                for name in self._list_files():
                    link(self.folder / name, new / name)
                write_rest(new)
                if self.out.exists():
                    keep_others(self.out, new)
        self.clear()

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *_: object) -> None:
        """Lets go of the folder; removes it where nothing in it is worth going on with."""
        if self._lock is None:
            return
        if not (self._base / _RECORD).exists():
            shutil.rmtree(self._base, ignore_errors=True)
        self._lock.close()

    def _read_record(self) -> dict[str, Any] | None:
        path = self._base / _RECORD
        if not path.exists():
            return None
        try:
            record = read_json(path)
            is_whole = isinstance(record["facts"], dict) and all(isinstance(p["files"], dict) for p in record["parts"])
        except (ValueError, KeyError, TypeError):
            is_whole = False
        if not is_whole:
            raise ValueError(f"{path} is damaged: start anew (resume=False, --no-resume)")
        return record


def _lock(path: Path, out: Path) -> TextIO:
    """The file at ``path``, which no other process has until it is closed."""
    file = open(path, "a")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise ValueError(f"{out}: another process is writing it: wait for that, or choose another folder") from None
    return file


def _find_base(out: Path) -> Path:
    return out.absolute().parent / f".{out.name}.fxmse"


def _name_passing(rank: int) -> tuple[str, str]:
    """The folders of what passes between parts of a process's data, and of the same of the float model."""
    return f"activations-{rank}", f"floats-{rank}"


def _keep(folder: Path, names: Collection[str]) -> None:
    """Removes all from a folder but what has one of these names."""
    for entry in folder.iterdir():
        if entry.name in names:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)  # a mapped file may stay a while, on file systems of networks
        else:
            entry.unlink()
