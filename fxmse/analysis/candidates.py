"""Configs to compare, and what each is called."""

import itertools
import os
from collections.abc import Iterable
from pathlib import Path

from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch.fx import GraphModule

from fxmse.capture.front_ends import copy_graph_module
from fxmse.config import Config, describe_format, resolve_config
from fxmse.passes import DecomposeAttention, FunctionalizeModules, InlineRegions, OpenRegions
from fxmse.passes.reads import find_refused

__all__ = ["FLOAT", "fit", "name_candidates"]

FLOAT = "float"
"""What it is called where a module stays as it is."""


def name_candidates(
    configs: Iterable[Config], names: Iterable[str | None] = itertools.repeat(None)
) -> dict[str, QuantizationConfig]:
    """The configs by their names: those that are given, a preset's, a file's, or the formats in words.

    Raises:
        ValueError: none; two that are the same; one that :func:`fxmse.config.resolve_config` refuses.
    """
    named: dict[str, QuantizationConfig] = {}
    for config, given in zip(configs, names, strict=False):
        resolved = resolve_config(config)
        if given == FLOAT:
            raise ValueError(f"a candidate is called {FLOAT}, as what stays as it is: give it another name")
        own = given or _find_name(config, resolved)
        for name, other in named.items():
            if _describe(other) == _describe(resolved):
                raise ValueError(f"candidates {name} and {own} quantize the same in the same formats: give one of them")
        name, number = own, 2
        while name in named:
            name, number = f"{own} ({number})", number + 1
        named[name] = resolved
    if not named:
        raise ValueError("no candidates: expected at least one config, scheme or preset")
    return named


def _find_name(config: Config, resolved: QuantizationConfig) -> str:
    if isinstance(config, str | os.PathLike):
        return Path(config).stem
    schemes = resolved.config_groups.values()
    return "; ".join(dict.fromkeys(map(_describe_scheme, schemes))) or "kv cache"


def _describe_scheme(scheme: QuantizationScheme) -> str:
    values = {"": scheme.weights, "inputs ": scheme.input_activations, "outputs ": scheme.output_activations}
    return ", ".join(f"{role}{describe_format(args)}" for role, args in values.items() if args)


def _describe(config: QuantizationConfig) -> object:
    """What a config quantizes and how, whatever its groups are called."""
    groups = [
        (sorted(scheme.targets), *map(_dump, (scheme.weights, scheme.input_activations, scheme.output_activations)))
        for scheme in config.config_groups.values()
    ]
    return sorted(map(repr, groups)), sorted(config.ignore or []), _dump(config.kv_cache_scheme)


def _dump(args: QuantizationArgs | None) -> object:
    return args and sorted(args.model_dump().items(), key=str)


def fit(
    captured: GraphModule, candidates: dict[str, QuantizationConfig]
) -> tuple[dict[str, QuantizationConfig], dict[str, str]]:
    """Candidates without the modules that they do not fit, and these with a reason, by the candidate's name.

    Raises:
        ValueError: a candidate that fits nothing.
    """
    graph_module = copy_graph_module(captured)
    graph_module.meta.update(captured.meta)
    for rewrite in (InlineRegions(), FunctionalizeModules(), DecomposeAttention(), OpenRegions()):
        rewrite(graph_module)
    fitting, reasons = {}, {}
    for name, config in candidates.items():
        try:
            refused = find_refused(graph_module, config)
        except ValueError as error:
            raise type(error)(f"candidate {name}: {error}") from None
        fitting[name] = config.model_copy(update={"ignore": [*(config.ignore or []), *refused]})
        if refused:
            reasons[name] = f"{', '.join(refused)} ({next(iter(refused.values()))})"
    return fitting, reasons
