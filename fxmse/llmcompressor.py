"""fxmse's observers and searches inside of llm-compressor.

Importing this registers the observers ``exact_mse`` and ``output_mse`` with llm-compressor, so that its recipes can
name them; within :func:`accelerated` its own MSE observers search by fxmse's compiled search.
"""

import importlib.metadata
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from fxmse.formats.grids import Format
from fxmse.formats.layout import Layout
from fxmse.observers import Observer
from fxmse.observers.imatrix import ImportanceMSEOptions
from fxmse.observers.inputs import Products
from fxmse.observers.output import OutputMSEObserver as FXMSEOutputMSEObserver
from fxmse.search.options import SearchOptions
from fxmse.search.shrinking import shrink_ranges

__all__ = ["ExactMSEObserver", "OutputMSEObserver", "accelerated"]

_TESTED = "0.14."


def _check_version() -> None:
    """Raises ImportError where llm-compressor is missing, or another version than this was tested with."""
    try:
        version = importlib.metadata.version("llmcompressor")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError("fxmse.llmcompressor needs llm-compressor: pip install 'llmcompressor==0.14.*'") from None
    if not version.startswith(_TESTED):
        raise ImportError(
            f"llmcompressor {version} is not what fxmse.llmcompressor was tested with: pip install "
            "'llmcompressor==0.14.*'"
        )


_check_version()

from llmcompressor.modifiers.utils.hooks import HooksMixin  # noqa: E402
from llmcompressor.observers import Observer as LLMCompressorObserver  # noqa: E402
from llmcompressor.observers import imatrix, mse  # noqa: E402


