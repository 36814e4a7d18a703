"""The report against sums made by hand."""

import math

import pytest
import torch
from cases import NVFP4, make_args
from compressed_tensors.quantization.lifecycle import fake_quantize
from models import make_config
from torch import nn

import fxmse
from fxmse.search.compiling import compilation


def test_report_says_what_quantization_did():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(32, 8)).eval(), [torch.randn(16, 32), torch.randn(5, 32)]
    config = make_config(weights={"num_bits": 4, "strategy": "group", "group_size": 8}, inputs={"symmetric": False})
    quantized = fxmse.quantize(model, config, batches, progress=False)
    code = quantized.code
    weight, activation = fxmse.report(quantized, batches)
    assert quantized.code == code
    assert (weight.module, weight.role, weight.format, weight.num_scales) == (
        "0",
        "weight",
        "int4 symmetric group 8",
        32,
    )
    assert (activation.role, activation.format, activation.num_scales) == ("input", "int8 asymmetric tensor", 1)
    scale = quantized.state_dict()["0.weight_scale"]
    value = model[0].weight.detach()
    noise = fake_quantize(value, scale, None, config.config_groups["group_0"].weights) - value
    sqnr = 10 * math.log10(value.square().sum() / noise.square().sum())
    assert weight.sqnr == pytest.approx(sqnr, rel=1e-5)
    minmax = value.unflatten(1, (4, 8)).abs().amax(-1) / 7.5
    assert weight.range_ratio == pytest.approx((scale.abs() / minmax).mean().item(), rel=1e-5)
    both = torch.cat(batches)
    expected = quantized.state_dict()["0.input_scale"].item() * 255 / (both.max() - both.min()).item()
    assert activation.range_ratio == pytest.approx(expected, rel=1e-5)


def test_scales_below_zero_are_reported_by_their_magnitude():
    torch.manual_seed(0)
    weights = {"num_bits": 3, "strategy": "group", "group_size": 8, "observer": "exact_mse"}
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(32, 8)).eval())
    quantized = fxmse.quantize(model, make_config(weights=weights), progress=False)
    scale = quantized.state_dict()["0.weight_scale"]
    assert (scale < 0).any()
    (weight,) = fxmse.report(quantized, [torch.randn(2, 32)])
    assert (weight.scale_min, weight.scale_max) == (scale.abs().min().item(), scale.abs().max().item())
    assert 0.7 < weight.range_ratio < 1.2


BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 32]}


@pytest.mark.parametrize("weights", [NVFP4.model_dump(), BLOCKS], ids=["nvfp4", "block"])
def test_report_knows_other_formats(weights):
    torch.manual_seed(0)
    config = make_config(weights={**weights, "observer": "memoryless_mse"})
    model = nn.Sequential(nn.Linear(128, 128)).eval()
    quantized = fxmse.quantize(torch.fx.symbolic_trace(model), config, progress=False)
    (site,) = fxmse.report(quantized, [torch.randn(2, 128)])
    assert site.sqnr > 15
    assert 0.7 < site.range_ratio <= 1.01


def test_report_needs_a_folded_graph_and_batches():
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="no fake-quantize nodes"):
        fxmse.report(model, [torch.randn(2, 4)])
    with pytest.raises(ValueError, match="no batches"):
        fxmse.report(fxmse.quantize(model, make_config(), progress=False), [])


def test_local_values_and_attention_states_are_reported():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.k_proj = nn.Linear(16, 16)

        def forward(self, x):
            q, k = (states.unflatten(-1, (2, 8)).transpose(1, 2) for states in (x, self.k_proj(x)))
            return nn.functional.scaled_dot_product_attention(q, k, k * 2)

    local = {**NVFP4.model_dump(), "dynamic": "local", "observer": "static_minmax"}
    config = make_config(inputs=local).model_copy(
        update={"kv_cache_scheme": make_args(8, strategy="attn_head", observer="static_minmax")}
    )
    x = torch.randn(2, 5, 16)
    reports = fxmse.report(fxmse.quantize(Attention().eval(), config, [x], progress=False), [x])
    found = {
        (r.module, r.role): (r.format, r.num_scales, round(r.range_ratio, 1)) for r in reports if r.role != "weight"
    }
    assert found == {
        ("k_proj", "input"): ("float4 symmetric tensor_group 16 dynamic", 0, 1.0),
        ("", "k"): ("int8 symmetric attn_head", 2, 1.0),
        ("", "v"): ("int8 symmetric attn_head", 2, 1.0),
    }
    assert all(r.sqnr > 15 for r in reports)


