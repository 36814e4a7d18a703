"""Front ends: what comes in, and that the user's model is left as it was."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from models import FRONT_ENDS, Attention, make_config, make_front_ends
from torch import nn

import fxmse
from fxmse.capture.front_ends import capture, copy_graph_module, split_inputs
from fxmse.passes import InsertObservers


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_graphs_share_parameters_and_keep_outputs(front_end):
    model, inputs = Attention().eval(), Attention.make_inputs()
    graph_module = capture(*make_front_ends(model, inputs)[front_end])
    assert torch.equal(graph_module(inputs), model(inputs))
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in graph_module.parameters()} == pointers


def test_an_exported_modules_dimensions_may_vary():
    model = Attention()
    graph_module = capture(model, Attention.make_inputs(batch=3))
    for batch in (1, 2, 7):
        inputs = Attention.make_inputs(batch)
        assert torch.equal(graph_module(inputs), model(inputs))


def test_modules_are_captured_in_evaluation_mode_and_stay_in_theirs():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9), nn.Sequential(nn.Linear(4, 4)).eval())
    before = [module.training for module in model.modules()]
    inputs = torch.randn(3, 4)
    graph_module = capture(model, (inputs,))
    assert [module.training for module in model.modules()] == before
    assert torch.equal(graph_module(inputs), model.eval()(inputs))


class Varied(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)


class Positional(Varied):
    def forward(self, *values):
        return sum(self.fc(value) for value in values)


class Named(Varied):
    def forward(self, x, **others):
        return self.fc(x) + self.fc(others["y"])


class Packed(Varied):
    def forward(self, pair, scale=1.0):
        return self.fc(pair[0]) + scale * self.fc(pair[1]["y"])


X, Y = torch.randn(4, 8), torch.randn(4, 8)


@pytest.mark.parametrize(
    ("model", "inputs", "others"),
    [
        (Positional(), (X, Y), (X[:2], Y[:2])),
        (Named(), {"x": X, "y": Y}, {"x": X[:2], "y": Y[:2]}),
        (Packed(), ((X, {"y": Y}), 2.0), ((X[:2], {"y": Y[:2]}), 2.0)),
    ],
)
def test_however_inputs_are_taken(model, inputs, others):
    graph_module = capture(model, inputs)
    for batch in (inputs, others):
        args, kwargs = split_inputs(batch)
        torch.testing.assert_close(graph_module(*args, **kwargs), model(*args, **kwargs))


@pytest.mark.parametrize("first", [1, 4])
def test_a_first_batch_of_one_stands_for_any(first):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    graph_module = capture(model, torch.randn(first, 8))
    for size in (1, 2, 5):
        x = torch.randn(size, 8)
        torch.testing.assert_close(graph_module(x), model(x))


class Head(nn.Module):
    """Flattens what it pooled, which torch.export can do of images of one size."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(128, 4)

    def forward(self, x):
        n, c, h, w = self.conv(x).shape
        x = self.conv(x).view(n, 2, c // 2, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)
        return self.fc(nn.functional.avg_pool2d(x, 4).view(n, -1))


@pytest.mark.parametrize("first", [1, 2])
def test_images_have_one_size_and_come_in_batches_of_any(first):
    model = Head().eval()
    graph_module = capture(model, torch.randn(first, 3, 16, 16))
    for size in (1, 3):
        x = torch.randn(size, 3, 16, 16)
        torch.testing.assert_close(graph_module(x), model(x))


def test_what_cannot_vary_is_said():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(3, 8) * 2 if len(x) == 3 else x

    model = Fixed()
    with pytest.warns(UserWarning, match="Fixed was exported with the first dimension fixed to the example's size"):
        graph_module = capture(model, torch.randn(3, 8, dtype=torch.float64))
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(graph_module(x), model(x))


def test_inputs_that_a_model_does_not_take_are_named():
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"Sequential.forward\(input\) cannot be called with .* without labels"):
        capture(model, (X, torch.zeros(4, dtype=torch.long)))
    with pytest.raises(ValueError, match="with the inputs pixels: missing a required argument"):
        capture(model, {"pixels": X})


def test_weights_without_values_are_named():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"0.weight, 0.bias on the meta device, .*: load the weights first"):
        capture(model, X)
    with pytest.raises(ValueError, match=r"0\.weight on the meta device, without values: load the weights"):
        fxmse.quantize(torch.fx.symbolic_trace(model), make_config(), [X], progress=False)


