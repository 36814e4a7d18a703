"""|e| ** norm, the arithmetic that most of a search's time goes into."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Power"]

_DEGREE = 5


@dataclass(frozen=True)
class Power:
    """``x ** exponent`` for float32 ``x`` >= 0 and an exponent above 0; make one with :meth:`of`.

    1 and 2 are exact. In a compiled graph any other exponent costs a fraction of ``torch.pow``:
    for x = m * 2 ** e with m in [1, 2),

        x ** p = m ** p * 2 ** f * 2 ** n,   n = round(p * e),  f = p * e - n in [-.5, .5]

    with polynomials for the first two factors and n put into the exponent's bits. The relative error is below
    1e-6 at exponents up to 4 (the tests hold it to that). Values below 2 ** (-120 / max(p, 1)) are taken for
    that value, whose power is at most 2 ** -120.

    Attributes:
        exponent: p.
        mantissa_coefficients: of m ** p on [1, 2], highest first; empty where nothing is approximated.
        exp2_coefficients: of 2 ** f on [-.5, .5].
    """

    exponent: float
    mantissa_coefficients: tuple[float, ...] = ()
    exp2_coefficients: tuple[float, ...] = ()

    @classmethod
    @functools.cache
    def of(cls, exponent: float) -> "Power":
        """The power function with its polynomials fitted."""
        if exponent in (1, 2) or exponent > 4:
            return cls(exponent)
        nodes = torch.cos(math.pi * (torch.arange(800, dtype=torch.float64) + 0.5) / 800)
        mantissa, fraction = 1.5 + 0.5 * nodes, 0.5 * nodes
        return cls(exponent, _fit(mantissa, mantissa**exponent), _fit(fraction, 2.0**fraction))

    def __call__(self, x: Tensor) -> Tensor:
        """``x ** exponent``."""
        if self.exponent == 1:
            return x
        if self.exponent == 2:
            return x * x
        if not self.mantissa_coefficients or not torch.compiler.is_compiling():
            return torch.pow(x, self.exponent)
        bits = x.clamp(min=2.0 ** -(120 / max(self.exponent, 1))).view(torch.int32)
        mantissa = ((bits & 0x007F_FFFF) | 0x3F80_0000).view(torch.float32)
        scaled = ((bits >> 23) - 127).float() * self.exponent
        # 1.5 * 2 ** 23 puts the nearest integer into the sum's low bits, from where it is shifted to the exponent.
        shift = 1.5 * 2.0**23
        shifted = scaled + shift
        integer_power = ((shifted.view(torch.int32) + 127) << 23).view(torch.float32)
        fraction = scaled - (shifted - shift)
        polynomials = _evaluate(self.mantissa_coefficients, mantissa) * _evaluate(self.exp2_coefficients, fraction)
        return polynomials * integer_power


def _evaluate(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Horner's scheme, highest coefficient first."""
    result = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        result = result * x + coefficient
    return result


def _fit(x: Tensor, y: Tensor) -> tuple[float, ...]:
    """Coefficients of y(x), highest first, least in relative error."""
    # Least squares at Chebyshev nodes is within a small factor of the minimax polynomial.
    rows = torch.linalg.vander(x, N=_DEGREE + 1).flip(1) / y[:, None]
    return tuple(torch.linalg.lstsq(rows, torch.ones_like(y)[:, None]).solution[:, 0].tolist())