FORMATS = {
    "int4_g32": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    "int8_channel": {"num_bits": 8, "strategy": "channel"},
    "int8_tensor": {"num_bits": 8, "strategy": "tensor"},
    "fp8_block": BLOCKS,
    "nvfp4": NVFP4.model_dump(),
}


# NVFP4's global scale would leave float32.
SIZES = [*((name, 1.0) for name in FORMATS), *((name, s) for name in FORMATS if name != "nvfp4" for s in (1e-25, 1e25))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "size"), SIZES)
@torch.no_grad()
def test_blocks_add_up_to_the_sums_of_float64(name, dtype, size, monkeypatch):
    monkeypatch.setattr("fxmse.outputs.noise._BLOCK", 1 << 14)  # several blocks, the last of them smaller
    torch.manual_seed(0)
    weight = (torch.randn(300, 160) * torch.logspace(0, -3, 300)[:, None] * size).to(dtype)
    linear = nn.Linear(160, 300, bias=False, dtype=dtype).eval()
    linear.weight.data = weight
    model = torch.fx.symbolic_trace(nn.Sequential(linear))
    quantized = fxmse.quantize(model, make_config(weights={**FORMATS[name], "observer": "minmax"}), progress=False)
    (site,) = fxmse.report(quantized)
    node = next(node for node in quantized.graph.nodes if node.name.endswith("fake_quant"))
    state = quantized.state_dict()
    qparams = [None if arg is None else state[arg.target] for arg in node.args[1:4]]
    noise = torch.ops.fxmse.fake_quantize(weight, *qparams, *node.args[4:]).double() - weight.double()
    sqnr = 10 * math.log10(weight.double().square().sum() / noise.square().sum())
    assert site.sqnr == pytest.approx(sqnr, abs=1e-4)
    assert site.range_ratio == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_compiled_sums_are_those_of_what_the_graph_computes(name):
    """Of bfloat16, each of whose operations rounds."""
    torch.manual_seed(0)
    linear = nn.Linear(160, 300, bias=False, dtype=torch.bfloat16).eval()
    model = torch.fx.symbolic_trace(nn.Sequential(linear))
    quantized = fxmse.quantize(model, make_config(weights={**FORMATS[name], "observer": "minmax"}), progress=False)
    with compilation("always"):
        (compiled,) = fxmse.report(quantized)
    (plain,) = fxmse.report(quantized)
    assert compiled.sqnr == pytest.approx(plain.sqnr, abs=1e-4)
    assert compiled.range_ratio == pytest.approx(plain.range_ratio, abs=1e-6)


@torch.no_grad()
def test_a_report_without_batches_is_of_weights():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 8)).eval(), torch.randn(16, 32)
    config = make_config(inputs={"symmetric": False})
    quantized = fxmse.quantize(model, config, [x], progress=False)
    weight, activation = fxmse.report(quantized)
    both = fxmse.report(quantized, [x])
    assert weight == both[0]
    assert math.isnan(activation.sqnr)
    assert math.isnan(activation.range_ratio)
    assert (activation.format, activation.scale_min) == (both[1].format, both[1].scale_min)


@torch.no_grad()
def test_batches_are_not_run_for_weights():
    def make_batches():
        yield torch.randn(16, 32)
        raise AssertionError("a second batch was asked for")

    quantized = fxmse.quantize(
        torch.fx.symbolic_trace(nn.Sequential(nn.Linear(32, 8))), make_config(inputs=None), progress=False
    )
    assert fxmse.report(quantized, make_batches()) == fxmse.report(quantized)
