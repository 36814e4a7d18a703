"""Linear quantization: which scales a value needs, and the ops that ONNX has, against its reference."""

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from fxmse.formats.linear import LINEAR_TYPES, LinearScales, find_linear_type, spread_scales
from fxmse.ops import dequantize_linear, dynamic_quantize_linear, quantize_linear


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=3, max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_every_element_keeps_its_scale(shape, blocks):
    # Blocks along all axes, the last of which may be cut off.
    indices = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    number = torch.zeros(shape, dtype=torch.int64)
    for index, block in zip(indices, blocks, strict=False):
        number = number * 10 + index // block
    found = LinearScales.of(number)
    spread = spread_scales(found.places, number, found.axis, found.block_size)
    assert torch.equal(spread.expand_as(number), number)


def make_places(rows, columns):
    return torch.arange(rows).repeat_interleave(4)[:, None] * 10 + torch.arange(columns).repeat_interleave(6)


@pytest.mark.parametrize(
    ("places", "axis", "block_size", "shape"),
    [
        (torch.zeros(4, 6), 0, 0, []),
        (torch.arange(4)[:, None].expand(4, 6), 0, 0, [4]),
        (torch.arange(6).expand(4, 6), 1, 0, [6]),
        (torch.arange(24).view(4, 6).repeat_interleave(5, 1), 1, 5, [4, 6]),
        (make_places(2, 3), 1, 6, [8, 3]),  # blocks of 4 x 6: along the columns, of which there are fewer
        (torch.arange(6).view(2, 3, 1).expand(2, 3, 7), 2, 7, [2, 3, 1]),  # channels of two matrices
        (torch.arange(2)[:, None, None].expand(2, 3, 7), 0, 0, [2]),
        (torch.zeros(0, 6), 0, 0, []),
    ],
)
def test_scales_are_as_few_as_one_axis_allows(places, axis, block_size, shape):
    found = LinearScales.of(places)
    assert (found.axis, found.block_size, list(found.places.shape)) == (axis, block_size, shape)


@pytest.mark.parametrize(("num_bits", "name"), [(2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 16), (16, 16)])
def test_codes_are_stored_in_the_smallest_type(num_bits, name):
    assert find_linear_type(num_bits, "int").name == f"INT{name}"


def run_reference(op_type, inputs, outputs, opset=24, **attributes):
    """What ONNX's own implementation in numpy gives for one node."""
    names = [f"input_{place}" for place in range(len(inputs))]
    tensors = [
        onnx_ir.serde.serialize_tensor(onnx_ir.tensor(value, name=name))
        for name, value in zip(names, inputs, strict=True)
    ]
    node = onnx.helper.make_node(op_type, names, outputs, **attributes)
    shown = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in outputs]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "graph", [], shown, tensors),
        opset_imports=[onnx.helper.make_opsetid("", opset)],
    )
    return ReferenceEvaluator(model).run(None, {})


FORMS = {"tensor": ((), 0, 0), "axis 0": ((6,), 0, 0), "axis 1": ((8,), 1, 0), "blocks": ((6, 2), 1, 4)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("type", ["INT4", "INT8", "UINT8", "INT16", "FLOAT8E4M3FN"])
def test_the_ops_are_onnxs(type, form):
    shape, axis, block_size = FORMS[form]
    x, scale = torch.randn(6, 8) * 3, torch.rand(shape) + 0.02
    linear = LINEAR_TYPES[type]
    zero_point = torch.zeros(shape, dtype=linear.dtype)
    if not linear.dtype.is_floating_point:
        zero_point = torch.randint(int(linear.range[0]), int(linear.range[1]) + 1, shape).to(linear.dtype)
    codes = quantize_linear(x, scale, zero_point, type, axis, block_size)
    values = dequantize_linear(codes, scale, zero_point, type, axis, block_size)
    stored = onnx_ir.DataType[type].numpy()
    numpy_zero = zero_point.float().numpy().astype(stored)
    attributes = {"axis": axis} | ({"block_size": block_size} if block_size else {})
    [expected_codes] = run_reference("QuantizeLinear", [x.numpy(), scale.numpy(), numpy_zero], ["y"], **attributes)
    assert np.array_equal(codes.float().numpy(), expected_codes.astype(np.float32))
    inputs = [codes.float().numpy().astype(stored), scale.numpy(), numpy_zero]
    [expected] = run_reference("DequantizeLinear", inputs, ["y"], **attributes)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-6)


def test_the_dynamic_op_is_onnxs():
    for x in (torch.randn(5, 7), torch.rand(5, 7) + 1, -torch.rand(5, 7), torch.zeros(2, 2)):
        codes, scale, zero_point = dynamic_quantize_linear(x)
        expected = run_reference("DynamicQuantizeLinear", [x.numpy()], ["y", "scale", "zero_point"])
        values, reference = (
            (c.astype(np.float32) - np.float32(z)) * s
            for c, s, z in ((codes.numpy(), scale.numpy(), zero_point.numpy()), expected)
        )
        # Where everything is 0 the reference has no scale.
        np.testing.assert_allclose(values, np.nan_to_num(reference), atol=1e-6)


def test_a_value_without_elements_has_no_codes():
    codes = quantize_linear(torch.zeros(0, 8), torch.ones(8), torch.zeros(8, dtype=torch.uint8), "UINT8", 1)
    assert codes.shape == (0, 8)
    assert codes.dtype == torch.uint8
