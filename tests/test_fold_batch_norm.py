"""Batch norms of evaluated graphs become part of the layers before them."""

import copy
import itertools
import operator
import re
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models import FRONT_ENDS, make_config, make_front_ends
from plain import quantize_input, quantize_weight
from test_lower_to_qdq import INPUTS, needs_patterns
from torch import nn
from torch._higher_order_ops.while_loop import while_loop
from torch._inductor.utils import run_and_get_code
from torch.fx.passes.shape_prop import ShapeProp

import fxmse
from fxmse.capture.attributes import list_graphs
from fxmse.capture.front_ends import capture
from fxmse.ops import is_fake_quantize
from fxmse.passes import FoldBatchNorm, LowerToQDQ

aten = torch.ops.aten
pytestmark = pytest.mark.filterwarnings("ignore:int8 products will run in float.*torchao")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONFIG = make_config("Conv2d", inputs=INPUTS)


def fill_norms(model):
    """Has all norms do something that is their own."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, NORMS):
            shape = module.running_mean.shape
            module.running_mean.copy_(torch.randn(shape, generator=generator))
            module.running_var.copy_(torch.rand(shape, generator=generator) + 0.3)
            if module.affine:
                module.weight.data.copy_(torch.randn(shape, generator=generator))
                module.bias.data.copy_(torch.randn(shape, generator=generator))
    return model.eval()


class Residual(nn.Module):
    """Two convolutions and a shortcut, each with a norm; the second one is grouped."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8, eps=0.1)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8, affine=False))
        fill_norms(self)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


MODELS = {
    "residual": (Residual, (3, 4, 6, 6), 3),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (3, 4, 7), 1),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 2, groups=2), nn.BatchNorm3d(4)), (3, 2, 4, 4, 4), 1),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)),
        (3, 4, 5, 5),
        1,
    ),
    "grouped_transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6)),
        (3, 4, 5, 5),
        1,
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), (7, 5), 1),
    "two_norms": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.BatchNorm2d(6)),
        (3, 4, 5, 5),
        2,
    ),
}


def count_norms(graph_module):
    """How many norms a graph has, by module or by name."""
    return sum(
        isinstance(graph_module.get_submodule(node.target), NORMS)
        if node.op == "call_module"
        else node.op == "call_function" and "batch_norm" in str(node.target)
        for node in graph_module.graph.nodes
    )


