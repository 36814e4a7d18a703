"""Reports for people: the worst values first, and a line for each role."""

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from fxmse.outputs.reporting import SiteReport

__all__ = ["as_json", "format_sites"]

_SHOWN = 10
# Fields of a SiteReport, and what the table calls them.
COLUMNS = {
    "module": "module",
    "role": "value",
    "format": "format",
    "num_scales": "scales",
    "scale_min": "least",
    "scale_max": "largest",
    "sqnr": "SQNR dB",
    "range_ratio": "range / min-max",
}

_Row = Mapping[str, Any]


def as_json(site: SiteReport) -> dict[str, Any]:
    """A site's report without what JSON has no word for.

    ``sqnr`` is null where it is infinite, and ``sqnr`` and ``range_ratio`` are where the value was not measured.
    """
    fields = dataclasses.asdict(site)
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in fields.items()
    }


def format_sites(sites: Sequence[_Row], *, show_all: bool = False) -> str:
    """A table of what :func:`as_json` gave, worst first, and a summary.

    Args:
        sites: a row each.
        show_all: show every row; otherwise the ten worst.
    """
    if not sites:
        return "no report (--report none)"
    worst = sorted(sites, key=_rank)
    shown = worst if show_all else worst[:_SHOWN]
    rows = [[site[column] for column in COLUMNS] for site in shown]
    table = tabulate(rows, list(COLUMNS.values()), floatfmt=("", "", "", "", ".3g", ".3g", ".1f", ".3f"))
    left = [f"{len(sites) - len(shown)} more in fxmse inspect --all"] if len(shown) < len(sites) else []
    by_role: defaultdict[str, list[_Row]] = defaultdict(list)
    for site in sites:
        by_role[site["role"]].append(site)
    return "\n".join([table, *left, "", *(_summarise(role, found) for role, found in by_role.items())])


def _is_measured(site: _Row) -> bool:
    return site["range_ratio"] is not None


def _get_sqnr(site: _Row) -> float:
    return math.inf if site["sqnr"] is None else site["sqnr"]


def _rank(site: _Row) -> tuple[bool, float]:
    return not _is_measured(site), _get_sqnr(site)


def _summarise(role: str, sites: Sequence[_Row]) -> str:
    measured = [_get_sqnr(site) for site in sites if _is_measured(site)]
    words = [f"{role}: {len(sites)} values"]
    if measured:
        words.append(f"SQNR at least {min(measured):.1f} dB, median {statistics.median_low(measured):.1f} dB")
    if len(measured) < len(sites):
        words.append(f"{len(sites) - len(measured)} not measured (--report full)")
    return ", ".join(words)
