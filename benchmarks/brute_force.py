"""The least squared error that a format can have, by trying all there is in float64.

For each group a dense grid of scales (for asymmetric formats with every zero point, for symmetric integers of less than
8 bits of either sign), each refitted by least squares; all powers of two; or all e4m3 scales with 128 global scales. It
knows nothing of fxmse's search. It is no proof: a search that is exact may find less where the grid passes the best
scale by (for NVFP4, between two global scales, some 1e-4).
"""

import math
from collections.abc import Iterable

import torch
from compressed_tensors.quantization import QuantizationArgs
from formats import has_scales_below_zero, is_tensor_group
from torch import Tensor

__all__ = ["sum_least_errors"]

# Elements of a tile and candidates at a time, so that temporaries are of some MiB.
TILE, AT_A_TIME = 1 << 13, 32
NUM_BEST, NUM_NEARBY, NUM_REFITS = 32, 17, 3
MIN_STEPS, MIN_STEPS_A_ZERO_POINT = 3000, 1000
# (explicit mantissa bits, smallest normal exponent, largest value) by number of bits.
FLOATS = {8: (3, -6, 448.0), 4: (1, 0, 6.0)}


def cut_groups(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """The elements that share a scale as rows."""
    if args.strategy == "tensor":
        return weight.reshape(1, -1)
    if args.strategy == "block":
        height, width = args.block_structure
        blocks = weight.unflatten(0, (-1, height)).unflatten(2, (-1, width)).transpose(1, 2)
        return blocks.reshape(-1, height * width)
    return weight.reshape(-1, args.group_size or weight.shape[1])


def round_to_format(x: Tensor, args: QuantizationArgs, zero_point: int) -> Tensor:
    """The nearest values of a format less its zero point, in place; which of two that are as near does not matter."""
    if args.type == "int":
        half = 2 ** (args.num_bits - 1)
        return x.round_().clamp_(-half - zero_point, half - 1 - zero_point)
    mantissa_bits, min_exponent, largest = FLOATS[args.num_bits]
    x = x.clamp_(-largest, largest)
    power = (x.view(torch.int64) & 0x7FF0_0000_0000_0000).view(torch.float64)
    step = power.clamp_(min=2.0**min_exponent).mul_(2.0**-mantissa_bits)
    return x.div_(step).round_().mul_(step)


def list_zero_points(args: QuantizationArgs) -> Iterable[int]:
    """All that there are."""
    half = 2 ** (args.num_bits - 1)
    return (0,) if args.symmetric else range(-half, half)


def list_scales(groups: Tensor, args: QuantizationArgs) -> Tensor:
    """Candidates for the scale of each group, shape (candidates, groups)."""
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    absmax = torch.maximum(-low, high).clamp(min=torch.finfo(torch.float32).tiny)
    if args.scale_dtype == torch.uint8:
        return 2.0 ** (torch.arange(-14.0, 5.0, dtype=torch.float64)[:, None] + absmax.log2().floor())
    if args.type == "float":
        own, qmax, least, largest = absmax / 448, 1.0, 0.9, 2.05
    else:
        span = 2.0**args.num_bits - 1
        own, qmax, least, largest = (2 * absmax if args.symmetric else high - low) / span, span / 2, 0.02, 2.0
    # A step of a tenth of qmax moves no element by more than a tenth of the distance between two values.
    num_steps = max(
        math.ceil(math.log(largest / least) * 10 * qmax), MIN_STEPS if args.symmetric else MIN_STEPS_A_ZERO_POINT
    )
    ratios = torch.linspace(math.log(least), math.log(largest), num_steps, dtype=torch.float64).exp()
    return ratios[:, None] * own


def find_stored_errors(groups: Tensor, scales: Tensor, args: QuantizationArgs) -> Tensor:
    """The least error of each group with one of ``scales`` as they are."""
    scales = scales[..., None]
    errors = round_to_format(groups / scales, args, 0).mul_(scales).sub_(groups)
    return errors.square_().sum(-1).amin(0)


def fit(groups: Tensor, scales: Tensor, args: QuantizationArgs, zero_point: int) -> tuple[Tensor, Tensor]:
    """Scales fitted to what the groups round to with ``scales``, and the errors of both together."""
    energy, tiny = groups.square().sum(-1), torch.finfo(torch.float64).tiny
    errors, fitted = [], []
    for part in scales.split(AT_A_TIME):
        rounded = round_to_format(groups / part[..., None], args, zero_point)
        products = (rounded * groups).sum(-1)
        squares = rounded.square_().sum(-1).clamp_(min=tiny)
        errors.append(energy - products.square() / squares)
        fitted.append((products / squares).clamp_(min=tiny))
    return torch.cat(errors), torch.cat(fitted)


def find_fitted_errors(groups: Tensor, scales: Tensor, args: QuantizationArgs, zero_point: int) -> Tensor:
    """The least error of each group with one of ``scales`` or near the best of them, fitted again and again."""
    errors, _ = fit(groups, scales, args, zero_point)
    best = scales.gather(0, errors.topk(NUM_BEST, dim=0, largest=False).indices)
    nearby = (scales[1] / scales[0] - 1) * torch.linspace(-0.5, 0.5, NUM_NEARBY, dtype=torch.float64)[:, None, None] + 1
    errors, fitted = fit(groups, (best * nearby).flatten(0, 1), args, zero_point)
    for _ in range(NUM_REFITS):
        least, step = errors.min(0, keepdim=True)
        errors, fitted = fit(groups, fitted.gather(0, step), args, zero_point)
        errors = torch.minimum(errors, least)
    return errors[0]


def find_least_errors(groups: Tensor, args: QuantizationArgs) -> Tensor:
    """The least error of each group that any scale and zero point give."""
    scales = list_scales(groups, args)
    if args.scale_dtype is not None:
        return find_stored_errors(groups, scales, args)
    errors = [find_fitted_errors(groups, scales, args, zero_point) for zero_point in list_zero_points(args)]
    if has_scales_below_zero(args):
        errors.append(find_fitted_errors(-groups, scales, args, 0))
    return torch.stack(errors).amin(0)


def sum_least_global_errors(parts: list[Tensor], args: QuantizationArgs) -> float:
    """The least error with one global scale for all groups: two octaves of them, and all scales."""
    values = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    absmax = max(part.abs().max().item() for part in parts)
    totals = []
    for step in range(128):
        scales = values[:, None] / (448 * 6 / absmax * 2 ** (-step / 64))
        totals.append(sum(find_stored_errors(part, scales, args).sum().item() for part in parts))
    return min(totals)


def sum_least_errors(weight: Tensor, args: QuantizationArgs) -> float:
    """The least summed squared error that a format can have."""
    groups = cut_groups(weight.double(), args)
    parts = list(groups.split(max(1, TILE // groups.shape[1])))
    if is_tensor_group(args):
        return sum_least_global_errors(parts, args)
    return sum(find_least_errors(part, args).sum().item() for part in parts)
