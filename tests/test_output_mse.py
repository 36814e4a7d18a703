"""``output_mse`` against plain float64: the products that it keeps, what its scales make of outputs, and its graphs."""

import itertools
import math
import re

import pytest
import torch
from cases import DISTRIBUTIONS, NVFP4, WEIGHT_ARGS, make_args, make_weight
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


def average(activations, damping=0.1):
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
    # compressed-tensors has no blocks of these, and no scale for each.
    if weight.dim() > 2 and args.strategy in ("block", "tensor", "tensor_group"):
        experts = ({name: None if t is None else t[i] for name, t in qparams.items()} for i in range(len(weight)))
        return torch.stack([quantize(w, q, args) for w, q in zip(weight, experts, strict=True)])
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
        torch.testing.assert_close(state.products[0].double(), expected, rtol=1e-5, atol=1e-5)
        assert state.num_tokens == len(tokens)


def test_padding_is_left_out_whatever_it_holds():
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    padded = torch.where(mask.bool()[..., None], x, torch.nan)
    products = Products(8, 0)
    products(padded, mask)
    torch.testing.assert_close(products.mean(0.1)[0, 0].double(), average(x[mask.bool()], 0.1), rtol=1e-5, atol=1e-6)
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
        for i, block in enumerate(products.mean(damping)[0].double()):
            part = expected[4 * i : 4 * i + 4, 4 * i : 4 * i + 4]
            torch.testing.assert_close(block[: len(part), : len(part)], part, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(products.mean(damping)[0, 2, 2:, 2:], damping * torch.eye(2))


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
        assert all(after <= before * ROUNDING for before, after in itertools.pairwise(by_sweeps)), kind
        assert by_sweeps[-1] <= ROUNDING * measure("exact_mse"), kind
        if args.strategy in ("channel", "group", "tensor_group"):
            assert by_sweeps[-1] <= ROUNDING * measure("exact_mse", importance=True), kind
        assert measure() == by_sweeps[-1]


SHAPES = {
    "many tokens": lambda x: x,
    "one token": lambda x: x[:1],
    "fewer tokens than channels": lambda x: x[:20],
    "equal channels": lambda x: x[:, :1].expand(-1, 96) + 1e-3 * x,
    "dead channels": lambda x: x * (torch.arange(96) % 3 > 0),
    "one large channel": lambda x: x * torch.where(torch.arange(96) == 40, 1e3, 1.0),
    "alternating signs": lambda x: x[:, :1] * (torch.arange(96) % 2 * 2.0 - 1) + 0.1 * x,
}


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize(
    "scheme", ["int4_g32", "int4_asym_g32", "int3_g16", "int4_channel", "fp4_g16", "mxfp4", "nvfp4"]
)
def test_no_row_is_worse_than_with_scales_that_are_best_alone(scheme, damping):
    args = ALL_ARGS[scheme]
    for (kind, change), distribution in itertools.product(SHAPES.items(), DISTRIBUTIONS):
        weight, x = make_weight(distribution), change(make_activations())
        products = average(x, damping)

        def measure(name="output_mse", weight=weight, x=x, products=products, **kwargs):
            errors = quantize(weight, observe(weight, args, x, name, **kwargs), args).double() - weight.double()
            return ((errors @ products) * errors).sum(1), errors.square() @ products.diagonal()

        found, size = measure(damping=damping)
        alone = [measure(damping=damping, max_sweeps=0)]
        if args.strategy != "tensor_group":  # whose global scale is another one
            alone.append(measure("exact_mse"))
            # Beside damping it has another diagonal.
            alone += [] if damping else [measure("exact_mse", importance=True)]
        # Where errors make up for each other what is left is rounding; where there are none scales are off by an ulp.
        rounding = 1e-6 * size + 1e-12 * (weight.double().square() @ products.diagonal())
        for expected, _ in alone:
            assert (found <= ROUNDING * expected + rounding).all(), (kind, distribution)


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
    excesses = []
    for seed in range(6):
        weight, x = make_weight(DISTRIBUTIONS[seed % 3], 16, 64, seed), make_activations(64, seed + 5)
        products, qparams = average(x), observe(weight, args, x)
        global_scale = qparams["global_scale"]
        found = descend(weight, args, products, None if global_scale is None else global_scale.double(), 5)
        excesses.append(math.log(get_error(weight, qparams, args, products) / min(found)))
    # Of a single weight as small as that chance decides: a tenth more or less.
    assert sum(excesses) / len(excesses) <= math.log(1.005)
    assert max(excesses) <= math.log(1.15)


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
        assert found <= ROUNDING * expected, kind


@pytest.mark.parametrize(("scheme", "dtype"), [("int4_g32", torch.bfloat16), ("int4_asym_g32", torch.float32)])
def test_compiled_and_uncompiled_searches_find_as_little(scheme, dtype, monkeypatch):
    # The search of each group alone is compiled in tests/test_optimum.py.
    monkeypatch.setattr("fxmse.search.optimum.pays_to_compile", lambda *_, **__: False)
    args, x = ALL_ARGS[scheme], make_activations(256)
    weight, products = make_weight("heavy", rows=64, columns=256).to(dtype), average(x)

    def measure(mode, **kwargs):
        with compilation(mode):
            return get_error(weight, observe(weight, args, x, **kwargs), args, products)

    assert measure("always", max_sweeps=0) == pytest.approx(measure("never", max_sweeps=0), rel=1e-4)
    # Two of a group's candidates that tie lead to different ends.
    assert measure("always") == pytest.approx(measure("never"), rel=1e-2)
    weight[3, 7] = torch.nan
    with compilation("always"), pytest.raises(ValueError, match="weight has 1 NaN and 0 Inf among 16384 elements"):
        observe(weight, args, x)


# Odd values.


SPARSE = ["int8_tensor", "int4_channel", "int4_asym_g32", "int4_g32", "int8_block", "fp4_g16", "mxfp4", "nvfp4"]


def scale(weight=1.0, x=1.0):
    return lambda w, inputs: (w * weight, inputs * x)


def fill(rows, columns):
    """Zeros in a weight."""
    return lambda w, x: (w.index_put((torch.arange(24)[rows, None], torch.arange(96)[columns]), torch.tensor(0.0)), x)


def kill(channels):
    """Channels of activations that are always 0."""
    return lambda w, x: (w, x.index_fill(1, torch.arange(96)[channels], 0.0))


ODD = {
    "one row": lambda w, x: (w[:1], x),
    "one group": lambda w, x: (w[:, :32], x[:, :32]),
    "one group of one row": lambda w, x: (w[:1, :32], x[:, :32]),
    "a dead channel": kill(slice(5, 6)),
    "a group of dead channels": kill(slice(32, 64)),
    "a group of zeros": fill(slice(3, 4), slice(32, 64)),
    "zeros": scale(weight=0.0),
    "constant inputs": lambda w, x: (w, torch.ones_like(x)),
    "one token": lambda w, x: (w, x[:1]),
    "tiny weights": scale(weight=1e-20),
    "huge weights": scale(weight=1e20),
    "tiny inputs": scale(x=1e-15),
    "huge inputs": scale(x=1e15),
    "three dimensions": lambda w, x: (torch.stack([w, make_weight("normal"), make_weight("skewed")]), x),
}


@pytest.mark.parametrize("scheme", SPARSE)
@pytest.mark.parametrize("kind", ODD)
def test_odd_values_have_usable_scales_and_no_more_error(kind, scheme):
    args, (weight, x) = ALL_ARGS[scheme], ODD[kind](make_weight("heavy"), make_activations())
    products = average(x)
    qparams = observe(weight, args, x)
    assert qparams["scale"].float().isfinite().all()
    assert (qparams["scale"].float() != 0).all()
    quantized = quantize(weight, qparams, args)
    assert quantized.isfinite().all()
    assert not quantized[weight == 0].any()
    if kind in ("tiny weights", "huge weights"):
        return  # their errors' squares are beyond float32, and scales end where a format's do
    error = get_error(weight, qparams, args, products)
    assert error <= ROUNDING * get_error(weight, observe(weight, args, x, max_sweeps=0), args, products)
    assert error <= ROUNDING * get_error(weight, observe(weight, args, x, "exact_mse"), args, products)


@pytest.mark.parametrize("scheme", ["int4_g32", "int4_channel", "int4_asym_g32"])
@pytest.mark.parametrize("exponent", [-40, 40])
def test_magnitudes_change_nothing_but_the_scales(scheme, exponent):
    args, weight, x = ALL_ARGS[scheme], make_weight("heavy"), make_activations()
    scale = observe(weight, args, x)["scale"]
    assert torch.equal(observe(weight * 2.0**exponent, args, x)["scale"], scale * 2.0**exponent)
    assert torch.equal(observe(weight, args, x * 2.0**exponent)["scale"], scale)


def test_experts_are_searched_alone():
    weight, x = torch.stack([make_weight("heavy", seed=seed) for seed in range(3)]), make_activations()
    for scheme in ("int4_g32", "int4_channel", "int8_block"):
        together = observe(weight, ALL_ARGS[scheme], x)["scale"]
        alone = torch.stack([observe(expert, ALL_ARGS[scheme], x)["scale"] for expert in weight])
        torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("scheme", ["int4_g32", "int4_channel", "int4_asym_g32", "fp8_block", "int8_tensor", "nvfp4"])
def test_what_was_changed_before_is_made_up_for(scheme, is_masked):
    """The mean of |x q - r w| ** 2, of inputs x that would be r in float."""
    args, weight, reference = ALL_ARGS[scheme], make_weight("heavy"), make_activations()
    torch.manual_seed(1)
    x = reference + 0.3 * torch.randn_like(reference) @ torch.randn(reference.shape[-1], reference.shape[-1]) / 8
    kept = torch.rand(len(x)) < 0.7 if is_masked else torch.ones(len(x), dtype=torch.bool)
    masks = kept.split(50) if is_masked else [None] * len(x.split(50))

    def find(*references):
        observer = Observer.load_from_registry("output_mse", base_name="weight", args=args, damping=0.0)
        for part, own, mask in zip(x.split(50), reference.split(50), masks, strict=True):
            observer.inputs.expect([own] if references else [])
            observer.inputs(part, mask)
        quantized = fake_quantize(weight, args=args, **observer(weight).get_qparams()).double()
        return (x[kept].double() @ quantized.T - reference[kept].double() @ weight.double().T).square().mean().item()

    assert find(reference) < 0.995 * find()


def test_what_was_not_changed_before_changes_nothing():
    args, weight, x = ALL_ARGS["int4_g32"], make_weight("heavy"), make_activations()
    observer = Observer.load_from_registry("output_mse", base_name="weight", args=args)
    observer.inputs.expect([x])
    observer.inputs(x)
    assert (observer.inputs.crosses == 0).all()
    assert torch.equal(observer(weight).get_qparams()["scale"], observe(weight, args, x)["scale"])


@pytest.mark.parametrize(("scheme", "block_size"), [("int4_g32", 32), ("int4_g32", 64), ("int4_g8", 40), ("nvfp4", 64)])
def test_blocks_leave_out_what_lies_beside_them(scheme, block_size):
    args, weight, x = ALL_ARGS[scheme], make_weight("heavy"), make_activations()
    products = cut(average(x), block_size)
    found, whole, alone = (
        get_error(weight, observe(weight, args, x, **kwargs), args, products)
        for kwargs in ({"block_size": block_size}, {}, {"block_size": block_size, "max_sweeps": 0})
    )
    assert found < whole
    assert found < alone or block_size == 32


@pytest.mark.parametrize("block_size", [20, 48])
def test_rows_that_share_a_scale_may_be_longer_than_a_block(block_size):
    x, weight = make_activations(), make_weight("heavy")
    products = cut(average(x), block_size)
    for scheme in ("int4_channel", "int8_tensor", "int3_asym_channel", "fp8_channel"):
        args = ALL_ARGS[scheme]
        found, whole = (
            get_error(weight, observe(weight, args, x, **kwargs), args, products)
            for kwargs in ({"block_size": block_size}, {})
        )
        assert found <= ROUNDING * whole


def test_large_weights_are_searched_some_rows_at_a_time(monkeypatch):
    x, weight = make_activations(), make_weight("heavy", rows=37)
    for scheme in ("int4_g32", "int4_asym_g32", "int8_block", "int4_channel"):
        expected = observe(weight, ALL_ARGS[scheme], x)["scale"]
        with monkeypatch.context() as patch:
            patch.setattr("fxmse.search.output_optimum._MAX_ELEMENTS", 7 * 96)
            patch.setattr("fxmse.search.output_optimum._MAX_ERRORS", 5 * 41 * 32)
            torch.testing.assert_close(observe(weight, ALL_ARGS[scheme], x)["scale"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", SPARSE)
def test_nan_and_inf_are_named(scheme, bad):
    weight, x = make_weight("normal"), make_activations()
    weight[3, 7] = bad
    with pytest.raises(ValueError, match=r"weight has \d NaN and \d Inf among 2304 elements of shape \(24, 96\)"):
        observe(weight, ALL_ARGS[scheme], x)


FAULTS = {
    "seen no activations": None,
    "seen activations that are not finite": torch.full((2, 96), torch.inf),
    "seen activations that are all 0": torch.zeros(2, 96),
    "seen activations of 8 channels, where the weight has 96": torch.ones(2, 8),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_without_activations_it_warns_and_searches_the_weights_error_or_raises(fault):
    args, weight = ALL_ARGS["int4_g32"], make_weight("heavy")

    def make(**kwargs):
        observer = make_observer(args, FAULTS[fault], **kwargs)
        observer.name = "layers.0.fc.weight"
        return observer

    with pytest.warns(UserWarning, match=f"layers.0.fc.weight: OutputMSEObserver has {fault}") as caught:
        found = make()(weight).get_qparams()
    assert len(caught) == 1
    assert torch.equal(found["scale"], observe(weight, args, name="exact_mse")["scale"])
    with pytest.raises(ValueError, match=f"layers.0.fc.weight: OutputMSEObserver has {fault}"):
        make(strict=True)(weight)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"max_sweeps": -1}, "max_sweeps=-1: expected a whole number of at least 0"),
        ({"max_sweeps": 1.5}, "max_sweeps=1.5: expected a whole number"),
        ({"max_sweeps": True}, "max_sweeps=True: expected a whole number"),
        ({"max_sweeps": math.inf}, "max_sweeps=inf: expected a whole number"),
        ({"max_sweeps": math.nan}, "max_sweeps=nan: expected a whole number"),
        ({"max_sweeps": "3"}, "max_sweeps='3': expected a whole number"),
        ({"max_sweeps": None}, "max_sweeps=None: expected a whole number"),
        ({"damping": -0.1}, "damping=-0.1: expected a number of at least 0"),
        ({"damping": math.inf}, "damping=inf: expected"),
        ({"damping": math.nan}, "damping=nan: expected"),
        ({"damping": "much"}, "damping='much': expected"),
        ({"block_size": 0}, "block_size=0: expected a whole number above 0"),
        ({"block_size": 32.5}, "block_size=32.5: expected a whole number above 0"),
        ({"block_size": math.inf}, "block_size=inf: expected a whole number above 0"),
        ({"block_size": "all"}, "block_size='all': expected"),
        ({"block_size": 48}, "block_size=48: expected a multiple of the groups' size, 32"),
        ({"block_size": 16}, "block_size=16: expected a multiple of the groups' size, 32"),
        ({"negative_scale": 1}, "negative_scale=1: expected True or False"),
        ({"strict": "no"}, "strict='no': expected True or False"),
        ({"mask": 3}, "mask=3: expected the name"),
        ({"importance": True}, "no argument 'importance': expected one of max_sweeps, damping, block_size"),
    ],
)
def test_bad_arguments_are_named(kwargs, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        make_observer(make_args(4, strategy="group", group_size=32), **kwargs)


@pytest.mark.parametrize("base_name", ["input", "output", "q", "k", "v"])
def test_activations_are_refused(base_name):
    strategy = "tensor" if base_name in ("input", "output") else "attn_head"
    with pytest.raises(ValueError, match=f"output_mse has no meaning for a value of role {base_name}: expected a wei"):
        Observer.load_from_registry("output_mse", base_name=base_name, args=make_args(8, strategy=strategy))


def test_scales_are_above_zero_where_a_runtime_takes_no_others():
    x = make_activations()
    for kwargs, has_negative in (({}, True), ({"negative_scale": False}, False)):
        scales = [observe(w, ALL_ARGS["int4_g32"], x, **kwargs)["scale"] for w in (make_weight("heavy"),) * 2]
        assert any((scale < 0).any() for scale in scales) == has_negative


# Graphs.


class Block(nn.Module):
    """Three linears that read one value, of which one shares its weight with another one, and one that runs twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))
        self.twice, self.head = nn.Linear(32, 32, bias=False), nn.Linear(32, 32)
        self.head.weight = self.value.weight

    def forward(self, x, attention_mask):
        y = torch.tanh(self.query(x) * self.key(x) + self.value(x))
        y = self.twice(self.twice(y).relu())
        return self.head(y) * attention_mask[..., None]


def make_batches():
    mask = torch.ones(2, 7)
    mask[1, 3:] = 0
    return [{"x": make_activations(32, seed, 14).view(2, 7, 32), "attention_mask": mask} for seed in range(3)]


def make_output_config(*targets, **kwargs):
    weights = {"num_bits": 4, "strategy": "group", "group_size": 8, "observer": "output_mse"}
    return make_config(*targets, weights={**weights, "observer_kwargs": kwargs})


def sum_by_hooks(model, batches, mask=None):
    """The sums of x x' of each weight's inputs, by the names of the first modules that have it."""
    found, first = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            name = first.setdefault(module.weight, name)

            def see(module, args, name=name):
                tokens = args[0].double()
                tokens = tokens.flatten(0, -2) if mask is None else tokens[batch[mask].bool()]
                found[name] = found.get(name, 0) + tokens.T @ tokens

            module.register_forward_pre_hook(see)
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    return found


def find_products(observed):
    """What the observers of weights go by, by the names of the first modules that have these."""
    probes = dict.fromkeys(probe for _, probe in find_probes(observed) if probe.is_weight)
    return {probe.sites[0].name.removesuffix(".weight"): probe.inputs.products for probe in probes}


def assert_sums(observed, expected):
    found = find_products(observed)
    assert found.keys() == expected.keys()
    for name, products in expected.items():
        torch.testing.assert_close(
            found[name][0, 0].double(), products, rtol=1e-4, atol=1e-5 * products.abs().max().item()
        )


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def prepare(**kwargs):
    return fxmse.prepare(torch.fx.symbolic_trace(Block().eval()), make_output_config(**kwargs))


def test_golden():
    observed = prepare(mask="attention_mask")
    Expect("""\
x = input
attention_mask = input
query_weight_observer = self.query.weight_observer(self.query.weight)
query_weight_products = self.query.weight_products(x, attention_mask)
linear = linear(query_weight_products, query_weight_observer, self.query.bias)
key_weight_observer = self.key.weight_observer(self.key.weight)
linear_1 = linear(query_weight_products, key_weight_observer, self.key.bias)
mul = mul(linear, linear_1)
value_weight_observer = self.value.weight_observer(self.value.weight)
value_weight_products = self.value.weight_products(x, attention_mask)
linear_2 = linear(value_weight_products, value_weight_observer, self.value.bias)
add = add(mul, linear_2)
tanh = tanh(add)
twice_weight_observer = self.twice.weight_observer(self.twice.weight)
twice_weight_products = self.twice.weight_products(tanh, attention_mask)
linear_3 = linear(twice_weight_products, twice_weight_observer, None)
relu = .relu(linear_3)
twice_weight_products_1 = self.twice.weight_products(relu, attention_mask)
linear_4 = linear(twice_weight_products_1, twice_weight_observer, None)
value_weight_products_1 = self.value.weight_products(linear_4, attention_mask)
linear_5 = linear(value_weight_products_1, value_weight_observer, self.head.bias)
getitem = getitem(attention_mask, [Ellipsis, None])
mul_1 = mul(linear_5, getitem)
return mul_1""").assert_expected(print_graph(observed))
    quantized = fxmse.convert(fxmse.calibrate(observed, make_batches(), progress=False))
    Expect("""\
x = input
attention_mask = input
query_weight_fake_quant = fxmse.fake_quantize(self.query.weight, self.query.weight_scale, None, None, 4, int, group, 8)
linear = linear(x, query_weight_fake_quant, self.query.bias)
key_weight_fake_quant = fxmse.fake_quantize(self.key.weight, self.key.weight_scale, None, None, 4, int, group, 8)
linear_1 = linear(x, key_weight_fake_quant, self.key.bias)
mul = mul(linear, linear_1)
value_weight_fake_quant = fxmse.fake_quantize(self.value.weight, self.value.weight_scale, None, None, 4, int, group, 8)
linear_2 = linear(x, value_weight_fake_quant, self.value.bias)
add = add(mul, linear_2)
tanh = tanh(add)
twice_weight_fake_quant = fxmse.fake_quantize(self.twice.weight, self.twice.weight_scale, None, None, 4, int, group, 8)
linear_3 = linear(tanh, twice_weight_fake_quant, None)
relu = .relu(linear_3)
linear_4 = linear(relu, twice_weight_fake_quant, None)
linear_5 = linear(linear_4, value_weight_fake_quant, self.head.bias)
getitem = getitem(attention_mask, [Ellipsis, None])
mul_1 = mul(linear_5, getitem)
return mul_1""").assert_expected(print_graph(quantized))


@pytest.mark.parametrize("mask", [None, "attention_mask"])
@pytest.mark.parametrize("front_end", ["symbolic_trace", "module", "compiled"])
def test_a_graph_sums_up_what_feeds_each_weight(mask, front_end):
    model, batches = Block().eval(), make_batches()
    traced = torch.fx.symbolic_trace(model) if front_end == "symbolic_trace" else model
    observed = fxmse.prepare(traced, make_output_config(mask=mask, strict=True), batches[0])
    assert torch.equal(observed(**batches[0]), model(**batches[0]))
    observed = fxmse.prepare(traced, make_output_config(mask=mask, strict=True), batches[0])
    fxmse.calibrate(observed, batches, compile=front_end == "compiled", progress=False)
    assert_sums(observed, sum_by_hooks(model, batches, mask))
    products = find_products(observed)
    assert products["query"] is products["key"]
    assert products["query"] is not products["value"]
    quantized = fxmse.convert(observed).state_dict()
    assert not [name for name in quantized if "products" in name or "observer" in name]
    for name, sums in products.items():
        observer = make_observer(make_args(4, strategy="group", group_size=8))
        observer.inputs.products = sums
        observer.inputs.num_tokens = torch.tensor(1.0)
        expected = observer(getattr(model, name).weight.detach()).get_qparams()["scale"]
        assert torch.equal(quantized[f"{name}.weight_scale"], expected), name


def test_a_batch_of_nan_leaves_the_products_as_they_were():
    batches, observed = make_batches(), prepare()
    fxmse.calibrate(observed, batches[:1], progress=False)
    before = [inputs.state for _, inputs in find_inputs(observed)]
    bad = {**batches[1], "x": batches[1]["x"].index_fill(2, torch.tensor([5]), torch.nan)}
    with pytest.raises(
        ValueError, match=r"NaN or Inf in batch 1: query.weight_products has 14 NaN and 0 Inf among 448"
    ):
        fxmse.calibrate(observed, [bad], progress=False)
    after = [inputs.state for _, inputs in find_inputs(observed)]
    assert all(a is b for one, other in zip(before, after, strict=True) for a, b in zip(one, other, strict=True))


def test_values_whose_squares_are_beyond_float32_are_named():
    batches, observed = make_batches(), prepare()
    bad = {**batches[1], "x": batches[1]["x"] * 1e30}
    with pytest.raises(ValueError, match=r"batch 1: query.weight_products has sums that are beyond float32"):
        fxmse.calibrate(observed, [bad], progress=False)


def test_a_calibration_that_is_saved_can_be_gone_on_with(tmp_path):
    batches, observed = make_batches(), prepare()
    expected = fxmse.calibrate(prepare(), batches, progress=False).state_dict()
    fxmse.calibrate(observed, batches[:2], progress=False)
    fxmse.convert(observed)
    torch.save(observed.state_dict(), tmp_path / "calibration.pt")
    resumed = prepare()
    resumed.load_state_dict(torch.load(tmp_path / "calibration.pt"))
    sums = {name: t for name, t in expected.items() if name.endswith(("products", "num_tokens"))}
    assert len(sums) == 2 * 3  # of query and key, of value and head, and of the layer that runs twice
    for graph in (observed, resumed):
        fxmse.calibrate(graph, batches[2:], progress=False)
        state = graph.state_dict()
        assert_equal({name: state[name] for name in sums}, sums)
    at_once = fxmse.quantize(torch.fx.symbolic_trace(Block().eval()), make_output_config(), batches, progress=False)
    assert_equal(fxmse.convert(resumed).state_dict(), at_once.state_dict())
    assert_equal(fxmse.convert(observed).state_dict(), at_once.state_dict())


def calibrate_rank(batches, group=None):
    config = make_config(weights={"num_bits": 4, "strategy": "group", "group_size": 8, "observer": "output_mse"})
    observed = fxmse.prepare(torch.fx.symbolic_trace(ProductsModel().eval()), config)
    group = torch.distributed.group.WORLD if group else None
    fxmse.calibrate(observed, batches, progress=False, group=group)
    return observed.state_dict(), fxmse.convert(observed, group=group).state_dict()


def test_ranks_calibrate_as_one():
    batches = ProductsModel.make_batches()
    with Processes(2) as processes:
        (state, qparams), other = processes(
            calibrate_rank, [{"batches": batches[:3]}, {"batches": batches[3:]}], group=True
        )
    assert_equal(other[0], state)
    assert_equal(other[1], qparams)
    alone, expected = calibrate_rank(batches)
    assert list(alone) == list(state)
    for name, tensor in alone.items():
        if name.endswith(("products", "num_tokens")):
            torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-4)
    assert list(qparams) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(qparams[name], tensor, rtol=1e-5, atol=0)


@torch.no_grad()
def test_a_compiled_calibration_finds_the_same():
    torch._dynamo.reset()
    batches = ProductsModel.make_batches(3)
    config = make_output_config(strict=True)
    calibration = fxmse.Calibration(config)
    step = torch.compile(ProductsModel().eval(), backend=calibration)
    for batch in batches:
        step(batch)
    calibration.fold()
    expected = fxmse.quantize(ProductsModel().eval(), config, batches, progress=False)
    for name, tensor in expected.named_buffers():
        torch.testing.assert_close(calibration.qparams[name], tensor, rtol=1e-5, atol=0)


class Branches(nn.Module):
    def __init__(self, is_plain):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.is_plain = is_plain

    def forward(self, x):
        branches = self.first, lambda v: self.first(self.second(v.relu()))
        if self.is_plain:
            return self.head(branches[0](x) if x.sum() > 0 else branches[1](x))
        return self.head(torch.cond(x.sum() > 0, *branches, (x,)))


def test_in_branches_what_runs_is_summed_up():
    batches = [torch.randn(4, 8) + shift for shift in (1, -1, 1, -1)]
    observed = fxmse.prepare(Branches(is_plain=False).eval(), make_output_config(strict=True), batches[0])
    fxmse.calibrate(observed, batches, progress=False)
    assert_sums(observed, sum_by_hooks(Branches(is_plain=True).eval(), batches))
    fxmse.convert(observed)


@pytest.mark.parametrize(
    ("model", "x", "target"),
    [
        (nn.Sequential(nn.ConvTranspose1d(8, 8, 3), nn.Flatten()), torch.randn(2, 8, 6), "ConvTranspose1d"),
        (nn.Sequential(nn.Embedding(16, 8), nn.Flatten()), torch.randint(0, 16, (2, 3)), "Embedding"),
    ],
)
def test_what_has_no_inputs_to_go_by_is_said_with_its_name(model, x, target):
    traced = torch.fx.symbolic_trace(model.eval())
    observed = fxmse.calibrate(fxmse.prepare(traced, make_output_config(target)), [x], progress=False)
    with pytest.warns(UserWarning, match=r"0.weight: OutputMSEObserver has seen no activations"):
        fxmse.convert(observed)
    observed = fxmse.calibrate(fxmse.prepare(traced, make_output_config(target, strict=True)), [x], progress=False)
    with pytest.raises(ValueError, match=r"0.weight: OutputMSEObserver has seen no activations"):
        fxmse.convert(observed)


def test_outputs_change_less():
    model, batches = Block().eval(), make_batches()
    errors = {}
    for name, kwargs in {"output_mse": {}, "exact_mse": {"importance": True}}.items():
        weights = {"num_bits": 3, "strategy": "group", "group_size": 8, "observer": name, "observer_kwargs": kwargs}
        quantized = fxmse.quantize(model, make_config("re:query|key", weights=weights), batches, progress=False)
        errors[name] = sum((quantized(**batch) - model(**batch)).square().sum().item() for batch in batches)
    assert errors["output_mse"] < 0.8 * errors["exact_mse"]


def test_a_mask_that_is_no_input_is_named():
    with pytest.raises(ValueError, match=r"mask='padding': expected one of the graph's inputs, x, attention_mask"):
        prepare(mask="padding")
