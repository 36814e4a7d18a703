"""Models from files: Hugging Face folders and .pt2 programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from fxmse.inputs.folders import load_pretrained
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


def load_source(
    path: Path, *, dtype: str | None = None, device: str | None = None, trust_remote_code: bool = False
) -> Source:
    """The model of a folder, in evaluation mode, or the program of a .pt2.

    Args:
        path: the folder, or the .pt2.
        dtype: of a folder's weights, as "bfloat16"; None is transformers' choice.
        device: where it is put; None leaves it where it is loaded.
        trust_remote_code: run the code that a folder has for models that transformers has no class of.

    Raises:
        ValueError: neither is there, the .pt2 is none or holds code, the folder's model is quantized, or it cannot be
            loaded (:func:`fxmse.inputs.folders.load_pretrained`).
    """
    if path.suffix == ".pt2":
        program = load_program(path)[0]
        return Source(path, program=move_to_device_pass(program, device) if device else program)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: expected a .pt2, or a folder with a config.json")
    import transformers

    config = load_pretrained(transformers.AutoConfig, path, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{path} is quantized already: expected the float model that it was made of")
    classes = [getattr(transformers, str(name), None) for name in getattr(config, "architectures", None) or []]
    models = [kind for kind in classes if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)]
    model_class = models[0] if models else transformers.AutoModel
    # Safetensors alone: a .bin is unpickled.
    arguments: dict[str, Any] = {"use_safetensors": True, **({"dtype": dtype} if dtype else {})}
    model = load_pretrained(model_class, path, trust_remote_code=trust_remote_code, **arguments).eval()
    return Source(path, model=model.to(device) if device else model)
