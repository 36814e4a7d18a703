"""Models from files: Hugging Face folders and .pt2 programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from fxmse.inputs.programs import load_program

__all__ = ["Source", "load_source"]


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


def load_source(path: Path, *, dtype: str | None = None, device: str | None = None) -> Source:
    """The model of a folder, in evaluation mode, or the program of a .pt2.

    Args:
        path: the folder or file.
        dtype: of a folder's weights, as "bfloat16"; None is transformers' choice.
        device: where it is put; None leaves it where it is loaded.

    Raises:
        ValueError: neither is there, the .pt2 is none or holds code, or the folder's model is quantized.
    """
    if path.suffix == ".pt2":
        program = load_program(path)[0]
        return Source(path, program=move_to_device_pass(program, device) if device else program)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: expected a .pt2, or a folder with a config.json")
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{path} is quantized already: expected the float model that it was made of")
    names = getattr(config, "architectures", None) or []
    model_class = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    # Safetensors alone: a .bin is unpickled.
    arguments = {"local_files_only": True, "use_safetensors": True, **({"dtype": dtype} if dtype else {})}
    model = (model_class or transformers.AutoModel).from_pretrained(path, **arguments).eval()
    return Source(path, model=model.to(device) if device else model)
