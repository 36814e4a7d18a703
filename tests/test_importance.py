"""The importance-weighted search against llm-compressor and a float64 loop, and what it says where it cannot be."""

import copy
import warnings

import pytest
import torch
from cases import DISTRIBUTIONS, NVFP4, WEIGHT_ARGS, make_args, make_weight
from expecttest import Expect
from hypothesis import given, settings
from hypothesis import strategies as st
from llmcompressor.observers import Observer as ReferenceObserver
from models import make_config
from oracle import calculate_scale, fake_quantize
from printing import print_graph
from torch import nn

import fxmse
from fxmse.observers import Observer
from fxmse.observers.inputs import Importance
from fxmse.passes.probe import find_inputs
from fxmse.search.compiling import compilation

NAMES = ("imatrix_mse", "nvfp4_expanded_imatrix")
ARGS = ("int4_asym_channel", "int8_channel", "int4_g32", "int3_g16", "fp8_channel", "fp4_g16", "mxfp4")


def make_activations(channels=96, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 7, channels, generator=generator) * torch.rand(channels, generator=generator) ** 3 * 5


def observe(weight, args, activations=None, name="imatrix_mse", **kwargs):
    observer = Observer.load_from_registry(name, base_name="weight", args=args, **kwargs)
    if activations is not None:
        observer.inputs(activations)
    return observer(weight).get_qparams()


def observe_reference(weight, args, activations, name="imatrix_mse", **kwargs):
    observer = ReferenceObserver.load_from_registry(name, base_name="weight", args=copy.deepcopy(args), **kwargs)
    tokens = activations.flatten(0, -2)
    observer._imatrix_sum, observer._imatrix_count = tokens.square().sum(0), torch.tensor(len(tokens))
    observer(weight)
    return observer.get_qparams()


def sum_weighted_errors(weight, activations, qparams, args, norm):
    """In float64, of each group."""
    mean = activations.double().square().flatten(0, -2).mean(0)
    size = args.group_size or weight.shape[1]
    groups, weights = (x.reshape(-1, size) for x in (weight.double(), (mean / mean.mean()).expand(weight.shape)))
    scale, zero_point = (qparams[name].double().reshape(-1, 1) for name in ("scale", "zero_point"))
    return ((fake_quantize(groups, scale, zero_point, args) - groups).abs() ** norm * weights).sum(1)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("args_name", ARGS)
@pytest.mark.parametrize("name", NAMES)
def test_has_the_references_qparams(name, args_name, kind):
    args, weight, activations = WEIGHT_ARGS[args_name], make_weight(kind), make_activations()
    ours, reference = (f(weight, args, activations, name) for f in (observe, observe_reference))
    if torch.equal(ours["scale"], reference["scale"]) and torch.equal(ours["zero_point"], reference["zero_point"]):
        return
    # Where float32 sums decide otherwise, ours has to be as good.
    norm = 3.0 if name == "imatrix_mse" else 2.4
    errors = [sum_weighted_errors(weight, activations, qparams, args, norm) for qparams in (ours, reference)]
    is_same = (ours["scale"] == reference["scale"]).flatten()
    assert (is_same | (errors[0] <= errors[1] * (1 + 1e-6))).all()
    assert is_same.double().mean() > 0.8


