"""Models from files: Hugging Face folders and .pt2 programs."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from fxmse.config import read_mapping
from fxmse.inputs.programs import load_program
from fxmse.inputs.shards import list_shards

__all__ = ["Source", "load_source"]

_NAMED = 10  # tensors in an error


@dataclass(frozen=True)
class Source:
    """What is to be quantized.

    Attributes:
        path: where it was loaded from.
        model: of a folder, the ``transformers.PreTrainedModel``; None for a program.
        program: of a .pt2; None for a folder.
    """

    path: Path
    model: Any = None
    program: ExportedProgram | None = None

    @property
    def module(self) -> nn.Module | ExportedProgram:
        """What ``fxmse.prepare`` takes."""
        return self.model if self.program is None else self.program

    @property
    def folder(self) -> Path | None:
        """Where a tokenizer or processor may be; None for a program, which has none."""
        return None if self.model is None else self.path

    def make_example(self) -> Any:
        """Inputs to trace with, where a scheme of weights alone needs no data.

        Raises:
            ValueError: a program without example inputs.
        """
        if self.program is None:
            return dict(self.model.dummy_inputs)
        if self.program.example_inputs is None:
            raise ValueError(f"{self.path} has no example inputs: pass data")
        args, kwargs = self.program.example_inputs
        return kwargs or args


def load_source(path: Path) -> Source:
    """The model of a folder, in evaluation mode, or the program of a .pt2.

    Tensors of the folder that its model does not have are named in a warning.

    Raises:
        ValueError: neither is there, the .pt2 is none or holds code, or the folder's model is quantized, lacks tensors
            or has them in other shapes (all are named).
    """
    if path.suffix == ".pt2":
        return Source(path, program=load_program(path)[0])
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: expected a .pt2, or a folder with a config.json")
    if read_mapping(path / "config.json").get("quantization_config"):
        raise ValueError(f"{path} is quantized already: expected the float model that it was made of")
    return Source(path, model=_load_model(path).eval())


def _load_model(path: Path) -> Any:
    import transformers

    list_shards(path)  # transformers would not name an index that is none
    # Safetensors alone: a .bin is unpickled.
    arguments = {"local_files_only": True, "use_safetensors": True}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # a table of what does not fit
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        names = getattr(config, "architectures", None) or []
        model_class = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
        loader = model_class or transformers.AutoModel
        # What does not fit is named below.
        model, loading = loader.from_pretrained(
            path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    except Exception as error:  # whatever transformers stumbles over
        raise ValueError(f"{path} cannot be loaded by transformers: {type(error).__name__}: {error}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    _check_loaded(path, loading)
    return model


def _check_loaded(path: Path, loading: Mapping[str, Any]) -> None:
    """Raises ValueError where weights were made up; warns of those that were left out."""
    problems = [f"there is no {name}" for name in sorted(loading["missing_keys"])]
    problems += [
        f"{name} has shape {tuple(found)}, the model needs {tuple(expected)}"
        for name, found, expected in sorted(loading["mismatched_keys"])
    ]
    problems += [str(message) for message in loading.get("error_msgs", ())]
    if problems:
        raise ValueError(f"the tensors of {path} do not fit its config.json: {_list(problems)}")
    if unexpected := sorted(loading["unexpected_keys"]):
        warnings.warn(
            f"{path} has tensors that the model of its config.json does not use: {_list(unexpected)}",
            UserWarning,
            stacklevel=4,
        )


def _list(things: list[str]) -> str:
    rest = f" and {len(things) - _NAMED} more" if len(things) > _NAMED else ""
    return "; ".join(things[:_NAMED]) + rest
