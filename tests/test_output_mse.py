"""``output_mse`` against plain float64: the products that it keeps, what its scales make of outputs, and its graphs."""

import math
import re

import pytest
import torch
from cases import DISTRIBUTIONS, MXFP4, NVFP4, WEIGHT_ARGS, make_args, make_weight
from compressed_tensors.quantization.lifecycle import fake_quantize
from expecttest import Expect
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Products as ProductsModel
from models import make_config
from oracle import list_values, round_fast
from printing import print_graph
from processes import Processes
from torch import nn

import fxmse
from fxmse.formats.grids import Format
from fxmse.observers import Observer
from fxmse.observers.inputs import Products
from fxmse.passes.probe import find_inputs, find_probes
from fxmse.search.candidates import Candidates, OptimumProblem
from fxmse.search.compiling import compilation
from fxmse.search.power import AbsolutePower
from fxmse.search.product_sums import list_changes

ALL_ARGS = {**WEIGHT_ARGS, "nvfp4": NVFP4, "int4_g8": make_args(4, strategy="group", group_size=8)}
DTYPES = (torch.float32, torch.bfloat16)
# What is compared is summed up in float64, what the search compares in float32, of about 100 channels.
ROUNDING = 1 + 1e-6


def make_activations(channels=96, seed=1, tokens=400):
    """Of channels that depend on each other, and some of which are large."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator) * torch.logspace(0, -2, channels)[:, None]
    x = torch.randn(tokens, channels, generator=generator) @ mix
    return x * (torch.rand(channels, generator=generator) ** 2 + 0.02) + 0.3 * torch.randn(
        channels, generator=generator
    )


def make_observer(args, activations=None, name="output_mse", **kwargs):
    observer = Observer.load_from_registry(name, base_name="weight", args=args, **kwargs)
    if activations is not None and observer.needs_inputs:
        observer.inputs(activations)
    return observer


def observe(weight, args, activations=None, name="output_mse", **kwargs):
    return make_observer(args, activations, name, **kwargs)(weight).get_qparams()


def average(activations, damping=0.01):
    """H in float64."""
    tokens = activations.double().flatten(0, -2)
    products = tokens.T @ tokens
    diagonal = products.diagonal()
    products = products / diagonal[diagonal != 0].mean()
    products.diagonal().add_(damping)
    return products


def cut(products, block_size):
    """H without what lies beside its blocks."""
    place = torch.arange(len(products)) // block_size
    return products * (place[:, None] == place)


def quantize(weight, qparams, args):
    scale, zero_point, global_scale = qparams["scale"], qparams["zero_point"], qparams["global_scale"]
    return fake_quantize(weight, scale, zero_point, args, global_scale=global_scale)


def get_error(weight, qparams, args, products):
    """E H E of all rows in float64, as the weight is quantized in its own dtype."""
    errors = (quantize(weight, qparams, args).double() - weight.double()).flatten(0, -2)
    return ((errors @ products) * errors).sum().item()


# What is kept of activations.


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.sampled_from([(64, 0), (0, 64), (4, 0), (5, 0), (10, 0)]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 1000),
)
def test_products_are_those_of_all_tokens_however_they_are_split(sizes, form, dtype, is_masked, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 3, 10, generator=generator).to(dtype)
    mask = torch.rand(sum(sizes), 3, generator=generator) < (0.6 if is_masked else 2)
    products, parts = Products(*form), []
    for part, kept in zip(x.split(sizes), mask.split(sizes), strict=True):
        assert products(part, kept if is_masked else None) is part
        parts.append(Products(*form))
        parts[-1](part, kept if is_masked else None)
    tokens = x[mask].double()
    block_size = form[0] if form[0] < 10 and not form[1] else 10
    blocks = torch.nn.functional.pad(tokens, (0, -10 % block_size)).split(block_size, 1)
    expected = torch.stack([block.T @ block for block in blocks])
    merged = products.init()
    for part in parts:
        merged = products.merge(merged, part.state)
    for state in (products.state, merged, products.merge(merged, products.init())):
        assert state.products.dtype == torch.float32
        torch.testing.assert_close(state.products.double(), expected, rtol=1e-5, atol=1e-5)
        assert state.num_tokens == len(tokens)


def test_padding_is_left_out_whatever_it_holds():
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    padded = torch.where(mask.bool()[..., None], x, torch.nan)
    products = Products(8, 0)
    products(padded, mask)
    torch.testing.assert_close(products.mean(0.1)[0].double(), average(x[mask.bool()], 0.1), rtol=1e-5, atol=1e-6)
    nothing = Products(8, 0)
    nothing(x, torch.zeros(2, 5))
    assert nothing.mean(0.1) is None


def test_damping_is_in_parts_of_the_channels_that_are_not_dead():
    x = torch.randn(50, 10)
    x[:, 3] = 0
    products = Products(4, 0)
    products(x)
    for damping in (0.0, 0.01, 1.0):
        expected = average(x, damping)
        for i, block in enumerate(products.mean(damping).double()):
            part = expected[4 * i : 4 * i + 4, 4 * i : 4 * i + 4]
            torch.testing.assert_close(block[: len(part), : len(part)], part, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(products.mean(damping)[2, 2:, 2:], damping * torch.eye(2))


# What is searched.


# Beside a global scale all arithmetic is float32.
IN_ROWS = [name for name, args in ALL_ARGS.items() if args.strategy in ("channel", "group")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", IN_ROWS)
def test_errors_have_the_signs_that_they_have_where_the_weight_is_quantized(scheme, dtype):
    args = ALL_ARGS[scheme]
    # Few mantissa bits have ties.
    weight = make_weight("normal", rows=64).to(dtype).float().mul(8).round().div(8).to(dtype)
    qparams = observe(weight, args, name="exact_mse")
    scale = qparams["scale"].flatten()[None].float()
    zero_point = None if args.symmetric else qparams["zero_point"].flatten()[None].float()
    size = args.group_size or weight.shape[1]
    values = weight.float().reshape(-1, size)[None, :, None]
    problem = OptimumProblem(Format.of(args), AbsolutePower.of(2.0), False, dtype)
    found = list_changes(problem, values, Candidates(scale, zero_point))[0, 0, :, 0]
    expected = (quantize(weight, qparams, args).float() - weight.float()).view(-1, size)
    if dtype == torch.float32:
        # Reciprocals may tell ties apart otherwise; here are none but those of powers of two, which are exact.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ALL_ARGS)
def test_the_error_is_below_those_of_other_searches_and_falls_with_sweeps(scheme, dtype):
    args, x = ALL_ARGS[scheme], make_activations()
    products = average(x)
    for kind in DISTRIBUTIONS:
        weight = make_weight(kind).to(dtype)

        def measure(name="output_mse", weight=weight, **kwargs):
            return get_error(weight, observe(weight, args, x, name, **kwargs), args, products)

        by_sweeps = [measure(max_sweeps=sweeps) for sweeps in (0, 1, 2, 4, 16)]
        assert all(after <= before * ROUNDING for before, after in zip(by_sweeps, by_sweeps[1:], strict=False)), kind
        assert by_sweeps[-1] <= ROUNDING * measure("exact_mse"), kind
        if args.strategy in ("channel", "group", "tensor_group"):
            assert by_sweeps[-1] <= ROUNDING * measure("exact_mse", importance=True), kind
        assert measure() == by_sweeps[-1]


def descend(weight, args, products, global_scale, num_restarts):
    """The errors of descents from random candidates, in float64: those around each group's best, or all of e4m3."""
    size, (rows, channels) = args.group_size, weight.shape
    groups, weights = weight.double().reshape(-1, size), products.diagonal().reshape(-1, size).repeat(rows, 1)
    if global_scale is not None:
        values = list_values(8, "float")[-126:]
        own = torch.searchsorted(values, groups.abs().amax(1) / 6 * global_scale)
        scale = values[(own + torch.arange(-5, 10)[:, None]).clamp(0, len(values) - 1)] / global_scale
    else:
        tried = groups.abs().amax(1) / 7.5 * torch.linspace(0.3, 1.7, 700, dtype=torch.float64)[:, None]
        tried = torch.cat([tried, -tried])
        errors = torch.stack([(_list_errors(groups, s, args).square() * weights).sum(1) for s in tried])
        width = min(max(0.05, 2.2 / math.sqrt(size)), 0.3)
        ratios = (1 + width) ** torch.linspace(-1, 1, 41, dtype=torch.float64)
        scale = tried.gather(0, errors.argmin(0)[None]) * ratios[:, None]
    table = torch.stack([_list_errors(groups, s, args) for s in scale]).view(len(scale), rows, -1, size)
    spans = [slice(start, start + size) for start in range(0, channels, size)]
    alone = [((table[:, :, n] @ products[s, s]) * table[:, :, n]).sum(-1) for n, s in enumerate(spans)]
    found = []
    for seed in range(num_restarts):
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(len(scale), (1, rows, len(spans), 1), generator=generator)
        errors = table.gather(0, index.expand(-1, -1, -1, size))[0].flatten(1)
        total = torch.full((rows,), torch.inf)
        while True:
            for n, s in enumerate(spans):
                cross = errors @ products[:, s] - errors[:, s] @ products[s, s]
                best = (alone[n] + 2 * (table[:, :, n] * cross).sum(-1)).argmin(0)
                errors[:, s] = table[:, :, n].gather(0, best[None, :, None].expand(-1, -1, size))[0]
            last, total = total, ((errors @ products) * errors).sum(1)
            if (total >= last * (1 - 1e-9)).all():
                break
        found.append(total.sum().item())
    return found