@pytest.mark.parametrize(
    "kwargs",
    [
        {"maxshrink": 0},
        {"maxshrink": 1, "grid": 7, "norm": 2.0},
        {"patience": 0, "grid": 50},
        {"patience": 1},
        {"expand": 1.5},
    ],
)
def test_arguments_have_the_references_effect(kwargs):
    args, weight, activations = WEIGHT_ARGS["int4_channel"], make_weight("heavy"), make_activations()
    ours, reference = (f(weight, args, activations, **kwargs) for f in (observe, observe_reference))
    torch.testing.assert_close(ours["scale"], reference["scale"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("args_name", ["int4_g32", "int4_channel", "int4_asym_channel"])
def test_is_the_brute_force_optimum_of_its_candidates(args_name):
    args, weight, activations = WEIGHT_ARGS[args_name], make_weight("heavy"), make_activations()
    ours = observe(weight, args, activations, patience=0)
    size = args.group_size or 96
    groups = weight.double().reshape(-1, size)
    errors = []
    for step in range(20):
        shrink = 1 - step / 20
        scale, zero_point = calculate_scale(groups.amin(1) * shrink, groups.amax(1) * shrink, args)
        errors.append(sum_weighted_errors(weight, activations, {"scale": scale, "zero_point": zero_point}, args, 3.0))
    least = torch.stack(errors).amin(0)
    found = sum_weighted_errors(weight, activations, ours, args, 3.0)
    torch.testing.assert_close(found, least, rtol=1e-4, atol=1e-12)


def test_importance_matters():
    weight, activations = make_weight("heavy"), make_activations()
    weighted = observe(weight, WEIGHT_ARGS["int4_g32"], activations)
    alike = observe(weight, WEIGHT_ARGS["int4_g32"], torch.ones(3, 96))
    assert not torch.equal(weighted["scale"], alike["scale"])
    uniform = Observer.load_from_registry(
        "memoryless_mse", base_name="weight", args=WEIGHT_ARGS["int4_g32"], maxshrink=1, grid=20, norm=3.0
    )
    assert torch.equal(alike["scale"], uniform(weight).get_qparams()["scale"])


def test_experts_share_the_importance_of_their_channels():
    weight, activations = torch.stack([make_weight("heavy", seed=s) for s in range(3)]), make_activations()
    for name in ("int4_g32", "int4_channel"):
        args = WEIGHT_ARGS[name]
        together = observe(weight, args, activations, patience=0)["scale"]
        alone = torch.stack([observe(expert, args, activations, patience=0)["scale"] for expert in weight])
        torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("args_name", ["int4_channel", "int4_g32"])
def test_tiles_equal_the_whole_compiled_or_not(args_name, monkeypatch):
    args, weight, activations = WEIGHT_ARGS[args_name], make_weight("heavy", rows=64), make_activations()
    whole = observe(weight, args, activations)
    monkeypatch.setattr("fxmse.formats.layout.MAX_ELEMENTS", 7 * 32)  # tiles are no multiple of a row's 3 groups
    tiled = observe(weight, args, activations)
    monkeypatch.setattr("fxmse.search.compiling.MIN_COMPILED", 1)
    with compilation("always"):
        compiled = observe(weight, args, activations)
    torch.testing.assert_close(tiled["scale"], whole["scale"], rtol=1e-6, atol=0)
    torch.testing.assert_close(compiled["scale"], whole["scale"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("exponent", [-60, 60])
def test_activations_of_any_magnitude_weigh_alike(exponent):
    args, weight, activations = WEIGHT_ARGS["int4_g32"], make_weight("heavy"), make_activations()
    scaled = observe(weight, args, activations * 2.0**exponent)
    assert torch.equal(scaled["scale"], observe(weight, args, activations)["scale"])


def test_tensor_group_weighs_both_steps():
    weight, activations = make_weight("heavy"), make_activations()
    ours, reference = (f(weight, NVFP4, activations) for f in (observe, observe_reference))
    torch.testing.assert_close(ours["global_scale"], reference["global_scale"], rtol=1e-6, atol=0)
    errors = []
    for qparams in (ours, reference):
        effective = {**qparams, "scale": qparams["scale"] / qparams["global_scale"], "zero_point": 0 * qparams["scale"]}
        errors.append(sum_weighted_errors(weight, activations, effective, NVFP4, 3.0))
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 1000))
def test_batches_split_in_any_way_have_the_same_importance(sizes, seed):
    x = torch.randn(sum(sizes), 3, 8, generator=torch.Generator().manual_seed(seed))
    whole, split = Importance(), Importance()
    assert whole(x) is x
    for part in x.split(sizes):
        split(part)
    torch.testing.assert_close(split.mean(), whole.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(whole.mean(), x.double().square().mean((0, 1)).float())


def test_padding_is_left_out_whatever_it_holds():
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    padded = torch.where(mask.bool()[..., None], x, torch.nan)
    for given_mask in (mask, mask.bool(), mask.float()):
        importance = Importance()
        importance(padded, given_mask)
        assert torch.equal(importance.mean(), x[mask.bool()].double().square().mean(0).float())
    nothing = Importance()
    nothing(x, torch.zeros(2, 5))
    assert nothing.mean() is None


def test_importance_that_is_negative_is_not_used():
    observer = Observer.load_from_registry("imatrix_mse", base_name="weight", args=make_args(4, strategy="channel"))
    observer.inputs(make_activations())
    observer.inputs.squares[3] = -1.0
    with pytest.warns(UserWarning, match="IMatrixMSEObserver has importance that is negative"):
        observer(make_weight("normal"))


FAULTS = {
    "seen no activations": (make_args(4, strategy="channel"), "weight", None),
    "seen activations that are not finite": (
        make_args(4, strategy="channel"),
        "weight",
        torch.full((2, 96), torch.inf),
    ),
    "seen activations that are all 0": (make_args(4, strategy="channel"), "weight", torch.zeros(2, 96)),
    "seen activations of 8 channels, where the weight has 96": (
        make_args(4, strategy="channel"),
        "weight",
        torch.ones(2, 8),
    ),
    "no meaning for strategy=tensor": (make_args(4), "weight", torch.ones(2, 96)),
    "no meaning for strategy=block": (
        make_args(4, strategy="block", block_structure=[8, 8]),
        "weight",
        torch.ones(2, 96),
    ),
    "no meaning for a value of role input": (make_args(4), "input", torch.ones(2, 96)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_without_importance_it_warns_and_searches_alike_or_raises(fault):
    args, base_name, activations = FAULTS[fault]
    weight = make_weight("heavy")

    def make(**kwargs):
        observer = Observer.load_from_registry("imatrix_mse", base_name=base_name, args=args, **kwargs)
        observer.name = "layers.0.fc.weight"
        if activations is not None:
            observer.inputs(activations)
        return observer

    with pytest.warns(UserWarning, match=f"layers.0.fc.weight: IMatrixMSEObserver has {fault}") as caught:
        found = make()(weight).get_qparams()
    assert len(caught) == 1
    alike = Observer.load_from_registry(
        "memoryless_mse", base_name=base_name, args=args, maxshrink=1, grid=20, norm=3.0
    )
    torch.testing.assert_close(found["scale"], alike(weight).get_qparams()["scale"], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=f"layers.0.fc.weight: IMatrixMSEObserver has {fault}"):
        make(strict=True)(weight)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"maxshrink": 1.2}, r"maxshrink=1.2: expected a number in \[0, 1\]"),
        ({"patience": -1}, "patience=-1: expected a whole number of at least 0"),
        ({"patience": float("inf")}, "patience=inf: expected a whole number of at least 0"),
        ({"grid": 0}, "grid=0"),
        ({"expand": 0.5}, "expand=0.5: expected a number of at least 1"),
        ({"strict": 1}, "strict=1: expected True or False"),
        ({"mask": 3}, "mask=3: expected the name"),
    ],
)
def test_bad_arguments_are_named(kwargs, named):
    with pytest.raises(ValueError, match=named):
        Observer.load_from_registry("imatrix_mse", base_name="weight", args=make_args(), **kwargs)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.other = nn.Linear(96, 96), nn.Linear(96, 24), nn.Linear(96, 24)

    def forward(self, x, attention_mask):
        x = self.first(x)
        return self.second(x) + self.other(x) * attention_mask[..., None]


def make_masked_batches():
    mask = torch.ones(2, 7)
    mask[1, 3:] = 0
    return [{"x": make_activations(seed=s), "attention_mask": mask} for s in range(3)]


def make_imatrix_config(*targets, **kwargs):
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, "observer": "imatrix_mse"}
    return make_config(*targets, weights={**weights, "observer_kwargs": kwargs})


