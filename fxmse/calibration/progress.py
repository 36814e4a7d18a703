"""Progress bars: over weights by their elements, and over batches."""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from typing import Generic, TypeVar

from torch import Tensor
from tqdm.auto import tqdm

from fxmse.passes.probe import Probe

__all__ = ["Peeked", "show_batches", "visit_weights"]

T = TypeVar("T")


def visit_weights(weights: Mapping[Probe, Tensor], visit: Callable[[Probe, Tensor], object], is_shown: bool) -> None:
    """Calls ``visit`` with one weight after the other, beside a bar of how many of their elements are done."""
    total = sum(rows.numel() for rows in weights.values())
    with tqdm(desc="search", total=total, unit=" weights", unit_scale=True, disable=not (is_shown and total)) as bar:
        for probe, rows in weights.items():
            visit(probe, rows)
            bar.update(rows.numel())


def show_batches(batches: Iterable[T], is_shown: bool) -> Generator[T]:
    """The batches, beside a bar whose clock starts once the first is asked for."""
    yield from tqdm(batches, desc="calibrate", unit="batch", disable=not is_shown)


class Peeked(Generic[T]):
    """Batches of which the first was looked at: they are read once, as some can be read no more often.

    Attributes:
        first: the first, as a list of one; empty where there is none.
    """

    def __init__(self, batches: Iterable[T]) -> None:
        self._batches = batches
        self._remaining = iter(batches)
        self.first = list(itertools.islice(self._remaining, 1))

    def __iter__(self) -> Iterator[T]:
        """All of them."""
        yield from self.first
        yield from self._remaining

    def __len__(self) -> int:
        """How many; raises TypeError where that is not known."""
        if not isinstance(self._batches, Sized):
            raise TypeError("batches that do not say how many they are")
        return len(self._batches)
