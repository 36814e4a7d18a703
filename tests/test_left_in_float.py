"""Nothing stays float in silence: what the targets match in a model is quantized or named, to the last module."""

import re
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.utils.match import match_named_modules
from models import Attention, Convolutions, Products
from plain import quantize_input, quantize_weight
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fxmse
from fxmse.config import AllLeftInFloatError
from fxmse.passes.probe import find_probes

X = torch.randn(4, 8)


def list_silent(model, traced, targets, example=None):
    """Modules that compressed-tensors matches in ``model`` and of which neither a site nor the warning knows."""
    config = {
        "targets": targets,
        "weights": {"num_bits": 8, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "symmetric": False},
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            observed = fxmse.prepare(traced, config, example)
        except AllLeftInFloatError as error:
            sites, said = [], str(error)
        else:
            sites = [site for _, probe in find_probes(observed) for site in probe.sites]
            said = " ".join(str(warning.message) for warning in caught)
    matched = {name for name, _ in match_named_modules(model, targets)}
    silent = set()
    for role, prefix in (("weight", ""), ("input", "(the input of )?")):
        quantized = {site.module for site in sites if site.role == role}
        silent |= {n for n in matched - quantized if not re.search(rf"(float: |; ){prefix}{re.escape(n)} \(", said)}
    return silent


def list_called(model, *args, **kwargs):
    """The modules that the model calls: graphs know nothing of others."""
    called = set()
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: called.add(name))
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    with torch.no_grad(), mock.patch.object(torch, "cond", _run_both):
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return called


def _run_both(condition, on_true, on_false, operands):
    return on_true(*operands), on_false(*operands)


class Regions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.unused = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        with torch.no_grad():
            x = self.first(x)
        return torch.cond(x.sum() > 0, lambda x: self.second(x), lambda x: self.third(x), (x,))


class Hidden(nn.Module):
    """Layers whose weight something else than their own product reads."""

    def __init__(self):
        super().__init__()
        self.normed = weight_norm(nn.Linear(8, 8))
        self.summed, self.read, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.table, self.positions = nn.Embedding(8, 8), nn.Embedding(8, 8)

    def forward(self, x):
        x = torch.einsum("bi,oi->bo", self.normed(x), self.summed.weight)
        x = x + self.positions.weight[:1] + self.table(torch.arange(4))
        return F.linear(x, x[:1] * self.other.weight) @ self.read.weight.t()


class Indexed(nn.Embedding):
    def forward(self, ids):
        return self.weight[ids]


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.attention = Indexed(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent, self.conv = (
            nn.LSTM(8, 8, batch_first=True),
            nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"),
        )
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        x = self.attention(x, x, x, need_weights=False)[0] + self.table(torch.arange(4))
        return self.head(self.conv(self.recurrent(x)[0].mT).mT)


class Replaced(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.fc.forward = lambda x: F.linear(x, self.fc.weight * x.mean())

    def forward(self, x):
        return self.head(self.fc(x))


TARGETS = ["Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding"]
MODELS = {
    **{model.__name__: (model, model.make_inputs()) for model in (Attention, Convolutions)},
    "Products": (Products, Products.make_batches(1)[0]),
    "Regions": (Regions, X),
    "Hidden": (Hidden, X),
    "Layers": (Layers, torch.randn(3, 4, 8)),
    "Replaced": (Replaced, X),
}
TRACEABLE = ("Attention", "Convolutions", "Products", "Hidden", "Replaced")


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # of recurrent layers, that export assigns
@pytest.mark.parametrize("targets", [["Linear"], TARGETS], ids=["linears", "all"])
@pytest.mark.parametrize(
    ("name", "front_end"),
    [*((name, way) for name in MODELS for way in ("module", "export")), *((n, "symbolic_trace") for n in TRACEABLE)],
)
def test_what_is_matched_is_quantized_or_named(name, front_end, targets):
    model, example = MODELS[name]
    traced = model = model().eval()
    if front_end == "export":
        traced = torch.export.export(model, (example,))
    elif front_end == "symbolic_trace":
        traced = torch.fx.symbolic_trace(model)
    matched = dict(match_named_modules(model, targets))
    assert matched or (name, targets) == ("Convolutions", ["Linear"])
    silent = list_silent(model, traced, targets, example)
    assert not (silent if front_end == "module" else silent & list_called(model, example))


@pytest.mark.parametrize("front_end", ["export", "calibration"])
@torch.no_grad()
def test_what_vmap_runs_is_named_unless_its_weight_alone_is_quantized(front_end):
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model.forward = lambda x: model["b"](torch.vmap(lambda row: model["a"](row).tanh())(x))
    x = torch.randn(4, 3, 8)

    def quantize(config):
        if front_end == "export":
            return fxmse.quantize(torch.export.export(model, (x,)), config, [x], progress=False)
        torch._dynamo.reset()
        calibration = fxmse.Calibration(config, model)
        step = torch.compile(model, backend=calibration)
        step(x)
        calibration.fold()
        return step

    weights = {"num_bits": 8, "strategy": "channel", "observer": "memoryless_minmax"}
    inputs = {"num_bits": 8, "symmetric": False, "observer": "static_minmax"}
    with pytest.warns(UserWarning, match=r"left in float: a \(torch.vmap runs it"):
        found = quantize({"targets": ["Linear"], "weights": weights, "input_activations": inputs})(x)
    y = model["a"](x).tanh()
    expected = F.linear(quantize_input(y, y.min(), y.max()), quantize_weight(model["b"].weight), model["b"].bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found = quantize({"targets": ["Linear"], "weights": weights})(x)
    y = F.linear(x, quantize_weight(model["a"].weight), model["a"].bias).tanh()
    expected = F.linear(y, quantize_weight(model["b"].weight), model["b"].bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
