"""int8 fake-quantize nodes as pairs that Inductor's int8 kernels take."""

import re
import subprocess
import sys
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cases import NVFP4, make_args
from compressed_tensors.quantization.lifecycle.forward import quantize
from expecttest import Expect
from models import FRONT_ENDS, W8A8, Attention, Convolutions, make_config, make_front_ends
from printing import print_graph
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.fx_passes import mkldnn_fusion
from torch._inductor.utils import run_and_get_code

import fxmse
from fxmse.capture.front_ends import copy_graph_module
from fxmse.ops import is_fake_quantize
from fxmse.passes import LowerToQDQ
from fxmse.passes.op_names import get_op_name

INPUTS = {"num_bits": 8, "symmetric": False}
CONVOLUTIONS = make_config("Linear", "Conv1d", "Conv2d", "Conv3d", inputs=INPUTS)
BF16 = torch.bfloat16
# Who registers Inductor's patterns: torch up to 2.13, and torchao.
TORCHS_OWN = "_register_quantization_weight_pack_pass"
TORCHAOS = "torchao.quantization.pt2e.inductor_passes.x86"

needs_patterns = pytest.mark.skipif(
    not hasattr(mkldnn_fusion, TORCHS_OWN) and find_spec("torchao") is None,
    reason="torch 2.14 and later need fxmse[int8]",
)
# Where they are needed, their absence is no matter of the other tests.
pytestmark = pytest.mark.filterwarnings("ignore:int8 products will run in float.*torchao")


def make_mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16, bias=False)).to(dtype).eval()


def quantize_mlp(config, dtype=torch.float32):
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    return fxmse.quantize(make_mlp(dtype), config, [x], progress=False), x


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize(("model_class", "config"), [(Attention, W8A8), (Convolutions, CONVOLUTIONS)])
@torch.no_grad()
def test_lowered_graph_computes_what_the_folded_one_does(model_class, config, front_end):
    inputs = model_class.make_inputs()
    source, example = make_front_ends(model_class().eval(), inputs)[front_end]
    observed = fxmse.prepare(source, config, example)
    quantized = fxmse.convert(fxmse.calibrate(observed, [(inputs,)], progress=False))
    lowered = copy_graph_module(quantized)
    result = LowerToQDQ()(lowered)
    assert result.modified
    assert result.graph_module is lowered
    assert not any(is_fake_quantize(node) for node in lowered.graph.nodes)
    before = print_graph(lowered)
    assert not LowerToQDQ()(lowered).modified
    assert print_graph(lowered) == before
    more = model_class.make_inputs(5, seed=2)
    # Half-way cases may go the other way; there are none among these.
    torch.testing.assert_close(lowered(more), quantized(more), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("model_class", "target"), [(Attention, "Linear"), (Convolutions, "Conv2d")])
@torch.no_grad()
def test_activations_may_be_int8(model_class, target, symmetric):
    inputs = {"num_bits": 8, "symmetric": symmetric}
    batch = model_class.make_inputs()
    config = make_config(target, inputs=inputs, outputs=inputs)
    quantized = fxmse.quantize(model_class().eval(), config, [batch], progress=False)
    shifted = copy_graph_module(quantized)
    LowerToQDQ()(shifted)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "int8 products will run in float")  # those of Inductor, which are not meant
        assert LowerToQDQ(activation_dtype=torch.int8)(quantized).modified
    pairs = zip(find_pairs(quantized), find_pairs(shifted), strict=True)
    for (scale, zero_point, *rest), (shifted_scale, shifted_zero_point, *shifted_rest) in pairs:
        assert (scale, zero_point + 128) == (shifted_scale, shifted_zero_point)
        assert -128 <= zero_point <= 127
        assert rest == [-128, 127, torch.int8]
        assert shifted_rest == [0, 255, torch.uint8]
    more = model_class.make_inputs(5, seed=2)
    assert torch.equal(quantized(more), shifted(more))


def find_pairs(graph_module):
    """The qparams of each quantize and dequantize node of an activation."""
    names = ("quantize_per_tensor", "dequantize_per_tensor")
    found = [node.args[1:] for node in graph_module.graph.nodes if get_op_name(node) in names]
    assert found
    return found


