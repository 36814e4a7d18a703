"""Which scales the search for the optimum evaluates, from coarse to fine."""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fxmse.formats.grids import Format

__all__ = ["NUM_LAST", "NUM_SHRUNK", "OF_COUNTS", "OF_GROUPS", "Density", "Plan"]

# Of integer grids, in parts of the scale of the group's own range. Widths and spacings were chosen so that errors stay
# within .4 % of the least for groups of 32 to 4096 normal, heavy-tailed, skewed and real values of 2 to 8 bits.
_MIDDLE = tuple(2.0 ** (i / 10.5) for i in range(-3, 4) if i)  # between the neighbours of the best of these
_MIN_WIDTH = 0.05  # of the fine part, to either side: half of what two scales of the middle part are apart
_WIDTH = 2.2  # and at least so many times 1 / sqrt(G)
_MAX_WIDTH = 0.4
_ABOVE = 1.13  # times 1 / sqrt(G): how far above the group's own range
_MIN_FINE = 8
NUM_SHRUNK = 20  # ranges of the reference, which are evaluated, too: 1, .99, ... of the group's own
NUM_LAST = 9  # scales around the best, where its valley's bottom does not follow from moments


class Density(NamedTuple):
    """How many scales are evaluated."""

    coarse: tuple[float, ...]  # of an integer grid, in parts of the scale of the group's own range
    spacing: float  # between two scales of its fine part, in parts of 1 / qmax
    float_spacing: float  # of the logarithms of a float grid's scales, in parts of 2 ** -mantissa_bits
    changes: tuple[float, ...]  # of the best scale at the end, in parts of 1 / qmax


OF_GROUPS = Density(tuple(2.0 ** (-i / 3) for i in range(12)), 0.4, 0.09, ())  # down to a thirteenth
OF_COUNTS = Density(tuple(2.0 ** (-i / 12) for i in range(48)), 0.8, 0.03, tuple(0.7 * i for i in range(-4, 5) if i))


@dataclass(frozen=True)
class Plan:
    """Which scales are evaluated, in parts of that of the group's own range.

    Of an integer grid the middle and fine ones are around the best before.
    """

    coarse: tuple[float, ...]
    middle: tuple[float, ...]
    fine: tuple[float, ...]
    limit: float
    last: tuple[float, ...]  # changes of the scale that are tried with several zero points at the end

    @classmethod
    @functools.cache
    def of(cls, format: Format, num_elements: int, density: Density = OF_GROUPS) -> "Plan":
        """The plan for groups of so many elements."""
        grid = format.grid
        if grid.type == "float":
            # It has the same values at twice the scale but for its smallest, and its largest are then not used: less
            # than twice the group's own scale is enough. As errors are in proportion to the elements, there is no
            # trend to follow.
            low, high = 1 - 2.0**-grid.mantissa_bits, 1.97
            num_fine = math.ceil(math.log(high / low) / density.float_spacing * 2**grid.mantissa_bits)
            fine = tuple(low * (high / low) ** (i / (num_fine - 1)) for i in range(num_fine))
            return cls((1.0,), (), fine, 2.0, ())
        # All of a symmetric grid's range is used where the largest element is at its upper, smaller end.
        top = (grid.qmax - grid.qmin) / 2 / grid.qmax if format.symmetric else 1.0
        noise = 1 / math.sqrt(num_elements)
        width = min(max(_MIN_WIDTH, _WIDTH * noise), _MAX_WIDTH)
        num_fine = max(_MIN_FINE, math.ceil(2 * width * grid.qmax / density.spacing))
        fine = tuple(1 - width + 2 * width * i / (num_fine - 1) for i in range(num_fine))
        coarse = (1.0, *(top * ratio for ratio in density.coarse if top * ratio != 1))
        last = tuple(change / grid.qmax for change in density.changes)
        return cls(coarse, _MIDDLE, fine, top * (1 + _ABOVE * noise), last)

    @property
    def num_candidates(self) -> int:
        """How many are evaluated."""
        return len(self.coarse) + NUM_SHRUNK + len(self.middle) + 2 * len(self.fine) + NUM_LAST

    @property
    def work(self) -> int:
        """What :func:`fxmse.search.compiling.pays_to_compile` goes by.

        Less than the candidates, as this search takes longer to compile.
        """
        return max(1, self.num_candidates // 4)

    def make_tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        """The plan for a graph that is the same for all plans."""
        return _make_tensors(self, device)


@functools.cache
def _make_tensors(plan: Plan, device: torch.device) -> tuple[Tensor, ...]:
    tables = (plan.coarse, plan.middle, plan.fine, (plan.limit,), plan.last)
    return tuple(torch.tensor(table, device=device) for table in tables)
