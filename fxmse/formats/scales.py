"""The scale and zero point that put a range on a grid, rounded as they are stored, and the way back."""

from collections.abc import Callable

import torch
from torch import Tensor

from fxmse.formats.grids import FLOAT_FORMATS, Format, Grid, round_to_mantissa
from fxmse.formats.tables import is_traced

__all__ = [
    "E4M3_STAND_IN",
    "calculate_exact_scale",
    "calculate_global_scale",
    "calculate_range_of_scale",
    "calculate_scale_and_zero_point",
    "cast",
    "get_mx_carry",
    "round_half",
    "round_scale",
    "round_to_dtype",
    "store_mx_scale",
]

# The scales of a tensor_group format are e4m3; together scale and element span 448 * 6.
_GLOBAL_RANGE = FLOAT_FORMATS[8][2] * FLOAT_FORMATS[4][2]
_MX_EXPONENTS = {4: 2, 6: 2, 8: 8}  # floor(log2(largest)) of an element, by its bits
E4M3_STAND_IN = 0.125  # what compressed-tensors stores for a zero scale


def calculate_global_scale(min: Tensor, max: Tensor) -> Tensor:
    """448 * 6 / absmax, float32: maps the largest group scale to the largest e4m3 value.

    A range that is zero (or so small that the quotient overflows) gives 1.
    Source: compressed-tensors ``generate_gparam``, without its reshape to ``[1]``.
    """
    absmax = torch.maximum(-min.clamp(max=0), max.clamp(min=0)).float()
    global_scale = _GLOBAL_RANGE / absmax.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(torch.isfinite(global_scale), global_scale, 1.0)


