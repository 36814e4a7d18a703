"""Which ranges the reference's search tries, and what it judges them by."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

from fxmse.search.power import AbsolutePower

__all__ = ["SearchOptions", "check_argument"]


def check_argument(name: str, value: object, expected: str, is_allowed: Callable[[float], bool]) -> None:
    """Raises ValueError where ``value`` is no number, or none that is allowed."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_allowed(value):
        raise ValueError(f"{name}={value!r}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Which candidates are tried and what they are judged by.

    Attributes:
        maxshrink: the range shrinks by at most this part; in (0, 1].
        patience: the search ends after so many steps in a row in which no group improved; at least 1.
        grid: candidates are p = 1 - i / grid for i in 0 .. maxshrink * grid - 1; above 0.
        norm: exponent of the error; above 0. 2 is the mean squared error.
        expand: the range that is shrunk is so many times the value's own; at least 1.
        factors: the factor p of each candidate; follows from maxshrink and grid.
        power: |e| ** norm; follows from norm.

    Deviation from the reference: maxshrink * grid is taken of the decimal numbers as written (.29 * 100 is 29
    steps, where float arithmetic truncates to 28), and no steps at all is an error.
    """

    maxshrink: float = 0.20
    patience: int = 5
    grid: float = 100.0
    norm: float = 2.4
    expand: float = 1.0
    factors: tuple[float, ...] = field(init=False, repr=False, compare=False)
    power: AbsolutePower = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises ValueError naming the argument that is out of range."""
        self._check_limits()
        check_argument("grid", self.grid, "a number above 0", lambda v: 0 < v < math.inf)
        check_argument("norm", self.norm, "a number above 0", lambda v: 0 < v < math.inf)
        check_argument("expand", self.expand, "a number of at least 1", lambda v: 1 <= v < math.inf)
        num_steps = self._count_steps(math.floor(Fraction(str(self.maxshrink)) * Fraction(str(self.grid))))
        if num_steps < 1:
            raise ValueError(
                f"maxshrink={self.maxshrink} and grid={self.grid} make no search step: "
                "expected maxshrink * grid of at least 1"
            )
        object.__setattr__(self, "factors", tuple(1 - i / self.grid for i in range(num_steps)))
        object.__setattr__(self, "power", AbsolutePower.of(self.norm))

    def _check_limits(self) -> None:
        check_argument("maxshrink", self.maxshrink, "a number in (0, 1]", lambda v: 0 < v <= 1)
        check_argument("patience", self.patience, "a whole number of at least 1", lambda v: v >= 1 and v % 1 == 0)

    def _count_steps(self, num_shrinks: int) -> int:
        """The number of candidates, of maxshrink * grid."""
        return num_shrinks
