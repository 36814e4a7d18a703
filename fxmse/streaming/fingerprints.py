"""What a run is made of, so that another can tell whether it may go on with it."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor
from torch.utils._pytree import tree_flatten

__all__ = ["describe_run", "find_difference", "hash_batches"]

_LIBRARIES = ("fxmse", "torch", "transformers", "compressed-tensors")


def describe_run(folder: Path, config: QuantizationConfig, **options: object) -> dict[str, str]:
    """What makes a run's bytes, fact by fact.

    Args:
        folder: of the float model, whose files are told apart by name, size and time.
        config: what is quantized how.
        options: the rest.
    """
    files = {
        file.name: (file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(folder.iterdir())
        if file.suffix in (".safetensors", ".json")
    }
    facts = {"the model": files, "the config": config.model_dump(mode="json"), **options}
    facts["versions"] = {name: version(name) for name in _LIBRARIES}
    return {name: _hash(json.dumps(fact, sort_keys=True, default=str).encode()) for name, fact in facts.items()}


def find_difference(here: Mapping[str, str], there: Mapping[str, str]) -> str | None:
    """The first fact in which two runs differ."""
    return next((fact for fact in {**here, **there} if here.get(fact) != there.get(fact)), None)


def hash_batches(batches: Iterable[Any], digest: "hashlib._Hash") -> Iterator[Any]:
    """The batches, each of which is added to ``digest`` as it passes."""
    for batch in batches:
        leaves, structure = tree_flatten(batch)
        digest.update(repr(structure).encode())
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
                digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            else:
                digest.update(repr(leaf).encode())
        yield batch


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