@pytest.mark.parametrize("dtype", [torch.qint8, torch.int16, "int8", None])
def test_other_activation_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"activation_dtype=.*: expected torch.uint8 or torch.int8"):
        LowerToQDQ(activation_dtype=dtype)


@torch.no_grad()
def test_golden():
    quantized = fxmse.quantize(Attention().eval(), W8A8, [Attention.make_inputs()], progress=False)
    LowerToQDQ()(quantized)
    Expect("""\
tokens = input
embedding = aten.embedding(self.head.weight, tokens)
dequantize_per_channel_default = quantized_decomposed.dequantize_per_channel(self.query.weight_quantized, self.query.weight_channel_scale, self.query.weight_channel_zero_point, 0, -128, 127, torch.int8)
quantize_per_tensor_default = quantized_decomposed.quantize_per_tensor(embedding, SCALE, 111, 0, 255, torch.uint8)
dequantize_per_tensor_default_1 = quantized_decomposed.dequantize_per_tensor(quantize_per_tensor_default, SCALE, 111, 0, 255, torch.uint8)
linear = aten.linear(dequantize_per_tensor_default_1, dequantize_per_channel_default, self.query.bias)
dequantize_per_channel_default_1 = quantized_decomposed.dequantize_per_channel(self.key.weight_quantized, self.key.weight_channel_scale, self.key.weight_channel_zero_point, 0, -128, 127, torch.int8)
dequantize_per_tensor_default = quantized_decomposed.dequantize_per_tensor(quantize_per_tensor_default, SCALE, 111, 0, 255, torch.uint8)
linear_1 = aten.linear(dequantize_per_tensor_default, dequantize_per_channel_default_1)
mul = aten.mul(linear, linear_1)
dequantize_per_channel_default_2 = quantized_decomposed.dequantize_per_channel(self.head.weight_quantized, self.head.weight_channel_scale, self.head.weight_channel_zero_point, 0, -128, 127, torch.int8)
quantize_per_tensor_default_1 = quantized_decomposed.quantize_per_tensor(mul, SCALE, 137, 0, 255, torch.uint8)
dequantize_per_tensor_default_2 = quantized_decomposed.dequantize_per_tensor(quantize_per_tensor_default_1, SCALE, 137, 0, 255, torch.uint8)
linear_2 = aten.linear(dequantize_per_tensor_default_2, dequantize_per_channel_default_2)
return [linear_2]""").assert_expected(re.sub(r"\d\.\d+", "SCALE", print_graph(quantized)))


