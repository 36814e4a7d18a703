"""Observers that keep smallest and largest elements."""

from fxmse.observers.averages import AverageOptions, AveragingObserver
from fxmse.observers.base import Observer
from fxmse.search.tiles import Range, cover_ranges

__all__ = ["MemorylessMinMaxObserver", "MinMaxObserver", "StaticMinMaxObserver"]


@Observer.register("memoryless_minmax")
class MemorylessMinMaxObserver(Observer):
    """Keeps the smallest and largest element of the last value."""


@Observer.register("static_minmax")
class StaticMinMaxObserver(Observer):
    """Keeps the smallest and largest element of all values."""

    def accumulate(self, old: Range | None, new: Range) -> Range:
        """The range that covers both."""
        if old is None:
            return new
        return cover_ranges([old, new])


@Observer.register("minmax")
class MinMaxObserver(AveragingObserver):
    """Keeps a moving average of each value's smallest and largest element (:class:`AverageOptions`)."""

    options_class = AverageOptions
