"""Every torch.library registration: fake-quantize with its fake, autograd and decomposed forms, and the search."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxmse.formats.grids import Format, Grid
from fxmse.formats.layout import Layout
from fxmse.formats.linear import LINEAR_TYPES, spread_scales
from fxmse.formats.scales import calculate_scale_and_zero_point, cast, round_half
from fxmse.observers.counting import count, count_patterns
from fxmse.observers.searches import load_search

__all__ = [
    "DECOMPOSITIONS",
    "DYNAMIC_FAKE_QUANTIZE",
    "FAKE_QUANTIZE",
    "calculate_codes",
    "dequantize_linear",
    "dynamic_fake_quantize",
    "dynamic_qparams",
    "dynamic_quantize_linear",
    "fake_quantize",
    "find_dynamic_qparams",
    "is_fake_quantize",
    "quantize_linear",
]


def _fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    global_scale: Tensor | None,
    num_bits: int,
    type: str,
    strategy: str,
    group_size: int | None = None,
    block_structure: Sequence[int] | None = None,
) -> Tensor:
    """(round(clamp(x / scale + zero_point)) - zero_point) * scale, equal to compressed-tensors' bit for bit.

    torch.export keeps it as one node; torch.compile, AOTInductor and ``ExportedProgram.run_decompositions`` see the
    arithmetic instead and fuse it into its neighbours. The gradient is straight-through: that of x is the output's.

    Args:
        x: float; a weight (out, in), an activation (..., channels), or any shape that ``scale`` broadcasts to.
        scale: float, shape qparam_shape of the strategy; divided by ``global_scale`` where there is one.
        zero_point: the same shape, or None for 0.
        global_scale: float32, one element, or one for each matrix of a weight, shape (..., 1, 1), or None.
        num_bits: of a :class:`fxmse.formats.grids.Grid`.
        type: "int" or "float".
        strategy: a ``QuantizationStrategy`` value.
        group_size: for group and tensor_group; divides the last dimension.
        block_structure: (rows, columns), for block: of x's last two dimensions; the last blocks may be cut off.

    Returns:
        x's shape; x's dtype for group and tensor_group, otherwise the scale's (as compressed-tensors has it).

    Source: compressed-tensors ``quantization.lifecycle.forward.fake_quantize``.
    """
    qparams = (scale, zero_point, global_scale)
    arguments = (Grid(num_bits, type), strategy, group_size, block_structure)
    result = _apply_in_groups(_quantize_dequantize, x, qparams, *arguments)
    return cast(result, x.dtype) if strategy in ("group", "tensor_group") else result


def calculate_codes(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    global_scale: Tensor | None,
    num_bits: int,
    type: str,
    strategy: str,
    group_size: int | None = None,
    block_structure: Sequence[int] | None = None,
) -> Tensor:
    """What :func:`fake_quantize` takes the zero point from and multiplies by the scale, in the scale's dtype."""
    arguments = (Grid(num_bits, type), strategy, group_size, block_structure)
    return _apply_in_groups(_quantize, x, (scale, zero_point, global_scale), *arguments)


def _apply_in_groups(
    function: Callable[..., Tensor],
    x: Tensor,
    qparams: tuple[Tensor, Tensor | None, Tensor | None],
    grid: Grid,
    strategy: str,
    group_size: int | None,
    block_structure: Sequence[int] | None,
) -> Tensor:
    """``function`` of x's elements beside their own scale, zero point and global scale; shape of x."""
    scale, zero_point, global_scale = qparams
    if strategy == "block":
        assert block_structure is not None
        height, width = block_structure
        padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % width, 0, -x.shape[-2] % height))
        blocks = padded.unflatten(-1, (-1, width)).unflatten(-3, (-1, height)).transpose(-3, -2)
        zero_point = None if zero_point is None else zero_point[..., None, None]
        result = function(blocks, scale[..., None, None], zero_point, global_scale, grid)
        result = result.transpose(-3, -2).reshape(padded.shape)
        return result[..., : x.shape[-2], : x.shape[-1]].contiguous()
    if strategy in ("group", "tensor_group"):
        assert group_size is not None
        zero_point = None if zero_point is None else zero_point.unsqueeze(-1)
        if global_scale is not None and global_scale.dim() > 1:
            global_scale = global_scale.unsqueeze(-1)
        groups = x.unflatten(-1, (-1, group_size))
        return function(groups, scale.unsqueeze(-1), zero_point, global_scale, grid).flatten(-2)
    return function(x, scale, zero_point, global_scale, grid)


