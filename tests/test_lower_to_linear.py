"""Fake-quantize nodes as linear quantize and dequantize nodes."""

import pytest
import torch
from cases import ACTIVATION_ARGS, DYNAMIC_ARGS, NVFP4, WEIGHT_ARGS, make_weight
from expecttest import Expect
from models import FRONT_ENDS, W8A8, Attention, Convolutions, make_config, make_front_ends
from printing import print_graph
from torch import nn

import fxmse
from fxmse.capture.front_ends import copy_graph_module
from fxmse.ops import is_fake_quantize
from fxmse.passes import LowerToLinear

INPUTS = {"num_bits": 8, "symmetric": False}


def lower(quantized):
    lowered = copy_graph_module(quantized)
    assert LowerToLinear()(lowered).modified
    assert not any(is_fake_quantize(node) for node in lowered.graph.nodes)
    assert not LowerToLinear()(lowered).modified  # exact about it
    return lowered


@torch.no_grad()
def test_a_graph_of_linears():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4, bias=False)).eval(), torch.randn(3, 8)
    config = make_config("0", inputs={**INPUTS, "dynamic": True})
    config.config_groups["group_1"] = make_config("1", inputs=INPUTS).config_groups["group_0"]
    quantized = fxmse.quantize(torch.fx.symbolic_trace(model), config, [x], progress=False)
    Expect("""\
input_1 = input
dequantize_linear_default = fxmse.dequantize_linear(self.0.weight_quantized, self.0.weight_quantized_scale, None, INT8, 1, 0)
dynamic_quantize_linear_default = fxmse.dynamic_quantize_linear(input_1)
getitem = getitem(dynamic_quantize_linear_default, 0)
getitem_1 = getitem(dynamic_quantize_linear_default, 1)
getitem_2 = getitem(dynamic_quantize_linear_default, 2)
dequantize_linear_default_1 = fxmse.dequantize_linear(getitem, getitem_1, getitem_2, UINT8)
type_as_default = aten.type_as(dequantize_linear_default_1, input_1)
matmul = matmul(type_as_default, dequantize_linear_default)
add = add(matmul, self.0.bias)
dequantize_linear_default_2 = fxmse.dequantize_linear(self.1.weight_quantized, self.1.weight_quantized_scale, None, INT8, 1, 0)
quantize_linear_default = fxmse.quantize_linear(add, self.1.input_quantized_scale, self.1.input_quantized_zero_point, UINT8, 0)
dequantize_linear_default_3 = fxmse.dequantize_linear(quantize_linear_default, self.1.input_quantized_scale, self.1.input_quantized_zero_point, UINT8, 0)
matmul_1 = matmul(dequantize_linear_default_3, dequantize_linear_default_2)
return matmul_1""").assert_expected(print_graph(lower(quantized)))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@torch.no_grad()
def test_what_a_graph_means(front_end):
    model, x = Convolutions().eval(), Convolutions.make_inputs()
    given, example = make_front_ends(model, x)[front_end]
    config = make_config("Linear", "Conv1d", "Conv2d", "Conv3d", inputs=INPUTS)
    observed = fxmse.calibrate(fxmse.prepare(given, config, example), [x], progress=False)
    quantized = fxmse.convert(observed)
    before = quantized(x)
    lowered = lower(quantized)
    assert torch.equal(quantized(x), before)  # not changed
    # What is half-way between two steps may fall to the other side.
    torch.testing.assert_close(lowered(x), before, rtol=0, atol=0.02 * before.abs().max().item())
    state = lowered.state_dict()
    assert state["two.weight_quantized"].shape == (2, 1, 3, 2)
    assert state["two.weight_quantized"].dtype == torch.int8
    assert "two.weight" not in state


@pytest.mark.parametrize("name", [*WEIGHT_ARGS, "nvfp4"])
@torch.no_grad()
def test_weights_of_every_format_stay_what_they_were(name):
    model = nn.Linear(96, 24, bias=False).eval()
    model.weight.copy_(make_weight("special"))
    args = {**WEIGHT_ARGS, "nvfp4": NVFP4}[name]
    x = torch.eye(96)
    quantized = fxmse.quantize(model, make_config(weights=args.model_dump()), [x], progress=False)
    # Under a global scale a quotient is a product with its inverse.
    torch.testing.assert_close(lower(quantized)(x), quantized(x), rtol=2e-7 if name == "nvfp4" else 0, atol=0)


