"""Searches as nodes of a graph: what an observer finds ranges by, as a string that a node can hold, and back."""

import functools
import json
from dataclasses import fields
from typing import Any, Protocol

from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from fxmse.formats.layout import Layout
from fxmse.observers.base import Observer
from fxmse.search.tiles import Range

__all__ = ["Search", "describe_search", "load_search"]


class Search(Protocol):
    """An observer whose search can be a node of a graph."""

    layout: Layout

    def search(self, value: Tensor, global_scale: Tensor | None) -> Range:
        """The range of each of the value's groups."""

    def search_global(self, value: Tensor) -> Range:
        """The range that the global scale follows from."""


def describe_search(observer: Observer, name: str, options_class: type, **changes: Any) -> str:
    """JSON of all that a search depends on.

    Args:
        observer: whose search it is.
        name: of a registered observer that keeps nothing and searches in the same way.
        options_class: the fields of ``observer.options`` that this one has.
        changes: values of some of them that JSON can hold.
    """
    options = {field.name: getattr(observer.options, field.name) for field in fields(options_class) if field.init}
    args = observer.args.model_copy(update={"observer_kwargs": {}}).model_dump(mode="json")
    return json.dumps({"name": name, "base_name": observer.base_name, "args": args, "options": {**options, **changes}})


@functools.cache
def load_search(spec: str) -> Search:
    """An observer that searches as the one described by ``spec``; it keeps nothing."""
    described = json.loads(spec)
    args = QuantizationArgs.model_validate(described["args"])
    name, base_name, options = (described[key] for key in ("name", "base_name", "options"))
    observer: Any = Observer.load_from_registry(name, base_name=base_name, args=args, **options)
    return observer
