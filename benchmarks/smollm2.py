"""SmolLM2-135M-Instruct: its weights, and windows of tokens in draws."""

import atexit
import functools
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import quantize_smollm2 as example

__all__ = ["HEAD", "draw_windows", "example", "load_model", "load_windows"]

HEAD = "lm_head"
"""Stays in float: it shares its weight with the embedding."""


@functools.cache
def load_model() -> nn.Module:
    """SmolLM2-135M-Instruct in float32, and a folder that its config names: llm-compressor looks into it."""
    model = example.load_model()
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    model.config.save_pretrained(folder.name)
    example.load_tokenizer().save_pretrained(folder.name)
    model.name_or_path = model.config._name_or_path = folder.name
    return model


@functools.cache
def load_windows(length: int, is_held_out: bool) -> Tensor:
    """All windows of ``length`` tokens of the text for calibration, or of the held-out one."""
    return example.cut_windows(example.load_tokenizer(), example.load_texts()[is_held_out], length)


def draw_windows(num_windows: int, length: int, draw: int) -> Tensor:
    """Windows for calibration, drawn at random; no two draws of the same sizes share one.

    Raises:
        ValueError: the text is too short for so many draws.
    """
    windows = load_windows(length, is_held_out=False)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    chosen = order[draw * num_windows :][:num_windows]
    if len(chosen) < num_windows:
        raise ValueError(f"draw {draw}: the text has {len(windows)} windows of {length} tokens")
    return windows[chosen]
