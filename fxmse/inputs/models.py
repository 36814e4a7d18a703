"""Models from files: Hugging Face folders and .pt2 programs."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from fxmse.inputs.folders import list_weight_files, load_pretrained
from fxmse.inputs.programs import load_program
from fxmse.reading import read_json

__all__ = ["Source", "check_loaded", "find_model_class", "load_source"]

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


def load_source(
    path: Path, *, dtype: str | None = None, device: str | None = None, trust_remote_code: bool = False
) -> Source:
    """The model of a folder, in evaluation mode, or the program of a .pt2.

    Tensors of the folder that its model does not have are named in a warning.

    Args:
        path: the folder, or the .pt2.
        dtype: of a folder's weights, as "bfloat16"; None is transformers' choice.
        device: where it is put; None leaves it where it is loaded.
        trust_remote_code: run the code that a folder has for models that transformers has no class of.

    Raises:
        ValueError: neither is there, the .pt2 is none or holds code, the folder's model is quantized, lacks tensors or
            has them in other shapes (all are named), or cannot be loaded
            (:func:`fxmse.inputs.folders.load_pretrained`).
    """
    if path.suffix == ".pt2":
        program = load_program(path)[0]
        return Source(path, program=move_to_device_pass(program, device) if device else program)
    model = _load_model(path, dtype, trust_remote_code).eval()
    return Source(path, model=model.to(device) if device else model)


def find_model_class(path: Path, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The class of a folder's model and its config, both of transformers.

    Raises:
        ValueError: there is none, it is of a quantized model, or cannot be loaded; an index that is none.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: expected a .pt2, or a folder with a config.json")
    if read_json(path / "config.json").get("quantization_config"):
        raise ValueError(f"{path} is quantized already: expected the float model that it was made of")
    import transformers

    list_weight_files(path)  # transformers would not name an index that is none
    config = load_pretrained(transformers.AutoConfig, path, trust_remote_code=trust_remote_code)
    names = [str(name) for name in getattr(config, "architectures", None) or []]
    classes = [getattr(transformers, name, None) for name in names]
    models = [kind for kind in classes if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)]
    # Of a class in the folder transformers says by which of its own classes it is loaded.
    auto_map = getattr(config, "auto_map", None)
    for name, reference in auto_map.items() if isinstance(auto_map, Mapping) else ():
        if name.startswith("AutoModel") and str(reference).rpartition(".")[2] in names and hasattr(transformers, name):
            models.append(getattr(transformers, name))
    return (models[0] if models else transformers.AutoModel), config


def _load_model(path: Path, dtype: str | None, trust_remote_code: bool) -> Any:
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # a table of what does not fit
    try:
        model_class, _ = find_model_class(path, trust_remote_code=trust_remote_code)
        model, loading = load_pretrained(
            model_class,
            path,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,  # a .bin is unpickled
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **({"dtype": dtype} if dtype else {}),
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
    check_loaded(path, loading)
    return model


def check_loaded(path: Path, loading: Mapping[str, Any]) -> None:
    """Raises ValueError where weights were made up; warns of those that were left out.

    Args:
        path: the folder.
        loading: what transformers says of it, as ``from_pretrained`` does with ``output_loading_info``.
    """
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
