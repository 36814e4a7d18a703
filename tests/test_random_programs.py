"""Small models that hypothesis writes, quantized by way of each front end, against plain arithmetic on the model."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
from cases import make_args
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain import QuantizeOps, quantize_by_range, quantize_groups, quantize_rows, quantize_tensor
from random_programs import Program, make_batch, programs
from torch._dynamo.exc import BackendCompilerFailed

import fxmse
from fxmse.config import NothingMatchedError
from fxmse.observers import Observer

WEIGHTS = {"num_bits": 8, "strategy": "channel", "observer": "memoryless_minmax"}
INPUTS = {"num_bits": 8, "symmetric": False, "observer": "static_minmax"}
LAYERS = ["Linear", "Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d"]


def observe_exactly(args, base_name, values):
    """What fxmse's search finds for values that plain arithmetic gives: which values are searched is what is tested."""
    observer = Observer.load_from_registry("exact_mse", base_name=base_name, args=args)
    for value in values:
        observer(value)
    qparams = observer.get_qparams()
    return lambda value: fake_quantize(value, qparams["scale"], qparams.get("zero_point"), args)


def find_rows_exactly(rows):
    return observe_exactly(make_args(**EXACT_WEIGHTS), "weight", [rows])(rows)


def find_inputs_exactly(values):
    return observe_exactly(make_args(**EXACT_INPUTS), "input", values)


class DoesNotFit(Exception):
    """A row has a number of elements that is no multiple of the group size."""


def quantize_groups_of_4(rows):
    if rows.shape[-1] % 4:
        raise DoesNotFit
    return quantize_groups(rows, 4)


EXACT_WEIGHTS = {"num_bits": 4, "strategy": "channel", "observer": "exact_mse"}
EXACT_INPUTS = {**INPUTS, "num_bits": 4, "observer": "exact_mse"}


@dataclass(frozen=True)
class Case:
    """A config, and how plain arithmetic does the same."""

    weights: dict = field(default_factory=lambda: WEIGHTS)
    inputs: dict = field(default_factory=lambda: INPUTS)
    has_outputs: bool = False
    quantize_rows: Callable = quantize_rows
    make_quantizer: Callable = quantize_by_range
    tolerance: float = 1e-9

    @property
    def config(self) -> QuantizationConfig:
        weights, inputs = make_args(**self.weights), make_args(**self.inputs)
        outputs = inputs if self.has_outputs else None
        layers = QuantizationScheme(
            targets=LAYERS, weights=weights, input_activations=inputs, output_activations=outputs
        )
        tables = QuantizationScheme(targets=["Embedding"], weights=weights)
        products = QuantizationScheme(targets=["matmul", "bmm", "mm"], input_activations=inputs)
        return QuantizationConfig(config_groups={"layers": layers, "tables": tables, "products": products})

    def make_reference(self, model):
        return QuantizeOps(
            model,
            outputs=self.has_outputs,
            quantize_rows=self.quantize_rows,
            make_quantizer=self.make_quantizer,
        )


CASES = {
    "inputs": Case(),
    "outputs": Case(has_outputs=True),
    "tensors": Case({**WEIGHTS, "strategy": "tensor"}, quantize_rows=quantize_tensor),
    "groups": Case(
        {**WEIGHTS, "num_bits": 4, "strategy": "group", "group_size": 4}, quantize_rows=quantize_groups_of_4
    ),
    # Where the best scale is follows from float32 sums, whose order depends on a weight's shape (an expanded one has
    # more dimensions): it may be an ulp off.
    "exact": Case(EXACT_WEIGHTS, EXACT_INPUTS, False, find_rows_exactly, find_inputs_exactly, 1e-6),
}
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
def check(program, front_end, name="inputs"):
    """Raises AssertionError where the quantized model gives another result than plain arithmetic."""
    case = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what stays in float, which the reference finds out by itself, and of sizes
        try:
            found = quantize(front_end, program, case.config, BATCHES[1])
        except NothingMatchedError:
            found = program.make_model()(*clone(BATCHES)[1])
        except (ValueError, BackendCompilerFailed) as error:
            if "does not divide the last dimension" not in str(error):
                raise
            found = None
    reference = case.make_reference(program.make_model())
    try:
        reference.calibrate(BATCHES)
        expected = reference.run(BATCHES[1])
    except DoesNotFit:
        assert found is None
        return
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one, other, rtol=case.tolerance, atol=case.tolerance * max(1, other.abs().max().item())
        )


