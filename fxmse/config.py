"""Configs to sites: which scheme each module gets, by compressed-tensors' own matching."""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch
import yaml
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
    is_preset_scheme,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_range
from compressed_tensors.utils.match import is_match, match_targets
from pydantic import ValidationError
from torch import nn

from fxmse.formats.grids import Format
from fxmse.formats.layout import Layout
from fxmse.patterns import check_patterns
from fxmse.reading import check_nesting, quote, read_text

__all__ = [
    "CONFIG_KEY",
    "FLOAT_BIASES_KEY",
    "KEPT_KEYS",
    "LEFT_IN_FLOAT_KEY",
    "MODULES_KEY",
    "AllLeftInFloatError",
    "Config",
    "Matches",
    "NothingMatchedError",
    "Site",
    "check_dynamic_shape",
    "describe_format",
    "is_named",
    "make_site",
    "match_schemes",
    "name_weight_observer",
    "resolve_config",
]

Config: TypeAlias = QuantizationConfig | QuantizationScheme | Mapping[str, Any] | str | os.PathLike[str]
"""What :func:`resolve_config` takes."""

CONFIG_KEY = "fxmse_config"
"""Where an observed graph's ``meta`` has the config that its observers were inserted by; folding keeps it."""
LEFT_IN_FLOAT_KEY = "fxmse_left_in_float"
"""Where it has what the config targets but stays float: (name, reason) pairs."""
FLOAT_BIASES_KEY = "fxmse_float_biases"
"""Where a folded graph's ``meta`` has the float model's biases, by name, in whose place it has corrected ones."""
KEPT_KEYS = (CONFIG_KEY, LEFT_IN_FLOAT_KEY, FLOAT_BIASES_KEY)
"""What of a graph's ``meta`` its copies have, too."""

_DEFAULT_OBSERVER = "exact_mse"
_FILES = (".json", ".yaml", ".yml")
_DYNAMIC_STRATEGIES = ("tensor", "token", "group", "tensor_group")
# What a checkpoint's quantization_config has beside a QuantizationConfig's fields: who wrote it, what else was done.
_OTHER_KEYS = ("version", "provider")
_UNAPPLIED_KEYS = ("sparsity_config", "transform_config", "moe_sparsity_config")
_METHOD = "compressed-tensors"
# compressed-tensors' registry imports what stands before a colon.
_OBSERVER = re.compile(r"[\w -]+")


@dataclass(frozen=True)
class Site:
    """One value that is quantized for one module.

    Attributes:
        module: the module's dotted path; "" is the root.
        prefix: "" where the module has one value of that role, otherwise that weight's or op's name and "_".
        role: "weight", "input", "output", "q", "k" or "v".
        args: the format, with ``observer`` filled in where there is one. Treated as frozen.
    """

    module: str
    prefix: str
    role: str
    args: QuantizationArgs

    @property
    def name(self) -> str:
        """The dotted path that the site's attributes begin with: ``fc.weight``, ``fc.input``."""
        return f"{self.module}.{self.prefix}{self.role}".lstrip(".")

    @property
    def is_dynamic(self) -> bool:
        """Whether scales come from each value at run time, so that there is nothing to calibrate."""
        return self.args.dynamic is True


def make_site(module: str, prefix: str, role: str, args: QuantizationArgs) -> Site:
    """The site of a module's value, checked and with the default observer filled in.

    Raises:
        ValueError: what cannot be quantized: a strategy that makes no sense for the role, a format that
            compressed-tensors knows no range of, an activation ordering.
    """
    args = args.model_copy(deep=True)
    site = Site(module, prefix, role, args)
    try:
        _check_args(args, role)
    except ValueError as error:
        raise ValueError(f"{site.name}: {error}") from None
    if not site.is_dynamic:
        args.observer = args.observer or _DEFAULT_OBSERVER
    return site


def _check_args(args: QuantizationArgs, role: str) -> None:
    if args.dynamic and role == "weight":
        raise ValueError(f"dynamic={args.dynamic}: weights are static, expected dynamic=False")
    if args.dynamic is True:
        Format.of(args)
        if args.strategy not in _DYNAMIC_STRATEGIES:
            raise ValueError(
                f"strategy={args.strategy} is not defined for dynamic=True: "
                f"expected one of {', '.join(_DYNAMIC_STRATEGIES)}"
            )
    else:
        Layout.of(args, role)
    try:
        low, high = calculate_range(args, "cpu")
    except NotImplementedError as error:
        raise ValueError(f"num_bits={args.num_bits}, type={args.type}: compressed-tensors says: {error}") from None
    if not args.symmetric and not args.zp_dtype.is_floating_point:
        held = torch.iinfo(args.zp_dtype)
        if held.min > low or held.max < high:
            raise ValueError(
                f"zp_dtype={args.zp_dtype} cannot hold zero points of {low.item():g} to {high.item():g}: "
                "use a wider signed dtype, or leave it out"
            )


