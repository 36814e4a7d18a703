"""The value grids that formats store, and the scale and zero point that put a range on one.

Legend of shape suffixes, here and in :mod:`fxmse.search.shrinking`: O observations, Q qparams (one per group),
C candidates, G elements of a group.
"""

import math
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from torch import Tensor

__all__ = [
    "Format",
    "Grid",
    "calculate_exact_scale",
    "calculate_global_scale",
    "calculate_range_of_scale",
    "calculate_scale_and_zero_point",
    "count_stored_scales",
    "keep",
    "list_stored_scales",
    "round_scale",
]

# (explicit mantissa bits, smallest normal exponent, largest value) by number of bits.
_FLOAT_FORMATS = {8: (3, -6, 448.0), 6: (3, 0, 7.5), 4: (1, 0, 6.0)}  # fp8 e4m3fn, fp6 e2m3, fp4 e2m1
_INT_BITS = range(2, 17)  # what float32 rounds exactly, and with room to spare
# The scales of a tensor_group format are e4m3; together scale and element span 448 * 6.
_GLOBAL_RANGE = _FLOAT_FORMATS[8][2] * _FLOAT_FORMATS[4][2]

_MX_EXPONENTS = {4: 2, 6: 2, 8: 8}  # floor(log2(largest)) of an element, by its bits
_E4M3_STAND_IN = 0.125  # what compressed-tensors stores for a zero scale
_E4M3_CODES = 127  # non-negative values, 0 to 448
_E4M3_OFFSET = 120 << 3  # the difference of the exponents' biases, above three mantissa bits


@dataclass(frozen=True)
class Grid:
    """The values a format can hold, in units of the scale.

    Attributes:
        num_bits: 2 to 16 for integers; 8 (e4m3), 6 (e2m3) or 4 (e2m1) for floats.
        type: "int" or "float".
    """

    num_bits: int
    type: str

    def __post_init__(self) -> None:
        """Raises ValueError for a format that is not implemented."""
        if self.type == "float" and self.num_bits not in _FLOAT_FORMATS:
            raise ValueError(f"num_bits={self.num_bits}, type=float: expected one of {sorted(_FLOAT_FORMATS)} bits")
        if self.type == "int" and self.num_bits not in _INT_BITS:
            raise ValueError(
                f"num_bits={self.num_bits}, type=int: expected {_INT_BITS.start} to {_INT_BITS.stop - 1} bits"
            )

    @property
    def qmin(self) -> float:
        """The smallest value."""
        return -self.qmax if self.type == "float" else -(2.0 ** (self.num_bits - 1))

    @property
    def qmax(self) -> float:
        """The largest value."""
        return _FLOAT_FORMATS[self.num_bits][2] if self.type == "float" else 2.0 ** (self.num_bits - 1) - 1

    @property
    def mantissa_bits(self) -> int:
        """Explicit mantissa bits of a float grid."""
        return _FLOAT_FORMATS[self.num_bits][0]

    @property
    def min_exponent(self) -> int:
        """Exponent of a float grid's smallest normal value."""
        return _FLOAT_FORMATS[self.num_bits][1]

    def round(self, x: Tensor) -> Tensor:
        """The nearest value of the grid, ties to even; ``x`` is already clamped to [qmin, qmax].

        Exact in every float dtype. The sign of a zero result is not kept for float grids.
        """
        if self.type == "int":
            return torch.round(x)
        return _round_to_mantissa(x, self.mantissa_bits, self.min_exponent)


def _round_to_mantissa(x: Tensor, mantissa: int, min_exponent: int) -> Tensor:
    """Rounds to ``mantissa`` explicit bits, half to even, with subnormals below 2 ** min_exponent.

    Adding and taking away 1.5 * 2 ** 23 steps of the target makes the adder do the rounding; unlike a
    table of comparisons or a cast to float8, that is a handful of vector instructions.
    """
    if x.dtype == torch.float64:
        bits, exponent_mask, stored = x.view(torch.int64), 0x7FF0_0000_0000_0000, 52
    else:
        bits, exponent_mask, stored = x.float().view(torch.int32), 0x7F80_0000, 23
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    power = (bits & exponent_mask).view(wide).clamp(min=2.0**min_exponent)
    shift = power * (1.5 * 2.0 ** (stored - mantissa))
    return ((x.to(wide) + shift) - shift).to(x.dtype)


