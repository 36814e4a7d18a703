"""What passes from one part of a graph to the next, in files, so that memory holds one batch at a time."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["Activations"]


class Activations:
    """The values, by name, that each batch has computed before a part runs.

    torch's own files keep strides, by which kernels choose how to add up, and which tensors share memory. They are read
    memory-mapped, and tensors alone.

    Args:
        folder: a folder of their own, made when it is needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, part: int, batch: int, values: Mapping[str, Any]) -> None:
        """Keeps the values that pass to ``part``."""
        path = self._locate(part, batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            torch.save({name: _own(value) for name, value in values.items()}, file)
            file.flush()
            os.fsync(file.fileno())

    def read(self, part: int, batch: int) -> dict[str, Any]:
        """The values of a batch that pass to ``part``."""
        return torch.load(self._locate(part, batch), weights_only=True, mmap=True)

    def read_all(self, part: int) -> Iterator[dict[str, Any]]:
        """The values that pass to ``part``, batch by batch."""
        for batch in range(len(self.list_sizes(part))):
            yield self.read(part, batch)

    def list_sizes(self, part: int) -> list[int]:
        """The bytes of each batch's file."""
        return [file.stat().st_size for file in sorted((self.folder / f"{part:05}").glob("*.pt"))]

    def keep(self, part: int) -> None:
        """Removes all but the values that pass to ``part``."""
        for folder in self.folder.glob("*"):
            if folder.name != f"{part:05}":
                shutil.rmtree(folder)

    def drop(self, part: int) -> None:
        """Removes the values that pass to ``part``."""
        shutil.rmtree(self.folder / f"{part:05}", ignore_errors=True)

    def _locate(self, part: int, batch: int) -> Path:
        return self.folder / f"{part:05}" / f"{batch:08}.pt"


def _own(value: Any) -> Any:
    """A tensor with no more memory than from its first to its last element, where it is a piece of a larger one."""
    if not isinstance(value, torch.Tensor) or value.untyped_storage().nbytes() <= value.nbytes:
        return value
    if not value.numel():
        return value.clone()
    length = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.as_strided((length,), (1,)).clone().as_strided(value.shape, value.stride(), 0)
