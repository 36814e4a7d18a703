"""What a run has worked on goes back to the system: it holds no more at its end than at its beginning."""

import ctypes
import gc

__all__ = ["Memory"]

_ENOUGH = 1 << 28


class Memory:
    """How much was worked on since memory was given back."""

    def __init__(self) -> None:
        self._num_bytes = 0

    def give_back(self, num_bytes: int) -> None:
        """Gives back what nothing refers to any more, where that may be much.

        Graphs and their modules refer to each other: what they hold, as the ranges of groups, waits for Python's
        collector, which counts objects, not bytes. And what is free lies between what is not.

        Args:
            num_bytes: of the weights that were worked on.
        """
        self._num_bytes += num_bytes
        if self._num_bytes < _ENOUGH:
            return
        self._num_bytes = 0
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
