"""``exact_mse`` of activations: the best range over all that was seen, however it was cut and shown."""

import itertools

import pytest
import torch
from cases import NVFP4, make_args, make_weight
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle import fake_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import find_least_errors

import fxmse
from fxmse.observers import Observer
from fxmse.passes.probe import find_probes

SCHEMES = {
    "int8": make_args(8),
    "int8 asymmetric": make_args(8, symmetric=False),
    "int4": make_args(4),
    "int4 asymmetric": make_args(4, symmetric=False),
    "fp8": make_args(8, "float"),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PEERS = ("mse", "static_minmax", "minmax", "memoryless_mse")


def make_batches(kind="skewed", count=5, dtype=torch.float32):
    return [make_weight(kind, rows=24, columns=64, seed=i).mul(1 + i / 2).to(dtype) for i in range(count)]


def observe(name, args, batches, base_name="input", device="cpu", **kwargs):
    if name == "exact_mse":
        kwargs = {"norm": 2.0, **kwargs}
    observer = Observer.load_from_registry(name, base_name=base_name, args=args, **kwargs)
    for batch in batches:
        observer(batch.to(device))
    return observer


def get_error(observer, batches):
    qparams, values = {k: v if v is None else v.cpu() for k, v in observer.get_qparams().items()}, torch.cat(batches)
    values = values.double()
    quantized = fake_quantize(values, qparams["scale"].double(), qparams["zero_point"], observer.args)
    return (quantized - values).square().sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "heavy", "skewed"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_other_observer_has_less_error_over_all_batches(scheme, kind, dtype, device):
    args, batches = SCHEMES[scheme], make_batches(kind, dtype=dtype)
    error = get_error(observe("exact_mse", args, batches, device=device), batches)
    for name in PEERS:
        assert error <= get_error(observe(name, args, batches), batches) * (1 + 1e-4), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["int8", "int4", "int4 asymmetric", "fp8"])
def test_the_error_is_within_half_a_percent_of_the_least(scheme, dtype, device):
    args, batches = SCHEMES[scheme], make_batches(count=2, dtype=dtype)
    values = torch.cat(batches).reshape(1, -1).float()
    # Stored in half precision, the scale is the nearest of those that this looks at.
    least = find_least_errors(values, args, num_scales=300 if not args.symmetric else 2000).sum()
    tolerance = 1.005 if dtype == torch.float32 else 1.02
    assert get_error(observe("exact_mse", args, batches, device=device), batches) <= tolerance * least


@pytest.mark.parametrize("kind", ["normal", "heavy", "gelu", "outliers"])
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_of_the_scales_that_bfloat16_stores_the_best_is_found(scheme, kind):
    args = SCHEMES[scheme]
    if kind in ("gelu", "outliers"):
        torch.manual_seed(3)
        batches = [torch.nn.functional.gelu(torch.randn(96, 64) / 2).bfloat16()]
        if kind == "outliers":
            batches[0].view(-1)[:60] = 20 + torch.randn(60)
    else:
        batches = make_batches(kind, dtype=torch.bfloat16)
    observer = observe("exact_mse", args, batches)
    values = torch.cat(batches).double()
    own = (values.abs().amax() / {"int8": 127.5, "int4": 7.5, "fp8": 448}[scheme]).bfloat16().view(torch.int16)
    stored = torch.arange(own - 3 * 128, own + 140, dtype=torch.int16).view(torch.bfloat16)  # from an eighth to twice
    errors = [(fake_quantize(values, scale, torch.zeros(1), args) - values).square().sum() for scale in stored.double()]
    assert get_error(observer, batches) <= 1.0001 * min(errors)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)), st.lists(st.integers(1, 5), max_size=3), st.sampled_from(DTYPES))
def test_any_order_and_split_gives_the_same_qparams(order, cuts, dtype):
    args, batches = SCHEMES["int4 asymmetric"], make_batches(count=6, dtype=dtype)
    expected = observe("exact_mse", args, batches)
    observer = observe("exact_mse", args, [])
    bounds = [0, *sorted(set(cuts)), 6]
    parts = [[batches[order[i]] for i in range(a, b)] for a, b in itertools.pairwise(bounds)]
    merged = observer.init()
    for part in parts:
        merged = observer.merge(merged, observe("exact_mse", args, part).state)
    merged = observer.merge(merged, observer.init())
    assert torch.equal(merged.counts, expected.state.counts)
    observer.state = merged
    for name, tensor in expected.get_qparams().items():
        assert tensor is None or torch.equal(observer.get_qparams()[name], tensor), name


