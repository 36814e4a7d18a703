"""The power against float64."""

import functools

import pytest
import torch

from fxmse.search.power import AbsolutePower

EXPONENTS = (1.0, 1.01, 1.2, 1.5, 2.0, 2.4, 2.5, 3.0, 3.5, 3.7, 4.0)
OTHER_EXPONENTS = (0.5, 7.0)


@functools.cache
def compile_powers():
    """All of them in one graph, in the order of the exponents."""
    powers = [AbsolutePower.of(exponent) for exponent in EXPONENTS + OTHER_EXPONENTS]
    options = {"cpp.enable_floating_point_contract_flag": "fast"}
    return torch.compile(lambda x: [power(x) for power in powers], dynamic=True, options=options)


def compute_compiled(x, exponent):
    return compile_powers()(x)[(EXPONENTS + OTHER_EXPONENTS).index(exponent)]


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_compiled_power_is_within_a_millionth(exponent):
    power = AbsolutePower.of(exponent)
    x = torch.cat([2.0 ** torch.linspace(-18, 10, 200_001), torch.zeros(1)])
    x = torch.cat([x, -x])
    # torch.pow rounds the exponent to float32, and so does the form for any exponent; a root's is exact.
    as_torch = x.abs().double() ** torch.tensor(exponent, dtype=torch.float32).double()
    expected = x.abs().double() ** exponent if power.root else as_torch
    error = (compute_compiled(x, exponent).double() - expected).abs()
    assert (error <= 1e-6 * expected + 1.01 * 2.0 ** (-30 * exponent)).all()
    assert torch.allclose(power(x).double(), as_torch, rtol=1e-6)


@pytest.mark.parametrize("exponent", OTHER_EXPONENTS)
def test_other_exponents_are_torchs(exponent):
    x = torch.linspace(-3, 3, 101)
    for powers in (AbsolutePower.of(exponent)(x), compute_compiled(x, exponent)):
        torch.testing.assert_close(powers, x.abs() ** exponent)