@pytest.mark.parametrize("front_end", ["export", "symbolic_trace"])
def test_graphs_of_training_mode_compute_as_in_evaluation_mode(front_end):
    model = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 4)).train()
    traced = torch.export.export(model, (X,)) if front_end == "export" else torch.fx.symbolic_trace(model)
    before = copy.deepcopy(model.state_dict())
    graph_module = capture(traced)
    first = graph_module(X)
    assert torch.equal(first, graph_module(X))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(first, model.eval()(X))


def attend(model, x):
    x = x[None]
    return F.scaled_dot_product_attention(x, x, x, None, 0.5 if model.training else 0.0)[0]


def normalize(model, x):
    norm = model.norm
    statistics = (norm.running_mean, norm.running_var, model.training, 0.1, 1e-5, True)
    return torch.batch_norm(x, norm.weight, norm.bias, *statistics)


def normalize_instances(model, x, *statistics):
    x = x[..., None] * torch.arange(1, 4)
    return F.instance_norm(x, *statistics, use_input_stats=model.training or not statistics)[..., 0]


KINDS = {
    "F.dropout": lambda m, x: F.dropout(x, 0.5, m.training),
    "torch.dropout": lambda m, x: torch.dropout(x, 0.5, m.training),
    "torch.alpha_dropout": lambda m, x: torch.alpha_dropout(x, 0.5, m.training),
    "torch.native_dropout": lambda m, x: torch.native_dropout(x, 0.5, m.training)[0],
    "torch.rrelu": lambda m, x: torch.rrelu(x, 0.1, 0.3, m.training),
    "torch.batch_norm": normalize,
    "F.instance_norm": lambda m, x: normalize_instances(m, x, m.norm.running_mean, m.norm.running_var),
    "a norm without statistics": normalize_instances,
    "attention": attend,
    "modules in modules": lambda m, x: m.encoder(x[None])[0],
    "LSTM": lambda m, x: m.recurrent(x[None])[0][0],
}


class Trained(nn.Module):
    """What torch has that does something else in training mode, one kind at a time."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.first, self.last = kind, nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.last(KINDS[self.kind](self, self.first(x)))


@pytest.mark.filterwarnings("ignore:The tensor attributes self.recurrent._flat_weights")  # of torch.export
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("front_end", ["export", "symbolic_trace"])
def test_whatever_trains_is_evaluated(front_end, kind):
    model = Trained(kind).train()
    traced = torch.export.export(model, (X,)) if front_end == "export" else torch.fx.symbolic_trace(model)
    before = copy.deepcopy(model.state_dict())
    graph_module = capture(traced)
    outputs = [graph_module(X), graph_module(X)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(*outputs)
    torch.testing.assert_close(outputs[0], model.eval()(X))


@pytest.mark.parametrize("kind", ["torch.dropout", "attention", "torch.batch_norm"])
def test_a_calibration_of_what_trains_is_refused(kind):
    traced = torch.fx.symbolic_trace(Trained(kind).train())
    InsertObservers("W8A8")(traced)
    with pytest.raises(
        ValueError, match=r"computes as in training mode in \w+: .* Make the observed graph with fxmse.pr"
    ):
        fxmse.calibrate(traced, [X], progress=False)


def test_a_cache_is_switched_off_and_on_again():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.fc = types.SimpleNamespace(use_cache=True), nn.Linear(8, 8)

        def forward(self, x):
            return (self.fc(x), object()) if self.config.use_cache else self.fc(x)

    model = Cached()
    graph_module = capture(nn.Sequential(model), X)
    assert torch.equal(graph_module(X), model.fc(X))
    assert model.config.use_cache


def test_a_module_without_example_inputs_is_an_error():
    with pytest.raises(ValueError, match="Attention has to be exported, which needs example_inputs"):
        capture(Attention())


def test_a_copys_graph_is_its_own():
    graph_module = torch.fx.symbolic_trace(Attention())
    copied = copy_graph_module(graph_module)
    for node in reversed(copied.graph.nodes):
        copied.graph.erase_node(node)
    assert len(graph_module.graph.nodes) > 0


def test_inputs_come_as_a_dict_a_sequence_or_a_tensor():
    x = torch.zeros(1)
    assert split_inputs({"x": x}) == ((), {"x": x})
    assert split_inputs([x, 1]) == ((x, 1), {})
    assert split_inputs(x) == ((x,), {})
