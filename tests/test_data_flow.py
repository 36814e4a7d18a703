"""What only a graph knows: fused and tied weights, values that share a scale, dynamic values, importance."""

import copy

import pytest
import torch
from cases import DYNAMIC_ARGS, NVFP4, make_args
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from expecttest import Expect
from models import make_config
from printing import print_graph
from torch import nn

import fxmse
from fxmse.passes import FoldFakeQuant, InsertObservers

NVFP4_8 = {**NVFP4.model_dump(), "group_size": 8}


class Fused(nn.Module):
    """Three linears that read one value, one that reads another, under names that no list has."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.alpha, self.beta, self.gamma = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 8)
        self.omega = nn.Linear(8, 8)
        with torch.no_grad():
            self.alpha.weight.mul_(3)
            self.gamma.weight[1, 2] = 9.0

    def forward(self, x):
        return self.omega(self.alpha(x) * self.beta(x) + self.gamma(x))


X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def list_global_scales(**kwargs):
    quantized = fxmse.quantize(Fused().eval(), make_config(**kwargs), [X], progress=False)
    state = quantized.state_dict()
    return {name: state.get(f"{name}.weight_global_scale") for name in ("alpha", "beta", "gamma", "omega")}


@pytest.mark.parametrize("observer", ["memoryless_mse", "memoryless_minmax"])
def test_linears_that_read_the_same_value_share_the_smallest_global_scale(observer):
    alone = {}
    for name in ("alpha", "beta", "gamma", "omega"):
        others = [other for other in ("alpha", "beta", "gamma", "omega") if other != name]
        alone[name] = list_global_scales(weights={**NVFP4_8, "observer": observer}, ignore=others)[name]
    shared = list_global_scales(weights={**NVFP4_8, "observer": observer})
    expected = torch.stack([alone[name] for name in ("alpha", "beta", "gamma")]).amin(0)
    assert all(torch.equal(shared[name], expected) for name in ("alpha", "beta", "gamma"))
    assert torch.equal(shared["omega"], alone["omega"])
    assert not torch.equal(shared["omega"], expected)
    # An ignored one is left out.
    without = list_global_scales(weights={**NVFP4_8, "observer": observer}, ignore=["gamma"])
    assert torch.equal(without["alpha"], torch.minimum(alone["alpha"], alone["beta"]))
    assert without["gamma"] is None


def test_scales_are_searched_with_the_shared_global_scale():
    model = Fused().eval()
    searched = {**NVFP4_8, "observer": "memoryless_mse"}
    quantized = fxmse.quantize(model, make_config(weights=searched), [X], progress=False)
    state = quantized.state_dict()
    given = {**searched, "observer_kwargs": {"global_scale": state["beta.weight_global_scale"].item(), "patience": 100}}
    alone = fxmse.quantize(model, make_config("beta", weights=given), [X], progress=False)
    assert torch.equal(state["beta.weight_scale"], alone.state_dict()["beta.weight_scale"])


def test_another_format_or_another_value_shares_nothing():
    args = QuantizationScheme(targets=["beta"], weights=make_args(**{**NVFP4_8, "group_size": 16}))
    rest = QuantizationScheme(targets=["Linear"], weights=make_args(**NVFP4_8))
    config = QuantizationConfig(config_groups={"a": args, "b": rest})
    state = fxmse.quantize(Fused().eval(), config, [X], progress=False).state_dict()
    assert torch.equal(state["alpha.weight_global_scale"], state["gamma.weight_global_scale"])
    assert not torch.equal(state["alpha.weight_global_scale"], state["beta.weight_global_scale"])


def test_converting_again_or_passes_alone_give_the_same_global_scales():
    observed = fxmse.prepare(torch.fx.symbolic_trace(Fused().eval()), make_config(weights=NVFP4_8))
    alone = copy.deepcopy(observed)
    first, second = fxmse.convert(observed).state_dict(), fxmse.convert(observed).state_dict()
    FoldFakeQuant()(alone)
    assert list(first) == list(alone.state_dict())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], alone.state_dict()[name]) for name in first)


def make_dynamic_scheme(args):
    return QuantizationScheme(targets=["Linear"], input_activations=args)


def test_dynamic_golden():
    observed = fxmse.prepare(torch.fx.symbolic_trace(Fused()), make_dynamic_scheme(DYNAMIC_ARGS["int8_token"]))
    Expect("""\