def _quantize_dequantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, global_scale: Tensor | None, grid: Grid
) -> Tensor:
    if global_scale is not None:
        scale = scale / global_scale
    codes = _quantize(x, scale, zero_point, None, grid)
    if zero_point is not None:
        codes = round_half(torch.sub, codes, zero_point.to(scale.dtype))
    return round_half(torch.mul, codes, scale)


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, global_scale: Tensor | None, grid: Grid) -> Tensor:
    if global_scale is not None:
        scale = scale / global_scale
    scaled = round_half(torch.div, x, scale)
    if zero_point is not None:
        scaled = round_half(torch.add, scaled, zero_point.to(x.dtype))
        # So it is after the sum already, unless a compiler knows that the zero point is 0.
        scaled = torch.where(scaled == 0, 0.0, scaled)
    quantized = grid.round(scaled.clamp(grid.qmin, grid.qmax))
    if grid.type == "float":
        # A cast to fp8 keeps the sign of zero. compressed-tensors' fp4 has it of what is below zero, and -0.0 is not.
        signed = scaled if grid.num_bits == 8 else torch.where(scaled < 0, -1.0, 1.0)
        quantized = torch.copysign(quantized, signed)
    return quantized.to(scale.dtype)


def _dynamic_fake_quantize(
    x: Tensor,
    global_scale: Tensor | None,
    num_bits: int,
    type: str,
    symmetric: bool,
    strategy: str,
    group_size: int | None = None,
    scale_dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`fake_quantize` with the scale and zero point that x's own smallest and largest values give.

    Args:
        x: float, an activation (..., channels).
        global_scale: float32, one element, or None.
        num_bits: of a :class:`fxmse.formats.grids.Grid`.
        type: "int" or "float".
        symmetric: whether the zero point is 0.
        strategy: "tensor", "token" (a scale for each row of x's last dimension), "group" or "tensor_group".
        group_size: for group and tensor_group; divides the last dimension.
        scale_dtype: what scales are rounded to; None takes x's.

    Returns:
        x's shape and dtype (float32 for a tensor or token strategy with a global scale).

    Source: compressed-tensors ``compute_dynamic_scales_and_zp``. Deviation: that one takes the first two dimensions
    for a token's, so that a value of two dimensions is quantized per tensor; here a row is a token whatever the rest.
    """
    grid = (num_bits, type)
    scale, zero_point = find_dynamic_qparams(x, global_scale, *grid, symmetric, strategy, group_size, scale_dtype)
    # The zero point of a symmetric format is 0, and adding it makes 0.0 of -0.0. That of an integer is never -0.0.
    zero_point = zero_point.int() if type == "int" else zero_point
    return _fake_quantize(x, scale, zero_point, global_scale, *grid, strategy, group_size)


def find_dynamic_qparams(
    x: Tensor,
    global_scale: Tensor | None,
    num_bits: int,
    type: str,
    symmetric: bool,
    strategy: str,
    group_size: int | None = None,
    scale_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The scale and zero point of :func:`dynamic_fake_quantize`, shape qparam_shape of the strategy, x's dtype."""
    if strategy == "tensor":
        # A scale's range has 0 in it in any case, and so there is a smallest and a largest where there is no token.
        rows = [x.reshape(-1, x.shape[-1]), x.new_zeros(1, x.shape[-1])] if x.dim() else [x.reshape(1, 1)]
        min, max = (torch.cat([reduce(part, -1) for part in rows]) for reduce in (torch.amin, torch.amax))
        min, max = min.amin(0, keepdim=True), max.amax(0, keepdim=True)
    elif strategy == "token":
        min, max = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    else:
        groups = x.unflatten(-1, (-1, group_size))
        min, max = groups.amin(-1), groups.amax(-1)
    format = Format(Grid(num_bits, type), symmetric, scale_dtype, is_mx=scale_dtype == torch.uint8)
    scale, zero_point = calculate_scale_and_zero_point(min, max, format, dtype=x.dtype, global_scale=global_scale)
    return scale, zero_point


def _quantize_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor, type: str, axis: int = 0, block_size: int = 0
) -> Tensor:
    """ONNX's QuantizeLinear: clamp(round(x / scale) + zero_point).

    Args:
        x: float.
        scale: x's dtype, of a shape that ``axis`` and ``block_size`` say (:class:`fxmse.formats.linear.LinearScales`).
        zero_point: the same shape, the dtype of ``type``.
        type: a name of ``LINEAR_TYPES``, of its whole numbers or of "FLOAT8E4M3FN".
        axis: what scales vary along.
        block_size: how many neighbours along ``axis`` share a scale; 0 for all.

    Returns:
        x's shape, the dtype of ``type``.
    """
    linear = LINEAR_TYPES[type]
    scaled = x / spread_scales(scale, x, axis, block_size)
    if linear.dtype.is_floating_point:
        return scaled.clamp(*linear.range).to(linear.dtype)
    shift = spread_scales(zero_point, x, axis, block_size).to(x.dtype)
    return (torch.round(scaled) + shift).clamp(*linear.range).to(linear.dtype)


def _dequantize_linear(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, type: str, axis: int = 0, block_size: int = 0
) -> Tensor:
    """ONNX's DequantizeLinear: (codes - zero_point) * scale; arguments as ``_quantize_linear`` has them.

    Without a zero point it is 0.

    Returns:
        The shape of ``codes``, the dtype of ``scale``.
    """
    values = codes.to(scale.dtype)
    if zero_point is not None:
        values = values - spread_scales(zero_point, codes, axis, block_size).to(scale.dtype)
    return values * spread_scales(scale, codes, axis, block_size)


def _dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX's DynamicQuantizeLinear: codes, uint8, with the scale and zero point that x's own range gives.

    Both have no dimension; the range has 0 in it.
    """
    scale, zero_point = find_dynamic_qparams(x.float(), None, 8, "int", False, "tensor")
    scale, zero_point = scale.reshape(()), (zero_point.reshape(()) + 128).to(torch.uint8)
    return _quantize_linear(x.float(), scale, zero_point, "UINT8"), scale, zero_point


def _pass_straight_through(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (grad.to(ctx.x_dtype), *[None] * (ctx.num_inputs - 1))  # type: ignore[attr-defined]


def _remember_inputs(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.x_dtype, ctx.num_inputs = inputs[0].dtype, len(inputs)  # type: ignore[attr-defined]


def _register(name: str, function: Callable[..., Any], *, decomposes: bool = True) -> Any:
    op = torch.library.custom_op(f"fxmse::{name}", function, mutates_args=())
    op.register_fake(function)
    if decomposes:
        # The decomposition that make_fx takes once it traces below autograd (torch.compile, AOTInductor,
        # run_decompositions). torch.export traces above it and keeps the op. The eager kernel and its gradient are the
        # ones registered beside it.
        getattr(torch.ops.fxmse, name).default.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)(function)
    return op


fake_quantize = _register("fake_quantize", _fake_quantize)
"""The op, as ``_fake_quantize`` describes it."""
dynamic_fake_quantize = _register("dynamic_fake_quantize", _dynamic_fake_quantize)
"""The op, as ``_dynamic_fake_quantize`` describes it."""
for _op in (fake_quantize, dynamic_fake_quantize):
    _op.register_autograd(_pass_straight_through, setup_context=_remember_inputs)

dynamic_qparams = _register("dynamic_qparams", find_dynamic_qparams)
"""The op, as ``find_dynamic_qparams`` describes it."""
quantize_linear = _register("quantize_linear", _quantize_linear, decomposes=False)
"""The op, as ``_quantize_linear`` describes it."""
dequantize_linear = _register("dequantize_linear", _dequantize_linear, decomposes=False)
"""The op, as ``_dequantize_linear`` describes it."""
dynamic_quantize_linear = _register("dynamic_quantize_linear", _dynamic_quantize_linear, decomposes=False)
"""The op, as ``_dynamic_quantize_linear`` describes it."""

FAKE_QUANTIZE = torch.ops.fxmse.fake_quantize.default
"""The overload that graphs call."""
DYNAMIC_FAKE_QUANTIZE = torch.ops.fxmse.dynamic_fake_quantize.default
"""The overload that graphs call."""


DECOMPOSITIONS = {FAKE_QUANTIZE: _fake_quantize, DYNAMIC_FAKE_QUANTIZE: _dynamic_fake_quantize}
"""A table for ``ExportedProgram.run_decompositions`` that leaves all other ops alone."""


def is_fake_quantize(node: Node) -> bool:
    """Whether ``node`` calls one of the ops."""
    return node.target in (FAKE_QUANTIZE, DYNAMIC_FAKE_QUANTIZE)


@torch.library.custom_op("fxmse::measure", mutates_args=())
def _measure(value: Tensor, global_scale: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    """The range of each group, by the observer that ``spec`` describes (:mod:`fxmse.observers.searches`)."""
    return load_search(spec).search(value, global_scale)


@_measure.register_fake
def _(value: Tensor, global_scale: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    shape = load_search(spec).layout.qparam_shape(value.shape)
    return value.new_empty(shape, dtype=torch.float32), value.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("fxmse::measure_global", mutates_args=())
def _measure_global(value: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    """The range, shape (1,) or (..., 1, 1), that the global scale follows from, by the observer ``spec`` describes."""
    return load_search(spec).search_global(value)


@_measure_global.register_fake
def _(value: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    shape = load_search(spec).layout.as_one_group().qparam_shape(value.shape)
    return value.new_empty(shape, dtype=torch.float32), value.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("fxmse::count", mutates_args=())
def _count(value: Tensor, counts: Tensor | None, base_name: str, strategy: str, group_size: int | None) -> Tensor:
    """:func:`fxmse.observers.counting.count` with a layout of these fields."""
    return count(value, Layout(base_name, strategy, group_size), counts)


@_count.register_fake
def _(value: Tensor, counts: Tensor | None, base_name: str, strategy: str, group_size: int | None) -> Tensor:
    num_groups = math.prod(Layout(base_name, strategy, group_size).qparam_shape(value.shape))
    return value.new_empty((num_groups, count_patterns(value.dtype)), dtype=torch.int64)
