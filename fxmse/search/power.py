"""|e| ** norm, the arithmetic that most of a search's time goes into."""

import functools
import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from fxmse.formats.tables import is_traced

__all__ = ["AbsolutePower"]

_DEGREE = 5  # for m ** p at p below 1 one more, which has the relative error stay as small
_FITTED = (1, 4)  # outside, the polynomials would need another degree
_TINY = 2.0**-60
_MAX_ROOT = 5  # roots of a higher degree need longer polynomials


@dataclass(frozen=True)
class _Root:
    """t ** (j - i / m) for t above 0 and whole i, j, m, up to a relative error below 5e-7.

    A float's bits, read as a whole number, are nearly the logarithm; so ``first_bits - bits / m`` are those of some z
    near t ** (-1 / m), and with w = t * z ** m, which is within 16 % of 1 for m = 5,

        t ** (j - i / m) = t ** j * z ** i * w ** (-i / m)

    with a polynomial in w - 1 for the last factor.

    Attributes:
        i: at least 1.
        j: at least 1.
        m: above i.
        first_bits: what z's bits are counted from.
        coefficients: of w ** (-i / m) in w - 1, highest first.
    """

    i: int
    j: int
    m: int
    first_bits: float
    coefficients: tuple[float, ...]

    @classmethod
    def of(cls, exponent: float) -> "_Root | None":
        """The form of t ** exponent; None where that is no fraction of a small denominator, as 2.4 / 2 = 2 - 4 / 5."""
        fraction = Fraction(str(exponent)) / 2
        if fraction.denominator == 1 or fraction.denominator > _MAX_ROOT:
            return None
        m, j = fraction.denominator, math.ceil(fraction)
        i = int((j - fraction) * m)
        # All that w depends on is the mantissa and the exponent's remainder by m.
        t = torch.exp2(torch.arange(m * 2048, dtype=torch.float64) / 2048).float()

        def seed(first_bits: float) -> Tensor:
            return t.double() * _approximate_root(t, m, first_bits).double() ** m

        best = min(
            (127 * 2.0**23 * (1 + 1 / m) + shift * 2.0**14 for shift in range(-64, 65)),
            key=lambda first_bits: (seed(first_bits) - 1).abs().max().item(),
        )
        w = seed(best)
        low, high = w.min().item(), w.max().item()
        nodes = (low + high) / 2 + (high - low) / 2 * _list_nodes()
        coefficients = _fit(nodes - 1, nodes ** (-i / m), _DEGREE if m > 2 else _DEGREE + 1)
        return cls(i, j, m, best, coefficients)

    def __call__(self, t: Tensor) -> Tensor:
        z = _approximate_root(t, self.m, self.first_bits)
        product = t * _multiply(z, self.i)
        result = _evaluate(self.coefficients, product * _multiply(z, self.m - self.i) - 1)
        return (product * _multiply(t, self.j - 1) if self.j > 1 else product) * result


def _approximate_root(t: Tensor, m: int, first_bits: float) -> Tensor:
    """Something near t ** (-1 / m)."""
    return (first_bits - t.view(torch.int32).float() * (1 / m)).to(torch.int32).view(torch.float32)


def _multiply(x: Tensor, times: int) -> Tensor:
    """``x ** times``, for a whole number of at least 1."""
    if times == 1:
        return x
    half = _multiply(x, times // 2)
    return half * half * x if times % 2 else half * half


@dataclass(frozen=True)
class AbsolutePower:
    """``|x| ** exponent`` for float32 ``x`` and an exponent above 0; make one with :meth:`of`.

    1 and 2 are exact. In a compiled graph other exponents up to 4 cost a fraction of ``torch.pow``: those that are
    even multiples of a fraction like 6 / 5 through a root, with a relative error below 1e-6 for all |x| above 2 ** -60.
    For others, with x ** 2 = m * 2 ** k, m in [1, 2) and p = exponent / 2,

        |x| ** exponent = m ** p * 2 ** f * 2 ** n,   n = round(p * k),  f = p * k - n in [-.5, .5]

    with polynomials for the first two factors and n put into the exponent's bits. Adding 2 ** -60 to x ** 2 keeps
    zero out of it. From |x| = 2 ** -18 up the relative error is below 1e-6 (the tests hold it to that); below, the
    result is at most 2 ** (-18 * exponent), nothing for errors measured in steps of a grid.

    Attributes:
        exponent: the exponent.
        root: the cheapest form, where there is one.
        mantissa_coefficients: of m ** p on [1, 2], highest first; empty where nothing is approximated.
        exp2_coefficients: of 2 ** f, highest first.
    """

    exponent: float
    root: _Root | None = None
    mantissa_coefficients: tuple[float, ...] = ()
    exp2_coefficients: tuple[float, ...] = ()

    @classmethod
    @functools.cache
    def of(cls, exponent: float) -> "AbsolutePower":
        """The power function with its polynomials fitted."""
        if exponent in (1, 2) or not _FITTED[0] < exponent <= _FITTED[1]:
            return cls(exponent)
        root = _Root.of(exponent)
        if root is not None:
            return cls(exponent, root)
        nodes = _list_nodes()
        mantissa = 1.5 + 0.5 * nodes
        mantissa_degree = _DEGREE + (exponent < 2)
        return cls(
            exponent,
            None,
            _fit(mantissa, mantissa ** (exponent / 2), mantissa_degree),
            _fit(0.5 * nodes, 2.0 ** (0.5 * nodes), _DEGREE),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """``|x| ** exponent``."""
        if self.exponent == 1:
            return x.abs()
        if self.exponent == 2:
            return x * x
        is_fitted = self.root or self.mantissa_coefficients
        if not is_fitted or not is_traced(x):
            return torch.pow(x.abs(), self.exponent)
        if self.root:
            return self.root(x * x)
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


def _list_nodes() -> Tensor:
    """Chebyshev nodes on [-1, 1]: least squares there is within a small factor of the minimax polynomial."""
    return torch.cos(math.pi * (torch.arange(800, dtype=torch.float64) + 0.5) / 800)


def _evaluate(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Horner's scheme, highest coefficient first; it is the fewest instructions that count here, not their latency."""
    result = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        result = result * x + coefficient
    return result


def _fit(x: Tensor, y: Tensor, degree: int) -> tuple[float, ...]:
    """Coefficients of y(x), highest first, least in relative error."""
    rows = torch.linalg.vander(x, N=degree + 1).flip(1) / y[:, None]
    solution = torch.linalg.lstsq(rows, torch.ones_like(y)[:, None]).solution[:, 0]
    # In float32, as graphs compute with them.
    return tuple(solution.float().tolist())