@dataclass(frozen=True)
class Format:
    """A grid and how its scales are stored: what of ``QuantizationArgs`` numbers depend on, and hashable.

    Attributes:
        grid: the values.
        symmetric: whether the zero point is 0.
        scale_dtype: the dtype that scales are rounded to; None takes the value's.
        is_mx: whether scales are the powers of two of the OCP microscaling formats.
    """

    grid: Grid
    symmetric: bool
    scale_dtype: torch.dtype | None
    is_mx: bool

    @classmethod
    def of(cls, args: QuantizationArgs) -> "Format":
        """The format that ``args`` name; raises ValueError where there is none."""
        grid = Grid(args.num_bits, QuantizationType(args.type).value)
        if args.type == "float" and args.num_bits < 8 and not args.symmetric:
            raise ValueError(
                f"symmetric=False is not defined for {args.num_bits}-bit floats: use symmetric=True or type='int'"
            )
        # As compressed-tensors tells them (should_generate_mx_scales).
        is_mx = args.type == "float" and args.group_size == 32 and args.scale_dtype == torch.uint8
        if args.scale_dtype is not None and not args.scale_dtype.is_floating_point and not is_mx:
            raise ValueError(
                f"scale_dtype={args.scale_dtype} belongs to the MX formats (type=float, group_size=32): "
                "use a float scale_dtype"
            )
        return cls(grid, args.symmetric, args.scale_dtype, is_mx)


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
            _store_mx_scale(exact, grid.num_bits) if format.is_mx else round_scale(exact, format.scale_dtype or dtype)
        )
        return scale, torch.zeros_like(min)
    min, max = min.clamp(max=0), max.clamp(min=0)
    scale = (max - min) / (grid.qmax - grid.qmin)
    # A dead group divides 0 by 0; compressed-tensors' integer cast turns that NaN into 0, too.
    zero_point = torch.nan_to_num((grid.qmin - min / scale).clamp(grid.qmin, grid.qmax), nan=0.0)
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
    scale = absmax / ((format.grid.qmax - format.grid.qmin) / 2)
    return scale if global_scale is None else global_scale * scale


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


def count_stored_scales(format: Format, shrink: float) -> int | None:
    """How many different scales at most ranges of one group are stored as, from its own to ``shrink`` times that.

    None where scales are stored with so many bits that counting them is of no use.
    """
    if not format.symmetric:
        return None
    if format.is_mx:
        return 1 + math.ceil(-math.log2(shrink) + 1e-6)
    if format.scale_dtype != torch.float8_e4m3fn:
        return None
    # The smallest scale that rounds to a value, and what that is rounded to when it shrinks.
    values = _decode_e4m3(torch.arange(_E4M3_CODES))
    middles = (values[:-1] + values[1:]) / 2
    shrunk = Grid(8, "float").round(middles * (shrink * (1 - 1e-6)))
    return 1 + int((torch.arange(1, _E4M3_CODES) - _encode_e4m3(shrunk)).max())


