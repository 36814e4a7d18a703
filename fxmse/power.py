"""|e| ** norm, the arithmetic that most of a search's time goes into."""

import functools
import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

__all__ = ["AbsolutePower"]

_DEGREE = 5  # for m ** p at p below 1 one more, which has the relative error stay as small
_FITTED = (1, 4)  # outside, the polynomials would need another degree
_TINY = 2.0**-60


@dataclass(frozen=True)
class AbsolutePower:
    """``|x| ** exponent`` for float32 ``x`` and an exponent above 0; make one with :meth:`of`.

    1 and 2 are exact. In a compiled graph other exponents up to 4 cost a fraction of ``torch.pow``. For
    x ** 2 = m * 2 ** k with m in [1, 2) and p = exponent / 2,

        |x| ** exponent = m ** p * 2 ** f * 2 ** n,   n = round(p * k),  f = p * k - n in [-.5, .5]

    with polynomials for the first two factors and n put into the exponent's bits. Adding 2 ** -60 to x ** 2 keeps
    zero out of it. From |x| = 2 ** -18 up the relative error is below 1e-6 (the tests hold it to that); below, the
    result is at most 2 ** (-18 * exponent), nothing for errors measured in steps of a grid.

    Attributes:
        exponent: the exponent.
        mantissa_coefficients: of m ** p on [1, 2], highest first; empty where nothing is approximated.
        exp2_coefficients: of 2 ** f, highest first.
    """

    exponent: float
    mantissa_coefficients: tuple[float, ...] = ()
    exp2_coefficients: tuple[float, ...] = ()

    @classmethod
    @functools.cache
    def of(cls, exponent: float) -> "AbsolutePower":
        """The power function with its polynomials fitted."""
        if exponent in (1, 2) or not _FITTED[0] < exponent <= _FITTED[1]:
            return cls(exponent)
        # Least squares at Chebyshev nodes is within a small factor of the minimax polynomial.
        nodes = torch.cos(math.pi * (torch.arange(800, dtype=torch.float64) + 0.5) / 800)
        mantissa = 1.5 + 0.5 * nodes
        fraction = _list_fractions(exponent)
        fraction = 0.5 * nodes if fraction is None else fraction
        mantissa_degree = _DEGREE + (exponent < 2)
        return cls(
            exponent,
            _fit(mantissa, mantissa ** (exponent / 2), mantissa_degree),
            _fit(fraction, 2.0**fraction, min(_DEGREE, len(fraction) - 1)),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """``|x| ** exponent``."""
        if self.exponent == 1:
            return x.abs()
        if self.exponent == 2:
            return x * x
        if not self.mantissa_coefficients or not torch.compiler.is_compiling():
            return torch.pow(x.abs(), self.exponent)
        bits = (x * x + _TINY).view(torch.int32)
        mantissa = ((bits & 0x007F_FFFF) | 0x3F80_0000).view(torch.float32)
        scaled = ((bits >> 23) - 127).float() * (self.exponent / 2)
        # 1.5 * 2 ** 23 puts the nearest integer into the sum's low bits, from where it is shifted to the exponent.
        shift = 1.5 * 2.0**23
        shifted = scaled + shift
        integer_power = ((shifted.view(torch.int32) + 127) << 23).view(torch.float32)
        fraction = scaled - (shifted - shift)
        polynomials = _evaluate(self.mantissa_coefficients, mantissa) * _evaluate(self.exp2_coefficients, fraction)
        return polynomials * integer_power


def _list_fractions(exponent: float) -> Tensor | None:
    """The few values that f can take where exponent / 2 is a fraction of a small denominator, as 2.4 / 2 = 6 / 5."""
    denominator = (Fraction(str(exponent)) / 2).denominator
    if denominator > _DEGREE:
        return None
    half = max(denominator // 2, 1)
    return torch.arange(-half, half + 1, dtype=torch.float64) / denominator


def _evaluate(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Horner's scheme, highest coefficient first; it is the fewest instructions that count here, not their latency."""
    result = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        result = result * x + coefficient
    return result


def _fit(x: Tensor, y: Tensor, degree: int) -> tuple[float, ...]:
    """Coefficients of y(x), highest first, least in relative error."""
    rows = torch.linalg.vander(x, N=degree + 1).flip(1) / y[:, None]
    return tuple(torch.linalg.lstsq(rows, torch.ones_like(y)[:, None]).solution[:, 0].tolist())