@pytest.mark.parametrize(
    "name", [*ACTIVATION_ARGS, *(name for name in DYNAMIC_ARGS if "mx" not in name and "nv" not in name)]
)
@torch.no_grad()
def test_activations_of_every_format_are_what_they_were(name):
    args = {**ACTIVATION_ARGS, **DYNAMIC_ARGS}[name]
    model, x = nn.Linear(96, 24).eval(), torch.randn(3, 7, 96)
    quantized = fxmse.quantize(model, make_config(inputs=args.model_dump()), [x], progress=False)
    far = ~torch.isclose(lower(quantized)(x), quantized(x), rtol=1e-5, atol=1e-5)
    is_rounded_first = name in ("int8_asym_tensor", "int8_asym_dynamic_tensor")
    assert far.float().mean() <= (0.02 if is_rounded_first else 0)


@torch.no_grad()
def test_a_tied_weight_is_stored_once():
    model, x = Attention().eval(), Attention.make_inputs()
    quantized = fxmse.quantize(model, make_config("Linear", "Embedding"), [x], progress=False)
    lowered = lower(quantized)
    torch.testing.assert_close(lowered(x), quantized(x))
    codes = [tensor for name, tensor in lowered.state_dict().items() if name.endswith("_quantized")]
    assert sorted(tuple(tensor.shape) for tensor in codes) == [(8, 8), (8, 8), (16, 8)]


class Fp6(nn.Module):
    """A weight and an input in fp6, as a graph calls the op."""

    def __init__(self, quantizes_input):
        super().__init__()
        self.quantizes_input = quantizes_input
        self.weight = nn.Parameter(torch.randn(8, 16))
        self.register_buffer("weight_scale", self.weight.detach().abs().amax(1, keepdim=True) / 7.5)
        self.register_buffer("input_scale", torch.tensor([0.4]))

    def forward(self, x):
        fake_quantize = torch.ops.fxmse.fake_quantize.default
        if self.quantizes_input:
            x = fake_quantize(x, self.input_scale, None, None, 6, "float", "tensor")
        return x @ fake_quantize(self.weight, self.weight_scale, None, None, 6, "float", "channel").t()


@torch.no_grad()
def test_fp6_is_stored_among_the_values_of_fp8():
    traced, x = torch.fx.symbolic_trace(Fp6(False)), torch.eye(16)
    lowered = lower(traced)
    assert lowered.state_dict()["weight_quantized"].dtype == torch.float8_e4m3fn
    assert torch.equal(lowered(x), traced(x))
    traced = torch.fx.symbolic_trace(Fp6(True))
    before = traced.code
    with pytest.raises(
        ValueError, match=r"no ops for fake_quantize_default \(there is no type of fp6 to quantize to\)"
    ):
        LowerToLinear()(traced)
    assert traced.code == before


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: self.fc(x), lambda x: x * 2, (x,))


def test_what_is_in_a_branch_is_named():
    quantized = fxmse.quantize(Branch().eval(), W8A8, [torch.ones(2, 8)], progress=False)
    with pytest.raises(ValueError, match=r"no ops for fc.input \(it is in a branch or loop\)"):
        LowerToLinear()(quantized)


@torch.no_grad()
def test_buffers_get_names_that_the_model_does_not_have():
    model, x = nn.Linear(8, 8).eval(), torch.randn(3, 8)
    model.register_buffer("weight_quantized", torch.tensor(2.0))
    doubled = nn.Sequential(model)
    doubled.register_forward_hook(lambda module, args, output: output * model.weight_quantized)
    quantized = fxmse.quantize(doubled, W8A8, [x], progress=False)
    torch.testing.assert_close(lower(quantized)(x), quantized(x), rtol=1e-5, atol=1e-5)