@pytest.mark.parametrize("front_end", ["symbolic_trace", "module"])
@pytest.mark.parametrize("mask", [None, "attention_mask"])
def test_a_graph_measures_what_feeds_the_weight(mask, front_end):
    model, batches = Masked().eval(), make_masked_batches()
    traced = torch.fx.symbolic_trace(model) if front_end == "symbolic_trace" else model
    observed = fxmse.prepare(traced, make_imatrix_config(mask=mask, strict=True), batches[0])
    assert len(list(find_inputs(observed))) == 2  # other reads what second reads
    assert torch.equal(observed(**batches[0]), model(**batches[0]))
    observed = fxmse.prepare(traced, make_imatrix_config(mask=mask, strict=True), batches[0])
    quantized = fxmse.convert(fxmse.calibrate(observed, batches, progress=False))
    assert not [name for name in quantized.state_dict() if "importance" in name or "observer" in name]
    inputs = torch.cat([batch["x"] for batch in batches])
    kept = torch.cat([batch["attention_mask"] for batch in batches]).bool()
    for name, value in (("first", inputs), ("second", model.first(inputs)), ("other", model.first(inputs))):
        args = make_args(4, strategy="group", group_size=32)
        tokens = value[kept] if mask else value
        expected = observe(getattr(model, name).weight.detach(), args, tokens.detach())
        torch.testing.assert_close(quantized.state_dict()[f"{name}.weight_scale"], expected["scale"], rtol=1e-6, atol=0)