@pytest.mark.parametrize(("kind", "seed"), [("normal", 0), ("heavy", 100), ("skewed", 0)])
def test_no_neighbour_of_the_best_range_is_better(kind, seed):
    args = SCHEMES["int8 asymmetric"]
    batches = [make_weight(kind, rows=24, columns=64, seed=seed + i).mul(1 + i / 2) for i in range(4)]
    qparams, values = observe("exact_mse", args, batches).get_qparams(), torch.cat(batches).double()

    def get_error_beside(change, steps):
        scale, zero_point = qparams["scale"].double() * (1 + change), qparams["zero_point"].double() + steps
        rounded = (values / scale + zero_point).round().clamp(-128, 127)
        return ((rounded - zero_point) * scale - values).square().sum()

    beside = [get_error_beside(change / 127, steps) for change in (-0.7, 0, 0.7) for steps in (-1, 0, 1)]
    assert get_error_beside(0, 0) <= 1.001 * min(beside)


def test_a_range_shrinks_where_outliers_are_rare():
    batches = [torch.randn(64, 64), torch.randn(64, 64)]
    batches[1][0, 0] = 60.0
    args = SCHEMES["int4 asymmetric"]
    scale, widest = (observe(name, args, batches).get_qparams()["scale"] for name in ("exact_mse", "static_minmax"))
    assert scale < widest / 3


def test_groups_and_heads_are_searched_alone():
    batches = [torch.randn(2, 10, 64) * torch.linspace(1, 4, 64) for _ in range(3)]
    groups = observe("exact_mse", make_args(4, strategy="group", group_size=16), batches).get_qparams()["scale"]
    assert groups.shape == (4,)
    for i, part in enumerate(torch.cat(batches).split(16, -1)):
        alone = observe("exact_mse", make_args(4), [part]).get_qparams()["scale"][0]
        torch.testing.assert_close(groups[i], alone, rtol=1e-5, atol=0)  # sums are added up in another order
    states = [torch.randn(2, 3, 10, 16) * torch.tensor([1.0, 2.0, 3.0])[:, None, None] for _ in range(3)]
    heads = observe("exact_mse", make_args(4, strategy="attn_head"), states, "k").get_qparams()["scale"]
    assert heads.shape == (3, 1, 1)
    for i, part in enumerate(torch.cat(states).unbind(1)):
        alone = observe("exact_mse", make_args(4), [part]).get_qparams()["scale"][0]
        torch.testing.assert_close(heads[i, 0, 0], alone, rtol=1e-5, atol=0)


def test_static_tensor_groups_have_a_global_scale():
    batches = [torch.randn(20, 32) for _ in range(3)]
    observer = observe("exact_mse", NVFP4, batches)
    qparams = observer.get_qparams()
    assert qparams["scale"].shape == (2,)
    assert qparams["global_scale"] is not None
    widest = observe("static_minmax", NVFP4, batches).get_qparams()

    def sum_errors(q):
        x = torch.cat(batches)
        quantized = fake_quantize(x, q["scale"].expand(len(x), 2), None, NVFP4, global_scale=q["global_scale"])
        return (quantized - x).square().sum()

    assert sum_errors(qparams) <= sum_errors(widest)


def test_of_a_local_value_the_largest_magnitude_counts():
    args = NVFP4.model_copy(update={"dynamic": "local"})
    batches = [torch.randn(20, 32), 3 * torch.randn(20, 32), torch.randn(20, 32)]
    found = observe("exact_mse", args, batches).get_qparams()
    assert torch.equal(found["global_scale"], observe("static_minmax", args, batches).get_qparams()["global_scale"])


def test_values_of_several_dtypes_are_counted_together():
    batches = [torch.randn(20, 32), torch.randn(20, 32).bfloat16(), torch.randn(20, 32).half()]
    args = SCHEMES["int8 asymmetric"]
    expected = observe("exact_mse", args, [batch.float() for batch in batches]).state.counts
    for order in itertools.permutations(batches):
        observer = observe("exact_mse", args, order)
        assert torch.equal(observer.state.counts, expected)
        assert observer.get_qparams()["scale"].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_nan_and_inf_are_named_and_not_counted(bad, dtype):
    observer = observe("exact_mse", SCHEMES["int8"], [torch.randn(4, 8).to(dtype)])
    before = observer.state
    value = torch.randn(4, 8).to(dtype)
    value[1, 2] = bad
    with pytest.raises(ValueError, match="input has . NaN and . Inf among 32 elements".replace(".", r"\d")):
        observer(value)
    assert all(a is b for a, b in zip(before, observer.state, strict=True))


