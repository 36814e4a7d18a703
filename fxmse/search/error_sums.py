"""The errors of many scales at once: sums of |fake_quantize(x) - x| ** norm over the groups of a tile.

Shape suffixes as in :mod:`fxmse.search.tiles`, and C candidates.
"""

import functools
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from fxmse.formats.grids import Format, Grid
from fxmse.formats.tables import is_traced, keep
from fxmse.search.tiles import Arithmetic, count_lanes, split_pairs

__all__ = ["list_errors", "sum_exactly", "sum_moments", "sum_powers"]

# Uncompiled, so many errors are held at a time.
_MAX_EAGER = 1 << 20


def sum_powers(
    arithmetic: Arithmetic,
    values_OQPG: Tensor,
    scale_CQ: Tensor,
    zero_point_CQ: Tensor | None,
    weights_OQPG: Tensor | None,
) -> Tensor:
    """sum(weight * |e| ** norm) over O and G for each candidate, shape [C, Q].

    e is the error in units of the scale, round_to_grid(x / scale) - x / scale. A row's are summed up in float32 while
    it is in cache, the rows' in float64.
    """
    return _sum(_list_powers, arithmetic, values_OQPG, scale_CQ, zero_point_CQ, weights_OQPG)[0]


def sum_moments(
    arithmetic: Arithmetic,
    values_OQPG: Tensor,
    scale_CQ: Tensor,
    zero_point_CQ: Tensor | None,
    weights_OQPG: Tensor | None,
) -> Tensor:
    """The sums of weight * e ** 2 and weight * e * q, shape [2, C, Q], e as in :func:`sum_powers`.

    q is what x is quantized to, in units of the scale. While no x is quantized to something else, a scale that is
    1 + d times as large has the squared error sum(e ** 2) + 2 * d * sum(e * q) + d ** 2 * sum(q ** 2). As q is
    x / scale + e, sum(q ** 2) = sum((x / scale) ** 2) + 2 * sum(e * q) - sum(e ** 2).
    """
    return torch.stack(_sum(_list_moments, arithmetic, values_OQPG, scale_CQ, zero_point_CQ, weights_OQPG))


