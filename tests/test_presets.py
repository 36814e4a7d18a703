"""Every preset of the installed compressed-tensors, against compressed-tensors applying the same qparams itself."""

import pytest
import torch
from compressed import apply_qparams
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from torch import nn

import fxmse
from fxmse.ops import is_fake_quantize

pytestmark = pytest.mark.slow

QUANTIZING = [name for name in PRESET_SCHEMES if name != "UNQUANTIZED"]


class Model(nn.Module):
    """Two linears that read one value, and one behind them."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(256, 128), nn.Linear(256, 128), nn.Linear(128, 72)
        self.to(dtype)

    def forward(self, x):
        return self.down(self.gate(x).sigmoid() * self.up(x))


def make_batches(dtype):
    generator = torch.Generator().manual_seed(1)
    channels = torch.rand(256, generator=generator)
    return [(torch.randn(2, 3, 256, generator=generator) * channels).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", QUANTIZING)
def test_preset_equals_compressed_tensors_bit_for_bit(name, dtype):
    model, batches = Model(dtype).eval(), make_batches(dtype)
    observed = fxmse.prepare(model, name, batches[0])
    assert torch.equal(observed(batches[1]), model(batches[1]))
    quantized = fxmse.convert(fxmse.calibrate(observed, batches, progress=False))
    scheme = preset_name_to_scheme(name, ["Linear"])
    # One node a weight, and one an input that is quantized; gate and up share theirs.
    expected_nodes = 3 + (2 if scheme.input_activations else 0)
    assert sum(is_fake_quantize(node) for node in quantized.graph.nodes) == expected_nodes
    reference = apply_qparams(model, QuantizationConfig(config_groups={"group_0": scheme}), quantized)
    assert torch.equal(quantized(batches[0]), reference(batches[0]))
    assert not torch.equal(quantized(batches[0]), model(batches[0]))


def test_presets_go_by_any_case_and_one_that_quantizes_nothing_is_an_error():
    model, batches = Model(torch.float32), make_batches(torch.float32)
    assert torch.equal(
        fxmse.quantize(model, "w8a8", batches, progress=False)(batches[0]),
        fxmse.quantize(model, "W8A8", batches, progress=False)(batches[0]),
    )
    with pytest.raises(ValueError, match=r"config_groups \['group_0'\] quantize nothing"):
        fxmse.prepare(model, "UNQUANTIZED", batches[0])


def test_presets_are_groups_of_a_config_too():
    config = {"config_groups": {"UNQUANTIZED": ["down"], "NVFP4": ["re:.*up"], "FP8_DYNAMIC": ["Linear"]}}
    quantized = fxmse.quantize(Model(torch.float32), config, make_batches(torch.float32), progress=False)
    names = [name for name in quantized.state_dict() if "scale" in name]
    assert names == ["gate.weight_scale", "up.weight_scale", "up.weight_global_scale", "up.input_global_scale"]