def _list_errors(groups, scale, args):
    return round_fast(groups / scale[:, None], args) * scale[:, None] - groups


@pytest.mark.parametrize("scheme", ["int4_g8", "int4_g16", "int4_g32", "nvfp4"])
def test_no_restarts_of_the_descent_find_less(scheme):
    args = {**ALL_ARGS, "int4_g16": make_args(4, strategy="group", group_size=16)}[scheme]
    of_best, of_mean = [], []
    for seed in range(6):
        weight, x = make_weight(DISTRIBUTIONS[seed % 3], 16, 64, seed), make_activations(64, seed + 5)
        products, qparams = average(x), observe(weight, args, x)
        global_scale = qparams["global_scale"]
        found = descend(weight, args, products, None if global_scale is None else global_scale.double(), 5)
        error = get_error(weight, qparams, args, products)
        of_best.append(math.log(error / min(found)))
        of_mean.append(math.log(error / (sum(found) / len(found))))
    print(
        scheme,
        [round(math.exp(v), 3) for v in of_best],
        [round(math.exp(v), 3) for v in of_mean],
        math.exp(sum(of_best) / 6),
    )
    assert sum(of_mean) < 0


@pytest.mark.parametrize("inputs", ["diagonal", "identity"])
@pytest.mark.parametrize(
    "scheme", ["int4_channel", "int4_asym_g32", "int4_g32", "int3_g16", "fp4_g16", "mxfp4", "nvfp4"]
)
def test_inputs_that_are_not_correlated_give_what_exact_mse_gives(scheme, inputs):
    args = ALL_ARGS[scheme]
    x = torch.eye(96) if inputs == "identity" else torch.diag(torch.rand(96) ** 2 * 5 + 0.01)
    products = average(x, 0.0)
    for kind in DISTRIBUTIONS:
        weight = make_weight(kind)
        found = get_error(weight, observe(weight, args, x, damping=0.0), args, products)
        expected = observe(weight, args, x, "exact_mse", importance=inputs == "diagonal")
        expected = get_error(weight, expected, args, products)
        assert 0.995 * expected <= found <= ROUNDING * expected, kind


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["int4_g32", "int4_asym_g32", "nvfp4", "int8_block", "fp8_channel"])
def test_compiled_and_uncompiled_searches_find_as_little(scheme, dtype):
    args, x = ALL_ARGS[scheme], make_activations(256)
    weight, products = make_weight("heavy", rows=64, columns=256).to(dtype), average(x)

    def measure(mode):
        with compilation(mode):
            return get_error(weight, observe(weight, args, x), args, products)

    assert measure("always") == pytest.approx(measure("never"), rel=1e-4)
    weight[3, 7] = torch.nan
    with compilation("always"), pytest.raises(ValueError, match="weight has 1 NaN and 0 Inf among 16384 elements"):
        observe(weight, args, x)
