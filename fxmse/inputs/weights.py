"""Hugging Face models without their weights, which are read from the folder's safetensors when they are asked for."""

import copy
import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fxmse.capture.attributes import find_place
from fxmse.inputs.folders import list_weight_files
from fxmse.inputs.models import check_loaded, find_model_class

__all__ = ["Skeleton", "Weights", "load_skeleton"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_ALIGNMENT = 64  # bytes; kernels may add up in another order where memory begins elsewhere


class Skeleton(NamedTuple):
    """A folder's model without its weights, and the weights, which are in files.

    Attributes:
        path: the folder.
        model: a ``transformers.PreTrainedModel``.
        weights: those of its parameters.
    """

    path: Path
    model: Any
    weights: "Weights"


def load_skeleton(path: Path, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> Skeleton:
    """A folder's model in evaluation mode, whose parameters have memory that was never touched, and its weights.

    Dtypes are those of ``from_pretrained``, and parameters are one where they are one there. All that is computed when
    a model is made (the frequencies of rotary embeddings) is there, as are the buffers that the folder holds. A
    parameter's memory becomes real when it is written first; nobody should.

    Args:
        path: a Hugging Face folder of safetensors, in one file or several with an index.
        dtype: of the model; by default what transformers would load it in.
        trust_remote_code: run the code that the folder has for models that transformers has no class of.

    Raises:
        ValueError: no such folder, a quantized model, files that cannot be read, or weights that are missing or do not
            fit the model.
    """
    from transformers.initialization import no_tie_weights

    model_class, config = find_model_class(path, trust_remote_code=trust_remote_code)
    found = _find_tensors(path)
    dtype = dtype or config.dtype or _find_dtype(tensor for _, tensor in found.values())
    make = getattr(model_class, "_from_config", None)
    make = make or functools.partial(model_class.from_config, trust_remote_code=trust_remote_code)
    with _parameters_on_meta(), no_tie_weights():  # what the folder has of each decides whether they are one
        model = make(config, dtype=dtype).eval()
    weights = Weights(path, model, found, dtype)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    loaded = weights.load(name for name in weights.names if name in buffers)
    made: dict[int, Tensor] = {id(buffers[name]): value.clone() for name, value in loaded.items()}  # aligned
    made |= {id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad) for p in model.parameters()}
    for module in model.modules():
        tensors: dict[str, Any]
        for tensors in (module._parameters, module._buffers):
            tensors |= {name: made.get(id(tensor), tensor) for name, tensor in tensors.items()}
    weights.locate(model)
    return Skeleton(path, model, weights)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Has parameters, but not buffers, be made without memory within a ``with`` block."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _find_tensors(path: Path) -> dict[str, tuple[Path, Tensor]]:
    """The file of each tensor, and the tensor without its values; each file is opened once."""
    found: dict[str, tuple[Path, Tensor]] = {}
    for file in list_weight_files(path):
        try:
            with safe_open(file, "pt") as opened:
                pieces = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
                described = {key: (piece.get_shape(), piece.get_dtype()) for key, piece in pieces.items()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read as safetensors: {error}") from None
        for key, (shape, dtype) in described.items():
            if dtype not in _DTYPES:
                raise ValueError(f"{file} has {key} as {dtype}: expected one of {', '.join(_DTYPES)}")
            found[key] = file, torch.empty(shape, dtype=_DTYPES[dtype], device="meta")
    return found


def _find_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype of the first tensor that is float, as transformers takes it."""
    dtypes = (tensor.dtype for tensor in tensors)
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.get_default_dtype())


class Weights:
    """The tensors of a folder under the model's names, as transformers would load them.

    Renamed, fused and cast by transformers' own conversions; memory-mapped where that leaves them as they are. What is
    one tensor has one name, under which ``save_pretrained`` writes it, whatever the folder calls it.

    Args:
        path: the folder.
        model: one without memory and with nothing tied, of which all that the folder holds is described as
            ``from_pretrained`` would load it: its dtype, and whether it is one tensor with others.
        found: the file of each of the folder's tensors, and the tensor without its values.
        dtype: the model's.

    Attributes:
        names: all parameters and buffers that the folder holds, in the model's order.
        sizes: the bytes of each in the model.
        dtype: the model's.
        conversions: how the folder's tensors become the model's, in transformers' terms.
    """

    def __init__(self, path: Path, model: Any, found: Mapping[str, tuple[Path, Tensor]], dtype: torch.dtype) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.path = path
        self.files = {key: file for key, (file, _) in found.items()}
        self.dtype = dtype
        self._mapping = get_model_conversion_mapping(model)
        self._sources, unexpected = self._find_sources(model)
        self.conversions = [entry for entry in self._mapping if entry.was_used()]
        # Shapes are known of what is no more than described, and of what conversions make of it.
        info = self._convert(model, {key: tensor for key, (_, tensor) in found.items()}, "meta")
        missing = model.state_dict().keys() - self._sources.keys()
        # A file that does not fit is refused below.
        fits = not info.mismatched_keys and not info.conversion_errors
        self._held = self._tie(model, missing, compares=fits)
        self.names = tuple(name for name in model.state_dict() if name in self._held)
        loading = {
            "missing_keys": missing,
            "mismatched_keys": set(info.mismatched_keys or ()),
            "unexpected_keys": {name for name in unexpected if name in (info.unexpected_keys or ())},
            "error_msgs": [*(info.error_msgs or ()), *(f"{n}: {e}" for n, e in (info.conversion_errors or {}).items())],
        }
        check_loaded(path, loading)
        tensors = (*model.parameters(), *model.buffers())
        self._on_meta = copy.deepcopy(model, {id(tensor): _forget(tensor) for tensor in tensors})
        self._places: dict[int, str] = {}
        self.sizes: dict[str, int] = {}

    def _find_sources(self, model: Any) -> tuple[dict[str, list[str]], list[str]]:
        """What the folder calls all that each of the model's tensors is made of, and what the model has no use for."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        targets = {pattern: entry.target_patterns for entry in converters for pattern in entry.source_patterns}
        expected = model.state_dict()
        found: defaultdict[str, list[str]] = defaultdict(list)
        unexpected = []
        for key in sorted(self.files):
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
            if name not in expected and key in expected:
                name, pattern = key, None
            patterns = targets[pattern] if pattern else [""]
            names = [name.replace(patterns[0], other, 1) for other in patterns]
            if name not in expected:
                unexpected += names
            for target in names if name in expected else ():
                found[target].append(key)
        return dict(found), unexpected

    def _tie(self, model: Any, missing: set[str], *, compares: bool) -> dict[str, str]:
        """Has tensors be one where ``from_pretrained`` does.

        Of those that are one by the model's tie map the folder should hold one. That stands for all of them. Where it
        holds several, they are one if their values are equal.

        Args:
            model: of which all that the folder holds is described.
            missing: the names of what the folder does not hold; those that another stands for are removed.
            compares: whether values are compared; else what the folder holds several of stays apart.

        Returns:
            Of each tensor that the folder holds: its name in the model, and the name that has its values in the
            folder. Of the names of one tensor it is that which the others are tied to.
        """
        tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        present = sorted(tied - missing)
        if compares and len(present) > 1:
            self._convert(model, self._read(present), "cpu")
        before = model.state_dict(keep_vars=True)
        holders = {id(tensor): name for name, tensor in before.items() if name not in missing}
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
        after = model.state_dict(keep_vars=True)
        names: dict[str, str] = {}
        for name in sorted(after, key=model.all_tied_weights_keys.__contains__):
            if (holder := holders.get(id(after[name]))) is not None:
                names.setdefault(holder, name)
        return {name: holder for holder, name in names.items()}

    def _convert(self, model: Any, tensors: Mapping[str, Tensor], device: str) -> Any:
        """Has a model hold what tensors of the folder become; what transformers says of it."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=model._get_dtype_plan(self.dtype),
            weight_mapping=self._mapping,  # type: ignore[arg-type]
            device_map={"": device},
        )
        with _silent():
            return convert_and_load_state_dict_in_model(model, dict(tensors), config)[0]

    def locate(self, model: nn.Module) -> None:
        """Takes note of where the parameters of ``model`` are."""
        named = dict(model.named_parameters(remove_duplicate=False))
        self._places = {find_place(named[name]): name for name in self.names if name in named and named[name].numel()}
        self.sizes = {name: tensor.nbytes for name, tensor in model.state_dict().items() if name in self.names}

    def list_fused(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """The parameters that are one tensor in the folder."""
        named = dict(model.named_parameters(remove_duplicate=False))
        by_source: defaultdict[str, list[nn.Parameter]] = defaultdict(list)
        for name, holder in self._held.items():
            for source in self._sources[holder] if name in named else ():
                by_source[source].append(named[name])
        return [parameters for parameters in by_source.values() if len(parameters) > 1]

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by the model's names: memory-mapped where they are in the file as the model wants them."""
        names = list(names)
        # What is made of several tensors holds all of them twice for a moment: one after the other.
        groups: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
        for name in names:
            sources = self._sources[self._held[name]]
            groups[tuple(sources) if len(sources) > 1 else ()].append(name)
        found = {name: tensor for group in groups.values() for name, tensor in self._load_at_once(group).items()}
        return {name: found[name] for name in names}

    def _load_at_once(self, names: list[str]) -> dict[str, Tensor]:
        self._convert(self._on_meta, self._read(self._held[name] for name in names), "cpu")
        loaded = {}
        for name in names:
            path, _, leaf = self._held[name].rpartition(".")
            module = self._on_meta.get_submodule(path)
            tensors = module._parameters if leaf in module._parameters else module._buffers
            loaded[name] = tensors[leaf].detach()
            tensors[leaf] = _forget(tensors[leaf])
        return loaded

    def _read(self, holders: Iterable[str]) -> dict[str, Tensor]:
        """All that some tensors are made of, as the folder has it: memory-mapped."""
        by_file: defaultdict[Path, list[str]] = defaultdict(list)
        for key in dict.fromkeys(key for holder in holders for key in self._sources[holder]):
            by_file[self.files[key]].append(key)
        found: dict[str, Tensor] = {}
        for file, keys in by_file.items():
            with safe_open(file, "pt") as opened:
                found |= {key: opened.get_tensor(key) for key in keys}
        return found

    def find(self, parameter: nn.Parameter) -> str:
        """The name of one of the model's parameters, by its memory, whatever it is called in a graph.

        Raises:
            ValueError: it is none of them.
        """
        if (name := self._places.get(find_place(parameter))) is None:
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is none of the tensors of {self.path}")
        return name

    def fill(self, parameters: Mapping[str, nn.Parameter], *, align: bool, device: torch.device) -> dict[str, Tensor]:
        """Has parameters hold their values, and returns these as they are in memory.

        Args:
            parameters: by their names, as :meth:`find` gives them.
            align: whether memory begins where an allocation of torch would, so that sums are the same to the last bit.
            device: of the parameters.
        """
        loaded = self.load(parameters)
        for name, tensor in loaded.items():
            loaded[name] = tensor.clone() if align and tensor.data_ptr() % _ALIGNMENT else tensor
            parameters[name].data = loaded[name].to(device)
        return loaded


def _forget(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


@contextmanager
def _silent() -> Iterator[None]:
    """Hides transformers' progress bar within a ``with`` block."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()
