"""The few scales that ranges of one group can be stored as, where scales are e4m3 or powers of two.

Shape suffixes: Q qparams (one per group), K different scales.
"""

import math

import torch
from torch import Tensor

from fxmse.formats.grids import Format, Grid
from fxmse.formats.scales import E4M3_STAND_IN, get_mx_carry, store_mx_scale
from fxmse.formats.tables import keep, keep_integers

__all__ = ["count_stored_scales", "list_stored_scales"]

_E4M3_CODES = 127  # non-negative values, 0 to 448
_E4M3_OFFSET = 120 << 3  # the difference of the exponents' biases, above three mantissa bits


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
        exact: float32 [Q], the :func:`fxmse.formats.scales.calculate_exact_scale` of each group's own range.
        format: one that :func:`count_stored_scales` counts, with ``num_scales``.
        num_scales: K.

    Returns:
        The scales [K, Q], from the stored scale of ``exact`` downwards, and bounds [K, Q]: whatever is above the k-th
        bound is stored as one of the first k scales. Below the smallest scale that can be stored, bounds are -1.
    """
    step_K1 = torch.arange(num_scales, device=exact.device, dtype=torch.int32)[:, None]
    if format.is_mx:
        carry = get_mx_carry(format.grid.num_bits)
        exponent_KQ = keep_integers(((exact.view(torch.int32) + carry) >> 23) - step_K1)
        scale_KQ = store_mx_scale((exponent_KQ.clamp(min=0) << 23).view(torch.float32), format.grid.num_bits)
        bound_KQ = (((exponent_KQ.clamp(min=0) + 1) << 23) - (carry + 1)).view(torch.float32)
        return scale_KQ, torch.where(exponent_KQ < 0, -1.0, bound_KQ)
    grid = Grid(8, "float")
    code_KQ = keep_integers(_encode_e4m3(keep(grid.round(exact.clamp(max=grid.qmax)))) - step_K1)
    value_KQ = _decode_e4m3(code_KQ.clamp(min=0))
    # A value half-way to the next larger one is rounded to the even one of both.
    middle_KQ = (value_KQ + _decode_e4m3(code_KQ.clamp(min=0) + 1)) / 2
    bound_KQ = (middle_KQ.view(torch.int32) - (code_KQ & 1)).view(torch.float32)
    scale_KQ = torch.where(code_KQ <= 0, E4M3_STAND_IN, value_KQ)
    return scale_KQ, torch.where(code_KQ < 0, -1.0, bound_KQ)


def _encode_e4m3(value: Tensor) -> Tensor:
    """The place of a non-negative e4m3 value among all of them, int32; ``value`` is float32."""
    normal = (value.view(torch.int32) >> 20) - _E4M3_OFFSET
    return torch.where(value < 2.0**-6, (value * 2.0**9).to(torch.int32), normal)


def _decode_e4m3(code: Tensor) -> Tensor:
    """The inverse of ``_encode_e4m3``."""
    normal = ((code.to(torch.int32) + _E4M3_OFFSET) << 20).view(torch.float32)
    return torch.where(code < 8, code * 2.0**-9, normal)
