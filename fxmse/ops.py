"""Every torch.library registration: the fake-quantize op with its fake, autograd and decomposed forms."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxmse.numerics import Grid

__all__ = ["FAKE_QUANTIZE", "fake_quantize"]


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
        global_scale: float32, one element, or None.
        num_bits: 2 to 8.
        type: "int" or "float" (8 bits: e4m3, 4 bits: e2m1).
        strategy: a ``QuantizationStrategy`` value.
        group_size: for group and tensor_group; divides the last dimension.
        block_structure: (rows, columns), for block; x has 2 dimensions, the last blocks may be cut off.

    Returns:
        x's shape; x's dtype for group and tensor_group, otherwise the scale's (as compressed-tensors has it).

    Source: compressed-tensors ``quantization.lifecycle.forward.fake_quantize``.
    """
    grid = Grid(num_bits, type)
    if strategy == "block":
        assert block_structure is not None
        height, width = block_structure
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % width, 0, -x.shape[0] % height))
        blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2)
        zero_point = None if zero_point is None else zero_point[:, :, None, None]
        result = _quantize_dequantize(blocks, scale[:, :, None, None], zero_point, global_scale, grid)
        return result.transpose(1, 2).reshape(padded.shape)[: x.shape[0], : x.shape[1]].contiguous()
    if strategy in ("group", "tensor_group"):
        assert group_size is not None
        zero_point = None if zero_point is None else zero_point.unsqueeze(-1)
        groups = x.unflatten(-1, (-1, group_size))
        result = _quantize_dequantize(groups, scale.unsqueeze(-1), zero_point, global_scale, grid)
        return result.flatten(-2).to(x.dtype)
    return _quantize_dequantize(x, scale, zero_point, global_scale, grid)


def _quantize_dequantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, global_scale: Tensor | None, grid: Grid
) -> Tensor:
    if global_scale is not None:
        scale = scale / global_scale
    scaled = x / scale
    if zero_point is not None:
        scaled = scaled + zero_point.to(x.dtype)
    quantized = grid.round(scaled.clamp(grid.qmin, grid.qmax))
    if grid.type == "float":
        quantized = torch.copysign(quantized, scaled)  # a cast keeps the sign of zero
    quantized = quantized.to(scale.dtype)
    if zero_point is not None:
        quantized = quantized - zero_point.to(scale.dtype)
    return quantized * scale


def _pass_straight_through(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (grad.to(ctx.x_dtype), *[None] * 8)  # type: ignore[attr-defined]


def _remember_dtype(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.x_dtype = inputs[0].dtype  # type: ignore[attr-defined]


fake_quantize = torch.library.custom_op("fxmse::fake_quantize", _fake_quantize, mutates_args=())
"""The op, as ``_fake_quantize`` describes it."""

FAKE_QUANTIZE = torch.ops.fxmse.fake_quantize.default
"""The overload that graphs call."""

fake_quantize.register_fake(_fake_quantize)
fake_quantize.register_autograd(_pass_straight_through, setup_context=_remember_dtype)
# The decomposition that make_fx takes once it traces below autograd (torch.compile, AOTInductor, run_decompositions).
# torch.export traces above it and keeps the op. The eager kernel and its gradient are the ones registered before.
FAKE_QUANTIZE.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)(_fake_quantize)
