"""Models from files: Hugging Face folders and .pt2 programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from fxmse.inputs.programs import load_program

__all__ = ["Source", "find_model_class", "load_source", "read_config"]


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

    Raises:
        ValueError: neither is there, the .pt2 is none or holds code, or the folder's model is quantized.
    """
    if path.suffix == ".pt2":
        return Source(path, program=load_program(path)[0])
    config = read_config(path)
    # Safetensors alone: a .bin is unpickled.
    arguments = {"local_files_only": True, "use_safetensors": True}
    return Source(path, model=find_model_class(config).from_pretrained(path, **arguments).eval())


def read_config(path: Path) -> Any:
    """The config of a Hugging Face folder, a ``transformers.PreTrainedConfig``.

    Raises:
        ValueError: there is none, or it is of a quantized model.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: expected a .pt2, or a folder with a config.json")
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{path} is quantized already: expected the float model that it was made of")
    return config


def find_model_class(config: Any) -> Any:
    """The class that a config names first, of those that transformers has, or ``transformers.AutoModel``."""
    import transformers

    names = getattr(config, "architectures", None) or []
    return next((getattr(transformers, name) for name in names if hasattr(transformers, name)), transformers.AutoModel)