x = input
alpha_input_observer = self.alpha.input_observer(x)
linear = linear(alpha_input_observer, self.alpha.weight, self.alpha.bias)
linear_1 = linear(alpha_input_observer, self.beta.weight, self.beta.bias)
mul = mul(linear, linear_1)
linear_2 = linear(alpha_input_observer, self.gamma.weight, self.gamma.bias)
add = add(mul, linear_2)
omega_input_observer = self.omega.input_observer(add)
linear_3 = linear(omega_input_observer, self.omega.weight, self.omega.bias)
return linear_3""").assert_expected(print_graph(observed))
    Expect("""\
x = input
alpha_input_fake_quant = fxmse.dynamic_fake_quantize(x, None, 8, int, True, token)
linear = linear(alpha_input_fake_quant, self.alpha.weight, self.alpha.bias)
linear_1 = linear(alpha_input_fake_quant, self.beta.weight, self.beta.bias)
mul = mul(linear, linear_1)
linear_2 = linear(alpha_input_fake_quant, self.gamma.weight, self.gamma.bias)
add = add(mul, linear_2)
omega_input_fake_quant = fxmse.dynamic_fake_quantize(add, None, 8, int, True, token)
linear_3 = linear(omega_input_fake_quant, self.omega.weight, self.omega.bias)
return linear_3""").assert_expected(print_graph(fxmse.convert(fxmse.calibrate(observed, progress=False))))


def test_local_golden():
    args = NVFP4.model_copy(update={"dynamic": "local", "observer": "static_minmax", "group_size": 8})
    observed = fxmse.prepare(torch.fx.symbolic_trace(Fused()), make_dynamic_scheme(args))
    fxmse.calibrate(observed, [X, X * 2], progress=False)
    quantized = fxmse.convert(observed)
    Expect("""\
x = input
alpha_input_fake_quant = fxmse.dynamic_fake_quantize(x, self.alpha.input_global_scale, 4, float, True, tensor_group, 8, torch.float8_e4m3fn)
linear = linear(alpha_input_fake_quant, self.alpha.weight, self.alpha.bias)
linear_1 = linear(alpha_input_fake_quant, self.beta.weight, self.beta.bias)
mul = mul(linear, linear_1)
linear_2 = linear(alpha_input_fake_quant, self.gamma.weight, self.gamma.bias)
add = add(mul, linear_2)
omega_input_fake_quant = fxmse.dynamic_fake_quantize(add, self.omega.input_global_scale, 4, float, True, tensor_group, 8, torch.float8_e4m3fn)
linear_3 = linear(omega_input_fake_quant, self.omega.weight, self.omega.bias)
return linear_3""").assert_expected(print_graph(quantized))
    assert torch.equal(quantized.state_dict()["alpha.input_global_scale"], 448 * 6 / (X * 2).abs().max().reshape(1))


def test_a_dynamic_value_needs_no_data_and_a_local_one_does():
    observed = fxmse.prepare(torch.fx.symbolic_trace(Fused()), make_dynamic_scheme(DYNAMIC_ARGS["int8_token"]))
    fxmse.convert(fxmse.calibrate(observed, progress=False))
    local = DYNAMIC_ARGS["nvfp4_local"].model_copy(update={"group_size": 8})
    observed = fxmse.prepare(torch.fx.symbolic_trace(Fused()), make_dynamic_scheme(local))
    with pytest.raises(ValueError, match=r"showed nothing to alpha.input, beta.input, gamma.input; omega.input"):
        fxmse.calibrate(observed, progress=False)


@pytest.mark.parametrize("front_end", ["symbolic_trace", "export"])
def test_groups_that_do_not_fit_a_dynamic_value_are_named(front_end):
    model, scheme = Fused(), make_dynamic_scheme(DYNAMIC_ARGS["fp8_dynamic_g32"])
    traced = torch.fx.symbolic_trace(model) if front_end == "symbolic_trace" else torch.export.export(model, (X,))
    with pytest.raises(ValueError, match=r"alpha.input(, beta.input, gamma.input)?: group_size=32 does not divide"):
        fxmse.calibrate(fxmse.prepare(traced, scheme), [X], progress=False)


def test_dynamic_graphs_report_their_error():
    quantized = fxmse.quantize(Fused(), make_dynamic_scheme(DYNAMIC_ARGS["int8_token"]), [X], progress=False)
    reports = fxmse.report(quantized, [X])
    assert [(r.module, r.role, r.num_scales, r.range_ratio) for r in reports] == [
        ("alpha", "input", 0, 1.0),
        ("omega", "input", 0, 1.0),
    ]
    assert all("int8 symmetric token dynamic" in r.format and 30 < r.sqnr < 60 for r in reports)


class Joined(nn.Module):
    """Two branches that are joined, and a third that is not."""

    def __init__(self, join):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.alone = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 4)
        self.behind = nn.Linear(8 if join == "cat" else 4, 4)
        self.join = {"cat": lambda *parts: torch.cat(parts, -1), "add": lambda a, b: a + b}[join]
        with torch.no_grad():
            self.right.weight.mul_(10)

    def forward(self, x):
        return self.behind(self.join(self.left(x), self.right(x))) + self.alone(x)


@pytest.mark.parametrize("front_end", ["symbolic_trace", "export"])
@pytest.mark.parametrize("join", ["cat", "add"])
def test_joined_values_share_their_scale_where_asked_to(join, front_end):
    model, x = Joined(join), torch.randn(16, 8)
    args = {"num_bits": 8, "observer": "static_minmax"}
    config = make_config("left", "right", "alone", outputs=args)
    into = QuantizationScheme(targets=["behind"], input_activations=make_args(**args))
    config.config_groups["behind"] = into
    traced = torch.fx.symbolic_trace(model) if front_end == "symbolic_trace" else torch.export.export(model, (x,))
    states = {}
    for share_across in ((), (join,)):
        observed = fxmse.prepare(traced, config, share_across=share_across)
        assert torch.equal(observed(x), model(x))
        quantized = fxmse.convert(fxmse.calibrate(observed, [x], progress=False))
        states[share_across] = [name for name in quantized.state_dict() if name.endswith("put_scale")]
    assert sorted(states[()]) == ["alone.output_scale", "behind.input_scale", "left.output_scale", "right.output_scale"]
    shared = quantized.state_dict()
    if join == "cat":
        assert sorted(states[("cat",)]) == ["alone.output_scale", "left.output_scale"]
        covered = model.join(model.left(x), model.right(x)).abs().max()
        torch.testing.assert_close(shared["left.output_scale"], (covered / 127.5).reshape(1))
    else:
        # The sum at the end joins the third branch, too, but not the output that is no site.
        assert sorted(states[("add",)]) == ["alone.output_scale", "left.output_scale"]


def test_joined_golden():
    args = {"num_bits": 8, "observer": "static_minmax"}
    config = make_config("left", "right", weights={"num_bits": 8}, outputs=args)
    observed = fxmse.prepare(torch.fx.symbolic_trace(Joined("cat")), config, share_across=("cat",))
    Expect("""\
