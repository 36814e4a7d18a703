"""Quantized graphs as torch.export programs, and .pt2 files of them."""

import io
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from fxmse.capture.exporting import export_module
from fxmse.capture.front_ends import check_graph, split_inputs
from fxmse.ops import DECOMPOSITIONS
from fxmse.outputs.files import replace_file
from fxmse.passes.probe import check_unobserved

__all__ = ["export", "save_program"]


def export(
    quantized: GraphModule, example_inputs: Any, *, dynamic_shapes: Any = None, decompose: bool = False
) -> ExportedProgram:
    """A quantized graph as a program for ``torch.export.save``, AOTInductor and everything else that takes one.

    Args:
        quantized: a graph from ``fxmse.convert``.
        example_inputs: a dict of keyword arguments, a tuple of positional ones, or a tensor.
        dynamic_shapes: as torch.export takes it; by default dimensions may vary that could in the graph, of images the
            batch alone.
        decompose: whether fake-quantize nodes become the arithmetic they stand for, so that a process that loads the
            program needs torch alone. Otherwise it imports ``fxmse.ops`` first, and finds one node a site.

    Raises:
        ValueError: a model, or a graph that still has observers.
    """
    check_graph(quantized, "fxmse.convert")
    check_unobserved(quantized)  # which torch.export would show values that are none
    args, kwargs = split_inputs(example_inputs)
    program = export_module(quantized, args, kwargs, dynamic_shapes)
    return _decompose(program) if decompose else program


def _decompose(program: ExportedProgram) -> ExportedProgram:
    with warnings.catch_warnings():
        # torch up to 2.13 says so of a class of its own, when it copies the program's pytree specs.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        return program.run_decompositions(DECOMPOSITIONS)


def save_program(
    program: ExportedProgram, path: str | os.PathLike[str], extra_files: Mapping[str, str] | None = None
) -> None:
    """``torch.export.save``, of which ``path`` is there whole or not at all.

    Raises:
        ValueError: a path that is a folder, a symbolic link, or in a folder that cannot be written.
        OSError: the disk is full, or fails; what was there before still is.
    """
    with replace_file(Path(path)) as new, open(new, "wb") as file:
        sink = _Sink(file)
        with _held_interrupts():
            torch.export.save(program, sink, extra_files=dict(extra_files or {}))  # type: ignore[arg-type]
        sink.check()


class _Sink(io.RawIOBase):
    """A file for torch's writer of archives, which ends the process where a write raises: errors wait for ``check``."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self._error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Does nothing: torch goes back to the start once it has written everything."""
        return 0

    def write(self, data: Any) -> int:
        try:
            if self._error is None:
                self._file.write(data)
        except OSError as error:
            self._error = error
        return len(data)

    def check(self) -> None:
        """Raises what a write would have."""
        if self._error is not None:
            raise self._error
        self._file.flush()


@contextmanager
def _held_interrupts() -> Iterator[None]:
    """Has SIGINT wait for the end of a ``with`` block: raised while torch's writer calls back, it ends the process."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: held.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for arguments in held[:1]:
            handler(*arguments)
