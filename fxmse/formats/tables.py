"""Small tables that a compiled graph looks things up in."""

import torch
from torch import Tensor

__all__ = ["keep", "keep_integers"]


def keep(table: Tensor) -> Tensor:
    """``table`` itself, and in a compiled graph a buffer.

    Inductor would otherwise compute each entry anew for every vector of the innermost loop, and when it makes the
    graph, for every use: long chains take minutes. It writes whatever as_strided looks at.
    """
    return table.as_strided(table.shape, table.stride())


def keep_integers(table: Tensor) -> Tensor:
    """:func:`keep`, of a table of whole numbers that float32 holds exactly."""
    # Vectors of floats are loaded faster than those of integers.
    return keep(table.float()).to(torch.int32)
