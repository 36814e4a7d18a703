"""torch.compile as the calibration step."""

import pytest
import torch
from models import W8A8, Attention, make_config
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import fxmse
from fxmse.outputs.inductor import FakeQuantizePass

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
LINEAR_INPUTS = {"num_bits": 8, "symmetric": False}


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()


def make_mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16)).eval()


def make_batches(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 32, generator=generator) for size in sizes]


class Broken(nn.Module):
    """A graph break between two parts of the root."""

    def __init__(self):
        super().__init__()
        self.first, self.second = make_mlp(), nn.Linear(16, 8)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


class Outer(nn.Module):
    """A graph break inside of a submodule."""

    def __init__(self):
        super().__init__()
        self.block, self.second = Broken(), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(self.block(x))


def get_qparams(quantized):
    return {name: t for name, t in quantized.named_buffers() if name.endswith(("_scale", "_zero_point"))}


def assert_equal_qparams(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@torch.no_grad()
@pytest.mark.parametrize("model_class", [make_mlp, Attention])
def test_it_finds_what_calibrate_finds_and_the_step_becomes_the_quantized_model(model_class):
    model = model_class().eval()
    batches = make_batches(5, 3, 9, 4) if model_class is make_mlp else [Attention.make_inputs(n, n) for n in (3, 5, 4)]
    expected = fxmse.quantize(model, W8A8, batches, progress=False)
    calibration = fxmse.Calibration(W8A8)
    step = torch.compile(model, backend=calibration)
    for batch in batches:
        assert torch.equal(step(batch), model(batch))
    with pytest.raises(ValueError, match=r"the calibration goes on: call fold\(\) first"):
        assert calibration.qparams
    calibration.fold()
    assert_equal_qparams(calibration.qparams, get_qparams(expected))
    counters.clear()
    for batch in batches:
        torch.testing.assert_close(step(batch), expected(batch), rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] >= 1  # Inductor's, of the quantized graph
    calibration.fold()
    assert calibration.is_folded


@torch.no_grad()
def test_the_importance_of_channels_is_of_the_data_of_all_graphs():
    config = make_config(weights={"num_bits": 4, "strategy": "channel", "observer": "imatrix_mse"})
    # Other channels are large in each shape, and each shape makes a graph until sizes are dynamic.
    batches = [batch * torch.linspace(i, 9 - i, 32) for i, batch in enumerate(make_batches(4, 6, 9))]
    calibration = fxmse.Calibration(config)
    step = torch.compile(make_mlp(), backend=calibration)
    for batch in batches:
        step(batch)
    calibration.fold()
    expected = fxmse.quantize(make_mlp(), config, batches, progress=False)
    assert_equal_qparams(calibration.qparams, get_qparams(expected))


@torch.no_grad()
def test_graph_breaks_make_several_graphs_of_one_calibration():
    model, batches = Broken().eval(), make_batches(5, 5, 7)
    calibration = fxmse.Calibration(W8A8)
    step = torch.compile(model, backend=calibration)
    for batch in batches:
        assert torch.equal(step(batch), model(batch))
    calibration.fold()
    parts = fxmse.quantize(model.first, W8A8, batches, progress=False)
    rest = fxmse.quantize(model.second, W8A8, [model.first(batch) for batch in batches], progress=False)
    expected = {f"first.{name}": value for name, value in get_qparams(parts).items()}
    expected |= {f"second.{name}": value for name, value in get_qparams(rest).items()}
    assert_equal_qparams(calibration.qparams, expected)
    torch.testing.assert_close(step(batches[0]), rest(parts(batches[0])), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_break_inside_of_a_submodule_needs_the_model_for_its_names():
    model, batches = Outer().eval(), make_batches(5, 5)
    with pytest.raises(BackendCompilerFailed, match=r"the full name of weight is unknown: pass the model, Calib"):
        torch.compile(model, backend=fxmse.Calibration(W8A8))(batches[0])
    torch._dynamo.reset()
    calibration = fxmse.Calibration(W8A8, model)
    step = torch.compile(model, backend=calibration)
    for batch in batches:
        assert torch.equal(step(batch), model(batch))
    calibration.fold()
    modules = {name.rpartition(".")[0] for name in calibration.qparams}
    assert modules == {"block.first.0", "block.first.2", "block.second", "second"}


@torch.no_grad()
def test_modules_are_matched_by_name_and_class():
    model = Broken().eval()
    calibration = fxmse.Calibration(make_config("re:first.*", inputs=LINEAR_INPUTS, ignore=["first.2"]), model)
    step = torch.compile(model, backend=calibration)
    step(*make_batches(4))
    calibration.fold()
    assert {name.partition("_")[0] for name in calibration.qparams} == {"first.0.weight", "first.0.input"}
    step(*make_batches(4))


@torch.no_grad()
def test_shapes_that_come_after_fold_run_quantized():
    model, batches = make_mlp(), make_batches(5, 5)
    calibration = fxmse.Calibration(W8A8)
    step = torch.compile(model, backend=calibration, dynamic=False)
    for batch in batches:
        step(batch)
    calibration.fold()
    expected = fxmse.quantize(model, W8A8, batches, progress=False)
    more = make_batches(11)[0]
    torch.testing.assert_close(step(more), expected(more), rtol=1e-4, atol=1e-4)
    assert_equal_qparams(calibration.qparams, get_qparams(expected))


def test_a_second_model_is_refused():
    calibration = fxmse.Calibration(W8A8)
    batch = make_batches(4)[0]
    torch.compile(make_mlp(), backend=calibration)(batch)
    # Dynamo takes the first model's graph, of which parameters are inputs.
    with pytest.raises(ValueError, match=r"0.weight is not the parameter that was calibrated: a second model needs"):
        torch.compile(make_mlp(1), backend=calibration)(batch)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match=r"this is a second model, which needs a Calibration of its own"):
        torch.compile(make_mlp(1), backend=calibration)(batch)
    torch._dynamo.reset()
    calibration = fxmse.Calibration(W8A8, make_mlp())
    with pytest.raises(BackendCompilerFailed, match="is no parameter of the model that this Calibration was made for"):
        torch.compile(make_mlp(1), backend=calibration)(batch)


def test_training_goes_straight_through():
    model, batch = make_mlp().train(), make_batches(6)[0]
    calibration = fxmse.Calibration(W8A8)
    step = torch.compile(model, backend=calibration)
    step(batch).sum().backward()
    in_float = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(batch).sum().backward()
    for parameter, grad in zip(model.parameters(), in_float, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    calibration.fold()
    expected = fxmse.quantize(model, W8A8, [batch], progress=False)
    model.zero_grad()
    expected(batch).sum().backward()
    eager = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    step(batch).sum().backward()
    for parameter, grad in zip(model.parameters(), eager, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-3)


def test_dropout_is_refused_until_it_is_folded():
    model = nn.Sequential(nn.Linear(32, 64), nn.Dropout(), nn.Linear(64, 16)).train()
    batch, calibration = make_batches(5)[0], fxmse.Calibration(W8A8)
    with pytest.raises(
        BackendCompilerFailed, match=r"computes as in training mode in .*: .* Call model.eval\(\) before"
    ):
        torch.compile(model, backend=calibration)(batch)
    torch._dynamo.reset()
    step = torch.compile(model.eval(), backend=calibration)
    step(batch)
    calibration.fold()
    model.train()
    assert step(batch).requires_grad  # another graph, with dropout


@torch.no_grad()
def test_a_bad_batch_is_named_and_not_kept():
    model, batches = make_mlp(), make_batches(5, 5)
    calibration = fxmse.Calibration(W8A8)
    step = torch.compile(model, backend=calibration)
    step(batches[0])
    bad = batches[1].clone()
    bad[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or Inf in batch 2: 0.input has 1 NaN and 0 Inf among 160 elements"):
        step(bad)
    step(batches[1])
    calibration.fold()
    assert_equal_qparams(calibration.qparams, get_qparams(fxmse.quantize(model, W8A8, batches, progress=False)))


@torch.no_grad()
def test_folding_too_early_or_nothing_is_an_error():
    with pytest.raises(ValueError, match="no graph was calibrated: run the compiled model on sample data"):
        fxmse.Calibration(W8A8).fold()
    with pytest.raises(ValueError, match="config='W9'"):
        fxmse.Calibration("W9")
    calibration = fxmse.Calibration(make_config("Conv2d"))
    model, batch = make_mlp(), make_batches(3)[0]
    assert torch.equal(torch.compile(model, backend=calibration)(batch), model(batch))
    with pytest.raises(ValueError, match=r"targets \['Conv2d'\].*matched nothing"):
        calibration.fold()


@torch.no_grad()
@pytest.mark.parametrize("is_dynamic", [False, True])
def test_a_pass_of_inductors_puts_in_what_was_calibrated(is_dynamic):
    model, batches = make_mlp(), make_batches(5, 4)
    expected = fxmse.quantize(model, W8A8, batches, progress=False)
    fake_quantize = FakeQuantizePass(W8A8, get_qparams(expected))
    with torch._inductor.config.patch(pre_grad_custom_pass=fake_quantize):
        step = torch.compile(model, dynamic=is_dynamic)
        for batch in make_batches(5, 9):
            torch.testing.assert_close(step(batch), expected(batch), rtol=1e-4, atol=1e-4)
            assert (step(batch) - model(batch)).abs().max() > 1e-4
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model)(batches[0]), model(batches[0]))


def test_the_passes_uuid_is_of_the_config_and_every_qparam():
    qparams = get_qparams(fxmse.quantize(make_mlp(), W8A8, make_batches(5), progress=False))
    uuid = FakeQuantizePass(W8A8, qparams).uuid()
    assert FakeQuantizePass(W8A8.model_copy(deep=True), dict(reversed(qparams.items()))).uuid() == uuid
    changed = {**qparams, "0.input_scale": qparams["0.input_scale"] * (1 + 2**-20)}
    assert FakeQuantizePass(W8A8, changed).uuid() != uuid
    assert FakeQuantizePass(make_config(inputs={"num_bits": 8}), qparams).uuid() != uuid


@torch.no_grad()
def test_the_pass_names_what_it_has_no_qparams_of():
    model, batch = make_mlp(), make_batches(5)[0]
    qparams = get_qparams(fxmse.quantize(model, W8A8, [batch], progress=False))
    del qparams["2.weight_scale"]
    with (
        torch._inductor.config.patch(pre_grad_custom_pass=FakeQuantizePass(W8A8, qparams)),
        pytest.raises(BackendCompilerFailed, match=r"there are no qparams of 2.weight: calibrate this model"),
    ):
        torch.compile(model)(batch)


@torch.no_grad()
def test_the_pass_leaves_other_graphs_alone():
    model, batch = make_mlp(), make_batches(5)[0]
    with torch._inductor.config.patch(pre_grad_custom_pass=FakeQuantizePass(make_config("Conv2d"), {})):
        torch.testing.assert_close(torch.compile(model)(batch), model(batch))
