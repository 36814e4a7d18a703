"""``bias_correction`` against plain float64: a corrected layer's outputs have the means that they had in float."""

import warnings

import pytest
import torch
from torch import nn

import fxmse
from fxmse.observers.inputs import Mean
from fxmse.passes import InsertObservers

INT3 = {"num_bits": 3, "strategy": "channel"}


def make_config(model):
    """All layers of a model to 3 bits."""
    classes = {type(module).__name__ for module in model.modules()} & {"Linear", "Conv1d", "Conv2d", "ConvTranspose1d"}
    return {"targets": sorted(classes or {"Linear"}), "weights": INT3}


class Addmm(nn.Module):
    """A linear as decomposed graphs have it."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 10)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight.t())


LAYERS = {
    "linear": (lambda: nn.Linear(10, 6), (7, 10)),
    "linear of three dimensions": (lambda: nn.Linear(10, 6), (3, 7, 10)),
    "addmm": (Addmm, (7, 10)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (2, 4, 11, 9)),
    "conv2d, same": (lambda: nn.Conv2d(4, 6, (5, 3), padding="same"), (2, 4, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 6, 6)),
}


def make_batches(shape, num=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).exp() for _ in range(num)]


def average_change(layer, quantized, batches):
    """What quantization moves the mean of each output channel by, in float64."""
    wide = {name: p.detach().double() for name, p in layer.named_parameters()}
    narrow = {**wide, "weight": quantized.double()}
    changes = [
        torch.func.functional_call(layer, narrow, (x.double(),))
        - torch.func.functional_call(layer, wide, (x.double(),))
        for x in batches
    ]
    is_conv = layer.weight.dim() > 2
    return torch.cat([(c.movedim(1, -1) if is_conv else c).flatten(0, -2) for c in changes]).mean(0)


def quantize_weight(weight, graph_module):
    """What the graph computes with in place of its only weight, in the parameter's shape."""
    (scale,) = graph_module.buffers()
    return (weight.detach().flatten(1) / scale).round().clamp(-4, 3).mul(scale).view(weight.shape)


