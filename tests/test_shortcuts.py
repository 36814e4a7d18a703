"""What residual nets add to the output of convolutions is quantized where a target asks for it."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from models import FRONT_ENDS, make_config, make_front_ends
from plain import quantize_input, quantize_weight
from test_lower_to_qdq import needs_patterns
from torch import nn
from torch._dynamo.utils import counters

import fxmse
from fxmse.ops import is_fake_quantize
from fxmse.passes import LowerToQDQ
from fxmse.passes.probe import find_probes

pytestmark = pytest.mark.filterwarnings("ignore:int8 products will run in float.*torchao")
WEIGHTS = {"num_bits": 8, "strategy": "channel", "observer": "memoryless_minmax"}
INPUTS = {"num_bits": 8, "symmetric": False, "observer": "static_minmax"}
CONFIG = make_config("Conv2d", "add", weights=WEIGHTS, inputs=INPUTS)
X = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """``add(y, x)`` of a convolution's output and what that convolution reads."""

    def __init__(self, add):
        super().__init__()
        torch.manual_seed(0)
        self.add = add
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.table, self.gate = nn.Parameter(torch.randn(1, 4, 6, 6)), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = x * 3
        return self.add(self, self.conv(x.tanh()), x)


def write(out, value):
    out += value
    return out


SPELLINGS = {
    "operator": lambda m, y, x: y + x,
    "the other way round": lambda m, y, x: x + y,
    "function": lambda m, y, x: torch.add(y, x),
    "method": lambda m, y, x: x.add(y),
    "in place": lambda m, y, x: write(y, x),
    "method in place": lambda m, y, x: y.add_(x),
}


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("spelling", SPELLINGS)
@torch.no_grad()
def test_the_shortcut_is_what_is_quantized(spelling, front_end):
    model = Block(SPELLINGS[spelling]).eval()
    source, example = make_front_ends(model, X)[front_end]
    observed = fxmse.prepare(source, CONFIG, example)
    sites = {site.name for _, probe in find_probes(observed) for site in probe.sites}
    assert len(sites) == 3
    assert {"conv.weight", "conv.input"} <= sites
    quantized = fxmse.convert(fxmse.calibrate(observed, [X], progress=False))
    x = X * 3
    y = F.conv2d(
        quantize_input(x.tanh(), x.tanh().min(), x.tanh().max()),
        quantize_weight(model.conv.weight),
        model.conv.bias,
        padding=1,
    )
    torch.testing.assert_close(quantized(X), y + quantize_input(x, x.min(), x.max()), rtol=1e-5, atol=1e-5)


OTHERS = {
    "a parameter": lambda m, y, x: y + m.table,
    "a number": lambda m, y, x: y + 3,
    "broadcast": lambda m, y, x: y + m.gate(x),
    "alpha": lambda m, y, x: torch.add(y, x, alpha=2),
    "an output read again": lambda m, y, x: (y + x) * y,
    "a relu between": lambda m, y, x: y.relu() + x,
    "the shortcut is written": lambda m, y, x: write(x, y),
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_what_no_kernel_would_take_stays_as_it_is(name):
    model = Block(OTHERS[name]).eval()
    with pytest.warns(UserWarning, match="matched no module: add"):
        observed = fxmse.prepare(torch.export.export(model, (X,)), CONFIG)
    assert {site.name for _, probe in find_probes(observed) for site in probe.sites} == {"conv.weight", "conv.input"}


@pytest.mark.parametrize("target", ["re:.*", "Block", "Conv2d"])
def test_other_targets_do_not_mean_additions(target):
    model = nn.Sequential(Block(SPELLINGS["operator"]), Block(SPELLINGS["operator"]))
    config = make_config("Conv2d", target, weights=WEIGHTS, inputs=INPUTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the targets that match nothing
        observed = fxmse.prepare(torch.fx.symbolic_trace(model), config)
    roles = [site.name for _, probe in find_probes(observed) for site in probe.sites]
    assert [name for name in roles if "conv" not in name] == []


@torch.no_grad()
def test_a_shortcut_that_is_a_convolution_shares_nothing_with_the_other():
    model = Block(lambda m, y, x: m.other(x) + y).eval()
    model.other = nn.Conv2d(4, 4, 1)
    quantized = fxmse.quantize(torch.fx.symbolic_trace(model), CONFIG, [X], progress=False)
    x = X * 3
    weights = [quantize_weight(conv.weight) for conv in (model.conv, model.other)]
    inputs = [quantize_input(value, value.min(), value.max()) for value in (x.tanh(), x)]
    y = F.conv2d(inputs[0], weights[0], model.conv.bias, padding=1)
    float_y = model.conv(x.tanh())
    # The later one of the two is what the kernel does along.
    expected = quantize_input(y, float_y.min(), float_y.max()) + F.conv2d(inputs[1], weights[1], model.other.bias)
    torch.testing.assert_close(quantized(X), expected, rtol=1e-5, atol=1e-5)


class Residual(nn.Module):
    """Two residual blocks; the second one's shortcut is a convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.conv3, self.conv4 = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.shortcut, self.bn = nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(8)
        self.bn.running_mean.copy_(torch.randn(8))

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.bn(self.conv2(self.conv1(x).relu())) + x).relu()
        identity = self.shortcut(x)
        return (identity + self.conv4(self.conv3(x).relu())).relu()


@needs_patterns
@pytest.mark.parametrize("adds", [False, True])
@torch.no_grad()
def test_int8_kernels_add_shortcuts(adds):
    model = Residual().eval()
    # Of 7 bits, which multiply without saturating where a CPU has no VNNI.
    targets = ("Conv2d", "add") if adds else ("Conv2d",)
    config = make_config(*targets, weights={**WEIGHTS, "num_bits": 7}, inputs=INPUTS)
    quantized = fxmse.quantize(model, config, [X], progress=False, fold_batch_norm=True)
    expected = quantized(X)
    LowerToQDQ()(quantized)
    assert not any(is_fake_quantize(node) for node in quantized.graph.nodes)
    torch.testing.assert_close(quantized(X), expected, rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings(), torch._inductor.config.patch(freezing=True, fx_graph_cache=False):
        warnings.simplefilter("ignore")  # torch's own, of freezing
        torch._dynamo.reset()
        counters.clear()
        found = torch.compile(quantized)(X)
    fused = counters["inductor"]["qconv2d_binary_lower_count"]
    assert (fused, fused + counters["inductor"]["qconv_unary_lower_count"]) == (2 if adds else 0, 6)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
