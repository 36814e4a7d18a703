"""Regions that run once are quantized as everything around them; what the graph does not run is named."""

import pytest
import torch
from models import make_config
from plain import quantize_by_hand, quantize_input, quantize_weight
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import fxmse
from fxmse.passes import InlineRegions

MINMAX = make_config(
    weights={"num_bits": 8, "strategy": "channel", "observer": "memoryless_minmax"},
    inputs={"num_bits": 8, "symmetric": False, "observer": "static_minmax"},
)
BATCHES = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


class Regions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.run(x))


class NoGrad(Regions):
    def run(self, x):
        with torch.no_grad():
            return self.body(x)


class Nested(Regions):
    def run(self, x):
        with torch.no_grad():
            x = self.body[0](x)
            with torch.enable_grad():
                x = self.body[1](x)
            return self.body[2](x)


class Checkpointed(Regions):
    def run(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


def list_sites(quantized):
    return [site for node in quantized.graph.nodes for site in node.meta.get("fxmse_sites", ())]


ALL = [f"{layer}.{role}" for layer in ("body.0", "body.2", "head") for role in ("weight", "input")]


@pytest.mark.parametrize("region", [NoGrad, Nested, Checkpointed])
@pytest.mark.parametrize("front_end", ["module", "export"])
def test_layers_in_regions_are_quantized(region, front_end):
    model = region().eval()
    traced = torch.export.export(model, (BATCHES[0],)) if front_end == "export" else model
    quantized = fxmse.quantize(traced, MINMAX, BATCHES, progress=False)
    assert sorted(list_sites(quantized)) == sorted(ALL)
    expected = quantize_by_hand(model, BATCHES, BATCHES[0])
    torch.testing.assert_close(quantized(BATCHES[0]), expected, rtol=1e-5, atol=1e-6)


class CompiledOnce(Regions):
    def run(self, x):
        return run_body(self.body, x)


@torch.compiler.nested_compile_region
def run_body(body, x):
    return body(x)


@pytest.mark.parametrize("region", [NoGrad, Checkpointed, CompiledOnce])
def test_layers_in_regions_are_calibrated(region):
    torch._dynamo.reset()
    model = region().eval()
    calibration = fxmse.Calibration(MINMAX)
    step = torch.compile(model, backend=calibration)
    for batch in BATCHES:
        step(batch)
    calibration.fold()
    assert {name.rpartition("_scale")[0] for name in calibration.qparams if name.endswith("_scale")} == set(ALL)
    expected = quantize_by_hand(model, BATCHES, BATCHES[0])
    torch.testing.assert_close(step(BATCHES[0]).detach(), expected, rtol=1e-5, atol=1e-6)


def test_what_has_no_gradient_has_none():
    model = NoGrad()
    quantized = fxmse.quantize(model, MINMAX, BATCHES, progress=False)
    for graph in (model, quantized):
        graph(BATCHES[0]).sum().backward()
        assert all(parameter.grad is None for parameter in model.body.parameters())
        assert all(parameter.grad is not None for parameter in model.head.parameters())
        model.zero_grad()


def test_a_region_reads_as_the_rest():
    graph_module = torch.export.export(NoGrad(), (BATCHES[0],)).module()
    assert InlineRegions()(graph_module).modified
    assert not InlineRegions()(graph_module).modified
    assert [node.target for node in graph_module.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.linear.default,
        torch.ops.aten.relu.default,
        torch.ops.aten.linear.default,
        torch.ops.aten.detach.default,
        torch.ops.aten.linear.default,
    ]


def test_autocast_is_entered_and_left():
    class Autocast(Regions):
        def run(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.body[0](x)
            return self.body[2](x.float())

    model = Autocast().eval()
    quantized = fxmse.quantize(model, MINMAX, BATCHES, progress=False)
    assert sorted(list_sites(quantized)) == sorted(ALL)
    # The inputs' ranges are those of the float model, whose first layer computes in bfloat16.
    values, x = BATCHES, BATCHES[0]
    with torch.no_grad():
        for layer, dtype in ((model.body[0], torch.bfloat16), (model.body[2], None), (model.head, None)):
            low, high = min(v.min() for v in values), max(v.max() for v in values)
            cast = (lambda t, dtype=dtype: t.to(dtype)) if dtype else (lambda t: t)
            x = linear(*map(cast, (quantize_input(x, low, high), quantize_weight(layer.weight), layer.bias))).float()
            values = [linear(*map(cast, (v, layer.weight, layer.bias))).float() for v in values]
    torch.testing.assert_close(quantized(BATCHES[0]), x, rtol=1e-5, atol=1e-6)
    exported = fxmse.export(quantized, BATCHES[0]).module()
    assert torch.equal(exported(BATCHES[0]), quantized(BATCHES[0]))


def test_layers_that_the_graph_does_not_run_are_named():
    class Unused(Regions):
        def forward(self, x):
            return self.body(x)

    with pytest.warns(UserWarning, match=r"left in float: head \(no op of the graph .* reads its weight\)$"):
        fxmse.prepare(Unused(), MINMAX, BATCHES[0])
