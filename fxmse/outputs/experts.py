"""Experts that a model holds as one parameter, as the linears that checkpoints and runtimes have: one an expert.

Shape suffixes: E experts, O output channels, I input channels.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match, match_targets
from torch import Tensor, nn

from fxmse.passes.stand_ins import make_stand_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Experts", "Qparams", "Sites", "name_expert_linears", "split_experts"]

Qparams: TypeAlias = Mapping[str, Tensor | None]
"""Scale, zero point and global scale by these names, None where there is none."""
Sites: TypeAlias = dict[str, Qparams]
"""Each site's, by its name."""

# The linears that the rows of a parameter are, in this order, by the parameter's name in transformers.
_LINEARS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
_BIAS = "_bias"
_SITE = re.compile(r"(\w+)_(weight|input)")


@dataclass(frozen=True, eq=False)
class Experts:
    """A module of experts: how its parameters, and what is known of them, become one linear an expert.

    Nothing here needs more than the module: not the model, and not the parameters' values.

    Rules:

    1. The parameter ``gate_up_proj`` is two linears, one after the other, or where the module is not
       ``is_concatenated`` row by row in turn; ``gate_proj``, ``up_proj`` and ``down_proj`` are one. Where the module
       ``is_transposed``, the parameter is (experts, in, out).
    2. An expert's linear has the scales of its own rows; its global scale is the expert's, and equal in both of two
       linears, as runtimes want it that run them as one.
    3. Experts' inputs have one scale in a graph, which covers the tokens of all experts; each linear has it. So an
       expert that met no token has one as well.

    Attributes:
        path: the module's dotted path.
        num_experts: so many.
        num_rows: of each parameter's matrices, by the parameter's name.
        linears: the names of the linears of each parameter, by its name. They are llm-compressor's and vLLM's;
            :func:`name_expert_linears` gives those of a model's own checkpoints.
        is_interleaved: whether the rows of two linears take turns.
        is_transposed: whether parameters are (experts, in, out).
    """

    path: str
    num_experts: int
    num_rows: Mapping[str, int]
    linears: Mapping[str, tuple[str, ...]]
    is_interleaved: bool
    is_transposed: bool

    @classmethod
    def of(cls, path: str, module: nn.Module) -> "Experts | None":
        """What there is to know of a module, as transformers writes those of experts; None for any other.

        Args:
            path: the module's dotted path.
            module: the module; its parameters may be on the meta device.
        """
        parameters = dict(module.named_parameters(recurse=False))
        shapes = {name: p.shape for name, p in parameters.items() if name in _LINEARS}
        if "down_proj" not in shapes or any(len(shape) != 3 for shape in shapes.values()):
            return None
        if any(name.removesuffix(_BIAS) not in shapes for name in parameters):
            return None
        is_transposed = getattr(module, "is_transposed", None)
        if is_transposed is None:
            if "gate_up_proj" not in shapes:
                return None
            # What comes in together has twice the rows that go out: 2 I of the one are I of the other.
            is_transposed = shapes["gate_up_proj"][2] == 2 * shapes["down_proj"][1]
        return cls(
            path,
            shapes["down_proj"][0],
            {name: shape[2 if is_transposed else 1] for name, shape in shapes.items()},
            {name: _LINEARS[name] for name in shapes},
            not getattr(module, "is_concatenated", True),
            is_transposed,
        )

    @classmethod
    def find(cls, model: "PreTrainedModel", path: str, module: nn.Module) -> "Experts | None":
        """:meth:`of` a module of ``model``, with the names that the model's own checkpoints have for its linears."""
        experts = cls.of(path, module)
        return experts and replace(experts, linears={**experts.linears, **name_expert_linears(model, path)})

    def list_linears(self) -> list[str]:
        """The dotted paths of all linears."""
        names = [name for names in self.linears.values() for name in names]
        return [f"{self.path}.{expert}.{name}" for expert in range(self.num_experts) for name in names]

    def split_parameter(self, name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The weights or biases of the linears, by their dotted names: ``....experts.0.gate_proj.weight``.

        Args:
            name: the parameter's, in the module: ``gate_up_proj`` or ``gate_up_proj_bias``.
            parameter: (experts, out, in), (experts, in, out), or of a bias (experts, out).

        Yields:
            views (out, in) or (out,).
        """
        leaf, kind = (name.removesuffix(_BIAS), "bias") if name.endswith(_BIAS) else (name, "weight")
        rows_EO = parameter.mT if self.is_transposed and kind == "weight" else parameter
        for expert in range(self.num_experts):
            parts = self._split_rows(rows_EO[expert], len(self.linears[leaf]))
            for linear, part in zip(self.linears[leaf], parts, strict=True):
                yield f"{self.path}.{expert}.{linear}.{kind}", part

    def split_site(self, site: str, qparams: Qparams, block_structure: Sequence[int] | None = None) -> Sites | None:
        """The sites of the linears with their qparams; None for a site that they have no place for.

        Args:
            site: its name, ``....experts.gate_up_proj_weight`` or ``....experts.down_proj_input``.
            qparams: scale, zero point and global scale, as an observer of the parameter's rows gives them.
            block_structure: of a weight in blocks.

        Raises:
            ValueError: blocks that hold rows of two linears.
        """
        match = _SITE.fullmatch(site.removeprefix(f"{self.path}."))
        if match is None or match[1] not in self.linears:
            return None
        leaf, role = match.groups()
        names = self.linears[leaf]
        height = block_structure[0] if block_structure and role == "weight" else 1
        if len(names) > 1 and height > 1 and (self.is_interleaved or self.num_rows[leaf] // len(names) % height):
            raise ValueError(
                f"{site}: a block of {height} rows has rows of both {' and '.join(names)}, which a checkpoint has "
                "apart: use another strategy, or leave the experts out of the config"
            )
        sites: Sites = {}
        for expert in range(self.num_experts):
            for number, linear in enumerate(names):
                picked = {
                    kind: self._pick(value, expert, number, len(names), has_blocks=bool(block_structure))
                    for kind, value in qparams.items()
                    if value is not None and role == "weight"
                }
                sites[f"{self.path}.{expert}.{linear}.{role}"] = {**qparams, **picked}
        return sites

    def _pick(self, value: Tensor, expert: int, number: int, num_linears: int, *, has_blocks: bool) -> Tensor:
        """Rule 2, of a value for each matrix, or of one for each row and group, or block."""
        if not has_blocks and value.numel() in (1, self.num_experts) and value.shape[-2:].numel() == 1:
            return value.flatten()[expert if value.numel() > 1 else 0].reshape(1)
        return self._split_rows(value[expert], num_linears)[number]

    def _split_rows(self, rows_O: Tensor, num_linears: int) -> list[Tensor]:
        """Rule 1."""
        if self.is_interleaved:
            return [rows_O[number::num_linears] for number in range(num_linears)]
        return list(rows_O.chunk(num_linears))


def name_expert_linears(model: "PreTrainedModel", path: str) -> dict[str, tuple[str, ...]]:
    """The names that a model's own checkpoints have for the linears of its experts, as Mixtral's ``w1`` and ``w3``.

    Args:
        model: on any device.
        path: of a module of experts.

    Returns:
        names by the module's parameters; none where checkpoints hold experts as the model does, or are not known.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    names = {}
    for conversion in conversions:
        if not isinstance(conversion, WeightConverter) or not all("*" in s for s in conversion.source_patterns):
            continue
        for leaf, linears in _LINEARS.items():
            is_meant = any(re.search(f"{target}$", f"{path}.{leaf}") for target in conversion.target_patterns)
            if is_meant and len(conversion.source_patterns) == len(linears):
                sources = [re.sub(r"\.weight\$?$", "", source) for source in conversion.source_patterns]
                names[leaf] = tuple(source.rpartition(".")[2] for source in sources)
    return names


def split_experts(
    model: "PreTrainedModel", sites: Sites, blocks: Mapping[str, Sequence[int]], config: QuantizationConfig
) -> tuple[Sites, QuantizationConfig]:
    """Puts linears in the place of experts that are quantized.

    Args:
        model: changed in place; no parameter of the experts that stay as they are is.
        sites: with their qparams.
        blocks: the block structure of sites in blocks.
        config: what the sites are of.

    Returns:
        The sites, those of linears in the place of experts', and the config, with targets and ignores that mean linears
        where its own mean the modules that held them all.

    Raises:
        ValueError: blocks that hold rows of two linears.
    """
    by_module: defaultdict[str, list[str]] = defaultdict(list)
    for site in sites:
        by_module[site.rpartition(".")[0]].append(site)
    split = dict(sites)
    groups: dict[Experts, str | None] = {}
    for path, module in list(model.named_modules()):
        if not (experts := Experts.find(model, path, module)):
            continue
        own = by_module.get(path, [])
        parts = {site: experts.split_site(site, sites[site], blocks.get(site)) for site in own}
        # What has no place is named later.
        is_split = bool(own) and all(part is not None for part in parts.values())
        groups[experts] = _find_group(config, path, module) if is_split else None
        if is_split:
            for site, part in parts.items():
                del split[site]
                split.update(part or {})
            model.set_submodule(path, _make_linears(experts, module, split))
    return split, _mean_linears(config, groups)


def _make_linears(experts: Experts, module: nn.Module, sites: Sites) -> nn.Module:
    """A linear an expert and parameter, of the same memory where it will be quantized."""
    tensors: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, parameter in module.named_parameters(recurse=False):
        for part, tensor in experts.split_parameter(name, parameter.detach()):
            own_path, _, kind = part.removeprefix(f"{experts.path}.").rpartition(".")
            # What stays in float is written as it is, and a file holds no two views of one tensor.
            tensors[own_path][kind] = tensor if part in sites else tensor.clone(memory_format=torch.contiguous_format)
    linears = nn.Module()
    for path, own in tensors.items():
        expert, _, name = path.rpartition(".")
        if not hasattr(linears, expert):
            linears.add_module(expert, nn.Module())
        num_outputs, num_inputs = own["weight"].shape
        linear = nn.Linear(num_inputs, num_outputs, bias="bias" in own, device="meta")
        for kind, tensor in own.items():
            setattr(linear, kind, nn.Parameter(tensor, requires_grad=False))
        linears.get_submodule(expert).add_module(name, linear)
    return linears


def _find_group(config: QuantizationConfig, path: str, module: nn.Module) -> str:
    """The config group that a module of experts is quantized by."""
    groups = _list_targets(config)
    stand_in = make_stand_in(f"{type(module).__module__}.{type(module).__qualname__}", "Linear")
    return groups[match_targets(path, stand_in, groups)[0]]


def _list_targets(config: QuantizationConfig) -> dict[str, str]:
    return {target: name for name, scheme in config.config_groups.items() for target in scheme.targets}


def _mean_linears(config: QuantizationConfig, groups: Mapping["Experts", str | None]) -> QuantizationConfig:
    """The config with targets and ignores that mean the linears of experts; a group of None stands for float."""
    targets, ignore = _list_targets(config), list(config.ignore or [])
    for experts, group in groups.items():
        linears = experts.list_linears()
        own = linears[: len(linears) // experts.num_experts]
        if all(_find_target(path, targets, ignore) == group for path in own):
            continue
        leaf = re.escape(experts.path.rpartition(".")[2])
        alike = [g for e, g in groups.items() if e.path.rpartition(".")[2] == experts.path.rpartition(".")[2]]
        # Checkpoints may call what is between the layer and the experts otherwise.
        layer = re.match(r"(?:.*\.)?\d+\.", experts.path)
        where = "" if len(set(alike)) == 1 or not layer else re.escape(layer[0])
        pattern = rf"re:.*\b{where}(?:.*\.)?{leaf}\.\d+\.\w+$"
        if group is None:
            ignore.append(pattern)
            continue
        targets[pattern] = group
        if any(_find_target(path, targets, ignore) != group for path in own):
            del targets[pattern]
            targets.update(dict.fromkeys(linears, group))  # names come before expressions
    config_groups = {
        name: scheme.model_copy(update={"targets": [target for target, group in targets.items() if group == name]})
        for name, scheme in config.config_groups.items()
    }
    return config.model_copy(update={"config_groups": config_groups, "ignore": ignore})


def _find_target(path: str, targets: dict[str, str], ignore: list[str]) -> str | None:
    """The group of the linear at ``path``."""
    linear = nn.Linear(1, 1, device="meta")
    found = match_targets(path, linear, targets)
    return None if not found or is_match(path, linear, ignore) else targets[found[0]]