@pytest.mark.parametrize("front_end", ["exported", "traced", "decomposed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_mean_of_outputs_is_that_of_the_float_layer(kind, front_end):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, batches = make().eval(), make_batches(shape)
    model = layer if isinstance(layer, Addmm) else nn.Sequential(layer)
    program = torch.export.export(model, (batches[0],))
    forms = {"exported": lambda: program, "decomposed": program.run_decompositions}
    captured = torch.fx.symbolic_trace(model) if front_end == "traced" else forms[front_end]()
    old = layer.bias.detach().clone()
    plain = fxmse.quantize(captured, make_config(model), batches, progress=False)
    corrected = fxmse.quantize(captured, make_config(model), batches, bias_correction=True, progress=False)
    quantized = quantize_weight(layer.weight, plain)
    (bias,) = (p for name, p in corrected.named_parameters() if name.endswith("bias"))
    change = average_change(layer, quantized, batches)
    assert change.abs().max() > 0.01
    torch.testing.assert_close(bias.double(), old.double() - change, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.bias, old)
    # A second look at the same graphs: all outputs move by that, and by nothing else.
    moved = (corrected(batches[0]) - plain(batches[0])).double()
    by_channel = moved.movedim(1, -1) if layer.weight.dim() > 2 else moved
    torch.testing.assert_close(by_channel, -change.expand_as(by_channel), rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """A layer that is called on two values, and one on neither."""

    def __init__(self):
        super().__init__()
        self.fc, self.last = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.last(self.fc(self.fc(x).sigmoid()))


def test_a_layer_that_is_called_twice_has_the_mean_of_both_values():
    torch.manual_seed(0)
    model, batches = Twice().eval(), make_batches((5, 8))
    observed = fxmse.prepare(model, make_config(model), batches[0], bias_correction=True)
    (mean,) = {module for module in observed.modules() if isinstance(module, Mean)}
    fxmse.calibrate(observed, batches, progress=False)
    values = torch.cat([*batches, *(model.fc(x).sigmoid() for x in batches)]).double()
    torch.testing.assert_close(mean.totals[0] / mean.num_tokens, values.mean(0), rtol=1e-5, atol=1e-6)
    # Conversion changes nothing that another one reads.
    first, second = (fxmse.convert(observed).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["fc.bias"], model.fc.bias)
    assert not any("mean" in name for name in first)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.free = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.bias = self.first.bias

    def forward(self, x):
        return self.free(self.second(self.first(x)))


class Reused(nn.Module):
    """A bias that something else reads."""

    def __init__(self):
        super().__init__()
        self.first, self.free = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.free(self.first(x)) + self.first.bias.sin()


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.free = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.free(torch.cond(x.sum() > 0, lambda y: self.first(y), lambda y: y * 2, (x,)))


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.free = nn.ConvTranspose1d(4, 4, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x):
        return self.free(self.first(x.view(-1, 4, 8)))


@pytest.mark.parametrize(
    ("make", "shape", "name", "reason"),
    [
        (Tied, (5, 8), "second.bias", "others read it, too"),
        (Reused, (5, 8), "first.bias", "others read it, too"),
        (Branches, (5, 8), "first.bias", "in a branch or loop"),
        (Transposed, (5, 4, 8), "first.bias", "of ConvTranspose1d, whose outputs' mean is not known"),
    ],
)
def test_what_cannot_be_corrected_is_named_and_stays(make, shape, name, reason):
    torch.manual_seed(0)
    model, batches = make().eval(), make_batches(shape)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantized = fxmse.quantize(model, make_config(model), batches, bias_correction=True, progress=False)
    (message,) = [str(w.message) for w in caught if "biases" in str(w.message)]
    assert message == f"biases that stay as they are: {name} ({reason})"
    assert torch.equal(quantized.state_dict()[name], model.first.bias)
    assert not torch.equal(quantized.state_dict()["free.bias"], model.free.bias)


def test_without_data_there_is_nothing_to_correct_by():
    observed = fxmse.prepare(
        nn.Linear(4, 4), {"targets": ["Linear"], "weights": INT3}, torch.randn(2, 4), bias_correction=True
    )
    fxmse.calibrate(observed)
    with pytest.raises(ValueError, match=r"nothing was seen by weight_input_mean: run calibration data"):
        fxmse.convert(observed)


def test_the_observed_graph_computes_what_it_did_and_goes_on_where_it_was_saved():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval(), make_batches((5, 8), 4)
    whole = fxmse.prepare(model, make_config(model), batches[0], bias_correction=True)
    assert torch.equal(whole(batches[0]), model(batches[0]))
    assert not InsertObservers(make_config(model), bias_correction=True)(whole).modified
    whole = fxmse.prepare(model, make_config(model), batches[0], bias_correction=True)
    parts = [fxmse.prepare(model, make_config(model), batches[0], bias_correction=True) for _ in range(2)]
    fxmse.calibrate(whole, batches, progress=False)
    fxmse.calibrate(parts[0], batches[:2], progress=False)
    parts[1].load_state_dict(parts[0].state_dict())
    fxmse.calibrate(parts[1], batches[2:], progress=False)
    bad = [torch.full((2, 8), torch.nan)]
    with pytest.raises(ValueError, match=r"0\.weight_input_mean has 16 NaN"):
        fxmse.calibrate(parts[1], bad, progress=False)
    expected, found = (fxmse.convert(graph)(batches[0]) for graph in (whole, parts[1]))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("observer", ["output_mse", "imatrix_mse", "memoryless_mse"])
def test_every_observer_of_weights_can_have_it_and_programs_keep_it(observer, tmp_path):
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(8, 16)).eval(), make_batches((50, 8), 2)
    weights = {"num_bits": 3, "strategy": "group", "group_size": 8, "observer": observer}
    config = {"targets": ["Linear"], "weights": weights}
    corrected = fxmse.quantize(model, config, batches, bias_correction=True, progress=False)
    outputs = (torch.cat([graph(x) for x in batches]).mean(0) for graph in (corrected, model))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    path = tmp_path / "model.pt2"
    torch.export.save(fxmse.export(corrected, batches[0]), path)
    torch.testing.assert_close(torch.export.load(path).module()(batches[0]), corrected(batches[0]))
