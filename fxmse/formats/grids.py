"""The values that formats hold, in units of the scale."""

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from torch import Tensor

__all__ = ["FLOAT_FORMATS", "Format", "Grid", "round_to_mantissa"]

# (explicit mantissa bits, smallest normal exponent, largest value) by number of bits.
FLOAT_FORMATS = {8: (3, -6, 448.0), 6: (3, 0, 7.5), 4: (1, 0, 6.0)}  # fp8 e4m3fn, fp6 e2m3, fp4 e2m1
_INT_BITS = range(2, 17)  # what float32 rounds exactly, and with room to spare


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
        if self.type == "float" and self.num_bits not in FLOAT_FORMATS:
            raise ValueError(f"num_bits={self.num_bits}, type=float: expected one of {sorted(FLOAT_FORMATS)} bits")
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
        return FLOAT_FORMATS[self.num_bits][2] if self.type == "float" else 2.0 ** (self.num_bits - 1) - 1

    @property
    def mantissa_bits(self) -> int:
        """Explicit mantissa bits of a float grid."""
        return FLOAT_FORMATS[self.num_bits][0]

    @property
    def min_exponent(self) -> int:
        """Exponent of a float grid's smallest normal value."""
        return FLOAT_FORMATS[self.num_bits][1]

    def round(self, x: Tensor) -> Tensor:
        """The nearest value of the grid, ties to even; ``x`` is already clamped to [qmin, qmax].

        Exact in every float dtype. The sign of a zero result is not kept for float grids.
        """
        if self.type == "int":
            return torch.round(x)
        return round_to_mantissa(x, self.mantissa_bits, self.min_exponent)


def round_to_mantissa(x: Tensor, mantissa: int, min_exponent: int) -> Tensor:
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