def copy_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def check_state(model, expected):
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_folded_graph_computes_what_the_model_does(name, front_end):
    make_model, shape, num_norms = MODELS[name]
    torch.manual_seed(0)
    model, x = fill_norms(make_model()), torch.randn(shape)
    before, expected = copy_state(model), model(x)
    source, example = make_front_ends(model, x)[front_end]
    if front_end == "symbolic_trace":
        ShapeProp(source).propagate(x)
    graph = capture(source, example)
    assert count_norms(graph) == num_norms
    unfolded = capture(source, example)
    assert FoldBatchNorm()(graph).modified
    assert count_norms(graph) == 0
    torch.testing.assert_close(graph(x), expected, rtol=1e-5, atol=1e-5)
    assert not FoldBatchNorm()(graph).modified
    # Neither the model nor what shares its parameters changed.
    check_state(model, before)
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(unfolded(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_decomposed_programs(name):
    make_model, shape, num_norms = MODELS[name]
    torch.manual_seed(0)
    model, x = fill_norms(make_model()), torch.randn(shape)
    graph = capture(torch.export.export(model, (x,)).run_decompositions())
    assert count_norms(graph) == num_norms
    FoldBatchNorm()(graph)
    assert count_norms(graph) == 0
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)


class Product(nn.Module):
    """A matrix product in front of a norm of 6 channels."""

    def __init__(self, multiply, num_rows=6):
        super().__init__()
        torch.manual_seed(0)
        self.multiply = multiply
        self.p, self.bias = nn.Parameter(torch.randn(num_rows, 6)), nn.Parameter(torch.randn(6))
        self.bn = nn.BatchNorm1d(6)
        fill_norms(self)

    def forward(self, x):
        return self.bn(self.multiply(x, self.p, self.bias))


PRODUCTS = {
    "mm": (lambda x, p, b: torch.mm(x, p), 6, True),
    "mm of a transposed one": (lambda x, p, b: torch.mm(x, p.t()), 6, True),
    "addmm": (lambda x, p, b: torch.addmm(b, x, p.transpose(0, 1)), 6, True),
    "a bias of one element": (lambda x, p, b: torch.addmm(b[:1], x, p), 6, False),
    "alpha": (lambda x, p, b: torch.addmm(b, x, p, alpha=2), 6, False),
    "rows": (lambda x, p, b: torch.mm(x, p[1:7].t()), 8, False),
    "other rows": (lambda x, p, b: torch.mm(x, p.flip(0).t()), 6, False),
    "from the left": (lambda x, p, b: torch.mm(p, x), 6, False),
    "transposed for two": (lambda x, p, b: torch.mm(x + (q := p.t()).sum(), q), 6, False),
}


@pytest.mark.parametrize("front_end", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", PRODUCTS)
@torch.no_grad()
def test_products_as_layers(name, front_end):
    multiply, num_rows, is_folded = PRODUCTS[name]
    model, x = Product(multiply, num_rows), torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    source = torch.fx.symbolic_trace(model) if front_end == "symbolic_trace" else torch.export.export(model, (x,))
    if front_end == "symbolic_trace":
        ShapeProp(source).propagate(x)
    graph = capture(source)
    assert FoldBatchNorm()(graph).modified == is_folded
    assert count_norms(graph) == (0 if is_folded else 1)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)


class InRegions(nn.Module):
    """Layers and norms in branches and a loop; ``shares`` has both branches run one layer."""

    def __init__(self, shares=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        if shares:
            self.conv2 = self.conv1
        fill_norms(self)

    def forward(self, x):
        y = torch.cond(x.sum() > 0, self.true, lambda v: self.bn2(self.conv2(v)), (x,))
        body = lambda i, v: (i + 1, self.bn3(self.conv3(v)).tanh())  # noqa: E731
        return while_loop(lambda i, v: i < 2, body, (torch.tensor(0), y))[1]

    def true(self, x):
        return torch.cond(x.mean() > 1, lambda v: self.bn1(self.conv1(v)).relu(), lambda v: v + 1, (x,))


@pytest.mark.parametrize("front_end", ["module", "export", "decomposed"])
@pytest.mark.parametrize("shares", [False, True])
@torch.no_grad()
def test_norms_in_branches_and_loops(front_end, shares):
    model, x = InRegions(shares).eval(), torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    before, inputs = copy_state(model), [x + shift for shift in (-2, 0.5, 2)]
    source, example = model, (x,)
    if front_end != "module":
        source, example = torch.export.export(model, (x,)), None
        source = source.run_decompositions() if front_end == "decomposed" else source

    def count(graph_module):
        return sum(map(count_norms, list_graphs(graph_module)))

    graph = capture(source, example)
    assert count(graph) == 3
    assert FoldBatchNorm()(graph).modified
    # A layer of two branches stays what it is.
    assert count(graph) == (2 if shares else 0)
    code = [region.code for region in list_graphs(graph)]
    assert not FoldBatchNorm()(graph).modified
    assert [region.code for region in list_graphs(graph)] == code
    for value in inputs:
        torch.testing.assert_close(graph(value), model(value), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.export.export(graph, (x,)).module()(x), model(x), rtol=1e-5, atol=1e-5)
    check_state(model, before)


@torch.no_grad()
def test_folded_weights_of_regions_are_what_is_quantized():
    model, x = InRegions(), torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    plain = copy.deepcopy(model)
    for conv, norm in ((plain.conv1, plain.bn1), (plain.conv2, plain.bn2), (plain.conv3, plain.bn3)):
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
        conv.bias = nn.Parameter(shift * factor + norm.bias)
        conv.weight.data = quantize_weight(conv.weight * factor[:, None, None, None])
        norm.reset_parameters()
        norm.eps = 0.0
    minmax = {"num_bits": 8, "strategy": "channel", "observer": "memoryless_minmax"}
    batches = [x - 2, x + 0.5, x + 2]
    quantized = fxmse.quantize(
        model, make_config("Conv2d", weights=minmax), batches, progress=False, fold_batch_norm=True
    )
    for value in batches:
        torch.testing.assert_close(quantized(value), plain(value), rtol=1e-4, atol=1e-4)


LAYER = ("0.weight", "0.bias")
NORM = ("1.weight", "1.bias", "1.running_mean", "1.running_var")
SPELLINGS = {
    "batch_norm": (aten.batch_norm.default, (False, 0.1, 0.01, False)),
    "native_batch_norm": (aten.native_batch_norm.default, (False, 0.1, 0.01)),
    "cudnn_batch_norm": (aten.cudnn_batch_norm.default, (False, 0.1, 0.01)),
    "_native_batch_norm_legit_no_training": (aten._native_batch_norm_legit_no_training.default, (0.1, 0.01)),
    "_batch_norm_no_update": (aten._batch_norm_no_update.default, (0.1, 0.01)),
}


@pytest.mark.parametrize("reads_statistics", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
@torch.no_grad()
def test_spellings_of_a_norm(name, reads_statistics):
    """Each op in a graph by hand, as backends' decompositions leave them."""
    model = fill_norms(nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, eps=0.01)))
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    target, options = SPELLINGS[name]
    tracer = torch.fx.Graph()
    layer = tracer.call_function(aten.conv2d.default, (tracer.placeholder("x"), *map(tracer.get_attr, LAYER)))
    layer.meta["val"] = model[0](x)
    norm = tracer.call_function(target, (layer, *map(tracer.get_attr, NORM), *options))
    outputs = norm
    if len(target._schema.returns) > 1:
        outputs = tracer.call_function(operator.getitem, (norm, 0))
        if reads_statistics:  # what only a norm has
            outputs = (outputs, tracer.call_function(operator.getitem, (norm, 1)))
    tracer.output(outputs)
    graph = torch.fx.GraphModule(model, tracer)
    stays = reads_statistics and isinstance(outputs, tuple)
    assert FoldBatchNorm()(graph).modified is not stays
    assert count_norms(graph) == stays
    if not stays:
        torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_dtypes_are_folded_in_float64(dtype):
    model = fill_norms(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).to(dtype)
    graph = capture(model, torch.randn(2, 4, 5, 5).to(dtype))
    FoldBatchNorm()(graph)
    conv, norm = model
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = conv.weight.double() * factor[:, None, None, None]
    bias = (conv.bias.double() - norm.running_mean.double()) * factor + norm.bias.double()
    for name, expected in (("0.weight", weight), ("0.bias", bias)):
        assert graph.get_parameter(name).dtype == dtype
        torch.testing.assert_close(graph.get_parameter(name), expected.to(dtype))


class Reused(nn.Module):
    """A convolution and a norm, and something that forbids folding."""

    def __init__(self, why):
        super().__init__()
        torch.manual_seed(0)
        self.why = why
        self.conv, self.bn, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        if why == "tied":
            self.other.weight = self.conv.weight
        fill_norms(self)

    def forward(self, x):
        y = self.conv(x)
        if self.why == "written":
            self.bn.running_mean.add_(1)
        z = self.bn(y)
        if self.why == "two readers":
            return z + y
        if self.why == "reused":
            return self.conv(z)
        if self.why == "tied":
            return self.other(z)
        if self.why == "read":
            return z + self.conv.weight.sum()
        return z


@pytest.mark.parametrize(
    ("why", "front_end"),
    [
        *itertools.product(("two readers", "reused", "tied", "read", "trains"), ("symbolic_trace", "export", "module")),
        ("written", "export"),
        ("written", "module"),
    ],
)
@torch.no_grad()
def test_what_is_not_folded(why, front_end):
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    model = Reused(why)
    expected = copy.deepcopy(model)(x)
    if why == "written":  # tracing would write at once
        source, example = (model, x) if front_end == "module" else (torch.export.export(model, (x,)), None)
    else:
        source, example = make_front_ends(model, x)[front_end]
    graph = capture(source, example)
    if why == "trains":  # captured graphs do not
        for node in graph.graph.nodes:
            if node.op == "call_module" and isinstance(module := graph.get_submodule(node.target), nn.BatchNorm2d):
                graph.set_submodule(node.target, copy.deepcopy(module).train())
            elif "batch_norm" in str(node.target):
                node.update_arg(5, True)
        graph.recompile()
        expected = copy.deepcopy(graph)(x)
    FoldBatchNorm()(graph)
    assert count_norms(graph) == 1
    torch.testing.assert_close(graph(x), expected, rtol=1e-5, atol=1e-5)


class Ambiguous(nn.Module):
    """A norm of what is no channel of the layer, though there are as many."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(5, 6), nn.BatchNorm1d(6)
        fill_norms(self)

    def forward(self, x):
        return self.bn(self.fc(x))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("knows_shapes", [False, True])
@torch.no_grad()
def test_a_norm_of_other_channels_stays(front_end, knows_shapes):
    model, x = Ambiguous(), torch.randn(3, 6, 5)
    source, example = make_front_ends(model, x)[front_end]
    if front_end == "symbolic_trace" and knows_shapes:
        ShapeProp(source).propagate(x)
    graph = capture(source, example)
    FoldBatchNorm()(graph)
    assert count_norms(graph) == 1
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_functional_norms_and_layers_whose_bias_is_something_else():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.weight, self.bias = nn.Parameter(torch.randn(6, 4, 3, 3)), nn.Parameter(torch.randn(1))
            self.register_buffer("mean", torch.randn(6))
            self.register_buffer("var", torch.rand(6) + 0.5)

        def forward(self, x):
            return F.batch_norm(F.conv2d(x, self.weight), self.mean, self.var, eps=0.01) * self.bias

    model, x = Functional(), torch.randn(2, 4, 6, 6)
    for source in (torch.fx.symbolic_trace(model), torch.export.export(model, (x,))):
        if isinstance(source, torch.fx.GraphModule):
            ShapeProp(source).propagate(x)
        graph = capture(source)
        FoldBatchNorm()(graph)
        assert count_norms(graph) == 0
        torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@torch.no_grad()
def test_folded_weights_are_what_is_quantized(front_end):
    model, x = Residual(), torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    before = copy_state(model)

    def fold(conv, norm):
        """The layer's weight, quantized, and its bias."""
        gamma, beta = (norm.weight, norm.bias) if norm.affine else (torch.ones(8), torch.zeros(8))
        factor = gamma / (norm.running_var + norm.eps).sqrt()
        bias = torch.zeros(8) if conv.bias is None else conv.bias
        shift = (bias - norm.running_mean) * factor + beta
        return quantize_weight(conv.weight * factor[:, None, None, None]), shift

    convolve = partial(F.conv2d, padding=1)
    weight1, bias1 = fold(model.conv1, model.bn1)
    weight2, bias2 = fold(model.conv2, model.bn2)
    weight3, bias3 = fold(*model.shortcut)
    float_y = F.relu(model.bn1(model.conv1(x)))
    x_q = quantize_input(x, x.min(), x.max())
    y = quantize_input(F.relu(convolve(x_q, weight1, bias1)), float_y.min(), float_y.max())
    expected = F.relu(convolve(y, weight2, bias2, groups=2) + F.conv2d(x_q, weight3, bias3))

    minmax = {"num_bits": 8, "strategy": "channel", "observer": "memoryless_minmax"}
    config = make_config("Conv2d", weights=minmax, inputs={**INPUTS, "observer": "static_minmax"})
    source, example = make_front_ends(model, x)[front_end]
    observed = fxmse.prepare(source, config, example, fold_batch_norm=True)
    quantized = fxmse.convert(fxmse.calibrate(observed, [x], progress=False))
    torch.testing.assert_close(quantized(x), expected, rtol=1e-4, atol=1e-4)
    assert {"conv1.weight_scale", "conv1.input_scale", "conv2.weight_scale", "shortcut.0.weight_scale"} <= set(
        quantized.state_dict()
    )
    assert not [name for name in quantized.state_dict() if "bn" in name]
    check_state(model, before)


def test_norms_stay_unless_they_are_asked_for():
    quantized = fxmse.quantize(Residual(), CONFIG, [torch.randn(3, 4, 6, 6)], progress=False)
    assert count_norms(quantized) == 3


@needs_patterns
@torch.no_grad()
def test_int8_kernels_take_a_relu_along():
    model, x = Residual(), torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    # Of 7 bits, which multiply without saturating where a CPU has no VNNI.
    config = make_config("Conv2d", weights={"num_bits": 7, "strategy": "channel"}, inputs=INPUTS)
    quantized = fxmse.quantize(model, config, [x], progress=False, fold_batch_norm=True)
    expected = quantized(x)
    LowerToQDQ()(quantized)
    assert count_norms(quantized) == 0
    assert not any(is_fake_quantize(node) for node in quantized.graph.nodes)
    with warnings.catch_warnings(), torch._inductor.config.patch(freezing=True):
        warnings.simplefilter("ignore")  # torch's own, of freezing
        torch._dynamo.reset()
        found, code = run_and_get_code(torch.compile(quantized), x)
    kernels = re.findall(r"onednn\.(qconv\w+)[.\w]*\((.*)\)", "".join(code))
    assert len(kernels) == 3
    # The one convolution that a relu follows; what is added in float stays outside of the kernels.
    assert sum("'relu'" in arguments for _, arguments in kernels) == 1
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
