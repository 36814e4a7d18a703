"""The fake-quantize op against compressed-tensors, bit for bit, and in every form that torch gives it."""

import pytest
import torch
from cases import ACTIVATION_ARGS, NVFP4, WEIGHT_ARGS, make_args, make_weight
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle import fake_quantize as reference_fake_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

from fxmse.layout import Layout
from fxmse.observers import Observer
from fxmse.ops import FAKE_QUANTIZE, fake_quantize

ALL_ARGS = {**WEIGHT_ARGS, "nvfp4": NVFP4}


def find_qparams(value, args, base_name="weight"):
    return Observer.load_from_registry("memoryless_minmax", base_name=base_name, args=args)(value).get_qparams()


def call(value, qparams, args: QuantizationArgs, op=fake_quantize):
    layout = Layout.of(args, "weight")
    return op(
        value,
        qparams["scale"],
        qparams["zero_point"],
        qparams["global_scale"],
        args.num_bits,
        args.type,
        layout.strategy,
        layout.group_size,
        layout.block_structure and list(layout.block_structure),
    )


def equal_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "heavy", "special"])
@pytest.mark.parametrize("name", ALL_ARGS)
def test_equals_compressed_tensors_bit_for_bit(name, kind, dtype):
    args, value = ALL_ARGS[name], make_weight(kind).to(dtype)
    qparams = find_qparams(value * 0.7, args)  # some values lie outside the range
    expected = reference_fake_quantize(
        value, qparams["scale"], qparams["zero_point"], args, global_scale=qparams["global_scale"]
    )
    assert equal_bits(call(value, qparams, args), expected)
    if args.symmetric:
        # Folded graphs leave the zero point of a symmetric format out.
        assert torch.equal(call(value, {**qparams, "zero_point": None}, args), expected)


@pytest.mark.parametrize("shape", [(5, 64), (2, 5, 64), (2, 3, 5, 64)])
@pytest.mark.parametrize("name", ACTIVATION_ARGS)
def test_activations_equal_compressed_tensors(name, shape):
    args, value = ACTIVATION_ARGS[name], torch.randn(shape)
    qparams = find_qparams(value, args, "input")
    if args.strategy == "group":
        # compressed-tensors takes one scale a group of channels in the shape (1, groups).
        qparams = {k: v if v is None else v[None] for k, v in qparams.items()}
    expected = reference_fake_quantize(value, qparams["scale"], qparams["zero_point"], args)
    assert equal_bits(call(value, qparams, args), expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(sorted(ALL_ARGS)))
def test_twice_equals_once(seed, name):
    args, value = ALL_ARGS[name], make_weight("heavy", rows=16, columns=32, seed=seed)
    qparams = find_qparams(value * 0.8, args)
    once = call(value, qparams, args)
    assert torch.equal(call(once, qparams, args), once)


@pytest.mark.parametrize("name", ALL_ARGS)
def test_fake_kernel_and_registration(name):
    args, value = ALL_ARGS[name], torch.randn(24, 96, requires_grad=True)
    qparams = find_qparams(value.detach(), args)
    layout = Layout.of(args, "weight")
    if args.symmetric:
        qparams["zero_point"] = None  # opcheck cannot compare float8
    torch.library.opcheck(
        FAKE_QUANTIZE,
        (
            *(value, qparams["scale"], qparams["zero_point"], qparams["global_scale"]),
            *(args.num_bits, args.type, layout.strategy, layout.group_size),
            layout.block_structure and list(layout.block_structure),
        ),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_gradient_is_straight_through():
    args, value = make_args(4), torch.randn(8, 8, requires_grad=True)
    qparams = find_qparams(value.detach() * 0.5, args)
    weight = torch.randn(8, 8)
    for function in (call, torch.compile(call, fullgraph=True)):
        value.grad = None
        (function(value, qparams, args) * weight).sum().backward()
        assert torch.equal(value.grad, weight)


@pytest.mark.parametrize("name", ["int8_asym_channel", "int4_g32", "nvfp4", "fp8_block"])
def test_inductor_sees_the_arithmetic_and_gives_equal_bits(name):
    args, value = ALL_ARGS[name], make_weight("heavy")
    qparams = find_qparams(value * 0.7, args)
    compiled = torch.compile(lambda value: call(value, qparams, args) + 0, fullgraph=True)
    result, (code,) = run_and_get_code(compiled, value)
    assert "fxmse" not in code
    assert torch.equal(result, call(value, qparams, args))


class Quantized(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        qparams = find_qparams(make_weight("normal"), args)
        for name, tensor in qparams.items():
            self.register_buffer(name, tensor)

    def forward(self, x):
        qparams = {"scale": self.scale, "zero_point": self.zero_point, "global_scale": self.global_scale}
        return call(x, qparams, self.args) * 2


@pytest.mark.parametrize("name", ["int4_asym_g32", "nvfp4", "int8_block"])
def test_export_keeps_one_node_and_decomposes_on_demand(name, tmp_path):
    module, value = Quantized(ALL_ARGS[name]), make_weight("heavy")
    program = torch.export.export(module, (value,))
    assert [n.target for n in program.graph.nodes].count(FAKE_QUANTIZE) == 1
    torch.export.save(program, tmp_path / "module.pt2")
    loaded = torch.export.load(tmp_path / "module.pt2")
    assert torch.equal(loaded.module()(value), module(value))
    decomposed = program.run_decompositions()
    assert not any("fxmse" in str(n.target) for n in decomposed.graph.nodes)
    assert torch.equal(decomposed.module()(value), module(value))
