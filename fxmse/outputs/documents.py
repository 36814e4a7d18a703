"""What a report says of a quantized graph, as data: the sites, and all that is drawn and listed beside them."""

import dataclasses
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match
from torch import Tensor, nn
from torch.fx import GraphModule

from fxmse.calibration.observing import check_batches
from fxmse.calibration.progress import Peeked
from fxmse.capture.attributes import find_place, get_attribute
from fxmse.capture.front_ends import copy_graph_module
from fxmse.config import CONFIG_KEY, LEFT_IN_FLOAT_KEY
from fxmse.ops import is_fake_quantize
from fxmse.outputs.depth import measure_depth
from fxmse.outputs.pictures import PicturedReport, PictureRecorder, list_levels
from fxmse.outputs.reporting import watch
from fxmse.outputs.summaries import as_json
from fxmse.passes.constants import find_sources
from fxmse.passes.open_regions import OpenRegions, list_open_graphs
from fxmse.passes.stand_ins import list_modules
from fxmse.passes.versions import Versions

__all__ = ["make_document"]

_PACKAGES = ("torch", "compressed-tensors", "transformers")
_DIGITS = 5
_CHOICE = ("unit", "budget", "size", "error", "gap", "curve", "chosen")
"""What is shown of what ``fxmse.choose_schemes`` returns."""


def make_document(
    quantized: GraphModule, batches: Iterable[Any] | None, facts: Mapping[str, Any], *, analysis: Any = None
) -> dict[str, Any]:
    """All that a report says, of what JSON has words for.

    Args:
        quantized: a graph from ``fxmse.convert``; not changed.
        batches: as for ``fxmse.report``.
        facts: more of what the document says, as ``out``; they come first.
        analysis: as for ``fxmse.write_report``.

    Returns:
        ``sites``, each as :func:`fxmse.outputs.summaries.as_json` has it and with what is drawn of it; ``depth``, the
        error of outputs in the graph's order; ``sizes`` by format and ``float``, the parameters that stay in float,
        with the reason; ``left_in_float``, what the config targets but cannot be quantized; ``config``, ``versions``
        and ``levels`` of grids; and unless ``facts`` know better, ``model``, ``scheme``, ``batches`` and the
        ``seconds`` that measuring took.

    Raises:
        ValueError: as ``fxmse.report``.
    """
    start = time.perf_counter()
    check_batches(batches)
    counted = None if batches is None else _Counted(batches)
    peeked = None if counted is None else Peeked(counted)
    sites = [site for site in watch(quantized, peeked, PictureRecorder) if isinstance(site, PicturedReport)]
    depth = [] if peeked is None else measure_depth(quantized, peeked.first[0])
    names = sorted({site.picture.grid for site in sites if site.picture})
    config = quantized.meta.get(CONFIG_KEY)
    formats = dict.fromkeys(f"{site.role} {site.format}" for site in sites)
    document = {
        "model": type(quantized).__name__,
        "scheme": ", ".join(formats),
        "batches": counted.number if counted else 0,
        "seconds": None,
        **facts,
        "versions": _find_versions(),
        "sites": [_describe_site(site) for site in sites],
        "depth": [{"module": point.module, "sqnr": _round(point.sqnr)} for point in depth],
        "levels": {name: list_levels(name) for name in names},
        "sizes": _sum_sizes(sites),
        "float": list(_list_float(quantized, config)),
        "left_in_float": [list(entry) for entry in quantized.meta.get(LEFT_IN_FLOAT_KEY, ())],
        "config": _describe_config(config),
        "analysis": None if analysis is None else _describe_analysis(analysis.to_dict()),
    }
    if document["seconds"] is None:
        document["seconds"] = round(time.perf_counter() - start, 3)
    return document


class _Counted:
    """Batches, and how many of them were taken."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches, self.number = batches, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.number += 1
            yield batch


def _find_versions() -> dict[str, str]:
    versions = {"fxmse": sys.modules["fxmse"].__version__, "python": sys.version.partition(" ")[0]}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _describe_site(site: PicturedReport) -> dict[str, Any]:
    report = {field: value for field, value in as_json(site).items() if field != "picture"}
    picture = None if site.picture is None else dataclasses.asdict(site.picture)
    return _clean({**report, "picture": picture})


def _sum_sizes(sites: Sequence[PicturedReport]) -> list[dict[str, Any]]:
    """The weights by their formats, the largest first."""
    by_format: defaultdict[str, list[PicturedReport]] = defaultdict(list)
    for site in sites:
        if site.num_bytes:
            by_format[site.format].append(site)
    sizes = [
        {
            "format": format,
            "weights": len(found),
            "elements": sum(site.num_elements for site in found),
            "bytes": sum(site.num_bytes for site in found),
            "float_bytes": sum(site.num_float_bytes for site in found),
        }
        for format, found in by_format.items()
    ]
    return sorted(sizes, key=lambda size: -size["bytes"])


def _list_float(quantized: GraphModule, config: QuantizationConfig | None) -> Iterator[dict[str, Any]]:
    """The parameters that no fake-quantize node reads, each once, and why."""
    opened = copy_graph_module(quantized)
    OpenRegions()(opened)
    graphs = list(list_open_graphs(opened))
    read = set()
    for graph in graphs:
        versions = Versions(graph)
        for node in filter(is_fake_quantize, graph.graph.nodes):
            for source in find_sources(graph, versions, node.args[0]) or ():
                read.add(find_place(get_attribute(graph, str(source.target))))
    reasons = dict(quantized.meta.get(LEFT_IN_FLOAT_KEY, ()))
    modules = {path: module for graph in graphs for path, module in list_modules(graph).items()}
    for name, parameter in quantized.named_parameters():
        if find_place(parameter) not in read and parameter.numel():
            read.add(find_place(parameter))
            yield {
                "name": name,
                "shape": list(parameter.shape),
                "bytes": parameter.nbytes,
                "reason": _find_reason(name, parameter, config, modules, reasons),
            }


def _find_reason(
    name: str,
    parameter: Tensor,
    config: QuantizationConfig | None,
    modules: dict[str, nn.Module],
    reasons: dict[str, str],
) -> str:
    path = name.rpartition(".")[0]
    if path in reasons and parameter.dim() > 1:
        return reasons[path]
    if parameter.dim() < 2:
        return "a bias, a norm or another vector: formats are for matrices"
    if config and is_match(path, modules.get(path, nn.Module()), config.ignore or []):
        return "on the config's ignore list"
    return "no target of the config names it"


def _describe_config(config: QuantizationConfig | None) -> Any:
    return None if config is None else json.loads(json.dumps(config.to_dict(), default=_describe_other))


def _describe_other(value: object) -> Any:
    return value.tolist() if isinstance(value, Tensor) else str(value)


def _describe_analysis(found: dict[str, Any]) -> dict[str, Any]:
    """Of an analysis, or of a choice that has one: each value's errors by candidate, and the choice's curve."""
    analysis = found.get("analysis", found)
    sites: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for site in analysis.get("sites", ()):
        exact = site.get("exact_error")
        name = f"{site['module']}|{site['role']}"
        sites[name][site["candidate"]] = site.get("model_error") if exact is None else exact
    choice = {name: found[name] for name in _CHOICE if name in found} if "curve" in found else None
    return _clean(
        {"unit": analysis.get("unit"), "totals": analysis.get("totals", {}), "sites": sites, "choice": choice}
    )


def _clean(value: Any) -> Any:
    """What JSON has words for, of plain data: numbers in few digits, null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, float):
        return _round(value)
    return value if isinstance(value, str | int | bool | None) else _describe_other(value)


def _round(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
