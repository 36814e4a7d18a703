"""fxmse's observers inside of torchao's PT2E."""

import dataclasses

import pytest
import torch
from cases import make_weight
from torch import nn

pytest.importorskip("torchao", reason="pip install 'fxmse[int8]'")

from torchao.quantization.pt2e import quantize_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

import fxmse.observers
from fxmse.pt2e import PT2EObserver, use_observer

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


def convert(batches, config):
    program = torch.export.export(Net().eval(), (batches[0],))
    prepared = quantize_pt2e.prepare_pt2e(program.module(), x86.X86InductorQuantizer().set_global(config))
    for batch in batches:
        prepared(batch)
    return prepared, quantize_pt2e.convert_pt2e(prepared)


@torch.no_grad()
def test_a_quantizer_with_fxmses_observers():
    batches = [torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(seed)) ** 3 for seed in range(3)]
    default = x86.get_default_x86_inductor_quantization_config()
    prepared, converted = convert(batches, use_observer(default, "exact_mse"))
    observers = [module for module in prepared.modules() if isinstance(module, PT2EObserver)]
    assert len(observers) >= 4
    assert sum(observer.qscheme == torch.per_channel_symmetric for observer in observers) == 2
    for batch in batches:
        expected = Net().eval()(batch)
        assert 0 < (converted(batch) - expected).norm() < 0.05 * expected.norm()
    ops = [node.target for node in converted.graph.nodes if node.op == "call_function"]
    assert torch.ops.quantized_decomposed.dequantize_per_channel.default in ops
    assert torch.ops.quantized_decomposed.quantize_per_tensor.default in ops


def quantize_by_hand(x, scale, zero_point, low, high):
    return ((x / scale).round() + zero_point).clamp(low, high).sub(zero_point) * scale


SCHEMES = [
    (torch.uint8, torch.per_tensor_affine, 0, 255),
    (torch.int8, torch.per_tensor_symmetric, -128, 127),
    (torch.int8, torch.per_tensor_affine, -128, 127),
    (torch.uint8, torch.per_tensor_affine, 0, 127),
]


@pytest.mark.parametrize(("dtype", "qscheme", "low", "high"), SCHEMES)
def test_no_activation_is_quantized_worse_than_by_histograms(dtype, qscheme, low, high):
    from torchao.quantization.pt2e import HistogramObserver

    x = make_weight("skewed")
    arguments = {"dtype": dtype, "qscheme": qscheme, "quant_min": low, "quant_max": high}
    errors = []
    for observer in (PT2EObserver(**arguments), HistogramObserver(**arguments)):
        assert observer(x) is x
        scale, zero_point = observer.calculate_qparams()
        assert scale.numel() == zero_point.numel() == 1
        errors.append((quantize_by_hand(x, scale, zero_point, low, high) - x).square().sum())
    assert errors[0] <= errors[1] * 1.001


def test_no_channel_is_quantized_worse_than_by_its_largest_magnitude():
    from torchao.quantization.pt2e import PerChannelMinMaxObserver

    weight = make_weight("heavy")
    scheme = {"dtype": torch.int8, "qscheme": torch.per_channel_symmetric, "quant_min": -128, "quant_max": 127}
    errors = []
    for observer in (PT2EObserver(**scheme), PerChannelMinMaxObserver(**scheme)):
        observer(weight)
        scale, zero_point = (tensor[:, None] for tensor in observer.calculate_qparams())
        errors.append((quantize_by_hand(weight, scale, zero_point, -128, 127) - weight).square().sum(1))
    assert (errors[0] <= errors[1] * 1.001).all()
    assert errors[0].sum() < errors[1].sum()


@pytest.mark.parametrize(("ch_axis", "low"), [(0, -128), (1, -128), (0, -127)])
def test_channels_have_the_scales_of_fxmses_observer(ch_axis, low):
    weight = make_weight("normal")
    scheme = {"dtype": torch.int8, "qscheme": torch.per_channel_symmetric, "quant_min": low, "quant_max": 127}
    observer = PT2EObserver(ch_axis=ch_axis, **scheme)
    observer(weight)
    scale, zero_point = observer.calculate_qparams()
    assert scale.shape == zero_point.shape == (weight.shape[ch_axis],)
    assert not zero_point.any()
    rows = weight.movedim(ch_axis, 0)
    args = fxmse.config.QuantizationArgs(num_bits=8, strategy="channel")
    own = fxmse.observers.Observer.load_from_registry("exact_mse", base_name="weight", args=args, negative_scale=False)
    expected = own(rows).get_qparams()["scale"].flatten() * (1 if low == -128 else 127.5 / 127)
    torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="has seen no value: run sample data"):
        PT2EObserver(dtype=torch.uint8).calculate_qparams()
    with pytest.raises(ValueError, match="observer='best': expected one of"):
        PT2EObserver(observer="best", dtype=torch.uint8)

    @dataclasses.dataclass(frozen=True)
    class Empty:
        weight: object = None

    with pytest.raises(ValueError, match="Empty has no static int8 specs"):
        use_observer(Empty(), "exact_mse")
