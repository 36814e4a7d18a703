"""ONNX models: what onnxruntime computes where there is no torch, what is stored, and what is refused."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from architectures import ARCHITECTURES
from cases import MXFP4, NVFP4, make_args
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from models import W8A8, Attention, Convolutions, make_config
from onnx.reference import ReferenceEvaluator
from plain import quantize_blocks, quantize_groups, quantize_nvfp4, quantize_weight
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import fxmse
from fxmse.inputs.onnx import read_metadata
from fxmse.outputs import onnx as onnx_output

# In a process of its own: each model on its inputs, and which ops the optimised graph has.
RUN = """
import collections, pathlib, sys
import numpy, onnx, onnxruntime
for folder in sorted(path for path in pathlib.Path(sys.argv[1]).iterdir() if path.is_dir()):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    # Otherwise MatMulNBits rounds activations to int8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    for number, inputs in enumerate(sorted(folder.glob("inputs_*.npz"))):
        inputs = numpy.load(inputs)
        outputs = session.run(None, {name: inputs[name] for name in names})
        numpy.savez(folder / f"outputs_{number}.npz", *outputs)
assert "torch" not in sys.modules and "fxmse" not in sys.modules
"""


def make_mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 32)).eval()


def make_convolutions():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def make_rows(*shape):
    return lambda seed: torch.randn(2 + 3 * seed, *shape, generator=torch.Generator().manual_seed(seed))


ROWS, IMAGES = make_rows(5, 96), make_rows(3, 12, 12)
W4 = {"num_bits": 4, "strategy": "group", "group_size": 32}
W8 = {"num_bits": 8, "strategy": "channel"}
UINT8 = {"num_bits": 8, "symmetric": False}
BY_TOKEN = {"strategy": "token", "dynamic": True}
FP8 = {"num_bits": 8, "type": "float"}
# Formats of weights and inputs by opset; each is a linear's, and all linears of an opset are one model's.
FORMATS = {
    20: {
        "W8A8": (W8, UINT8),
        "W8A8 symmetric": (W8, {"num_bits": 8}),
        "W8A8 dynamic": (W8, {**UINT8, "dynamic": True}),
        "W8A8 by token": (W8, {"num_bits": 8, **BY_TOKEN}),
        "W8A8 in groups": (W8, {**W4, "num_bits": 8}),
        "W8A5": (W8, {**UINT8, "num_bits": 5}),
        "W8A16": (W8, None),
        "FP8": ({**FP8, "strategy": "channel"}, FP8),
        "FP8 by token": ({**FP8, "strategy": "tensor"}, {**FP8, **BY_TOKEN}),
    },
    21: {
        "W4A16": (W4, None),
        "W4A16 asymmetric": ({**W4, "symmetric": False}, None),
        "W3A16": ({**W4, "num_bits": 3}, None),
        "W4A4": (W4, {**UINT8, "num_bits": 4}),
        "W8A16 static": (W8, {"num_bits": 16}),
        "int8 blocks": ({"num_bits": 8, "strategy": "block", "block_structure": [24, 32]}, None),
        "FP8 blocks": ({**FP8, "strategy": "block", "block_structure": [16, 32]}, None),
    },
    25: {"W2A16": ({**W4, "num_bits": 2}, None)},
}
# Values that are rounded while a model runs: one that lies half-way between two steps may fall to the other side.
ROUNDED = [name for formats in FORMATS.values() for name, (_, inputs) in formats.items() if inputs]


class Linears(nn.Module):
    """Linears that read one value, by the name of their format."""

    def __init__(self, names):
        super().__init__()
        torch.manual_seed(0)
        self.linears = nn.ModuleDict({name: nn.Linear(96, 40) for name in names})

    def forward(self, x):
        return tuple(linear(x) for linear in self.linears.values())


def make_groups(formats):
    return QuantizationConfig(
        config_groups={
            name: QuantizationScheme(
                targets=[f"linears.{name}"],
                weights=make_args(**weights),
                input_activations=make_args(**inputs) if inputs else None,
            )
            for name, (weights, inputs) in formats.items()
        }
    )


# The model, its inputs by a seed, the config, the opset, and how often ops occur in what onnxruntime makes of it.
CASES = {
    **{
        str(opset): (lambda formats=formats: Linears(formats), ROWS, make_groups(formats), opset, ops)
        for (opset, formats), ops in zip(
            FORMATS.items(),
            [
                {"MatMulIntegerToFloat": 2, "DynamicQuantizeMatMul": 1, "MatMulNBits": 4, "QuantizeLinear": 7},
                {"MatMulNBits": 5, "QuantizeLinear": 2},
                {"MatMulNBits": 1, "DequantizeLinear": 0},
            ],
            strict=True,
        )
    },
    "of two dimensions": (make_mlp, make_rows(96), W8A8, 20, {"MatMulIntegerToFloat": 2, "Gemm": 0}),
    "convolutions": (
        make_convolutions,
        IMAGES,
        make_config("Conv2d", "Linear", inputs=UINT8, outputs=UINT8),
        20,
        {"QLinearConv": 3, "Conv": 0},
    ),
    "of all dimensions": (
        lambda: Convolutions().eval(),
        lambda seed: Convolutions.make_inputs(2 + seed, seed),
        make_config("Conv1d", "Conv2d", "Conv3d", "Linear", inputs=UINT8),
        20,
        {"QLinearConv": 3},
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 3, groups=2)).eval(),
        make_rows(4, 6, 6),
        make_config("ConvTranspose2d"),
        20,
        {"ConvTranspose": 2},
    ),
    "tied": (
        lambda: Attention().eval(),
        lambda seed: Attention.make_inputs(2 + seed, seed),
        make_config("Linear", "Embedding"),
        20,
        {"Gather": 1},
    ),
    "Llama": (
        ARCHITECTURES["Llama"].make_model,
        lambda seed: ARCHITECTURES["Llama"].make_inputs(2 + seed, seed),
        make_config(weights=W4, ignore=["lm_head"]),
        21,
        {"MatMulNBits": 7},
    ),
}


def call(graph, inputs):
    """All outputs."""
    outputs = graph(**inputs) if isinstance(inputs, dict) else graph(inputs)
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


@dataclass
class Written:
    """A model in a folder, with two batches of different sizes, and what the graph gives for them."""

    folder: Path
    opset: int
    expected: list


def write(folder, make_model, make_inputs, config):
    folder.mkdir()
    batches = [make_inputs(seed) for seed in range(2)]
    quantized = fxmse.quantize(make_model().eval(), config, batches[:1], progress=False)
    opset = fxmse.export_onnx(quantized, batches[0], folder / "model.onnx")
    names = [entry.name for entry in onnx.load(folder / "model.onnx").graph.input]
    for number, batch in enumerate(batches):
        arrays = batch if isinstance(batch, dict) else {names[0]: batch}
        np.savez(folder / f"inputs_{number}.npz", **tree_map(lambda tensor: tensor.numpy(), arrays))
    return Written(folder, opset, [call(quantized, batch) for batch in batches])


@pytest.fixture(scope="module")
@torch.no_grad()
def written(tmp_path_factory):
    """All cases, written here and run in a process that has no torch."""
    folder = tmp_path_factory.mktemp("onnx")
    models = {name: write(folder / str(number), *case[:3]) for number, (name, case) in enumerate(CASES.items())}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", RUN, str(folder)], check=True, env=environment)
    return models


@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_computes_what_the_graph_does(written, name):
    model = written[name]
    labels = list(FORMATS.get(model.opset, ())) if name.isdigit() else [name]
    for number, tensors in enumerate(model.expected):
        outputs = np.load(model.folder / f"outputs_{number}.npz")
        for place, (label, tensor) in enumerate(zip(labels, tensors, strict=False)):
            found = torch.from_numpy(outputs[f"arr_{place}"])
            largest = tensor.abs().max().item()
            torch.testing.assert_close(found, tensor, rtol=0, atol=0.02 * largest)
            if name.isdigit():  # a linear alone
                far = (found - tensor).abs() > 1e-5 * largest
                assert far.float().mean() <= (0.05 if label in ROUNDED else 0), label
    ops = Counter(node.op_type for node in onnx.load(model.folder / "optimized.onnx").graph.node)
    assert {op: ops[op] for op in CASES[name][4]} == CASES[name][4]


@pytest.mark.parametrize("name", CASES)
def test_the_opset_is_what_the_formats_need(written, name):
    path = written[name].folder / "model.onnx"
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    opsets = [entry.version for entry in model.opset_import if entry.domain == ""]
    assert opsets == [written[name].opset] == [CASES[name][3]]
    assert json.loads(read_metadata(path)["fxmse.config"])["config_groups"]


def list_weights(path):
    """The codes by the name of their module, each with the inputs of its node, as numpy has them."""
    for node in onnx_ir.load(path).graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer():
            name = node.inputs[0].name.partition("weight")[0].strip(".").removeprefix("linears.")
            yield name, node, [None if value is None else value.const_value for value in node.inputs]


TYPES = {"W8": ("INT8", 8), "W4": ("INT4", 4), "W3": ("INT4", 4), "W2": ("INT2", 2), "FP8": ("FLOAT8E4M3FN", 8)}


@pytest.mark.parametrize("opset", FORMATS)
def test_weights_are_stored_in_their_bits(written, opset):
    path = written[str(opset)].folder / "model.onnx"
    weights = {name: tensors for name, _, tensors in list_weights(path)}
    assert list(weights) == list(FORMATS[opset])
    num_bytes, elements = 0, 96 * 40
    for name, tensors in weights.items():
        type, bits = TYPES[name.replace("int8", "W8")[: 3 if name.startswith("FP8") else 2]]
        assert tensors[0].dtype == onnx_ir.DataType[type]
        assert tensors[0].nbytes == elements * bits / 8
        assert len(tensors) == (3 if "asymmetric" in name else 2)  # otherwise zero points are 0
        assert all(tensor.dtype == tensors[0].dtype for tensor in tensors[2:])
        num_bytes += sum(tensor.nbytes for tensor in tensors) + 40 * 4
    # Names, shapes, and the config.
    assert num_bytes < path.stat().st_size < num_bytes + 4000 * (4 + len(weights))


def dequantize(node, tensors):
    """Codes to values by loops: (code - zero point) * scale."""
    codes, scale, *zero_points = (tensor.numpy().astype(np.float32) for tensor in tensors)
    axis, block_size = (node.attributes[n].value if n in node.attributes else 0 for n in ("axis", "block_size"))
    values = np.empty_like(codes)
    for index in np.ndindex(codes.shape):
        in_blocks = tuple(i // block_size if dim == axis else i for dim, i in enumerate(index)) if block_size else ()
        place = () if scale.ndim == 0 else in_blocks or index[axis]
        zero_point = zero_points[0][place] if zero_points else 0
        values[index] = (codes[index] - zero_point) * scale[place]
    return values


MINMAX = {"observer": "memoryless_minmax"}
# Of onnxruntime's CPU kernels none takes fp4; ONNX's reference does.
BY_HAND = {
    "W8": (W8, quantize_weight),
    "W4": (W4, lambda weight: quantize_groups(weight, 32)),
    "W3": ({**W4, "num_bits": 3}, lambda weight: quantize_groups(weight, 32, 3)),
    "blocks": (FORMATS[21]["int8 blocks"][0], lambda weight: quantize_blocks(weight, 24, 32)),
    "NVFP4": (NVFP4.model_dump(), quantize_nvfp4),
    "MXFP4": (MXFP4.model_dump(), None),
    "FP4": ({"num_bits": 4, "type": "float", "strategy": "channel"}, None),
}


@torch.no_grad()
def test_what_is_stored_is_what_arithmetic_by_hand_gives(tmp_path):
    path, model, x = tmp_path / "model.onnx", Linears(BY_HAND).eval(), ROWS(0)
    config = make_groups({name: ({**weights, **MINMAX}, None) for name, (weights, _) in BY_HAND.items()})
    quantized = fxmse.quantize(model, config, [x], progress=False)
    assert fxmse.export_onnx(quantized, x, path) == 23
    stored = {}
    for name, node, tensors in list_weights(path):
        stored.setdefault(name, []).append((node, tensors))
    for name, (_, quantize) in BY_HAND.items():
        *scales, (node, tensors) = stored[name]
        if scales:  # codes themselves, dequantized by the global scale
            tensors[1] = onnx_ir.tensor(dequantize(*scales[0]))
        if name.endswith("FP4"):
            assert tensors[0].dtype.name == "FLOAT4E2M1"
        assert bool(scales) == (name == "NVFP4")
        if quantize:
            # Stored as (in, out), which is what kernels read.
            found = torch.from_numpy(dequantize(node, tensors)).T
            torch.testing.assert_close(found, quantize(model.linears[name].weight), rtol=1e-6, atol=0)
    reference = ReferenceEvaluator(str(path))
    for batch in (x, ROWS(1)):
        for found, tensor in zip(reference.run(None, {"x": batch.numpy()}), quantized(batch), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), tensor, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_model_in_bfloat16_stays_in_it(tmp_path):
    # Of onnxruntime's CPU kernels none dequantizes to bfloat16.
    path, x = tmp_path / "model.onnx", ROWS(0).bfloat16()
    config = make_groups({"W4": (W4, None), "W8": (W8, UINT8), "dynamic": (W8, {**UINT8, "dynamic": True})})
    quantized = fxmse.quantize(Linears(("W4", "W8", "dynamic")).bfloat16().eval(), config, [x], progress=False)
    fxmse.export_onnx(quantized, x, path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {tensors[1].dtype.name for _, _, tensors in list_weights(path)} == {"BFLOAT16"}
    assert {value.type.tensor_type.elem_type for value in model.graph.output} == {onnx.TensorProto.BFLOAT16}


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="pip install openvino")
@pytest.mark.parametrize("name", ["20", "21", "convolutions", "Llama"])
def test_openvino_reads_it(written, name):
    import openvino

    model = written[name]
    # INT2 it does not know (2026.4).
    compiled = openvino.Core().compile_model(model.folder / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for number, tensors in enumerate(model.expected):
        outputs = compiled(dict(np.load(model.folder / f"inputs_{number}.npz")))
        for place, tensor in enumerate(tensors):
            # Its own kernels round what meets weights of few bits to 8.
            found = torch.from_numpy(outputs[place])
            torch.testing.assert_close(found, tensor, rtol=0, atol=0.03 * tensor.abs().max().item())


class Odd(nn.Module):
    """An op that torch.onnx has no translation of, in a module."""

    def __init__(self):
        super().__init__()
        self.fc, self.inner = nn.Linear(8, 8), Exponential()

    def forward(self, x):
        return self.inner(self.fc(x))


class Exponential(nn.Module):
    def forward(self, x):
        return torch.linalg.matrix_exp(x @ x.t())


def test_an_op_without_a_translation_is_named_with_its_module(tmp_path):
    x = torch.randn(8, 8)
    quantized = fxmse.quantize(Odd().eval(), W8A8, [x], progress=False)
    match = r"the node linalg_matrix_exp of inner, a call of aten.linalg_matrix_exp.default \(DispatchError: No ONNX"
    with pytest.raises(ValueError, match=match):
        fxmse.export_onnx(quantized, x, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (MXFP4.model_copy(update={"dynamic": True}), "its scales are rounded to 8 bits while the graph runs"),
        (NVFP4.model_copy(update={"dynamic": "local"}), "its scales are rounded to 8 bits while the graph runs"),
    ],
)
def test_what_onnx_has_no_ops_for_is_named(tmp_path, inputs, reason):
    quantized = fxmse.quantize(make_mlp(), make_config(inputs=inputs.model_dump()), [ROWS(0)], progress=False)
    with pytest.raises(ValueError, match=rf"no ops for 0.input \({reason}\); 2.input \({reason}\): leave"):
        fxmse.export_onnx(quantized, ROWS(0), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_was_not_folded_is_refused(tmp_path):
    model = make_mlp()
    for value, message in (
        (model, "expected the graph that fxmse.convert returns"),
        (fxmse.prepare(model, W8A8, ROWS(0)), "has observers"),
        (torch.fx.symbolic_trace(model), "has no fake-quantize nodes that fxmse folded"),
    ):
        with pytest.raises(ValueError, match=message):
            fxmse.export_onnx(value, ROWS(0), tmp_path / "model.onnx")


def test_a_missing_package_is_named_before_any_work(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ImportError, match=r"is written with onnxscript: pip install 'fxmse\[onnx\]'"):
        fxmse.export_onnx(fxmse.quantize(make_mlp(), "FP8", [ROWS(0)], progress=False), ROWS(0), tmp_path / "m.onnx")


@pytest.fixture
def quantized():
    return fxmse.quantize(make_mlp(), W8A8, [ROWS(0)], progress=False)


def test_a_path_that_cannot_be_written_is_named(quantized, tmp_path):
    (tmp_path / "folder.onnx").mkdir()
    for path, message in (("missing/m.onnx", "is no folder that can be written"), ("folder.onnx", "expected a file")):
        with pytest.raises(ValueError, match=message):
            fxmse.export_onnx(quantized, ROWS(0), tmp_path / path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]


def run_model(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@contextmanager
def failing(monkeypatch, name):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(onnx_ir, name, fail)
        yield


@torch.no_grad()
def test_the_tensors_of_a_large_model_are_in_a_file_beside_it(quantized, tmp_path, monkeypatch):
    path, x = tmp_path / "model.onnx", ROWS(1)
    fxmse.export_onnx(quantized, x, path)
    small = path.read_bytes()
    monkeypatch.setattr(onnx_output, "_LIMIT", 1000)
    with failing(monkeypatch, "to_proto"), pytest.raises(OSError, match="No space left"):
        fxmse.export_onnx(quantized, x, path)
    assert path.read_bytes() == small
    assert list(tmp_path.iterdir()) == [path]

    for _ in range(2):  # the second takes the place of the first one and of its tensors
        fxmse.export_onnx(quantized, x, path)
        first, second = sorted(tmp_path.iterdir())
        assert first == path
        assert second.name.startswith("model.onnx.")
        assert second.stat().st_size >= 96 * 64 + 64 * 32  # the codes
        assert path.stat().st_size < len(small) - 96 * 64
        torch.testing.assert_close(run_model(path, x), quantized(x), rtol=1e-4, atol=1e-4)

    monkeypatch.undo()
    fxmse.export_onnx(quantized, x, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == small


@torch.no_grad()
def test_names_of_modules_that_are_onnxs_are_names(tmp_path):
    model = nn.ModuleDict({"QuantizeLinear": nn.Linear(8, 8), "Constant": nn.Linear(8, 4)})

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.DequantizeLinear = model

        def forward(self, x):
            return self.DequantizeLinear["Constant"](self.DequantizeLinear["QuantizeLinear"](x))

    x = torch.randn(3, 2, 8)
    graph = fxmse.quantize(Named().eval(), W8A8, [x], progress=False)
    fxmse.export_onnx(graph, x, tmp_path / "model.onnx", metadata={"by": "hand"})
    torch.testing.assert_close(run_model(tmp_path / "model.onnx", x), graph(x), rtol=1e-5, atol=1e-5)
    assert read_metadata(tmp_path / "model.onnx")["by"] == "hand"


def test_nothing_of_the_machine_is_in_the_file(written):
    content = (written["Llama"].folder / "model.onnx").read_bytes()
    assert os.sep.join(["", "site-packages", ""]).encode() not in content
    assert b".py" not in content


@torch.no_grad()
def test_a_batch_without_rows_has_outputs_without_rows(written):
    assert run_model(written["20"].folder / "model.onnx", torch.zeros(0, 5, 96)).shape == (0, 5, 40)


def test_a_file_that_is_no_model_is_named(tmp_path):
    (tmp_path / "cut.onnx").write_bytes(b"\x08\xff\xff\xff")
    with pytest.raises(ValueError, match=r"cut.onnx cannot be read as an ONNX model"):
        read_metadata(tmp_path / "cut.onnx")
    with pytest.raises(ValueError, match=r"missing.onnx cannot be read: No such file"):
        read_metadata(tmp_path / "missing.onnx")
