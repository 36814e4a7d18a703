"""Small models that hypothesis writes, quantized by way of each front end, against plain arithmetic on the model."""

import warnings
from unittest import mock

import pytest
import torch
from cases import make_args
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain import QuantizeOps
from random_programs import Program, make_batch, programs

import fxmse
from fxmse.config import NothingMatchedError

WEIGHTS = make_args(8, strategy="channel", observer="memoryless_minmax")
INPUTS = make_args(8, symmetric=False, observer="static_minmax")
LAYERS = ["Linear", "Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d"]


def make_config(outputs=None):
    layers = QuantizationScheme(targets=LAYERS, weights=WEIGHTS, input_activations=INPUTS, output_activations=outputs)
    tables = QuantizationScheme(targets=["Embedding"], weights=WEIGHTS)
    products = QuantizationScheme(targets=["matmul", "bmm", "mm"], input_activations=INPUTS)
    return QuantizationConfig(config_groups={"layers": layers, "tables": tables, "products": products})


CONFIGS = {"inputs": make_config(), "outputs": make_config(INPUTS)}
BATCHES = [make_batch(seed) for seed in range(3)]


def clone(batches):
    return [tuple(tensor.clone() for tensor in batch) for batch in batches]


def calibrate_by_compiling(model, config, x):
    torch._dynamo.reset()
    calibration = fxmse.Calibration(config, model)
    step = torch.compile(model, backend=calibration)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for batch in clone(BATCHES):
        step(*batch)
    model.load_state_dict(buffers, strict=False)
    with mock.patch.object(torch, "compile", lambda graph_module: graph_module):  # Inductor's arithmetic differs
        calibration.fold()
        return step(*clone([x])[0])


def quantize(front_end, program, config, x):
    model = program.make_model()
    if front_end == "calibration":
        return calibrate_by_compiling(model, config, x)
    if front_end == "symbolic_trace":
        model = torch.fx.symbolic_trace(model)
    elif front_end == "export":
        model = torch.export.export(model, clone(BATCHES)[0])
    return fxmse.quantize(model, config, clone(BATCHES), progress=False)(*clone([x])[0])


@torch.no_grad()
def check(program, front_end, config_name="inputs"):
    """Raises AssertionError where the quantized model gives another result than plain arithmetic."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what stays in float, which the reference finds out by itself, and of sizes
        try:
            found = quantize(front_end, program, CONFIGS[config_name], BATCHES[1])
        except NothingMatchedError:
            found = program.make_model()(*clone(BATCHES)[1])
    reference = QuantizeOps(program.make_model(), outputs=config_name == "outputs")
    reference.calibrate(BATCHES)
    for one, other in zip(found, reference.run(BATCHES[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * max(1, other.abs().max().item()))


FRONT_ENDS = ("symbolic_trace", "module", "export", "calibration")


def hold_for_programs(front_end, **options):
    """Hypothesis's search for a program that is quantized wrongly; it prints the smallest as code."""

    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), **options)
    @given(programs(front_end), st.sampled_from(list(CONFIGS)))
    def holds(program, config_name):
        check(program, front_end, config_name)

    holds()


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_random_programs(front_end):
    hold_for_programs(front_end, max_examples=25, derandomize=True)


@pytest.mark.nightly
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_thousands_of_random_programs(front_end):
    hold_for_programs(front_end, max_examples=2500)


TWO_LAYERS = ("self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)",)
# What was wrong once, each with the statements that make its modules and those of its forward.
FOUND = {
    "a layer shares with another that reads less": (TWO_LAYERS, ("y = self.a(x)", "y = self.a(5 * y) + self.b(x)")),
    "a layer shares with two others": (TWO_LAYERS, ("y = 5 * x", "y = self.b(y) + self.a(x) + self.b(x)")),
    "layers that read the same values share": (
        TWO_LAYERS,
        ("z = 5 * x", "y = self.a(z) + self.b(x) + self.a(x) + self.b(z)"),
    ),
    "two layers of one flat parameter": (
        ("self.p = nn.Parameter(torch.randn(128))",),
        ("y = F.linear(5 * x, self.p[:64].view(8, 8))", "y = F.linear(y, self.p[64:].view(8, 8))"),
    ),
    "a decoder that reads its encoder's weight": (
        ("self.a = nn.Linear(8, 8)",),
        ("y = self.a(x)", "y = F.linear(5 * y, self.a.weight.t())"),
    ),
    "one computed matrix from both sides": (
        ("self.p = nn.Parameter(torch.randn(8, 8))",),
        ("y = x @ torch.flip(self.p, (0,)).t()", "y = F.linear(5 * y, torch.flip(self.p, (0,)))"),
    ),
    "one matrix in two words": (
        ("self.p = nn.Parameter(torch.randn(8, 8, 1))",),
        ("y = F.linear(x, self.p.squeeze(-1))", "y = F.linear(5 * y, self.p[:, :, 0])"),
    ),
    "some rows": (
        ("self.p = nn.Parameter(torch.randn(9, 8))",),
        ("y = F.linear(x, self.p.narrow(0, 1, 8))", "y = (5 * y).matmul(self.p.narrow(0, 1, 8).mT)"),
    ),
    "two layers of one matrix": (
        ("self.p = nn.Parameter(torch.randn(16, 8))",),
        ("y = F.linear(5 * x, self.p[:8])", "y = F.linear(y, self.p[8:])"),
    ),
    "a product that is written": (
        ("self.p = nn.Parameter(torch.randn(8, 8))",),
        ("y = torch.einsum('...i,oi->...o', x, self.p)", "y.mul_(2)", "y = y + x @ self.p.t()"),
    ),
    "a permuted value that is written": (
        TWO_LAYERS,
        ("z = x * 2", "y = self.a(z)", "torch.einsum('bti->tbi', z).mul_(3)", "y = y + self.b(z)"),
    ),
    "values that are broadcast and written": (
        TWO_LAYERS,
        ("z = x * 2", "y = self.a(z)", "torch.broadcast_tensors(x, z)[1].mul_(3)", "y = y + self.b(z)"),
    ),
}


@pytest.mark.parametrize("front_end", ["symbolic_trace", "module"])
@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name, front_end):
    init, lines = FOUND[name]
    check(Program(init, lines, ("y",)), front_end, "outputs")


@pytest.mark.parametrize("op", ["F.linear(x, self.several[0])", "x @ self.several[0]"])
@pytest.mark.parametrize("front_end", FRONT_ENDS[:3])
def test_parameters_in_lists_are_parameters(op, front_end):
    init = ("self.p = nn.Parameter(torch.randn(8, 8))", "self.several = [self.p]", "self.a = nn.Linear(8, 8)")
    program = Program(init, (f"y = self.a(5 * {op})",), ("y",))
    check(program, front_end)
