"""What the benchmarks of quality print."""

import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from tabulate import tabulate

Row = dict[str, Any]


def note(text: str) -> None:
    """Says something beside the tables."""
    print(text, file=sys.stderr, flush=True)


def choose(names: Iterable[str], chosen: list[str]) -> list[str]:
    """Those of ``names`` that were asked for; all where nothing was."""
    return [name for name in names if not chosen or name in chosen]


def print_pivot(rows: list[Row], index: tuple[str, ...], value: str, floatfmt: str) -> None:
    """A column for each observer; where several rows meet in a cell, their geometric mean."""
    cells = defaultdict(list)
    for row in rows:
        cells[tuple(row[name] for name in index), row["observer"]].append(row[value])
    columns = dict.fromkeys(column for _, column in cells)
    table = [
        [*key, *(statistics.geometric_mean(cells[key, c]) if (key, c) in cells else None for c in columns)]
        for key in dict.fromkeys(key for key, _ in cells)
    ]
    print(f"\n{value}\n")
    print(tabulate(table, headers=[*index, *columns], floatfmt=floatfmt, tablefmt="github"))