def test_float_parameters_go_unless_something_else_reads_them():
    quantized = fxmse.quantize(Attention().eval(), W8A8, [Attention.make_inputs()], progress=False)
    weight = quantized.get_parameter("query.weight")
    scale = quantized.get_buffer("query.weight_scale")
    expected = quantize(weight.detach(), scale, None, make_args(8, strategy="channel"), dtype=torch.int8)
    LowerToQDQ()(quantized)
    state = quantized.state_dict()
    assert "query.weight" not in state
    assert "query.weight_scale" not in state
    assert "query.input_scale" not in state
    assert torch.equal(state["query.weight_quantized"], expected)
    assert any(
        tensor is not None and tensor.shape == (16, 8) and tensor.is_floating_point() for tensor in state.values()
    )


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@torch.no_grad()
def test_formats_that_are_lowered(strategy, num_bits, dtype):
    config = make_config(weights={"num_bits": num_bits, "strategy": strategy}, inputs=INPUTS)
    quantized, x = quantize_mlp(config, dtype)
    expected = quantized(x)
    LowerToQDQ()(quantized)
    assert not any(is_fake_quantize(node) for node in quantized.graph.nodes)
    # In bfloat16 the folded graph rounds each product with a scale, where the pairs dequantize in float32.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(quantized(x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (make_config(weights={"num_bits": 4, "strategy": "group", "group_size": 16}, inputs=INPUTS), "int4 group"),
        (make_config(), "not every op that reads it multiplies it by an int8 activation"),
        (make_config(weights={**INPUTS, "strategy": "channel"}, inputs=INPUTS), "asymmetric weight"),
        (make_config(inputs={"num_bits": 6}), "activation of int6 tensor"),
        (make_config(inputs={"num_bits": 8, "strategy": "token", "dynamic": True}), "dynamic"),
        (make_config(weights={"num_bits": 8, "type": "float"}, inputs=INPUTS), "float8 tensor"),
        (make_config(weights=NVFP4.model_dump(), inputs=INPUTS), "float4 tensor_group"),
        (make_config("Embedding"), "not every op that reads it multiplies it by an int8 activation"),
    ],
)
@torch.no_grad()
def test_what_cannot_be_lowered_stays_and_is_listed(config, reason):
    if "Embedding" in config.config_groups["group_0"].targets:
        x = Attention.make_inputs()
        quantized = fxmse.quantize(Attention().eval(), config, [x], progress=False)
    else:
        quantized, x = quantize_mlp(config)
    expected = quantized(x)
    with pytest.warns(UserWarning, match=r"not lowered to int8, still fake-quantized: .*") as caught:
        LowerToQDQ()(quantized)
    assert f"({reason})" in str(caught[0].message)
    assert any(is_fake_quantize(node) for node in quantized.graph.nodes)
    torch.testing.assert_close(quantized(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_decomposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_a_transposed_convolution_is_told_as_such(groups, is_decomposed):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=groups)).eval(), torch.randn(2, 4, 5, 5)
    program = torch.export.export(model, (x,))
    program = program.run_decompositions() if is_decomposed else program
    quantized = fxmse.quantize(program, make_config("ConvTranspose2d", inputs=INPUTS), [x], progress=False)
    expected = quantized(x)
    with pytest.warns(UserWarning, match=r"0.weight \(there is no int8 kernel for transposed convolutions\)$"):
        LowerToQDQ()(quantized)
    torch.testing.assert_close(quantized(x), expected, rtol=1e-5, atol=1e-5)


def test_float16_stays():
    quantized, _ = quantize_mlp(W8A8, torch.float16)
    with pytest.warns(UserWarning, match=r"0.weight \(torch.float16\)"):
        assert not LowerToQDQ()(quantized).modified


def run_frozen(quantized, x):
    """The outputs of a lowered graph that Inductor compiled, and the names of the kernels that it calls."""
    counters.clear()
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch._inductor.config.patch(freezing=True):
        warnings.simplefilter("ignore")  # torch's own, of freezing
        found, code = run_and_get_code(torch.compile(quantized), x)
    return found, re.findall(r"(?:torch\.ops\.onednn|extern_kernels)\.(\w+)[.\w]*\(", "".join(code))


@needs_patterns
@torch.no_grad()
def test_inductor_takes_the_pairs_for_its_int8_kernels():
    # Of 7 bits, which multiply without saturating where a CPU has no VNNI.
    weights = {"num_bits": 7, "strategy": "channel", "observer": "exact_mse"}
    quantized, x = quantize_mlp(make_config(weights=weights, inputs=INPUTS))
    assert (quantized.get_buffer("0.weight_scale") < 0).any()  # as others
    expected = quantized(x)
    LowerToQDQ()(quantized)
    found, kernels = run_frozen(quantized, x)
    assert counters["inductor"]["qlinear_weight_prepack_matcher_count"] == 2
    assert kernels == ["qlinear_pointwise"] * 2
    # A step of the inputs' grid, where a value lies half-way between two.
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # torch's own, of freezing
@pytest.mark.parametrize("factors", [{"beta": 0.1, "alpha": 2.0}, {"alpha": 3}, {}])
def test_a_product_that_is_scaled_stays_as_it_is(factors):
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(32, 64)), nn.Parameter(torch.randn(64))

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight, **factors)

    torch.manual_seed(0)
    x = torch.randn(8, 32)
    # Weights of 7 bits, which kernels without VNNI compute as others do.
    config = make_config(weights={"num_bits": 7, "strategy": "channel"}, inputs={"num_bits": 8, "symmetric": False})
    quantized = fxmse.quantize(Added(), config, [x], progress=False)
    expected = quantized(x)
    if factors:
        with pytest.warns(UserWarning, match="the product that reads it has a factor alpha or beta"):
            LowerToQDQ()(quantized)
    else:
        LowerToQDQ()(quantized)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        torch.testing.assert_close(torch.compile(quantized)(x), expected, rtol=1e-3, atol=1e-2)


