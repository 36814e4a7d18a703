"""Values that are written in place between two readers: each reads what was there when it read."""

import pytest
import torch
import torch.nn.functional as F
from models import make_config
from plain import quantize_by_hand
from torch import nn

import fxmse
from fxmse.capture.front_ends import copy_graph_module
from fxmse.passes.versions import Versions

MINMAX = make_config(
    weights={"num_bits": 8, "strategy": "channel", "observer": "memoryless_minmax"},
    inputs={"num_bits": 8, "symmetric": False, "observer": "static_minmax"},
)
BATCHES = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def set_item(x, y):
    x[:, 0] = 7.0


def add_to_slice(x, y):
    x[:, 0] += y[:, 0]


def add(x, y):
    x += 2 * y


METHODS = {
    "slice": lambda x, y: x[:, :4].add_(5),
    "view": lambda x, y: x.view(-1).mul_(3),
    "relu_": lambda x, y: x.relu_(),
    "F.relu_": lambda x, y: F.relu_(x),
    "F.relu inplace": lambda x, y: F.relu(x, inplace=True),
    "F.relu inplace by position": lambda x, y: F.relu(x, True),
    "chunk": lambda x, y: x.chunk(2, -1)[1].relu_(),
    "unbind": lambda x, y: x.unbind(1)[2].zero_(),
    "transpose": lambda x, y: x.t()[1].fill_(-9.0),
    "reshape": lambda x, y: x.reshape(2, 16)[0].copy_(y.reshape(2, 16)[0] * 4),
    "detach": lambda x, y: x.detach().mul_(2),
    "dropout that passes on": lambda x, y: F.dropout(x, 0.5, False).mul_(2),
    "masked_fill_": lambda x, y: x.masked_fill_(x > 1, -3.0),
    "out": lambda x, y: torch.add(x, 3, out=x),
}
STATEMENTS = {"x[:, 0] = 7": set_item, "x[:, 0] += y[:, 0]": add_to_slice, "x += 2 * y": add}


class Written(nn.Module):
    def __init__(self, write):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.write = write

    def forward(self, x):
        x = x * 1.5
        y = self.first(x)
        again = self.third(x)
        self.write(x, y)
        return y + again + self.second(x)


class Inplace(nn.Module):
    """A residual block whose activation is computed in place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.relu = nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(inplace=True)

    def forward(self, x):
        x = x * 1.5
        y = self.first(x)
        return self.second(self.relu(x)) + y


def run_calibration(model, batches, x):
    torch._dynamo.reset()
    calibration = fxmse.Calibration(MINMAX, model)
    step = torch.compile(model, backend=calibration)
    with torch.no_grad():
        for batch in batches:
            step(batch.clone())
        calibration.fold()
        return step(x.clone())


def run(front_end, model, batches, x):
    """What the model quantized by way of a front end gives for x."""
    if front_end == "calibration":
        return run_calibration(model, batches, x)
    if front_end == "export":
        model = torch.export.export(model, (x.clone(),))
    elif front_end == "symbolic_trace":
        model = torch.fx.symbolic_trace(model)
    return fxmse.quantize(model, MINMAX, [batch.clone() for batch in batches], progress=False)(x.clone())


CASES = [
    *((name, front_end) for name in METHODS for front_end in ("module", "symbolic_trace")),
    *((name, front_end) for name in STATEMENTS for front_end in ("module", "calibration")),
    *(("slice", front_end) for front_end in ("export", "calibration")),
]


@pytest.mark.filterwarnings("ignore:Written was exported with the first dimension fixed")  # by a reshape
@pytest.mark.parametrize(("name", "front_end"), CASES)
def test_a_write_between_two_readers_makes_two_values(name, front_end):
    model = Written({**METHODS, **STATEMENTS}[name]).eval()
    expected = quantize_by_hand(model, BATCHES, BATCHES[0])
    with torch.no_grad():
        # The write counts: with one range for both readers the result would be another.
        assert (model(BATCHES[0].clone()) - expected).abs().max() < 0.2
    torch.testing.assert_close(run(front_end, model, BATCHES, BATCHES[0]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("front_end", ["module", "symbolic_trace", "calibration"])
def test_an_activation_in_place_makes_two_values(front_end):
    model = Inplace().eval()
    expected = quantize_by_hand(model, BATCHES, BATCHES[0])
    torch.testing.assert_close(run(front_end, model, BATCHES, BATCHES[0]), expected, rtol=1e-5, atol=1e-5)


def test_readers_without_a_write_between_them_share():
    graph_module = torch.fx.symbolic_trace(Written(METHODS["relu_"]))
    observed = fxmse.prepare(graph_module, MINMAX)
    names = {name for name, _ in observed.named_modules() if name.endswith("input_observer")}
    assert names == {"first.input_observer", "second.input_observer"}  # the third reads what the first does


def test_what_is_fresh_is_not_written_with_its_source():
    class Fresh(nn.Module):
        def forward(self, x):
            copy = x.clone()
            copy.add_(1)
            product = torch.matmul(x, x)
            product.relu_()
            return x + copy + product

    graph_module = torch.fx.symbolic_trace(Fresh())
    versions = Versions(graph_module)
    x = next(iter(graph_module.graph.find_nodes(op="placeholder")))
    assert not versions.is_written(x)
    assert len({versions.find(x, reader) for reader in x.users}) == 1


class Cache(nn.Module):
    """Writes a buffer twice and reads it behind each write, as a key-value cache is; and counts its calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("cache", torch.zeros(3, 8))
        self.register_buffer("step", torch.zeros(()))

    def forward(self, x):
        self.step.add_(1)
        self.cache[:] = x[:3]
        y = self.first(self.cache)
        self.cache[1:] = 5 * x[1:3]
        return self.second(self.cache) + y


@pytest.mark.parametrize("front_end", ["module", "export", "calibration"])
def test_a_cache_is_another_value_after_each_write(front_end):
    expected = quantize_by_hand(Cache().eval(), BATCHES, BATCHES[0])
    found = run(front_end, Cache().eval(), BATCHES, BATCHES[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_models_buffers_stay_as_they_are():
    model = Cache().eval()
    quantized = fxmse.quantize(model, MINMAX, BATCHES, progress=False)
    fxmse.report(quantized, BATCHES)
    for state in (model.state_dict(), quantized.state_dict()):
        assert state["step"] == 0
        assert not state["cache"].any()
    quantized(BATCHES[0])  # whoever runs the graph writes its buffers, as the model's forward does
    assert quantized.step == 1


def test_a_parameter_that_the_graph_writes_stays_float():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            self.fc.weight.data.mul_(x.mean())
            return self.head(self.fc(x))

    with pytest.warns(UserWarning, match=r"left in float: fc \(its weight depends on the data"):
        observed = fxmse.prepare(torch.fx.symbolic_trace(Normed()), MINMAX)
    assert {name.partition(".")[0] for name, _ in observed.named_modules() if "observer" in name} == {"head"}


def test_a_copied_graph_has_the_same_versions():
    graph_module = torch.fx.symbolic_trace(Written(METHODS["relu_"]))
    first, second = Versions(graph_module), Versions(copy_graph_module(graph_module))
    assert len(first._writes) == len(second._writes) == 1