def sum_exactly(
    arithmetic: Arithmetic,
    values_OQPG: Tensor,
    scale_CQ: Tensor,
    zero_point_CQ: Tensor | None,
    weights_OQPG: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The sums of weight * |x * q| and weight * q ** 2, float64 [C, Q], q as in :func:`sum_moments`.

    Without weights, of integers and of floats of few bits both are exact, whatever the order of the sums: what x is
    rounded to is as long as it is rounded step by step (:func:`fxmse.search.compiling.rounds_each`).
    """
    # Squares of some integers are exact in float32.
    is_short = arithmetic.format.grid.type == "int" and weights_OQPG is None
    list_terms = _list_products_of_integers if is_short else _list_products
    products_CQ, squares_CQ = _sum(list_terms, arithmetic, values_OQPG, scale_CQ, zero_point_CQ, weights_OQPG)
    return products_CQ, squares_CQ.double()


def list_errors(arithmetic: Arithmetic, values_OQPG: Tensor, scale_CQ: Tensor, zero_point_CQ: Tensor | None) -> Tensor:
    """Each candidate's errors with their signs, in units of its scale, [O, C, Q, P, G]; values are float32."""
    shape_CQ11 = (len(scale_CQ), *values_OQPG.shape[1:-2], 1, 1)
    reciprocal = keep(scale_CQ.reciprocal()).reshape(shape_CQ11)
    zero_point = None if zero_point_CQ is None else zero_point_CQ.reshape(shape_CQ11)
    values = values_OQPG[:, None]
    errors, _ = _round(values, reciprocal, zero_point, arithmetic.format)
    if arithmetic.format.grid.type == "float" and zero_point is None:
        return torch.where(values < 0, -errors, errors)
    return errors


_Terms = Callable[[Arithmetic, Tensor, Tensor, Tensor], list[Tensor]]


def _list_powers(arithmetic: Arithmetic, values: Tensor, error: Tensor, quantized: Tensor) -> list[Tensor]:
    return [arithmetic.power(error)]


def _list_moments(arithmetic: Arithmetic, values: Tensor, error: Tensor, quantized: Tensor) -> list[Tensor]:
    return [error * error, error * quantized]


def _list_products(arithmetic: Arithmetic, values: Tensor, error: Tensor, quantized: Tensor) -> list[Tensor]:
    quantized = quantized.double()
    return [(values.double() * quantized).abs(), quantized * quantized]


def _list_products_of_integers(
    arithmetic: Arithmetic, values: Tensor, error: Tensor, quantized: Tensor
) -> list[Tensor]:
    return [(values.double() * quantized.double()).abs(), quantized * quantized]


def _sum(
    list_terms: _Terms,
    arithmetic: Arithmetic,
    values_OQPG: Tensor,
    scale_CQ: Tensor,
    zero_point_CQ: Tensor | None,
    weights_OQPG: Tensor | None,
) -> list[Tensor]:
    """The sums of terms, uncompiled of so many candidates at a time as may be copies of the data."""
    if is_traced(values_OQPG):
        # There the candidates are a loop around a row that stays in cache.
        return _sum_at_once(list_terms, arithmetic, values_OQPG, scale_CQ, zero_point_CQ, weights_OQPG)
    at_a_time = max(1, min(len(scale_CQ), _MAX_EAGER // values_OQPG.numel()))
    parts = []
    for start in range(0, len(scale_CQ), at_a_time):
        some = slice(start, start + at_a_time)
        zero_point = None if zero_point_CQ is None else zero_point_CQ[some]
        parts.append(_sum_at_once(list_terms, arithmetic, values_OQPG, scale_CQ[some], zero_point, weights_OQPG))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def _sum_at_once(
    list_terms: _Terms,
    arithmetic: Arithmetic,
    values_OQPG: Tensor,
    scale_CQ: Tensor,
    zero_point_CQ: Tensor | None,
    weights_OQPG: Tensor | None,
) -> list[Tensor]:
    # fake_quantize's error is continuous in x / scale, so that a reciprocal off by an ulp changes it by an ulp.
    shape_CQ11 = (len(scale_CQ), *values_OQPG.shape[1:-2], 1, 1)
    reciprocal = keep(scale_CQ.reciprocal()).reshape(shape_CQ11)
    zero_point = None if zero_point_CQ is None else zero_point_CQ.reshape(shape_CQ11)
    terms = [
        list_terms(arithmetic, part[:, None], *_round(part[:, None], reciprocal, zero_point, arithmetic.format))
        for part in split_pairs(arithmetic, values_OQPG)
    ]
    weights_O1QPG = None if weights_OQPG is None else weights_OQPG[:, None]
    return [_sum_rows(functools.reduce(torch.add, term), weights_O1QPG) for term in zip(*terms, strict=True)]


def _sum_rows(terms_OCQPG: Tensor, weights_O1QPG: Tensor | None) -> Tensor:
    if weights_O1QPG is not None:
        terms_OCQPG = terms_OCQPG * weights_O1QPG
    sums_OCQP = _add_up(terms_OCQPG)
    if sums_OCQP.shape[0] == sums_OCQP.shape[-1] == 1:
        return sums_OCQP[0, ..., 0].flatten(1)
    return sums_OCQP.sum((0, -1), dtype=torch.float64).flatten(1)


def _add_up(terms: Tensor) -> Tensor:
    """The sums of rows, in the order of Inductor's loops on a CPU: vectors, then what is in their lanes by halves.

    So that an uncompiled search decides as a compiled one does (:func:`fxmse.search.compiling.rounds_each`).
    """
    if is_traced(terms) or terms.device.type != "cpu":
        return terms.sum(-1)
    num_lanes = count_lanes()
    if terms.shape[-1] % num_lanes:
        return terms.sum(-1)
    lanes = functools.reduce(torch.add, terms.split(num_lanes, -1))
    while num_lanes > 1:
        num_lanes //= 2
        lanes = lanes[..., :num_lanes] + lanes[..., num_lanes:]
    return lanes[..., 0]


def _round(values: Tensor, reciprocal: Tensor, zero_point: Tensor | None, format: Format) -> tuple[Tensor, Tensor]:
    """The error of rounding x / scale, and what it is rounded to, in units of the scale; of -x where that is alike."""
    grid = format.grid
    if grid.type == "int":
        return _round_to_integer(values, reciprocal, grid, zero_point)
    if zero_point is None:
        return _round_to_float(values, reciprocal, grid)
    scaled, zero_point = values * reciprocal, keep(zero_point)
    rounded = grid.round((scaled + zero_point).clamp(grid.qmin, grid.qmax))
    quantized = rounded - zero_point
    return quantized - scaled, quantized


def _round_to_integer(
    values: Tensor, reciprocal: Tensor, grid: Grid, zero_point: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``_round`` for an integer grid.

    1.5 * 2 ** 23 has the adder round, half to even. Positive floats are ordered as their bits are, and negative ones
    below them, so that the clamp is one of integers: one instruction a bound, where one of floats that passes NaN on
    takes four. The last difference passes it on.
    """
    shift, shift_bits = 1.5 * 2.0**23, 0x4B40_0000
    bits = (values * reciprocal + shift).view(torch.int32)
    low, high = shift_bits + int(grid.qmin), shift_bits + int(grid.qmax)
    if zero_point is None:
        bits = bits.clamp(low, high)
    else:
        # A whole zero point moves the grid by whole steps: moving the bounds instead keeps x / scale exact.
        steps = zero_point.to(torch.int32)
        bits = torch.minimum(torch.maximum(bits, keep(low - steps)), keep(high - steps))
    quantized = bits.view(torch.float32) - shift
    return quantized - values * reciprocal, quantized


def _round_to_float(values: Tensor, reciprocal: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """``_round`` for a float grid, of |x|.

    As ``Grid.round``, with the clamp one of integers: see ``_round_to_integer``.
    """
    magnitudes = values.abs()
    clamped = (magnitudes * reciprocal).view(torch.int32).clamp(max=_to_bits(grid.qmax))
    power = (clamped & 0x7F80_0000).clamp(min=_to_bits(2.0**grid.min_exponent)).view(torch.float32)
    shift = power * 2.0 ** (23 - grid.mantissa_bits)
    rounded = (clamped.view(torch.float32) + shift) - shift
    return rounded - magnitudes * reciprocal, rounded


def _to_bits(value: float) -> int:
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    return bits
