"""What is only of use in a graph: whether there is one, and small tables that it looks things up in."""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

__all__ = ["is_traced", "keep", "keep_integers"]


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


def is_traced(value: Tensor) -> bool:
    """Whether somebody else's graph is being made, or ``value`` has no data that a kernel could read.

    ``torch.compiler.is_compiling`` and ``is_exporting`` are flags of the process, which another thread may have set.
    """
    if torch.compiler.is_dynamo_compiling():  # True where Dynamo looks at this line, False where Python runs it
        return True
    return isinstance(value, FakeTensor | FunctionalTensor) or torch._C._len_torch_dispatch_stack() > 0