def check_dynamic_shape(args: QuantizationArgs, shape: torch.Size) -> None:
    """Raises ValueError where the groups of a dynamic value do not fit its shape."""
    if args.group_size:
        Layout("input", "group", args.group_size).qparam_shape(shape)


def describe_format(args: QuantizationArgs) -> str:
    """A format in words, as in "int8 asymmetric tensor"."""
    symmetry = "symmetric" if args.symmetric else "asymmetric"
    size = f" {args.group_size}" if args.group_size else ""
    dynamic = " dynamic" if args.dynamic else ""
    kind, strategy = QuantizationType(args.type).value, QuantizationStrategy(args.strategy).value
    return f"{kind}{args.num_bits} {symmetry} {strategy}{size}{dynamic}"


def resolve_config(config: Config) -> QuantizationConfig:
    """A config from any of its forms.

    Args:
        config: a config; a scheme; a preset's name (which targets every Linear); a mapping of a config's or a scheme's
            fields, or one that has a config under "quantization_config", as a checkpoint's config.json does; or the
            path of a JSON or YAML file of such a mapping.

    Raises:
        ValueError: a preset that compressed-tensors does not have, a key or value that it does not take, a file that
            cannot be read as a mapping, a config that quantizes nothing, an observer that is not a name, a regular
            expression that may never end (:func:`fxmse.patterns.check_patterns`).
        TypeError: anything else.
    """
    if not _is_path(config):
        return _resolve(config)
    text = read_text(Path(config))
    try:
        return _resolve(_parse_text(text))
    except ValueError as error:
        raise ValueError(f"config={str(config)!r}: {' '.join(str(error).split())}") from None


def _is_path(config: Config) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(config, os.PathLike) or (isinstance(config, str) and config.endswith(_FILES))


def _resolve(config: Config) -> QuantizationConfig:
    if isinstance(config, str):
        if not is_preset_scheme(config):
            raise ValueError(
                f"config={config!r}: expected one of the presets {', '.join(PRESET_SCHEMES)}, or the path of a file "
                f"that ends in {', '.join(_FILES)}"
            )
        config = preset_name_to_scheme(config, ["Linear"])
    if isinstance(config, Mapping):
        config = _parse(config)
    if isinstance(config, QuantizationScheme):
        config = QuantizationConfig(config_groups={"group_0": config})
    if not isinstance(config, QuantizationConfig):
        raise TypeError(
            f"config is a {type(config).__name__}: expected a QuantizationConfig, a QuantizationScheme, a mapping, a "
            "preset's name or the path of a file"
        )
    if not config.kv_cache_scheme and all(_is_empty(scheme) for scheme in config.config_groups.values()):
        raise ValueError(
            f"config_groups {list(config.config_groups)} quantize nothing: give weights, input_activations or "
            "output_activations, or a kv_cache_scheme"
        )
    check_patterns(_list_targets(config))
    _check_observers(config)
    return config


def _list_targets(config: QuantizationConfig) -> list[str]:
    """Targets and ignores."""
    return [*(target for scheme in config.config_groups.values() for target in scheme.targets), *(config.ignore or [])]


def _check_observers(config: QuantizationConfig) -> None:
    schemes = config.config_groups.values()
    values = [
        args for scheme in schemes for args in (scheme.weights, scheme.input_activations, scheme.output_activations)
    ]
    for args in (*values, config.kv_cache_scheme):
        if args and args.observer and not _OBSERVER.fullmatch(args.observer):
            raise ValueError(f"observer={quote(args.observer)}: expected the name of an observer that is registered")


def name_weight_observer(
    config: Config, name: str | None, observer_kwargs: Mapping[str, Any] | None = None
) -> QuantizationConfig:
    """``config`` with an observer for weights whose scheme names none; raises as :func:`resolve_config`.

    Args:
        config: the config; not changed.
        name: the observer; None for the default one.
        observer_kwargs: its arguments; None for its defaults.
    """
    named = resolve_config(config).model_copy(deep=True)
    for scheme in named.config_groups.values():
        if scheme.weights and not scheme.weights.observer:
            scheme.weights.observer = name or _DEFAULT_OBSERVER
            scheme.weights.observer_kwargs = {**scheme.weights.observer_kwargs, **(observer_kwargs or {})}
    return named


def _is_empty(scheme: QuantizationScheme) -> bool:
    return not (scheme.weights or scheme.input_activations or scheme.output_activations)


def _parse_text(text: str) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(text)  # JSON is YAML, too
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"it cannot be read as YAML or JSON: {error}") from None
    check_nesting(content, "it")
    if not isinstance(content, Mapping):
        raise ValueError(f"expected a mapping of a config's fields, found {quote(content)}")
    return content


def _abbreviate(content: object) -> str:
    text = repr(content)
    return text if len(text) < 50 else f"a {type(content).__name__}"


