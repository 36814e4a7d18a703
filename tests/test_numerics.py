"""The grids and qparams against lists of values, torch's own casts and compressed-tensors."""

import pytest
import torch
from cases import FP8, MXFP4, MXFP8, NVFP4, WEIGHT_ARGS, make_args, make_weight
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given
from hypothesis import strategies as st
from oracle import list_values, round_to

from fxmse.formats.grids import Format, Grid
from fxmse.formats.scales import (
    calculate_exact_scale,
    calculate_global_scale,
    calculate_scale_and_zero_point,
    round_scale,
)
from fxmse.formats.stored_scales import count_stored_scales, list_stored_scales


@pytest.mark.parametrize(
    ("num_bits", "type_"), [(b, "int") for b in range(2, 10)] + [(8, "float"), (6, "float"), (4, "float")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_grid_rounds_to_the_nearest_of_its_values(num_bits, type_, dtype):
    grid, values = Grid(num_bits, type_), list_values(num_bits, type_)
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles, middles * 1.01, middles * 0.99, torch.linspace(values[0], values[-1], 5001)])
    x = x.to(dtype).clamp(grid.qmin, grid.qmax)
    assert torch.equal(grid.round(x).double(), round_to(x.double(), values))
    assert (grid.qmin, grid.qmax) == (values[0], values[-1])


def test_fp8_rounds_as_the_cast_does_on_every_bit_pattern():
    x = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float().clamp(max=448)
    x = torch.cat([x, x * 1.0039, -x])
    assert torch.equal(Grid(8, "float").round(x.clamp(-448, 448)), x.clamp(-448, 448).to(FP8).float())


@pytest.mark.parametrize("name", [*WEIGHT_ARGS, "nvfp4"])
@pytest.mark.parametrize("kind", ["normal", "special"])
def test_scale_and_zero_point_equal_compressed_tensors(name, kind):
    args = {**WEIGHT_ARGS, "nvfp4": NVFP4}[name]
    weight = make_weight(kind, rows=64)
    low, high = weight.amin(1), weight.amax(1)
    global_scale = torch.tensor([37.5]) if name == "nvfp4" else None
    scale, zero_point = calculate_scale_and_zero_point(
        low, high, Format.of(args), dtype=torch.float32, global_scale=global_scale
    )
    expected_scale, expected_zero_point = calculate_qparams(low, high, args, global_scale)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(zero_point, expected_zero_point.float())


@pytest.mark.parametrize("args", [MXFP4, MXFP8])
def test_mx_scales_equal_compressed_tensors_over_all_magnitudes(args):
    high = torch.cat([2.0 ** torch.linspace(-100, 100, 4001), torch.tensor([0.0, 1.75, 1.7499999, 448.0])])
    scale, _ = calculate_scale_and_zero_point(-high, high, Format.of(args), dtype=torch.float32, global_scale=None)
    assert torch.equal(scale, calculate_qparams(-high, high, args)[0])


def test_global_scale_equals_compressed_tensors():
    for low, high in ((-2.0, 1.0), (0.5, 3.0), (0.0, 0.0), (-1e-42, 0.0)):
        low, high = torch.tensor([low]), torch.tensor([high])
        assert torch.equal(calculate_global_scale(low, high), generate_gparam(low, high))


@given(st.floats(0, 1e4), st.sampled_from([torch.float32, torch.bfloat16, torch.float16, FP8]))
def test_stored_scale_is_never_zero_and_is_representable(scale, dtype):
    rounded = round_scale(torch.tensor([scale]), dtype)
    assert rounded.item() > 0
    assert torch.equal(rounded.to(dtype).float(), rounded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_half_precision_are_rounded_as_the_cast_does(dtype):
    patterns = torch.arange(1 << 16, dtype=torch.int32)
    # All values of half precision, those half-way between two, and next to these.
    bits = [patterns.to(torch.int16).view(dtype).float().view(torch.int32)]
    half = 1 << (15 if dtype == torch.bfloat16 else 12)
    bits += [bits[0] + half + offset for offset in (-1, 0, 1)]
    scale = torch.cat([*bits, patterns << 16, (patterns << 16) + 0xFFFF]).view(torch.float32)
    expected = scale.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).float()
    expected = torch.where(expected == 0, torch.finfo(dtype).eps, expected)
    torch.testing.assert_close(round_scale(scale, dtype), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"num_bits": 5, "type": "float", "zp_dtype": FP8}, "num_bits=5"),
        ({"num_bits": 17}, "num_bits=17"),
        ({"num_bits": 4, "type": "float", "symmetric": False}, "symmetric=False"),
        ({"num_bits": 8, "scale_dtype": torch.uint8}, "scale_dtype"),
    ],
)
def test_formats_that_do_not_exist_are_named(kwargs, named):
    with pytest.raises(ValueError, match=named):
        Format.of(make_args(**kwargs))


@pytest.mark.parametrize("args", [NVFP4, MXFP4, MXFP8], ids=["nvfp4", "mxfp4", "mxfp8"])
@pytest.mark.parametrize("shrink", [0.99, 0.81, 0.5, 0.44, 0.05])
def test_stored_scales_are_few_and_all_listed(args, shrink):
    format_ = Format.of(args)
    num_scales = count_stored_scales(format_, shrink)
    # Magnitudes over the whole range of a stored scale, those that round to zero and those cut off included.
    absmax = torch.cat([torch.logspace(-9, 4, 10_001, dtype=torch.float64).float(), torch.zeros(1)])
    factors = torch.cat([torch.linspace(1, shrink, 201), torch.tensor([shrink])])
    global_scale = torch.tensor([1.0]) if args is NVFP4 else None
    candidates = factors[:, None] * absmax
    scales, _ = calculate_scale_and_zero_point(
        -candidates, candidates, format_, dtype=torch.float32, global_scale=global_scale
    )
    exact = calculate_exact_scale(-candidates, candidates, format_, global_scale)
    listed, bounds = list_stored_scales(exact[0], format_, num_scales)
    # A candidate is stored as the scale whose bound is the last that it does not exceed.
    index = torch.stack([exact <= bound for bound in bounds[1:]]).sum(0)
    assert torch.equal(listed.gather(0, index), scales)
    most = max(len(column.unique()) for column in scales.T[::9])
    assert most <= num_scales <= most + 1


def test_scales_of_other_formats_are_not_counted():
    for args in (make_args(8), make_args(4, strategy="group", group_size=32), make_args(8, "float")):
        assert count_stored_scales(Format.of(args), 0.5) is None
