"""The fake-quantize op against compressed-tensors, bit for bit, and in every form that torch gives it."""

import pytest
import torch
from cases import ACTIVATION_ARGS, DYNAMIC_ARGS, NVFP4, WEIGHT_ARGS, copies_pytree_specs, make_args, make_weight
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle import fake_quantize as reference_fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

from fxmse.formats.layout import Layout
from fxmse.observers import Observer
from fxmse.ops import DYNAMIC_FAKE_QUANTIZE, FAKE_QUANTIZE, dynamic_fake_quantize, fake_quantize

ALL_ARGS = {**WEIGHT_ARGS, "nvfp4": NVFP4}


def move(device, value, qparams):
    return value.to(device), {name: None if tensor is None else tensor.to(device) for name, tensor in qparams.items()}


def find_qparams(value, args, base_name="weight"):
    return Observer.load_from_registry("memoryless_minmax", base_name=base_name, args=args)(value).get_qparams()


def call(value, qparams, args: QuantizationArgs):
    layout = Layout.of(args, "weight")
    return fake_quantize(
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


def with_zeros(value):
    """``value`` with zeros of either sign, and with what is rounded to them."""
    value[..., 3], value[..., 4], value[..., 5] = -0.0, -2e-3, 2e-3
    value[0] = -0.0
    return value


def equal_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "heavy", "special"])
@pytest.mark.parametrize("name", ALL_ARGS)
def test_equals_compressed_tensors_bit_for_bit(name, kind, dtype, device):
    args, value = ALL_ARGS[name], with_zeros(make_weight(kind).to(dtype))
    qparams = find_qparams(value * 0.7, args)  # some values lie outside the range
    # Folded graphs leave the zero point of a symmetric format out: adding 0 makes 0.0 of -0.0.
    for zero_point in (qparams["zero_point"], None)[: 1 + args.symmetric]:
        given = {**qparams, "zero_point": zero_point}
        expected = reference_fake_quantize(value, given["scale"], zero_point, args, global_scale=given["global_scale"])
        assert equal_bits(call(*move(device, value, given), args).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int4_asym_g32", "fp8_channel", "nvfp4"])
def test_compiled_equals_compressed_tensors_bit_for_bit(name, dtype, device):
    args, value = ALL_ARGS[name], with_zeros(make_weight("normal").to(dtype))
    qparams = find_qparams(value * 0.7, args)
    expected = reference_fake_quantize(
        value, qparams["scale"], qparams["zero_point"], args, global_scale=qparams["global_scale"]
    )
    # What is computed of the result meets the rounded one, too.
    compiled = torch.compile(lambda value, qparams: (call(value, qparams, args), call(value, qparams, args) * 3))
    found, tripled = (result.cpu() for result in compiled(*move(device, value, qparams)))
    assert equal_bits(found, expected)
    assert equal_bits(tripled, expected * 3)


@pytest.mark.parametrize("shape", [(5, 64), (2, 5, 64), (2, 3, 5, 64)])
@pytest.mark.parametrize("name", ACTIVATION_ARGS)
def test_activations_equal_compressed_tensors(name, shape, device):
    args, value = ACTIVATION_ARGS[name], torch.randn(shape)
    qparams = find_qparams(value, args, "input")
    if args.strategy == "group":
        # compressed-tensors takes one scale a group of channels in the shape (1, groups).
        qparams = {k: v if v is None else v[None] for k, v in qparams.items()}
    expected = reference_fake_quantize(value, qparams["scale"], qparams["zero_point"], args)
    assert equal_bits(call(*move(device, value, qparams), args).cpu(), expected)


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
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        value.grad = None
        (function(value, qparams, args) * weight).sum().backward()
        assert torch.equal(value.grad, weight)


@pytest.mark.parametrize("name", ["int8_asym_channel", "int4_g32", "nvfp4", "fp8_block"])
def test_inductor_sees_the_arithmetic_and_gives_equal_bits(name, device):
    args, value = ALL_ARGS[name], make_weight("heavy")
    value, qparams = move(device, value, find_qparams(value * 0.7, args))
    compiled = torch.compile(lambda value: call(value, qparams, args) + 0, fullgraph=True)
    with torch._inductor.config.patch("eager_numerics.division_rounding", True):  # Triton's own is an ulp off
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


@copies_pytree_specs
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


def list_dynamic_arguments(args, global_scale=None):
    if args.dynamic == "local" and global_scale is None:
        global_scale = torch.tensor([700.0])
    scale_dtype = args.scale_dtype
    return global_scale, args.num_bits, args.type, args.symmetric, args.strategy, args.group_size, scale_dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["normal", "heavy", "special"])