def calculate_scale_and_zero_point(
    min: Tensor, max: Tensor, format: Format, *, dtype: torch.dtype, global_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range, rounded as they will be stored.

    The traceable twin of compressed-tensors ``calculate_qparams``: the same operations in the same order and dtype
    (held to equality by the tests), without its cached tensors and its data-dependent dtype changes.

    Args:
        min: smallest values, any float dtype, any shape, in units of x.
        max: largest values, same shape.
        format: the format.
        dtype: dtype the scale is stored in when the format names none.
        global_scale: multiplied into the scale before it is rounded; broadcasts to ``min``.

    Returns:
        scale and zero point, shape of ``min`` and its dtype (the scale float32 next to a global scale). The scale is
        never 0.
    """
    grid = format.grid
    if format.symmetric:
        exact = calculate_exact_scale(min, max, format, global_scale)
        scale = (
            store_mx_scale(exact, grid.num_bits) if format.is_mx else round_scale(exact, format.scale_dtype or dtype)
        )
        return scale, torch.zeros_like(min)
    min, max = min.clamp(max=0), max.clamp(min=0)
    scale = _divide(round_half(torch.sub, max, min), grid.qmax - grid.qmin)
    # A dead group divides 0 by 0; compressed-tensors' integer cast turns that NaN into 0, too.
    zero_point = round_half(torch.rsub, round_half(torch.div, min, scale), torch.full_like(min, grid.qmin))
    zero_point = torch.nan_to_num(zero_point.clamp(grid.qmin, grid.qmax), nan=0.0)
    if global_scale is not None:
        scale = global_scale * scale
    return round_scale(scale, format.scale_dtype or dtype), grid.round(zero_point)


def calculate_exact_scale(min: Tensor, max: Tensor, format: Format, global_scale: Tensor | None) -> Tensor:
    """What the scale of a symmetric format is rounded from; of the MX formats the largest magnitude.

    Arguments are those of :func:`calculate_scale_and_zero_point`.
    """
    absmax = torch.maximum(-min.clamp(max=0), max.clamp(min=0))
    if format.is_mx:
        return absmax
    scale = _divide(absmax, (format.grid.qmax - format.grid.qmin) / 2)
    return scale if global_scale is None else global_scale * scale


def _divide(value: Tensor, divisor: float) -> Tensor:
    """The quotient, rounded once, as compressed-tensors has it: by a number a GPU multiplies with its inverse."""
    return round_half(torch.div, value, torch.full((), divisor, dtype=value.dtype, device=value.device))


def calculate_range_of_scale(scale: Tensor, zero_point: Tensor | None, format: Format) -> tuple[Tensor, Tensor]:
    """A range that :func:`calculate_scale_and_zero_point` gives this scale and zero point for.

    Args:
        scale: as it is stored, less the global scale; any shape.
        zero_point: a whole number, or None for 0; of a symmetric format it is.
        format: the format.
    """
    grid = format.grid
    if format.is_mx:
        absmax = scale * 2.0 ** _MX_EXPONENTS[grid.num_bits]
        return -absmax, absmax
    if format.symmetric or zero_point is None:
        absmax = scale * ((grid.qmax - grid.qmin) / 2)
        return -absmax, absmax
    return scale * (grid.qmin - zero_point), scale * (grid.qmax - zero_point)


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` rounded to what ``dtype`` can hold, in its own dtype; a zero becomes compressed-tensors' stand-in."""
    if dtype == torch.float8_e4m3fn:
        rounded, stand_in = Grid(8, "float").round(scale.clamp(-448.0, 448.0)), E4M3_STAND_IN
    else:
        largest = min(torch.finfo(dtype).max, torch.finfo(scale.dtype).max)
        rounded = round_to_dtype(scale.clamp(-largest, largest), dtype)
        stand_in = torch.finfo(dtype).eps
    return torch.where(rounded == 0, stand_in, rounded)


def round_to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` rounded as a cast to ``dtype`` rounds, in its own dtype; float16 takes what it can hold.

    Inductor leaves out a cast to half precision that is taken back: of float32 it is arithmetic here.
    """
    if x.dtype != torch.float32 or dtype not in (torch.bfloat16, torch.float16):
        return x.to(dtype).to(x.dtype)
    if dtype == torch.float16:
        return torch.copysign(round_to_mantissa(x, 10, -14), x)
    bits = x.view(torch.int32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x1_0000).view(torch.float32)
    # isnan would not be vectorized: the search takes six times as long.
    return torch.where(x != x, x, rounded)


def round_half(operation: Callable[[Tensor, Tensor], Tensor], x: Tensor, other: Tensor) -> Tensor:
    """``operation`` of two tensors, of half precision rounded in a graph as it is outside.

    Inductor computes in float32 and rounds what it stores, not what one operation hands to the next.
    """
    dtype = torch.promote_types(x.dtype, other.dtype)
    if dtype not in (torch.bfloat16, torch.float16) or not is_traced(x):
        return operation(x, other)
    return cast(operation(x.float(), other.float()), dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``, in a graph for what reads it there, too (see :func:`round_half`)."""
    return round_to_dtype(x, dtype).to(dtype) if is_traced(x) and x.dtype != dtype else x.to(dtype)


def get_mx_carry(num_bits: int) -> int:
    """What carries a magnitude's bits into the next exponent, where they round past the largest element's mantissa.

    That is from a mantissa of 1.75, for fp6 of 1.9375.
    """
    return 1 << (19 if num_bits == 6 else 21)  # as compressed-tensors has it


def store_mx_scale(absmax: Tensor, num_bits: int) -> Tensor:
    """The power of two that an E8M0 scale stores, less the element's exponent; in ``absmax``'s dtype."""
    # Half of it: the largest magnitudes are carried beyond float32.
    bits = (((absmax.float().view(torch.int32) + get_mx_carry(num_bits)) & 0x7F80_0000) - 0x80_0000).clamp(min=0)
    scale = (
        (bits.view(torch.float32) * 2.0 ** (1 - _MX_EXPONENTS[num_bits]))
        .clamp(min=2.0**-127, max=2.0**127)
        .to(absmax.dtype)
    )
    return torch.where(scale == 0, 1.0, scale)  # float16 cannot hold the smallest
