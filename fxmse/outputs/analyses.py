"""What formats cost a model, for people: as JSON and as tables."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fxmse.analysis.choosing import SchemeChoice
from fxmse.analysis.results import Analysis

__all__ = ["format_analysis", "is_analysis", "parse_analysis", "summarise_analysis"]

_KIND = "fxmse analysis"
_SHOWN = 10
_UNITS = {
    "nats": "nats, the KL divergence of a token's distribution",
    "relative": "squared error of outputs over their squares",
    "loss": "squared change of the loss",
}
# Fields of a site's error, and what the table calls them.
_COLUMNS = {
    "name": "value",
    "candidate": "scheme",
    "value_error": "value's error",
    "output_error": "op's output",
    "model_error": "model's output",
    "exact_error": "measured",
}


def summarise_analysis(model: str, analysis: Analysis, choice: SchemeChoice | None) -> dict[str, Any]:
    """What is written as JSON, and :func:`format_analysis` reads."""
    chosen = choice and choice.to_dict()
    if chosen:
        del chosen["analysis"]
    return {"kind": _KIND, "model": model, "analysis": analysis.to_dict(), "choice": chosen}


def is_analysis(text: str) -> bool:
    """Whether ``text`` says of itself that :func:`summarise_analysis` gave it."""
    return text.lstrip("{ \n").startswith(f'"kind": "{_KIND}"')


def parse_analysis(text: str, path: Path) -> dict[str, Any]:
    """Raises ValueError for what :func:`summarise_analysis` does not give."""
    try:
        summary = json.loads(text)
        format_analysis(summary)
    except (TypeError, KeyError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError(
            f"{path} is no report of fxmse analyze ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from None
    return summary


def format_analysis(summary: Mapping[str, Any], *, show_all: bool = False) -> str:
    """Tables of the values that cost most, of the candidates, and of what was chosen.

    Args:
        summary: from :func:`summarise_analysis`.
        show_all: show every value; otherwise the ten worst.
    """
    analysis, choice = summary["analysis"], summary["choice"]
    worst = sorted(analysis["sites"], key=lambda site: -_read_error(site))
    shown = worst if show_all else worst[:_SHOWN]
    columns = [name for name in _COLUMNS if any(site[name] is not None for site in shown)]
    rows = [[site[name] for name in columns] for site in shown]
    table = tabulate(rows, [_COLUMNS[name] for name in columns], floatfmt=".3g")
    left = [f"{len(worst) - len(shown)} more with --all"] if len(shown) < len(worst) else []
    parts = ["\n".join([table, *left]), _format_candidates(analysis)]
    if choice is not None:
        parts.append(_format_choice(choice))
    parts.append(
        f"{summary['model']}: {analysis['num_batches']} batches; errors of the model in {_UNITS[analysis['unit']]}"
    )
    return "\n\n".join(parts)


def _read_error(site: Mapping[str, Any]) -> float:
    found = site["model_error"] if site["exact_error"] is None else site["exact_error"]
    return -math.inf if found is None else float(found)


def _format_candidates(analysis: Mapping[str, Any]) -> str:
    sums: defaultdict[str, float] = defaultdict(float)
    for site in analysis["sites"]:
        sums[site["candidate"]] += site["model_error"] or 0.0
    bits: dict[str, str] = {}
    for name in analysis["candidates"]:
        own = [group for group in analysis["groups"] if name in group["bits"]]
        num_weights = sum(group["num_weights"] for group in own)
        bits[name] = f"{sum(group['bits'][name] for group in own) / num_weights:.3f}" if num_weights else ""
    rows = [[name, bits[name], sums[name], analysis["totals"][name]] for name in analysis["candidates"]]
    return tabulate(rows, ["scheme", "bits a weight", "sum over values", "all, first batch"], floatfmt=".3g")


def _format_choice(choice: Mapping[str, Any]) -> str:
    counts = Counter(choice["chosen"].values())
    modules = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    gap = f", at most {choice['gap']:.2%} above the least" if choice["gap"] else ""
    unit = {"bits": "bits a weight", "bytes": "bytes"}.get(choice["unit"], choice["unit"])
    lines = [
        f"chosen: {modules} modules",
        f"{choice['size']:.6g} {unit} of {choice['budget']:.6g}; error {choice['error']:.3g}{gap}",
    ]
    return "\n".join([*lines, tabulate(choice["curve"], [unit, "least error"], floatfmt=(".6g", ".3g"))])
