"""Calibration data from files: batches of tensors, texts, images."""

import inspect
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils._pytree import tree_leaves

from fxmse.capture.front_ends import split_inputs
from fxmse.inputs.archive import map_file
from fxmse.inputs.folders import load_pretrained, load_safetensors
from fxmse.inputs.tensors import load_tensors
from fxmse.reading import check_file, read_text

__all__ = ["ALL", "Choice", "check_batches", "find_batch_size", "order_inputs", "read_batches", "take_inputs"]

Batch = Any
T = TypeVar("T")

_TENSORS = (".safetensors", ".pt")
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# By what is in them: PIL takes a file for what its content is, whatever its name, and runs PostScript by Ghostscript.
_IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
_TEXT_LIMIT = 2**30
"""Bytes: a thousand times what a calibration needs."""


@dataclass(frozen=True)
class Choice:
    """Which samples of a file are used, and in which order: its own, where ``seed`` is None, and all by default."""

    num_samples: int | None = None
    seed: int | None = None

    def of(self, samples: Sequence[T]) -> list[T]:
        """The samples that are chosen."""
        order = list(range(len(samples)))
        if self.seed is not None:
            order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return [samples[place] for place in order[: self.num_samples]]


ALL = Choice()
"""Every sample, in a file's order."""


def read_batches(
    path: Path,
    *,
    batch_size: int,
    max_length: int,
    model_folder: Path | None = None,
    choice: Choice = ALL,
    trust_remote_code: bool = False,
) -> list[Batch]:
    """The batches that a file or folder holds.

    Args:
        path: a .safetensors file of inputs by name, each with its samples in the first dimension; a .pt file of such a
            dict, or of a list of batches (dicts, tuples or tensors); a .txt file, a text a line; a .jsonl file of
            strings or of objects with a "text"; or a folder of images.
        batch_size: samples a batch, where the file does not say.
        max_length: tokens at most of a text.
        model_folder: where the tokenizer of texts or the processor of images is; None if there is none.
        choice: which samples; of a list of batches, in which order.
        trust_remote_code: run the code that the model's folder has for them.

    Raises:
        ValueError: a file that cannot be read as that, or holds nothing; a number of samples of a list of batches.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.is_dir():
        batches = list(_read_images(path, batch_size, model_folder, choice, trust_remote_code))
    elif path.suffix in (".txt", ".jsonl"):
        batches = list(_read_texts(path, batch_size, max_length, model_folder, choice, trust_remote_code))
    elif path.suffix in _TENSORS:
        batches = list(_read_tensors(path, batch_size, choice))
    else:
        raise ValueError(f"{path}: expected a .safetensors, .pt, .txt or .jsonl file, or a folder of images")
    if not batches:
        raise ValueError(f"{path} holds no samples")
    return batches


def _read_tensors(path: Path, batch_size: int, choice: Choice) -> Iterator[Batch]:
    is_pickled = path.suffix != ".safetensors"
    content = load_tensors(map_file(path), str(path)) if is_pickled else load_safetensors(path)
    if isinstance(content, list):
        for batch in content:
            if not all(isinstance(leaf, Tensor | int | float | bool | None) for leaf in tree_leaves(batch)):
                raise ValueError(f"{path}: expected batches of tensors")
        if choice.num_samples is not None:
            raise ValueError(f"{path} holds batches, not samples: choose how many with --max-batches")
        yield from choice.of(content)
        return
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) and t.dim() for t in content.values()):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected a dict of tensors or a list of batches")
    sizes = {name: len(tensor) for name, tensor in content.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{path}: expected as many samples of each input, found {sizes}")
    chosen = torch.tensor(choice.of(range(min(sizes.values(), default=0))), dtype=torch.int64)
    for rows in chosen.split(batch_size) if len(chosen) else ():
        yield {name: tensor[rows] for name, tensor in content.items()}


def _read_texts(
    path: Path, batch_size: int, max_length: int, model_folder: Path | None, choice: Choice, trust_remote_code: bool
) -> Iterator[Batch]:
    if model_folder is None:
        raise ValueError(f"{path} holds texts, and a .pt2 has no tokenizer: pass tensors (.safetensors, .pt)")
    texts = choice.of(list(_read_lines(path)))
    from transformers import AutoTokenizer

    try:
        tokenizer = load_pretrained(AutoTokenizer, model_folder, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ValueError(f"{model_folder} has no tokenizer for the texts of {path}: {error}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for start in range(0, len(texts), batch_size):
        some = texts[start : start + batch_size]
        yield dict(tokenizer(some, padding=True, truncation=True, max_length=max_length, return_tensors="pt"))


def _read_lines(path: Path) -> Iterator[str]:
    lines = read_text(path, _TEXT_LIMIT).splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            yield line
            continue
        try:
            content = json.loads(line)
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from None
        text = content.get("text") if isinstance(content, Mapping) else content
        if not isinstance(text, str):
            raise ValueError(f'{path}, line {number}: expected a string, or an object with a "text"')
        yield text


def _read_images(
    folder: Path, batch_size: int, model_folder: Path | None, choice: Choice, trust_remote_code: bool
) -> Iterator[Batch]:
    if model_folder is None:
        raise ValueError(f"{folder} holds images, and a .pt2 has no processor: pass tensors (.safetensors, .pt)")
    files = choice.of(sorted(file for file in folder.iterdir() if file.suffix.lower() in _IMAGES))
    try:
        # transformers itself offers it only where torchvision is installed, which not all processors need.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        processor = load_pretrained(AutoImageProcessor, model_folder, trust_remote_code=trust_remote_code)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{model_folder} has no processor for the images of {folder}: {error}") from None
    for start in range(0, len(files), batch_size):
        yield dict(processor([_read_image(file) for file in files[start : start + batch_size]], return_tensors="pt"))


def _read_image(path: Path) -> Any:
    from PIL import Image

    check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(path, formats=_IMAGE_FORMATS).convert("RGB")
    except Exception as error:  # its decoders raise many
        raise ValueError(f"{path} cannot be read as an image ({', '.join(_IMAGE_FORMATS)}): {error}") from None


def take_inputs(batch: Batch, path: Path, model: nn.Module) -> Batch:
    """A batch without what a tokenizer makes for other models.

    Raises:
        ValueError: inputs that the model does not have, in a file of tensors.
    """
    if not isinstance(batch, Mapping):
        return batch
    parameters = inspect.signature(model.forward).parameters
    unknown = [name for name in batch if name not in parameters]
    if unknown and path.suffix in _TENSORS:
        raise ValueError(f"{path} has {', '.join(unknown)}: {type(model).__name__} takes {', '.join(parameters)}")
    return {name: tensor for name, tensor in batch.items() if name in parameters}


def check_batches(batches: list[Batch], program: ExportedProgram | None = None) -> list[Batch]:
    """The batches as they are.

    Raises:
        ValueError: one has other inputs, dtypes or ranks than the first, or than the program's example.
    """
    expected = None
    if program is not None and program.example_inputs is not None:
        expected = _describe_batch(program.example_inputs[1] or program.example_inputs[0])
    for number, batch in enumerate(batches, 1):
        found = _describe_batch(batch)
        expected = expected or found
        if found != expected:
            raise ValueError(
                f"batch {number} of the data has {_print_inputs(found)}: expected {_print_inputs(expected)}"
            )
    return batches


def order_inputs(batches: list[Batch], program: ExportedProgram) -> list[Batch]:
    """Batches of inputs by the program's names, in its order where it was exported with positional ones."""
    if program.example_inputs is None or program.example_inputs[1]:
        return batches
    names = [str(name) for name in program.graph_signature.user_inputs]
    return [
        tuple(batch[name] for name in names) if isinstance(batch, Mapping) and set(batch) == set(names) else batch
        for batch in batches
    ]


def find_batch_size(program: ExportedProgram) -> int | None:
    """How many samples a program takes that was exported for batches of one size; None where that may vary."""
    values = [
        node.meta["val"]
        for node in program.graph.find_nodes(op="placeholder")
        if node.name in program.graph_signature.user_inputs
    ]
    sizes = [value.shape[0] for value in values if isinstance(value, Tensor) and value.dim()]
    fixed = {int(size) for size in sizes if is_concrete_int(size)}
    return fixed.pop() if len(fixed) == 1 and all(map(is_concrete_int, sizes)) else None


def _describe_batch(batch: Any) -> dict[str, str]:
    args, kwargs = split_inputs(batch)
    inputs = {**{f"input {place}": value for place, value in enumerate(args)}, **kwargs}
    return {
        name: f"{value.dtype} of {value.dim()} dimensions" if isinstance(value, Tensor) else type(value).__name__
        for name, value in sorted(inputs.items())
    }


def _print_inputs(inputs: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in inputs.items())