def list_stored_scales(exact: Tensor, format: Format, num_scales: int) -> tuple[Tensor, Tensor]:
    """The scales that ranges from a group's own downwards can be stored as.

    Args:
        exact: float32 [Q], the :func:`calculate_exact_scale` of each group's own range.
        format: one that :func:`count_stored_scales` counts, with ``num_scales``.
        num_scales: K.

    Returns:
        The scales [K, Q], from the stored scale of ``exact`` downwards, and bounds [K, Q]: whatever is above the k-th
        bound is stored as one of the first k scales. Below the smallest scale that can be stored, bounds are -1.
    """
    step_K1 = torch.arange(num_scales, device=exact.device, dtype=torch.int32)[:, None]
    if format.is_mx:
        carry = _get_mx_carry(format.grid.num_bits)
        exponent_KQ = _keep_integers(((exact.view(torch.int32) + carry) >> 23) - step_K1)
        scale_KQ = _store_mx_scale((exponent_KQ.clamp(min=0) << 23).view(torch.float32), format.grid.num_bits)
        bound_KQ = (((exponent_KQ.clamp(min=0) + 1) << 23) - (carry + 1)).view(torch.float32)
        return scale_KQ, torch.where(exponent_KQ < 0, -1.0, bound_KQ)
    grid = Grid(8, "float")
    code_KQ = _keep_integers(_encode_e4m3(keep(grid.round(exact.clamp(max=grid.qmax)))) - step_K1)
    value_KQ = _decode_e4m3(code_KQ.clamp(min=0))
    # A value half-way to the next larger one is rounded to the even one of both.
    middle_KQ = (value_KQ + _decode_e4m3(code_KQ.clamp(min=0) + 1)) / 2
    bound_KQ = (middle_KQ.view(torch.int32) - (code_KQ & 1)).view(torch.float32)
    scale_KQ = torch.where(code_KQ <= 0, _E4M3_STAND_IN, value_KQ)
    return scale_KQ, torch.where(code_KQ < 0, -1.0, bound_KQ)


def keep(table: Tensor) -> Tensor:
    """``table`` itself, and in a compiled graph a buffer.

    Inductor would otherwise compute each entry anew for every vector of the innermost loop, and when it makes the
    graph, for every use: long chains take minutes. It writes whatever as_strided looks at.
    """
    return table.as_strided(table.shape, table.stride())


def _keep_integers(table: Tensor) -> Tensor:
    # Vectors of floats are loaded faster than those of integers.
    return keep(table.float()).to(torch.int32)


def _encode_e4m3(value: Tensor) -> Tensor:
    """The place of a non-negative e4m3 value among all of them, int32; ``value`` is float32."""
    normal = (value.view(torch.int32) >> 20) - _E4M3_OFFSET
    return torch.where(value < 2.0**-6, (value * 2.0**9).to(torch.int32), normal)


def _decode_e4m3(code: Tensor) -> Tensor:
    """The inverse of ``_encode_e4m3``."""
    normal = ((code.to(torch.int32) + _E4M3_OFFSET) << 20).view(torch.float32)
    return torch.where(code < 8, code * 2.0**-9, normal)


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` rounded to what ``dtype`` can hold, in its own dtype; a zero becomes compressed-tensors' stand-in."""
    if dtype == torch.float8_e4m3fn:
        rounded, stand_in = Grid(8, "float").round(scale.clamp(-448.0, 448.0)), _E4M3_STAND_IN
    else:
        largest = min(torch.finfo(dtype).max, torch.finfo(scale.dtype).max)
        rounded = scale.clamp(-largest, largest).to(dtype).to(scale.dtype)
        stand_in = torch.finfo(dtype).eps
    return torch.where(rounded == 0, stand_in, rounded)


def _get_mx_carry(num_bits: int) -> int:
    """What carries a magnitude's bits into the next exponent, where they round past the largest element's mantissa.

    That is from a mantissa of 1.75, for fp6 of 1.9375.
    """
    return 1 << (19 if num_bits == 6 else 21)  # as compressed-tensors has it


def _store_mx_scale(absmax: Tensor, num_bits: int) -> Tensor:
    """The power of two that an E8M0 scale stores, less the element's exponent; in ``absmax``'s dtype."""
    power = ((absmax.float().view(torch.int32) + _get_mx_carry(num_bits)) & 0x7F80_0000).view(torch.float32)
    scale = (power * 2.0 ** -_MX_EXPONENTS[num_bits]).clamp(min=2.0**-127, max=2.0**127).to(absmax.dtype)
    return torch.where(scale == 0, 1.0, scale)  # float16 cannot hold the smallest