@pytest.mark.parametrize(("base_name", "norm"), [("weight", 2.0), ("input", 2.4), ("output", 2.4), ("k", 2.4)])
def test_activations_have_a_norm_of_their_own(base_name, norm):
    def make(given=None, **kwargs):
        args = make_args(8, observer_kwargs=given or {})
        return Observer.load_from_registry("exact_mse", base_name=base_name, args=args, **kwargs).options.norm

    assert make() == make({"strict": True}) == norm
    assert make({"norm": 3.0}) == make(norm=3.0) == make({"norm": 4.0}, norm=3.0) == 3.0


def make_scheme(**kwargs):
    return QuantizationScheme(
        targets=["Linear"],
        weights=make_args(8, strategy="channel", observer="exact_mse", **kwargs),
        input_activations=make_args(8, symmetric=False, observer="exact_mse"),
    )


def test_a_compiled_calibration_counts_the_same():
    model = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.GELU(), torch.nn.Linear(24, 8)).eval()
    batches = [torch.randn(4 + i, 32) for i in range(4)]
    counts = []
    for compile_ in (False, True):
        observed = fxmse.prepare(model, make_scheme(), batches[0])
        fxmse.calibrate(observed, batches, compile=compile_, progress=False)
        counts.append([probe.state.counts for _, probe in find_probes(observed) if not probe.is_weight])
    for eager, compiled in zip(*counts, strict=True):
        assert eager.sum() == compiled.sum()
    assert torch.equal(counts[0][0], counts[1][0])  # the model's own values may differ by a rounding


def test_a_bad_batch_leaves_the_counts_as_they_were():
    model = torch.nn.Sequential(torch.nn.Linear(32, 8)).eval()
    observed = fxmse.prepare(model, make_scheme(), torch.randn(2, 32))
    fxmse.calibrate(observed, [torch.randn(4, 32)], progress=False)
    before = [probe.state.counts for _, probe in find_probes(observed)]
    with pytest.raises(ValueError, match=r"NaN or Inf in batch 1: 0.input has 1 NaN"):
        fxmse.calibrate(
            observed, [torch.full((1, 32), 1.0).index_fill(1, torch.tensor([3]), torch.nan)], progress=False
        )
    assert all(a is b for a, b in zip(before, [probe.state.counts for _, probe in find_probes(observed)], strict=True))


def test_importance_is_an_option_of_the_weights_observer():
    model = torch.nn.Sequential(torch.nn.Linear(128, 64)).eval()
    batches = [torch.randn(64, 128) * torch.linspace(0.1, 3, 128) for _ in range(2)]
    errors = {}
    for importance in (False, True):
        scheme = make_scheme(observer_kwargs={"importance": importance})
        scheme.weights.num_bits = 3
        scheme.input_activations = None
        quantized = fxmse.quantize(model, scheme, batches, progress=False)
        errors[importance] = sum((quantized(x) - model(x)).square().sum() for x in batches)
    assert errors[True] < errors[False]


@pytest.mark.parametrize(
    ("base_name", "kwargs", "named"),
    [
        ("weight", {"norm": 0}, "norm=0: expected a number above 0"),
        ("weight", {"negative_scale": "no"}, "negative_scale='no': expected True or False"),
        ("weight", {"importance": 1}, "importance=1: expected True or False"),
        ("weight", {"strict": "no"}, "strict='no': expected True or False"),
        ("weight", {"mask": 3}, "mask=3: expected the name"),
        ("weight", {"maxshrink": 0.2}, "no argument 'maxshrink': expected one of norm, negative_scale, importance"),
        ("input", {"importance": True}, "importance=True has no meaning for a value of role input"),
    ],
)
def test_bad_arguments_are_named(base_name, kwargs, named):
    with pytest.raises(ValueError, match=named):
        Observer.load_from_registry("exact_mse", base_name=base_name, args=make_args(8), **kwargs)
