"""A compressed-tensors checkpoint that is written part by part, each from its weights and qparams alone."""

import copy
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fxmse.config import Site
from fxmse.outputs.checkpoint import check_model, find_homes, find_places, foresee, make_compressor, prepare_model
from fxmse.outputs.experts import Experts, Sites
from fxmse.outputs.files import replace_file

__all__ = ["Shards"]

_INDEX = "model.safetensors.index.json"
# Elements that are compressed at a time: compressors hold several copies of 4 bytes each, which stay in a cache so.
_AT_A_TIME = 1 << 18
_ALIGNMENT = 64
_BY_ROW = ("weight_scale", "weight_zero_point")
_ROWS = 32  # of them, what is compressed at a time has a multiple: whole words of packed zero points


class Shards:
    """Files of a model's tensors, of which the quantized ones are compressed by compressed-tensors.

    Args:
        model: a ``transformers.PreTrainedModel``, of whose parameters no value is read.
        config: what it was quantized by.
        sites: all values that are quantized.
        conversions: how the float model's files become its tensors, in transformers' terms: names and forms are turned
            back to those.

    Raises:
        ValueError: another kind of model; tied parameters; values that such a checkpoint has no place for (all are
            named).
    """

    def __init__(
        self, model: nn.Module, config: QuantizationConfig, sites: Iterable[Site], conversions: Sequence[Any] = ()
    ) -> None:
        check_model(model)
        foreseen, self._blocks = foresee(sites)
        copied = _copy_on_meta(model)
        copied._weight_conversions = list(conversions) or None  # as from_pretrained leaves them
        experts = [Experts.find(copied, path, module) for path, module in copied.named_modules()]
        self.model, split, ignored = prepare_model(copied, config, foreseen, self._blocks)
        self._experts = {
            own.path: own for own in experts if own and not Experts.of(own.path, self.model.get_submodule(own.path))
        }
        find_places(self.model, {site: list(kinds) for site, kinds in split.items()})
        self._compressor = make_compressor(self.model, ignored)

    def measure(self) -> int:
        """The bytes of all tensors of the checkpoint, or a little more: zero points before they are packed."""
        total, quantized = 0, set()
        for module in self.model.modules():
            if isinstance(getattr(module, "quantization_scheme", None), QuantizationScheme):
                quantized |= {id(tensor) for tensor in module.parameters(recurse=False)}
                total += sum(tensor.nbytes for tensor in _foresee(module))
        buffers, names = dict(self.model.named_buffers()), self.model.state_dict()
        rest = [*self.model.parameters(), *(tensor for name, tensor in buffers.items() if name in names)]
        return total + sum(tensor.nbytes for tensor in rest if id(tensor) not in quantized)

    def write(self, tensors: Mapping[str, Tensor], sites: Sites, path: Path) -> None:
        """A file of some of the model's tensors, which is there whole or not at all.

        Args:
            tensors: by the model's names; of a quantized module all that it has.
            sites: the qparams of each site of theirs.
            path: of the file.

        Raises:
            ValueError: qparams that do not fit.
        """
        from transformers.core_model_loading import revert_weight_conversion

        found = dict(self._split_tensors(tensors))
        homes = find_homes(self.model, self._split_sites(sites))
        modules = {path: self.model.get_submodule(path) for path in homes}
        room = _Room(sum(_round_up(tensor.nbytes) for module in modules.values() for tensor in _foresee(module)))
        for module_path, qparams in homes.items():
            module = modules[module_path]
            prefix = f"{module_path}." if module_path else ""
            names = [name for name, _ in module.named_parameters(recurse=False) if prefix + name in found]
            compressed = _compress(module, {name: found.pop(prefix + name) for name in names} | qparams)
            found |= {prefix + name: room.keep(tensor) for name, tensor in compressed.items()}
        found = {name: tensor.contiguous() for name, tensor in revert_weight_conversion(self.model, found).items()}
        with replace_file(path) as new:
            save_file(found, new, metadata={"format": "pt"})

    def _split_tensors(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """With a linear for each expert that is quantized."""
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            yield from self._experts[path].split_parameter(leaf, tensor) if path in self._experts else [(name, tensor)]

    def _split_sites(self, sites: Sites) -> Sites:
        split: Sites = {}
        for site, qparams in sites.items():
            experts = self._experts.get(site.rpartition(".")[0])
            own = experts.split_site(site, qparams, self._blocks.get(site)) if experts else None
            split |= {site: qparams} if own is None else own
        return split

    def write_index(self, folder: Path, files: Iterable[str]) -> None:
        """What says which file of ``folder`` has which tensor, the config, and the model's own code, if it has some."""
        from transformers.dynamic_module_utils import custom_object_save

        weight_map: dict[str, str] = {}
        total = 0
        for file in files:
            with safe_open(folder / file, "pt") as opened:
                weight_map |= dict.fromkeys(opened.keys(), file)
            total += (folder / file).stat().st_size
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
        config = self.model.config
        config.architectures = [type(self.model).__name__]
        config.save_pretrained(folder)
        if self.model._auto_class is not None:  # of code that was in the float model's folder, and goes with it
            custom_object_save(self.model, str(folder), config=config)
        if self.model.can_generate() and self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(folder)
        assert self._compressor.quantization_config is not None
        self._compressor.quantization_config.quantization_status = QuantizationStatus.COMPRESSED
        self._compressor.update_config(str(folder))


def _copy_on_meta(model: nn.Module) -> Any:
    """A copy of the modules, without the values of their parameters."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


class _Room:
    """Memory for what is kept until a file is written, allocated at once.

    Small tensors that are kept between large ones that are not would leave holes, into which no large one fits: of a
    layer of 128 experts 1 GB.
    """

    def __init__(self, num_bytes: int) -> None:
        self._free = torch.empty(num_bytes, dtype=torch.uint8)

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, in this memory while there is any."""
        num_bytes = _round_up(tensor.nbytes)
        if num_bytes > len(self._free) or not tensor.nbytes:
            return tensor
        place, self._free = self._free[: tensor.nbytes], self._free[num_bytes:]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _foresee(module: Any) -> Iterable[Tensor]:
    """A quantized module's tensors as they will be stored, without their values."""
    return _compress(module, dict(module.named_parameters(recurse=False))).values()


def _compress(module: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a quantized module as compressed-tensors stores them.

    Compressors hold several copies of a weight, of 4 bytes an element: large ones are compressed some rows at a time.
    """
    scheme = module.quantization_scheme
    compressor = BaseCompressor.get_value_from_registry(CompressionFormat(scheme.format).value)
    if "weight" not in tensors:  # of attention, or where the weight was written with an earlier part
        return compressor._remove_symmetric_zp(dict(tensors), scheme)
    weight = tensors["weight"]
    height = scheme.weights.block_structure[0] if scheme.weights.strategy == "block" else 1
    unit = math.lcm(_ROWS, height)
    step = max(_AT_A_TIME // weight.shape[1:].numel() // unit, 1) * unit
    if len(weight) <= step:
        return compressor.compress(tensors, scheme)
    heights = {name: height for name in _BY_ROW if name in tensors and tensors[name].dim() > 1} | {"weight": 1}
    cut = {name: height for name, height in heights.items() if len(tensors[name]) == -(-len(weight) // height)}
    chunks = [
        compressor.compress(
            tensors
            | {name: tensors[name][start // height : -(-(start + step) // height)] for name, height in cut.items()},
            scheme,
        )
        for start in range(0, len(weight), step)
    ]
    joined = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0].keys() & {*cut, "weight_packed"}}
    shape = {"weight_shape": torch.tensor(weight.shape)} if "weight_shape" in chunks[0] else {}
    return chunks[0] | joined | shape