def test_a_computed_weight_stays_as_it_is():
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return nn.functional.linear(x, self.weight / self.weight.norm())

    x = torch.randn(4, 8)
    config = make_config(weights={"num_bits": 8, "strategy": "tensor"}, inputs={"num_bits": 8, "symmetric": False})
    quantized = fxmse.quantize(Computed(), config, [x], progress=False)
    expected = quantized(x)
    with pytest.warns(UserWarning, match=r"weight \(a weight that is computed in the graph\)"):
        LowerToQDQ()(quantized)
    torch.testing.assert_close(quantized(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make_layer", "shape", "kernel"),
    [
        (partial(nn.Linear, 32, 16), (16, 32), "qlinear"),
        (partial(nn.Conv1d, 8, 16, 3, padding=1), (4, 8, 9), "qconv"),
        (partial(nn.Conv2d, 4, 16, 3, groups=2), (4, 4, 9, 9), "qconv"),
    ],
    ids=["linear", "conv1d", "conv2d"],
)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@needs_patterns
@torch.no_grad()
def test_a_product_its_bias_and_relu_are_one_int8_kernel(make_layer, shape, kernel, dtype):
    torch.manual_seed(0)
    model, x = nn.Sequential(make_layer(), nn.ReLU()).to(dtype).eval(), torch.randn(shape).to(dtype)
    config = make_config(make_layer.func.__name__, weights={"num_bits": 7, "strategy": "channel"}, inputs=INPUTS)
    quantized = fxmse.quantize(model, config, [x], progress=False)
    expected = quantized(x)
    LowerToQDQ()(quantized)
    found, kernels = run_frozen(quantized, x)
    assert counters["inductor"][f"{kernel}_weight_prepack_matcher_count"] == 1
    assert kernels == [f"{kernel}_pointwise"]
    # In bfloat16 the folded graph rounds each product with a scale, where the kernel dequantizes in float32.
    tolerance = 1e-2 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_patterns_that_nobody_has_are_said(monkeypatch):
    monkeypatch.delattr(mkldnn_fusion, TORCHS_OWN, raising=False)
    monkeypatch.setitem(sys.modules, TORCHAOS, None)  # cannot be imported
    quantized, x = quantize_mlp(W8A8)
    expected = quantized(x)
    with pytest.warns(UserWarning, match=r"int8 products will run in float: .* pip install 'fxmse\[int8\]'") as caught:
        LowerToQDQ()(quantized)
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
    torch.testing.assert_close(quantized(x), expected, rtol=1e-5, atol=1e-5)
    LowerToQDQ()(quantized)  # has nothing to lower, and nothing to say


def test_a_torch_without_onednn_is_said(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    quantized, _ = quantize_mlp(W8A8)
    with pytest.warns(UserWarning, match="int8 products will run in float: this torch has no oneDNN"):
        LowerToQDQ()(quantized)


@pytest.mark.skipif(not hasattr(mkldnn_fusion, TORCHS_OWN), reason="the other tests are of torchao's patterns")
@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_torchaos_patterns_do_where_torch_has_none():
    # What torch 2.14 took away is taken away here, in a process of its own: patterns are registered for good.
    code = f"""
import torch
from torch._inductor.fx_passes import mkldnn_fusion
del mkldnn_fusion.{TORCHS_OWN}
mkldnn_fusion._mkldnn_weight_pack_init = lambda: (
    mkldnn_fusion._register_weight_pack_pass(), mkldnn_fusion._recover_linear()
)
import test_lower_to_qdq as tests
tests.test_inductor_takes_the_pairs_for_its_int8_kernels()
assert torch._inductor.config.pre_grad_custom_pass is None
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
