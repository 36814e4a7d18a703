"""Quantized graphs as torch.export programs, and .pt2 files of them."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from fxmse.capture.exporting import export_module
from fxmse.capture.front_ends import split_inputs
from fxmse.ops import DECOMPOSITIONS
from fxmse.outputs.files import replace_file

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
    """
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
    """``torch.export.save``, of which ``path`` is there whole or not at all."""
    with replace_file(Path(path)) as new:
        torch.export.save(program, new, extra_files=dict(extra_files or {}))
