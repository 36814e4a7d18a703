"""What the contract says, in float64 and step by step: nothing here is shared with fxmse.

Rounding is a search through the list of a format's values, candidates are a loop with patience as it is worded.
"""

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor


def list_values(num_bits: int, type_: str) -> Tensor:
    """All values of a format, ascending; the position's parity is that of the mantissa."""
    if type_ == "int":
        return torch.arange(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1), dtype=torch.float64)
    exponent_bits, mantissa_bits, bias, top = {8: (4, 3, 7, 448), 6: (2, 3, 1, 7.5), 4: (2, 1, 1, 6)}[num_bits]
    values = set()
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            value = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
            if value <= top:
                values |= {value, -value}
    return torch.tensor(sorted(values), dtype=torch.float64)


def round_to(x: Tensor, values: Tensor) -> Tensor:
    """The nearest of ``values``, the one of even position of two that are as near."""
    zero = int((values == 0).nonzero())
    right = torch.searchsorted(values, x.contiguous()).clamp(1, len(values) - 1)
    left = right - 1
    to_left, to_right = x - values[left], values[right] - x
    take_right = (to_right < to_left) | ((to_right == to_left) & ((right - zero) % 2 == 0))
    return values[torch.where(take_right, right, left)]


def calculate_scale(low: Tensor, high: Tensor, args: QuantizationArgs, global_scale: Tensor | float = 1.0):
    """Effective scale and zero point of a range."""
    values = list_values(args.num_bits, args.type)
    low, high = low.clamp(max=0), high.clamp(min=0)
    span = values[-1] - values[0]
    zero_point = torch.zeros_like(low)
    if args.symmetric:
        scale = torch.maximum(-low, high) / (span / 2)
    else:
        scale = (high - low) / span
        zero_point = (values[0] - low / scale).clamp(values[0], values[-1]).nan_to_num(0).round()
    scale = scale * global_scale
    eps = torch.finfo(torch.float32).eps
    if args.scale_dtype == torch.float8_e4m3fn:
        scale, eps = round_to(scale.clamp(max=448), list_values(8, "float")), 0.125
    return torch.where(scale == 0, eps, scale) / global_scale, zero_point


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, args: QuantizationArgs) -> Tensor:
    """In float64; scale and zero point broadcast."""
    values = list_values(args.num_bits, args.type)
    return (round_to((x / scale + zero_point).clamp(values[0], values[-1]), values) - zero_point) * scale


def sum_errors(groups: Tensor, scale: Tensor, zero_point: Tensor, args: QuantizationArgs, norm: float) -> Tensor:
    """sum(|fake_quantize(x) - x| ** norm) of each group; groups is (groups, elements)."""
    quantized = fake_quantize(groups, scale[:, None], zero_point[:, None], args)
    return ((quantized - groups).abs() ** norm).sum(1)


def global_scale_of(absmax: Tensor) -> Tensor:
    """448 * 6 / absmax."""
    return 448 * 6 / absmax


@dataclass
class Searched:
    """The outcome of the contract's loop; shapes (groups,) and (groups, steps)."""

    step: Tensor
    errors: Tensor
    num_steps_done: int


def search(
    groups: Tensor,
    args: QuantizationArgs,
    num_steps: int,
    grid: float,
    norm: float,
    patience: int,
    global_scale: Tensor | float = 1.0,
    optimize_global_scale: bool = False,
) -> Searched:
    """The contract's loop over ``groups`` (groups, elements)."""
    groups = groups.double()
    low, high = groups.amin(1), groups.amax(1)
    best = torch.full_like(low, torch.finfo(torch.float32).max)
    step = torch.zeros_like(low, dtype=torch.long)
    errors, stale = [], 0
    for i in range(num_steps):
        p = 1 - i / grid
        if optimize_global_scale:
            global_scale = global_scale_of(torch.maximum(-low * p, high * p))
        error = sum_errors(groups, *calculate_scale(low * p, high * p, args, global_scale), args, norm)
        errors.append(error)
        improved = error < best
        best, step = torch.where(improved, error, best), torch.where(improved, i, step)
        stale = 0 if improved.any() else stale + 1
        if stale >= patience:
            break
    return Searched(step, torch.stack(errors, 1), len(errors))


def round_fast(x: Tensor, args: QuantizationArgs) -> Tensor:
    """``round_to`` for the integers, whose values lie one apart."""
    values = list_values(args.num_bits, args.type)
    x = x.clamp(values[0], values[-1])
    return x.round() if args.type == "int" else round_to(x, values)


def list_scales(
    args: QuantizationArgs,
    absmax: Tensor,
    global_scale: Tensor | float,
    num_scales: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Scales among which the best of symmetric groups of these magnitudes is or is near, (scales, groups)."""
    values = list_values(args.num_bits, args.type)
    own = absmax / ((values[-1] - values[0]) / 2)
    if args.scale_dtype == torch.float8_e4m3fn:
        return (list_values(8, "float")[-126:] / global_scale)[:, None].expand(-1, len(own))
    if args.scale_dtype == torch.uint8:
        return 2.0 ** (own.log2().floor() + torch.arange(-3, 4)[:, None])
    low, high = (0.8, 2.05) if args.type == "float" else (0.02 if args.num_bits < 6 else 0.2, 1.7)
    return (own * torch.linspace(low, high, num_scales, dtype=torch.float64)[:, None]).to(dtype).double()


def find_least_errors(
    groups: Tensor,
    args: QuantizationArgs,
    global_scale: Tensor | float = 1.0,
    num_scales: int = 3000,
    weights: Tensor | float = 1.0,
    negative_scale: bool = False,
) -> Tensor:
    """The least squared error of each group over scales, and of asymmetric formats zero points, by trying all.

    Scales below 0 are tried, too, where ``negative_scale`` says so.
    """
    dtype, groups = groups.dtype, groups.double()
    values = list_values(args.num_bits, args.type)
    zero_points = torch.zeros(1, dtype=torch.float64) if args.symmetric else values
    reach = groups.abs().amax(1)
    if not args.symmetric:
        reach = (groups.amax(1).clamp(min=0) - groups.amin(1).clamp(max=0)) / 2
    best = torch.full((len(groups),), torch.inf, dtype=torch.float64)
    scales = list_scales(args, reach.clamp(min=1e-30), global_scale, num_scales, dtype)
    for zero_point in zero_points:
        for scale in torch.cat([scales, -scales]) if negative_scale else scales:
            quantized = (round_fast(groups / scale[:, None] + zero_point, args) - zero_point) * scale[:, None]
            best = torch.minimum(best, ((quantized - groups).square() * weights).sum(1))
    return best
