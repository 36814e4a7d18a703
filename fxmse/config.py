"""Configs to sites: which scheme each module gets, by compressed-tensors' own matching."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    is_preset_scheme,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.utils.match import is_match, match_targets
from torch import nn

from fxmse.layout import Layout

__all__ = ["Site", "make_site", "match_schemes", "resolve_config"]

_DEFAULT_OBSERVERS = {"weight": "memoryless_mse"}  # and "mse" for every activation


@dataclass(frozen=True)
class Site:
    """One value that is quantized for one module.

    Attributes:
        module: the module's dotted path; "" is the root.
        prefix: "" where the module has one weight called ``weight``, otherwise that weight's name and "_".
        role: "weight", "input" or "output".
        args: the format, with ``observer`` filled in. Treated as frozen.
    """

    module: str
    prefix: str
    role: str
    args: QuantizationArgs

    @property
    def name(self) -> str:
        """The dotted path that the site's attributes begin with: ``fc.weight``, ``fc.input``."""
        return f"{self.module}.{self.prefix}{self.role}".lstrip(".")


def make_site(module: str, prefix: str, role: str, args: QuantizationArgs) -> Site:
    """The site of a module's value, checked and with the default observer filled in.

    Raises:
        ValueError: what cannot be calibrated: a strategy that makes no sense for the role, a dynamic format.
    """
    args = args.model_copy(deep=True)
    args.observer = args.observer or _DEFAULT_OBSERVERS.get(role, "mse")
    site = Site(module, prefix, role, args)
    if args.dynamic:
        raise ValueError(
            f"{site.name}: dynamic={args.dynamic} formats are not calibrated and cannot be folded yet: "
            "use a scheme whose activations are static, or one without activations"
        )
    try:
        Layout.of(args, role)
    except ValueError as error:
        raise ValueError(f"{site.name}: {error}") from None
    return site


def resolve_config(config: QuantizationConfig | QuantizationScheme | str) -> QuantizationConfig:
    """A config from a config, a scheme, or a preset's name (which targets every Linear).

    Raises:
        ValueError: a preset that compressed-tensors does not have.
        TypeError: anything else.
    """
    if isinstance(config, QuantizationConfig):
        return config
    if isinstance(config, str):
        if not is_preset_scheme(config):
            raise ValueError(f"config={config!r}: expected one of the presets {', '.join(PRESET_SCHEMES)}")
        config = preset_name_to_scheme(config, ["Linear"])
    if isinstance(config, QuantizationScheme):
        return QuantizationConfig(config_groups={"group_0": config})
    raise TypeError(
        f"config is a {type(config).__name__}: expected a QuantizationConfig, a QuantizationScheme or a preset's name"
    )


def match_schemes(config: QuantizationConfig, modules: Mapping[str, nn.Module]) -> dict[str, QuantizationScheme]:
    """The scheme of each module that the config targets and does not ignore.

    Targets and ignores that match nothing are named in one warning.

    Args:
        config: the config.
        modules: by dotted path, those that hold an op that can be quantized.

    Raises:
        ValueError: no module is left.
    """
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    ignore = config.ignore or []
    matched = {}
    for name, module in modules.items():
        targets = match_targets(name, module, schemes)
        # The first target is the most specific: a name, then an expression, then a class.
        if targets and not is_match(name, module, ignore):
            matched[name] = schemes[targets[0]]
    if not matched:
        found = sorted({f"{type(module).__name__} ({name or 'root'})" for name, module in modules.items()})
        raise ValueError(
            f"targets {list(schemes)} (ignoring {ignore}) matched nothing: the graph's modules that can be quantized "
            f"are {', '.join(found) if found else 'none'}"
        )
    idle = [p for p in (*schemes, *ignore) if not any(is_match(name, module, p) for name, module in modules.items())]
    if idle:
        warnings.warn(f"targets and ignores that matched no module: {', '.join(idle)}", UserWarning, stacklevel=2)
    return matched