def test_importance_golden():
    observed = fxmse.prepare(torch.fx.symbolic_trace(Masked().eval()), make_imatrix_config(mask="attention_mask"))
    Expect("""\
x = input
attention_mask = input
first_weight_observer = self.first.weight_observer(self.first.weight)
first_weight_importance = self.first.weight_importance(x, attention_mask)
linear = linear(first_weight_importance, first_weight_observer, self.first.bias)
second_weight_observer = self.second.weight_observer(self.second.weight)
second_weight_importance = self.second.weight_importance(linear, attention_mask)
linear_1 = linear(second_weight_importance, second_weight_observer, self.second.bias)
other_weight_observer = self.other.weight_observer(self.other.weight)
linear_2 = linear(second_weight_importance, other_weight_observer, self.other.bias)
getitem = getitem(attention_mask, [Ellipsis, None])
mul = mul(linear_2, getitem)
add = add(linear_1, mul)
return add""").assert_expected(print_graph(observed))
    quantized = fxmse.convert(fxmse.calibrate(observed, make_masked_batches(), progress=False))
    Expect("""\
x = input
attention_mask = input
first_weight_fake_quant = fxmse.fake_quantize(self.first.weight, self.first.weight_scale, None, None, 4, int, group, 32)
linear = linear(x, first_weight_fake_quant, self.first.bias)
second_weight_fake_quant = fxmse.fake_quantize(self.second.weight, self.second.weight_scale, None, None, 4, int, group, 32)
linear_1 = linear(linear, second_weight_fake_quant, self.second.bias)
other_weight_fake_quant = fxmse.fake_quantize(self.other.weight, self.other.weight_scale, None, None, 4, int, group, 32)
linear_2 = linear(linear, other_weight_fake_quant, self.other.bias)
getitem = getitem(attention_mask, [Ellipsis, None])
mul = mul(linear_2, getitem)
add = add(linear_1, mul)
return add""").assert_expected(print_graph(quantized))


def test_an_observed_graph_compiles_as_a_whole():
    batches = make_masked_batches()
    observed = fxmse.prepare(torch.fx.symbolic_trace(Masked().eval()), make_imatrix_config(mask="attention_mask"))
    expected = fxmse.prepare(torch.fx.symbolic_trace(Masked().eval()), make_imatrix_config(mask="attention_mask"))
    with torch.no_grad():
        compiled = torch.compile(observed, fullgraph=True)
        for batch in batches:
            torch.testing.assert_close(compiled(**batch), expected(**batch))
    for (_, ours), (_, eager) in zip(find_inputs(observed), find_inputs(expected), strict=True):
        torch.testing.assert_close(ours.mean(), eager.mean())


def test_calibration_can_go_on_after_converting():
    batches = make_masked_batches()
    observed = fxmse.prepare(torch.fx.symbolic_trace(Masked().eval()), make_imatrix_config())
    fxmse.calibrate(observed, batches[:1], progress=False)
    fxmse.convert(observed)
    fxmse.calibrate(observed, batches[1:], progress=False)
    at_once = fxmse.quantize(torch.fx.symbolic_trace(Masked().eval()), make_imatrix_config(), batches, progress=False)
    state = fxmse.convert(observed).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in at_once.state_dict().items())


def test_a_batch_of_nan_leaves_the_importance_as_it_was():
    batches = make_masked_batches()
    observed = fxmse.prepare(torch.fx.symbolic_trace(Masked().eval()), make_imatrix_config())
    fxmse.calibrate(observed, batches[:1], progress=False)
    before = [importance.mean().clone() for _, importance in find_inputs(observed)]
    bad = {**batches[1], "x": torch.full((2, 7, 96), torch.nan)}
    with pytest.raises(ValueError, match=r"NaN or Inf in batch 1: first.weight_importance has 1344 NaN"):
        fxmse.calibrate(observed, [bad], progress=False)
    after = [importance.mean() for _, importance in find_inputs(observed)]
    assert all(map(torch.equal, before, after))


def test_what_has_no_importance_in_a_graph_is_said_with_its_name():
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Flatten(), nn.Linear(32, 32)).eval()
    config = make_config("Conv1d", weights={"num_bits": 4, "strategy": "channel", "observer": "imatrix_mse"})
    observed = fxmse.prepare(torch.fx.symbolic_trace(model), config)
    with pytest.warns(UserWarning, match="0.weight: IMatrixMSEObserver has seen no activations"):
        fxmse.convert(fxmse.calibrate(observed, [torch.randn(2, 8, 4)], progress=False))


def test_a_mask_that_is_no_input_is_named():
    with pytest.raises(ValueError, match=r"mask='padding': expected one of the graph's inputs, x, attention_mask"):
        fxmse.prepare(torch.fx.symbolic_trace(Masked()), make_imatrix_config(mask="padding"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxmse.prepare(torch.fx.symbolic_trace(Masked()), make_imatrix_config(mask="attention_mask"))
