"""A report as one file to look at: the data, a style and a script in a page that loads nothing."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from fxmse.outputs.documents import make_document
from fxmse.outputs.files import check_place, replace_file
from fxmse.reading import read_text

__all__ = ["PAGE_SUFFIXES", "check_page", "read_document", "render_json", "render_page", "write_report"]

PAGE_SUFFIXES = (".html", ".htm")
"""What a page's name ends in."""
_OPENING = '<script type="application/json" id="report">'
_GENERATOR = '<meta name="generator" content="fxmse">'
_SCRIPTS = (
    "data.js",
    "elements.js",
    "numbers.js",
    "selection.js",
    "tables.js",
    "charts.js",
    "pictures.js",
    "detail.js",
    "summary.js",
    "values.js",
    "layers.js",
    "depth.js",
    "sizes.js",
    "mix.js",
    "start.js",
)
"""The files of the script: each uses those before it alone, but for functions. They run as one."""
# A name may hold what ends the script that it is data of.
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def write_report(
    quantized: GraphModule,
    batches: Iterable[Any] | None,
    path: str | os.PathLike[str],
    *,
    analysis: Any = None,
) -> None:
    """Writes what :func:`fxmse.report` finds, and pictures of it, as one page to look at, or as JSON.

    A page has all that it shows in itself: nothing is loaded, and nothing runs but its own script.

    Args:
        quantized: a graph from ``fxmse.convert``; not changed.
        batches: as for ``fxmse.calibrate``, at least one; the first is run twice more, for the error along the depth.
            None shows weights alone.
        path: ends in .html, or in .json for the same as data. A report that is there is replaced.
        analysis: what ``fxmse.analyze`` or ``fxmse.choose_schemes`` returned, or whatever has a ``to_dict`` like
            theirs: the errors of other formats, and the error against the size, are shown, too.

    Raises:
        ValueError: as :func:`fxmse.report`; a path that ends in something else, or where something else is.
    """
    path = Path(path)
    if path.suffix not in (*PAGE_SUFFIXES, ".json"):
        raise ValueError(f"{path}: expected a name that ends in .html or .json")
    check_page(path)
    document = make_document(quantized, batches, {"out": str(path)}, analysis=analysis)
    with replace_file(path) as new:
        new.write_text(render_json(document) if path.suffix == ".json" else render_page(document), encoding="utf-8")


def check_page(path: Path) -> None:
    """Raises ValueError where a page cannot take the place of ``path``, or would replace another one's file."""
    check_place(path, is_folder=False)
    if path.suffix in PAGE_SUFFIXES and path.exists() and _GENERATOR not in read_text(path):
        raise ValueError(f"{path} is a page that fxmse did not write: choose another name")


def render_json(document: dict[str, Any]) -> str:
    """A document as JSON, an entry a line."""
    return json.dumps(document, indent=1, allow_nan=False)


def render_page(document: dict[str, Any]) -> str:
    """A document as a page.

    Its content security policy allows the style and the script by their hashes, and nothing else.
    """
    template, style = _read("page.html"), _read("page.css")
    script = f'"use strict";\n(() => {{\n{"".join(map(_read, _SCRIPTS))}}})();\n'
    data = json.dumps(document, separators=(",", ":"), allow_nan=False)
    parts = {
        "style": style,
        "script": script,
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "document": data.translate(_ESCAPES),
    }
    # In one pass: what is filled in is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _read(name: str) -> str:
    return (resources.files("fxmse.outputs") / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def read_document(page: str, path: Path) -> str:
    """The JSON in a page; raises ValueError for a page that has none."""
    _, opening, rest = page.partition(_OPENING)
    if not opening:
        raise ValueError(f"{path} has no report: expected a page that fxmse wrote")
    return rest.partition("</script>")[0]
