"""The power against float64."""

import pytest
import torch

from fxmse.search.power import AbsolutePower


@pytest.mark.parametrize("exponent", [1.0, 1.01, 1.2, 1.5, 2.0, 2.4, 2.5, 3.0, 3.5, 3.7, 4.0])
def test_compiled_power_is_within_a_millionth(exponent):
    power = AbsolutePower.of(exponent)
    x = torch.cat([2.0 ** torch.linspace(-18, 10, 200_001), torch.zeros(1)])
    x = torch.cat([x, -x])
    compiled = torch.compile(lambda x: power(x), options={"cpp.enable_floating_point_contract_flag": "fast"})
    # torch.pow rounds the exponent to float32, and so does the form for any exponent; a root's is exact.
    as_torch = x.abs().double() ** torch.tensor(exponent, dtype=torch.float32).double()
    expected = x.abs().double() ** exponent if power.root else as_torch
    error = (compiled(x).double() - expected).abs()
    assert (error <= 1e-6 * expected + 1.01 * 2.0 ** (-30 * exponent)).all()
    assert torch.allclose(power(x).double(), as_torch, rtol=1e-6)


@pytest.mark.parametrize("exponent", [0.5, 7.0])
def test_other_exponents_are_torchs(exponent):
    x = torch.linspace(-3, 3, 101)
    power = AbsolutePower.of(exponent)
    torch.testing.assert_close(torch.compile(lambda x: power(x))(x), x.abs() ** exponent)