@pytest.mark.parametrize("name", DYNAMIC_ARGS)
def test_dynamic_equals_compressed_tensors_bit_for_bit(name, kind, dtype, device):
    args, value = DYNAMIC_ARGS[name], with_zeros(make_weight(kind, rows=24, columns=96).to(dtype)).reshape(2, 12, 96)
    arguments = list_dynamic_arguments(args)
    scale, zero_point = compute_dynamic_scales_and_zp(value, args, module=None, global_scale=arguments[0])
    expected = reference_fake_quantize(value, scale, zero_point, args, global_scale=arguments[0])
    global_scale, *others = arguments
    on_device = None if global_scale is None else global_scale.to(device)
    found = dynamic_fake_quantize(value.to(device), on_device, *others).cpu()
    assert equal_bits(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8_token", "int4_asym_dynamic_g32"])
def test_dynamic_is_compiled_to_the_same_bits(name, dtype, device):
    arguments = list_dynamic_arguments(DYNAMIC_ARGS[name])
    value = with_zeros(make_weight("normal").to(dtype)).to(device)
    compiled = torch.compile(lambda value: dynamic_fake_quantize(value, *arguments))
    assert equal_bits(compiled(value), dynamic_fake_quantize(value, *arguments))


@pytest.mark.parametrize("name", ["int8_token", "fp8_token", "int8_asym_token"])
def test_a_row_is_a_token_whatever_the_other_dimensions(name):
    value, arguments = torch.randn(2, 3, 4, 32), list_dynamic_arguments(DYNAMIC_ARGS[name])
    expected = dynamic_fake_quantize(value.reshape(1, -1, 32), *arguments)
    for shape in ((24, 32), (2, 3, 4, 32)):
        assert torch.equal(dynamic_fake_quantize(value.reshape(shape), *arguments).flatten(), expected.flatten())


@pytest.mark.parametrize("name", DYNAMIC_ARGS)
def test_dynamic_fake_kernel_gradient_and_compilation(name):
    args = DYNAMIC_ARGS[name]
    arguments = list_dynamic_arguments(args)
    value = torch.randn(2, 12, 96, requires_grad=True)
    torch.library.opcheck(
        DYNAMIC_FAKE_QUANTIZE,
        (value, *arguments),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    weight = torch.randn(2, 12, 96)
    (dynamic_fake_quantize(value, *arguments) * weight).sum().backward()
    assert torch.equal(value.grad, weight)


@pytest.mark.parametrize("name", ["int8_asym_token", "nvfp4_local", "mxfp4_dynamic", "fp8_dynamic_g32"])
def test_dynamic_compiles_to_its_arithmetic_and_exports_as_one_node(name, tmp_path):
    arguments, value = list_dynamic_arguments(DYNAMIC_ARGS[name]), torch.randn(2, 12, 96)

    class Module(torch.nn.Module):
        def forward(self, x):
            return dynamic_fake_quantize(x, *arguments) + 0

    result, (code,) = run_and_get_code(torch.compile(Module(), fullgraph=True), value)
    assert "fxmse" not in code
    torch.testing.assert_close(result, Module()(value), rtol=1e-6, atol=0)
    program = torch.export.export(Module(), (value,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert [n.target for n in program.graph.nodes].count(DYNAMIC_FAKE_QUANTIZE) == 1
    torch.export.save(program, tmp_path / "module.pt2")
    other = torch.randn(3, 12, 96)
    assert torch.equal(torch.export.load(tmp_path / "module.pt2").module()(other), Module()(other))


@pytest.mark.parametrize("strategy", ["tensor", "token"])
def test_dynamic_values_without_tokens(strategy):
    x = torch.randn(0, 8)
    for symmetric in (True, False):
        found = dynamic_fake_quantize(x, None, 8, "int", symmetric, strategy)
        assert found.shape == x.shape
