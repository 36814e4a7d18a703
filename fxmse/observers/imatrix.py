"""MSE observers of weights whose errors count by their channels' importance."""

from dataclasses import dataclass

from fxmse.observers.base import Observer
from fxmse.observers.input_aware import InputAwareObserver, check_input_options
from fxmse.observers.mse import MSEObserver, MSEOptions
from fxmse.search.options import check_argument

__all__ = ["ExpandedImportanceMSEOptions", "IMatrixMSEObserver", "ImportanceMSEOptions", "NVFP4ExpandedIMatrixObserver"]


@dataclass(frozen=True, kw_only=True)
class ImportanceMSEOptions(MSEOptions):
    """Arguments of a weighted MSE search.

    Attributes:
        maxshrink: in [0, 1]; the end point is a candidate, too, so that there are maxshrink * grid + 1, at least 2.
        patience: 0 switches it off.
        strict: raise where there is no importance to search with, instead of warning and searching without.
        mask: the name of the graph's input that is 0 where a token is padding (``attention_mask``), shape
            (batch, tokens).
    """

    maxshrink: float = 0.95
    patience: int = 5
    grid: float = 20.0
    norm: float = 3.0
    strict: bool = False
    mask: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError naming the argument that is out of range."""
        super().__post_init__()
        check_input_options(self.strict, self.mask)

    def _check_limits(self) -> None:
        check_argument("maxshrink", self.maxshrink, "a number in [0, 1]", lambda v: 0 <= v <= 1)
        check_argument("patience", self.patience, "a whole number of at least 0", lambda v: v >= 0 and v % 1 == 0)

    def _count_steps(self, num_shrinks: int) -> int:
        return max(1, num_shrinks) + 1


@dataclass(frozen=True, kw_only=True)
class ExpandedImportanceMSEOptions(ImportanceMSEOptions):
    """Arguments of a weighted MSE search from 1.8 times down to .8 times the value's range."""

    maxshrink: float = 1 - 0.8 / 1.8
    patience: int = 1000
    grid: float = 200.0
    norm: float = 2.4
    expand: float = 1.8


@Observer.register("imatrix_mse")
class IMatrixMSEObserver(InputAwareObserver, MSEObserver):
    """``memoryless_mse`` for weights, each error times E[x ** 2] of its input channel (:class:`ImportanceMSEOptions`).

    Source: llm-compressor 0.14 ``IMatrixMSEObserver``.
    """

    options_class = ImportanceMSEOptions

    @property
    def needs_inputs(self) -> bool:
        """Yes."""
        return True


@Observer.register("nvfp4_expanded_imatrix")
class NVFP4ExpandedIMatrixObserver(IMatrixMSEObserver):
    """``imatrix_mse`` over the ranges that serve NVFP4 best (:class:`ExpandedImportanceMSEOptions`)."""

    options_class = ExpandedImportanceMSEOptions