class _Adapter(LLMCompressorObserver):
    """An observer of fxmse's as llm-compressor calls observers.

    Scales are above 0 (``negative_scale`` is False): llm-compressor stores ranges. A global scale is llm-compressor's,
    which covers the ranges of all weights that are fused.
    """

    fxmse_name: ClassVar[str]
    """The observer's name."""
    missing: ClassVar[tuple[str, ...]] = ("negative_scale",)
    """The arguments of that observer that mean nothing here."""

    def __init__(self, base_name: str, args: QuantizationArgs, **observer_kwargs: Any) -> None:
        super().__init__(base_name, args, **observer_kwargs)
        options = {"negative_scale": False, **self.args.observer_kwargs}
        for name in self.missing:
            if options.get(name):
                raise ValueError(f"{self.fxmse_name} has no {name}={options[name]!r} in llm-compressor: leave it out")
        self._observer = Observer.load_from_registry(self.fxmse_name, base_name=base_name, args=args, **options)
        self._found: tuple[Tensor, Tensor] | None = None

    @property
    def min_vals(self) -> Tensor:
        """The smallest value of each group's best range, searched where it is asked for; float32, qparam_shape."""
        return self._find_range()[0]

    @min_vals.deleter
    def min_vals(self) -> None:
        self._forget()

    @property
    def max_vals(self) -> Tensor:
        """The largest."""
        return self._find_range()[1]

    @max_vals.deleter
    def max_vals(self) -> None:
        self._forget()

    @property
    def has_statistics(self) -> bool:
        """Whether any value has been seen."""
        return self._observer.has_statistics

    def _find_range(self) -> tuple[Tensor, Tensor]:
        if not self.has_statistics:
            raise AttributeError("no value has been seen")
        if self._found is None:
            range = self._observer.finish(self._observer.state).range
            assert range is not None
            self._found = range.min, range.max
        return self._found

    def _forget(self) -> None:
        self._observer.state, self._found = self._observer.init(), None

    def update_statistics_from_observed(self, observed: Tensor) -> None:
        """Not called: :meth:`forward` takes values as they are."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, observed: Tensor) -> "_Adapter":
        """Takes one more value into account."""
        if observed.numel() and not (self.is_weight_obs and self.has_statistics):
            self._observer(observed)
            self._found = None
            self.fusion_handler.get_fused_statistics()
        return self

    @torch.no_grad()
    def get_qparams(self) -> Any:
        """Scale, zero point and global scale, by their names; what was seen is forgotten."""
        if self.args.strategy == QuantizationStrategy.TENSOR_GROUP:
            return super().get_qparams()
        assert self.has_statistics, "No statistics available. Call observer(value) first."
        qparams = self._observer.get_qparams()
        self.delete_statistics()
        return qparams


@LLMCompressorObserver.register("exact_mse")
class ExactMSEObserver(_Adapter):
    """:class:`fxmse.observers.exact.ExactMSEObserver`, but for what needs the values that meet a weight."""

    fxmse_name = "exact_mse"
    missing = ("negative_scale", "importance")


@LLMCompressorObserver.register("output_mse")
class OutputMSEObserver(_Adapter):
    """:class:`fxmse.observers.output.OutputMSEObserver`, of a linear's weight.

    It sees the linear's inputs through the hook by which ``imatrix_mse`` does. llm-compressor knows that one alone, so
    a recipe that quantizes weights only has to say ``requires_calibration_data=True``.
    """

    fxmse_name = "output_mse"
    missing = ("negative_scale", "mask")
    _act_sync_dict: ClassVar[dict[str, Any]] = dict.fromkeys(("_products", "_num_tokens"), distributed.ReduceOp.SUM)
    _hook: RemovableHandle | None = None

    @property
    def _inputs(self) -> Products:
        assert isinstance(self._observer, FXMSEOutputMSEObserver)
        assert isinstance(self._observer.inputs, Products)
        return self._observer.inputs

    @property
    def _products(self) -> Tensor | None:
        return self._inputs.products

    @property
    def _num_tokens(self) -> Tensor | None:
        return self._inputs.num_tokens

    def attach(self, module: nn.Module) -> None:
        """Has the inputs of a linear be seen."""
        self.detach(module)
        if isinstance(module, nn.Linear):
            self._hook = module.register_forward_pre_hook(self._show)

    def detach(self, module: nn.Module) -> None:
        """Has them be seen no more, and forgets them."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        self._inputs.state = self._inputs.init()

    @torch.no_grad()
    def _show(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not HooksMixin._HOOKS_DISABLED or self._hook in HooksMixin._HOOKS_KEEP_ENABLED:
            self._inputs(args[0])


@contextmanager
def accelerated() -> Iterator[None]:
    """Has llm-compressor's MSE observers search by fxmse within a ``with`` block.

    That is ``memoryless_mse``, ``mse``, ``nvfp4_expanded_mse``, ``imatrix_mse`` and ``nvfp4_expanded_imatrix``. They
    find the same, the candidate of least error. Errors are summed in float32 whatever the values' dtype, where
    llm-compressor sums bfloat16 in bfloat16.
    """
    before = mse._grid_search_mse, imatrix._grid_search
    mse._grid_search_mse, imatrix._grid_search = _search, _search_weighted
    try:
        yield
    finally:
        mse._grid_search_mse, imatrix._grid_search = before


def _make_format(args: QuantizationArgs) -> Format:
    """What candidates are rounded in: llm-compressor leaves the rounding of scales under a global scale out."""
    if args.strategy == QuantizationStrategy.TENSOR_GROUP:
        args = args.model_copy(update={"scale_dtype": None})
    return Format.of(args)


def _search(
    observed: Tensor,
    args: QuantizationArgs,
    token_args: QuantizationArgs,
    maxshrink: float,
    patience: int,
    grid: float,
    norm: float,
    triton_error_buffer: float,
    expand: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``_grid_search_mse``; observed has the shape (num_observations, *qparam_shape, group_size)."""
    options = SearchOptions(maxshrink=maxshrink, patience=patience, grid=grid, norm=norm, expand=expand)
    shape = observed.shape[1:-1]
    if math.prod(shape) == 1:
        value, layout = observed.reshape(1, -1), Layout("weight", "tensor")
    else:
        value, layout = observed.movedim(0, -2).reshape(math.prod(shape), -1), Layout("weight", "channel")
    found = shrink_ranges(value, _make_format(args), layout, options)
    return found.min.to(observed.dtype).reshape(shape), found.max.to(observed.dtype).reshape(shape)


def _search_weighted(
    observed: Tensor,
    args: QuantizationArgs,
    maxshrink: float,
    patience: int,
    grid: int,
    norm: float,
    expand: float = 1.0,
    importance_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``_grid_search``; importance is one for each input channel, in the shape of a row of groups."""
    options = ImportanceMSEOptions(maxshrink=maxshrink, patience=patience, grid=grid, norm=norm, expand=expand)
    shape = observed.shape[1:-1]
    if importance_weights is None:
        value = observed.movedim(0, -2).reshape(math.prod(shape), -1)
        found = shrink_ranges(value, _make_format(args), Layout("weight", "channel"), options)
    else:
        rows = observed[0].flatten(-2)
        layout = Layout("weight", "group", group_size=observed.shape[-1])
        importance = importance_weights[0, 0].flatten().float()
        found = shrink_ranges(rows, _make_format(args), layout, options, importance=importance)
    return found.min.to(observed.dtype).reshape(shape), found.max.to(observed.dtype).reshape(shape)