FRONT_ENDS = ("symbolic_trace", "module", "export", "calibration")


def hold_for_programs(front_end, **options):
    """Hypothesis's search for a program that is quantized wrongly; it prints the smallest as code."""

    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), **options)
    @given(programs(front_end), st.sampled_from(list(CASES)))
    def holds(program, name):
        check(program, front_end, name)

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


THREE_LAYERS = ("self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)",)
CACHE = (*THREE_LAYERS, "self.register_buffer('cache', torch.zeros(4, 6, 8))")
READ_BEFORE = ("y = self.a(x)", "z = self.b(y)")
# What hypothesis does not write, by hand.
SPELLINGS = {
    "y[...] =": (THREE_LAYERS, (*READ_BEFORE, "y[...] = z * 3", "y = self.c(y) + z")),
    "where with out": (THREE_LAYERS, (*READ_BEFORE, "torch.where(z > 0, z, y * 5, out=y)", "y = self.c(y)")),
    "index_put_": (
        THREE_LAYERS,
        (*READ_BEFORE, "y.index_put_((torch.tensor([0, 1]),), z[0] * 9)", "y = self.c(y)"),
    ),
    "narrow and copy_": (
        THREE_LAYERS,
        (*READ_BEFORE, "y.narrow(-1, 0, 4).copy_(z.narrow(-1, 4, 4) * 6)", "y = self.c(y)"),
    ),
    "masked_scatter_": (THREE_LAYERS, (*READ_BEFORE, "y.masked_scatter_(y > 0, z * 4)", "y = self.c(y)")),
    "views of views": (
        THREE_LAYERS,
        (*READ_BEFORE, "y.unflatten(-1, (2, 4)).select(-2, 0).mul_(7)", "y = self.c(y) + z"),
    ),
    "lerp_ and addcmul_": (THREE_LAYERS, (*READ_BEFORE, "y.lerp_(z, 0.9).addcmul_(z, z, value=5)", "y = self.c(y)")),
    "a loop": (THREE_LAYERS, ("y = self.a(x)", "for i in range(3): y[:, i] = self.b(y)[:, i] * 2", "y = self.c(y)")),
    "a cache": (
        CACHE,
        (
            "self.cache[:, :3] = self.a(x)[:, :3]",
            "y = self.b(self.cache)",
            "self.cache[:, 3:] = y[:, 3:] * 4",
            "y = self.c(self.cache) + y",
        ),
    ),
    "a cache by index_copy_": (
        CACHE,
        (
            "self.cache.index_copy_(1, torch.tensor([0, 2]), self.a(x)[:, :2])",
            "y = self.b(self.cache)",
            "self.cache.mul_(2)",
            "y = self.c(self.cache) + y",
        ),
    ),
    "regions in regions": (
        THREE_LAYERS,
        (
            "with torch.no_grad(), torch.autocast('cpu', enabled=False):",
            "    y = self.a(x)",
            "    with torch.enable_grad(): y = self.b(y)",
            "y = self.c(y)",
        ),
    ),
    "parameters in a list": (
        ("self.p = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(3)])",),
        ("y = x", "for p in self.p: y = torch.tanh(F.linear(3 * y, p))"),
    ),
    "functional_call": (
        THREE_LAYERS,
        ("y = torch.func.functional_call(self.a, {'weight': self.b.weight, 'bias': self.b.bias}, (self.a(x),))",),
    ),
    "a block diagonal": (
        THREE_LAYERS,
        ("y = F.linear(torch.cat([x, x], -1), torch.block_diag(self.a.weight, self.b.weight))",),
    ),
    "rows of two layers": (
        THREE_LAYERS,
        ("y = F.linear(x, torch.vstack([self.a.weight, self.b.weight]))[..., :8] + self.a(2 * x)",),
    ),
    "a triangle": (THREE_LAYERS, ("y = F.linear(x, self.a.weight.tril()) + self.a(3 * x)",)),
    "low rank": (("self.p = nn.Parameter(torch.randn(16, 8))",), ("y = F.linear(x, self.p[:8] @ self.p[8:])",)),
}


@pytest.mark.parametrize("front_end", ["export", "calibration"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name, front_end):
    init, lines = SPELLINGS[name]
    check(Program(init, lines, ("y",)), front_end)
