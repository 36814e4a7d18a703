"""What commands print, and the reports that they write and read."""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from fxmse.cli.paths import is_file
from fxmse.outputs.report_html import PAGE_SUFFIXES
from fxmse.outputs.reporting import SiteReport
from fxmse.outputs.summaries import COLUMNS, format_sites

__all__ = [
    "PAGE_FILE",
    "REPORT_FILE",
    "find_page",
    "format_report",
    "leave_pictures_out",
    "list_facts",
    "parse_report",
    "print_text",
]

REPORT_FILE = "fxmse_report.json"
"""The report's name inside of a .pt2 and of a checkpoint's folder."""
PAGE_FILE = "fxmse_report.html"
"""The page's name in a checkpoint's folder; that of a file is beside it, under its name but for the ending."""


def list_facts(options: argparse.Namespace, num_batches: int, start: float) -> dict[str, Any]:
    """What a report says of a command that began at ``start``."""
    return {
        "model": str(options.model),
        "scheme": options.scheme,
        "out": str(options.out),
        "batches": num_batches,
        "seconds": round(time.perf_counter() - start, 3),
    }


def leave_pictures_out(document: dict[str, Any]) -> dict[str, Any]:
    """What a report says of each value in numbers."""
    fields = [field.name for field in dataclasses.fields(SiteReport)]
    sites = [{name: site[name] for name in fields} for site in document["sites"]]
    return {**{name: document[name] for name in ("model", "scheme", "out", "batches", "seconds")}, "sites": sites}


def find_page(out: Path) -> Path:
    """Where the page of what is written there is."""
    return out.with_suffix(PAGE_SUFFIXES[0]) if is_file(out) else out / PAGE_FILE


def parse_report(content: str, path: Path) -> dict[str, Any]:
    """The contents of a report; raises ValueError for what ``fxmse quantize`` does not write."""
    try:
        summary = json.loads(content)
        sites = [[site[column] for column in COLUMNS] for site in summary["sites"]]
        facts = [summary[key] for key in ("model", "out", "scheme", "batches")]
    except (TypeError, KeyError, RecursionError, ValueError) as error:
        raise ValueError(
            f"{path} has a {REPORT_FILE} that cannot be read ({type(error).__name__}: {error}): quantize it again"
        ) from None
    if not all(isinstance(value, str | int | float | None) for row in (*sites, facts) for value in row):
        raise ValueError(f"{path} has a {REPORT_FILE} that fxmse did not write: quantize it again")
    return summary


def format_report(summary: dict[str, Any], as_json: bool, *, show_all: bool = False) -> str:
    """What is printed of a report."""
    if as_json:
        return json.dumps(summary, indent=1)
    what = f"{summary['model']} to {summary['out']}: {summary['scheme']}, {summary['batches']} batches"
    return f"{format_sites(summary['sites'], show_all=show_all)}\n\n{what}"


def print_text(text: str) -> None:
    """Prints to stdout, whose reader may go when it has seen enough."""
    try:
        print(text, flush=True)
    except OSError as error:
        # What is still in the buffer would be tried again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise OSError(error.errno, f"stdout: {error.strerror}") from None