x = input
left_weight_observer = self.left.weight_observer(self.left.weight)
linear = linear(x, left_weight_observer, self.left.bias)
left_output_observer = self.left.output_observer(linear)
right_weight_observer = self.right.weight_observer(self.right.weight)
linear_1 = linear(x, right_weight_observer, self.right.bias)
left_output_observer_1 = self.left.output_observer(linear_1)
cat = cat([left_output_observer, left_output_observer_1], -1)
linear_2 = linear(cat, self.behind.weight, self.behind.bias)
linear_3 = linear(x, self.alone.weight, self.alone.bias)
add = add(linear_2, linear_3)
return add""").assert_expected(print_graph(observed))
    quantized = fxmse.convert(fxmse.calibrate(observed, [torch.randn(2, 8)], progress=False))
    Expect("""\
x = input
left_weight_fake_quant = fxmse.fake_quantize(self.left.weight, self.left.weight_scale, None, None, 8, int, tensor)
linear = linear(x, left_weight_fake_quant, self.left.bias)
left_output_fake_quant = fxmse.fake_quantize(linear, self.left.output_scale, None, None, 8, int, tensor)
right_weight_fake_quant = fxmse.fake_quantize(self.right.weight, self.right.weight_scale, None, None, 8, int, tensor)
linear_1 = linear(x, right_weight_fake_quant, self.right.bias)
left_output_fake_quant_1 = fxmse.fake_quantize(linear_1, self.left.output_scale, None, None, 8, int, tensor)
cat = cat([left_output_fake_quant, left_output_fake_quant_1], -1)
linear_2 = linear(cat, self.behind.weight, self.behind.bias)
linear_3 = linear(x, self.alone.weight, self.alone.bias)
add = add(linear_2, linear_3)
return add""").assert_expected(print_graph(quantized))


def test_only_ops_that_join_can_be_shared_across():
    with pytest.raises(ValueError, match=r"share_across has 'mul': expected some of cat, add"):
        InsertObservers(make_config(), ("mul",))
