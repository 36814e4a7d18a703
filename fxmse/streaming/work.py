"""The folder of a run that is not done, which the next one goes on with."""

import errno
import fcntl
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxmse.outputs.checkpoint import keep_others, link
from fxmse.outputs.files import replace_file, replace_folder
from fxmse.reading import read_json
from fxmse.streaming.activations import Activations
from fxmse.streaming.fingerprints import find_difference

__all__ = ["Work"]

_RECORD = "run.json"
_LOCK = "lock"


class Work:
    """A hidden folder beside the checkpoint to be, held by one process at a time.

    Args:
        out: where the checkpoint will be.

    Attributes:
        folder: what becomes the checkpoint.
        activations: what passes between parts.
        done: what was noted of each part that is finished.

    Raises:
        ValueError: another process works on the same checkpoint.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._base = _find_base(out)
        self._base.mkdir(parents=True, exist_ok=True)
        self._lock = open(self._base / _LOCK, "a")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise ValueError(f"{out}: another process is writing it: wait for that, or choose another folder") from None
        self.folder = self._base / "checkpoint"
        self.activations = Activations(self._base / "activations")
        self.done: list[dict[str, Any]] = []
        self._facts: dict[str, str] = {}

    @staticmethod
    def is_begun(out: Path) -> bool:
        """Whether a run left something for ``out`` that the next one can go on with."""
        return (_find_base(out) / _RECORD).exists()

    def resume(self, facts: Mapping[str, str]) -> None:
        """Takes what an earlier run of the same facts has finished.

        Raises:
            ValueError: there is an unfinished run of other facts.
        """
        record = self._read_record()
        if record and (difference := find_difference(facts, record["facts"])):
            raise ValueError(
                f"{self._base} has {len(record['parts'])} finished parts of a run with something else as {difference}: "
                "give the same arguments to go on with it, or start anew (resume=False, --no-resume)"
            )
        self._facts = dict(facts)
        self.folder.mkdir(exist_ok=True)
        for part in record["parts"] if record else ():
            if any(_find_size(self.folder / name) != size for name, size in part["files"].items()):
                break
            self.done.append(part)
        if self.done and self.activations.list_sizes(len(self.done)) != self.done[-1]["activations"]:
            warnings.warn(f"{self._base} has lost what its finished parts pass on: starting anew", stacklevel=2)
            self.done = []

    def note(self, part: Mapping[str, Any], files: list[str], following: int) -> None:
        """Notes that a part is finished.

        Args:
            part: what to note of it.
            files: that it wrote.
            following: the number of the next part, whose activations are kept.
        """
        sizes = {name: (self.folder / name).stat().st_size for name in files}
        passed = self.activations.list_sizes(following)
        self.done.append({**part, "files": sizes, "activations": passed})
        with replace_file(self._base / _RECORD) as new:
            new.write_text(json.dumps({"facts": self._facts, "parts": self.done}))
        self.activations.keep(following)

    def clear(self) -> None:
        """Forgets all that is there."""
        for name in (self.folder, self.activations.folder):
            shutil.rmtree(name, ignore_errors=True)
        (self._base / _RECORD).unlink(missing_ok=True)
        self.done = []

    def finish(self) -> None:
        """Puts the checkpoint in its place."""
        with replace_folder(self.out) as new:
            # A run that is killed here is gone on with from the parts, which stay until all is in its place.
            for file in self.folder.iterdir():
                link(file, new / file.name)
            if self.out.exists():
                keep_others(self.out, new)
        self.clear()

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *_: object) -> None:
        """Lets go of the folder; removes it where nothing in it is worth going on with."""
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


def _find_base(out: Path) -> Path:
    return out.absolute().parent / f".{out.name}.fxmse"


def _find_size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