def _parse(fields: Mapping[str, Any]) -> QuantizationConfig | QuantizationScheme:
    fields = fields.get("quantization_config", fields)
    if not isinstance(fields, Mapping):
        raise ValueError(f"quantization_config={quote(fields)}: expected a mapping of a config's fields")
    method = fields.get("quant_method") or _METHOD
    if method != _METHOD:
        raise ValueError(f"config has quant_method={method!r}: expected {_METHOD}, whose configs these are")
    unapplied = [key for key in _UNAPPLIED_KEYS if fields.get(key)]
    if unapplied:
        raise ValueError(f"config has {', '.join(unapplied)}, which fxmse does not apply: expected quantization alone")
    # A key without a value says nothing: newer writers have some that are not known here.
    fields = {
        key: value for key, value in fields.items() if value is not None and key not in (*_OTHER_KEYS, *_UNAPPLIED_KEYS)
    }
    parsed = QuantizationConfig if "config_groups" in fields else QuantizationScheme
    # QuantizationConfig ignores what it does not know, a misspelt ignore list for one.
    unknown = [key for key in fields if key not in parsed.model_fields]
    if unknown:
        raise ValueError(
            f"config has {', '.join(map(str, unknown))}: expected the fields of a {parsed.__name__}, "
            f"{', '.join(parsed.model_fields)}"
        )
    try:
        return parsed.model_validate(fields)
    except ValidationError as error:
        found = (f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors())
        raise ValueError(f"config: {'; '.join(found)}") from None
    except (NotImplementedError, KeyError) as error:  # pydantic passes these on
        raise ValueError(f"config: {error}") from None


Modules: TypeAlias = Mapping[tuple[str, str], nn.Module]
"""Modules that hold ops which can be quantized, by dotted path and the op's class or function name."""


MODULES_KEY = "fxmse_modules"
"""Where a captured graph's ``meta`` has the modules of its model by their paths, until observers are inserted."""


class NothingMatchedError(ValueError):
    """A graph has nothing that the config quantizes."""


class AllLeftInFloatError(NothingMatchedError):
    """A graph has nothing of what the config targets that can be quantized."""


class Matches(NamedTuple):
    """Which scheme each op gets, by its module's path and its class or function name.

    Attributes:
        modules: of ops with a weight.
        functions: of ops that have activations only.
    """

    modules: dict[tuple[str, str], QuantizationScheme]
    functions: dict[tuple[str, str], QuantizationScheme]


def match_schemes(config: QuantizationConfig, modules: Modules, functions: Modules) -> Matches:
    """The scheme of each module that the config targets and does not ignore.

    Ops of activations only (attention, matrix products) get a scheme whose target is their function's name, or one
    without weights whose target names them narrowly: it matches neither the module around them nor one inside, as
    compressed-tensors has it for attention.
    Targets and ignores that match nothing are named in one warning.

    Args:
        config: the config.
        modules: those with ops that have a weight.
        functions: those with ops of activations only.

    Raises:
        NothingMatchedError: nothing is left to quantize.
    """
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    ignore = config.ignore or []
    check_patterns(_list_targets(config), (path for path, _ in (*modules, *functions)))
    matched = Matches({}, {})
    for key, module in modules.items():
        # The first target is the most specific: a name, then an expression, then a class.
        targets = match_targets(key[0], module, schemes)
        if targets and not is_match(key[0], module, ignore):
            matched.modules[key] = schemes[targets[0]]
    for key, module in functions.items():
        targets = [
            target
            for target in match_targets(key[0], module, schemes)
            if target == key[1] or (not schemes[target].weights and _is_narrow(target, key[0], modules))
        ]
        if targets and not is_match(key[0], module, ignore):
            matched.functions[key] = schemes[targets[0]]
    everything = {**modules, **functions}
    if not matched.modules and not matched.functions and not config.kv_cache_scheme:
        found = sorted({f"{type(module).__name__} ({path or 'root'})" for (path, _), module in everything.items()})
        raise NothingMatchedError(
            f"targets {list(schemes)} (ignoring {ignore}) matched nothing: the graph's modules that can be quantized "
            f"are {', '.join(found) if found else 'none'}"
        )
    idle = [pattern for pattern in (*schemes, *ignore) if not _matches_any(pattern, everything)]
    if idle:
        warnings.warn(f"targets and ignores that matched no module: {', '.join(idle)}", UserWarning, stacklevel=2)
    return matched


def is_named(config: QuantizationConfig, path: str) -> bool:
    """Whether a target is the name of the module at ``path``, or an expression for it, not its class."""
    return any(is_match(path, nn.Module(), scheme.targets) for scheme in config.config_groups.values())


def _matches_any(pattern: str, modules: Modules) -> bool:
    return any(is_match(path, module, pattern) for (path, _), module in modules.items())


def _is_narrow(target: str, path: str, modules: Modules) -> bool:
    """Whether ``target``, which matches the module at ``path``, matches neither its parent's name nor its children."""
    children = {key: module for key, module in modules.items() if key[0].startswith(f"{path}.")}
    return not is_match(path.rpartition(".")[0], nn.Module(), target) and not _matches_any(target, children)
