"""ONNX files of quantized graphs, for onnxruntime and whatever else reads QuantizeLinear and DequantizeLinear."""

import importlib.util
import logging
import os
import re
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.fx import GraphModule

from fxmse.capture.exporting import export_module
from fxmse.capture.front_ends import check_graph, copy_graph_module, split_inputs
from fxmse.config import CONFIG_KEY
from fxmse.formats.linear import LINEAR_TYPES
from fxmse.outputs.files import check_place, replace_file
from fxmse.passes import LowerToLinear
from fxmse.passes.probe import check_unobserved

__all__ = ["check_onnx", "export_onnx"]

_OPSET = 20  # torch.onnx.export's own
_BLOCK_OPSET = 21  # the first with blocks
_LIMIT = 2**31 - 2**27  # bytes of tensors: a protobuf message has at most 2 ** 31
# What torch.onnx notes beside the "namespace" of nodes: paths of the machine, and the same in other words.
_NOTES = "pkg.torch."
_TYPE_KEY = "fxmse.type"  # of a node's metadata: the type of its codes


def export_onnx(
    quantized: GraphModule,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    dynamic_shapes: Any = None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Writes a quantized graph as an ONNX model.

    Weights are stored as what they are (2, 4 and 8 bits, fp8, fp4) with a DequantizeLinear node, and activations go
    through QuantizeLinear and DequantizeLinear or DynamicQuantizeLinear (:class:`fxmse.passes.LowerToLinear`). The
    config is in the model's metadata, as ``fxmse.config``. Tensors of a model of 2 GB and more are in a file beside it.

    Args:
        quantized: a graph from ``fxmse.convert``; not changed.
        example_inputs: a dict of keyword arguments, whose names are the model's inputs, a tuple of positional ones, or
            a tensor.
        path: the file; replaced once the new one is complete.
        dynamic_shapes: as :func:`fxmse.export` takes it.
        metadata: more of it.

    Returns:
        The opset that the model is in: 20, or what its formats need (21 for int4, int16 and blocks, 23 for fp4, 25 for
        int2).

    Raises:
        ImportError: onnx or onnxscript are missing.
        ValueError: a model, a graph that has observers, or no fake-quantize nodes; what ONNX has no ops for, by name; a
            path that cannot be written.
        OSError: the disk is full, or fails; what was there before still is.
    """
    check_graph(quantized, "fxmse.convert")
    check_unobserved(quantized)
    check_onnx(Path(path))
    lowered = copy_graph_module(quantized)
    if not LowerToLinear()(lowered).modified:
        raise ValueError("the graph has no fake-quantize nodes that fxmse folded: make it with fxmse.convert")
    args, kwargs = split_inputs(example_inputs)
    program = export_module(lowered, args, kwargs, dynamic_shapes)
    if any(tensor.device.type != "cpu" for tensor in program.state_dict.values()):
        program = move_to_device_pass(program, "cpu")
    opset = _find_opset(program)
    model = _translate(program, opset)
    _store_types(model)
    _keep_products(model)
    if config := quantized.meta.get(CONFIG_KEY):  # what a quantizer annotated has none
        model.metadata_props["fxmse.config"] = config.model_dump_json()
    model.metadata_props.update(metadata or {})
    _save(model, Path(path))
    return opset


def check_onnx(path: Path) -> None:
    """Raises what :func:`export_onnx` does of packages and of the path, before any work."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"an ONNX model is written with {' and '.join(missing)}: pip install 'fxmse[onnx]'")
    check_place(path, is_folder=False)


def _find_opset(program: ExportedProgram) -> int:
    opsets = [_OPSET]
    for node in program.graph.nodes:
        if node.target in (torch.ops.fxmse.quantize_linear.default, torch.ops.fxmse.dequantize_linear.default):
            _, _, _, type, *form = node.args
            opsets += [LINEAR_TYPES[str(type)].opset, _BLOCK_OPSET if len(form) > 1 and form[1] else _OPSET]
    return max(opsets)


def _translate(program: ExportedProgram, opset: int) -> Any:
    """The program as an onnx_ir model, whose codes are in torch's types."""
    table = _make_table(opset)
    with _quiet():
        try:
            exported = torch.onnx.export(
                program, dynamo=True, verbose=False, opset_version=opset, custom_translation_table=table
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ValueError(f"torch.onnx cannot translate {_describe(program, error)}") from error
    assert exported is not None
    model = exported.model
    values = (*model.graph.inputs, *model.graph.initializers.values())
    items: list[Any] = [*values, *(item for node in model.graph.all_nodes() for item in (node, *node.outputs))]
    for item in items:
        for key in [key for key in item.metadata_props if key.startswith(_NOTES)]:
            del item.metadata_props[key]
    return model


def _describe(program: ExportedProgram, error: Exception) -> str:
    """What torch.onnx failed at: the node, its op and its module, and why."""
    reason: BaseException = error
    while reason.__cause__ is not None:
        reason = reason.__cause__
    why = f"{type(reason).__name__}: {' '.join(str(reason).split())}"
    found = re.search(r"translating node %(\w+) .*?target=torch\.ops\.([\w.]+)", str(error.__cause__ or error))
    if found is None:
        return f"the graph ({why})"
    name, target = found.groups()
    nodes = [node for node in program.graph.nodes if node.name == name or str(node.target) == target]
    stack = nodes[0].meta.get("nn_module_stack", {}) if nodes else {}
    paths = [path for path, _ in stack.values() if path]
    module = f" of {paths[-1]}" if paths else ""
    return f"the node {name}{module}, a call of {target} ({why})"


@contextmanager
def _quiet() -> Iterator[None]:
    """Has torch.onnx say nothing of itself within a ``with`` block."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch up to 2.13 says so of a class of its own, when it copies the program's pytree specs.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _make_table(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """How torch.onnx translates the ops that :class:`fxmse.passes.LowerToLinear` puts into a graph."""
    import onnxscript

    # Of one that onnxscript does not know yet, torch.onnx converts the nodes.
    op = next(own for n in range(opset, 0, -1) if (own := getattr(onnxscript, f"opset{n}", None)))

    def mark(value: Any, type: str) -> Any:
        value.producer().metadata_props[_TYPE_KEY] = type
        return value

    def list_attributes(axis: int, block_size: int) -> dict[str, int]:
        return {"axis": axis, "block_size": block_size} if block_size else {"axis": axis}

    def quantize_linear(x: Any, scale: Any, zero_point: Any, type: str, axis: int = 0, block_size: int = 0) -> Any:
        x = x if x.dtype == scale.dtype else op.CastLike(x, scale)
        return mark(op.QuantizeLinear(x, scale, zero_point, **list_attributes(axis, block_size)), type)

    def dequantize_linear(
        codes: Any, scale: Any, zero_point: Any, type: str, axis: int = 0, block_size: int = 0
    ) -> Any:
        return mark(op.DequantizeLinear(codes, scale, zero_point, **list_attributes(axis, block_size)), type)

    def dynamic_quantize_linear(x: Any) -> Any:
        import onnx_ir

        return op.DynamicQuantizeLinear(
            x if x.dtype == onnx_ir.DataType.FLOAT else op.Cast(x, to=onnx_ir.DataType.FLOAT)
        )

    ops = torch.ops.fxmse
    return {
        ops.quantize_linear.default: quantize_linear,
        ops.dequantize_linear.default: dequantize_linear,
        ops.dynamic_quantize_linear.default: dynamic_quantize_linear,
    }


def _store_types(model: Any) -> None:
    """Gives codes, and zero points with them, the types that they are stored in."""
    import onnx_ir

    stored: dict[tuple[Any, str], Any] = {}
    for node in model.graph:
        type = node.metadata_props.pop(_TYPE_KEY, None)
        if type is None:
            continue
        is_quantize = node.op_type == "QuantizeLinear"
        for place in (2,) if is_quantize else (0, 2):
            value = node.inputs[place] if place < len(node.inputs) else None
            if value is not None and value.is_initializer() and value.dtype != onnx_ir.DataType[type]:
                if (value, type) not in stored:
                    stored[value, type] = _store(model.graph, value, onnx_ir.DataType[type])
                node.replace_input_with(place, stored[value, type])
        if is_quantize:
            node.outputs[0].dtype = onnx_ir.DataType[type]
    _remove_unread(model.graph, [value for value, _ in stored])


def _store(graph: Any, value: Any, type: Any) -> Any:
    """An initializer of the same values in another type."""
    import numpy
    import onnx_ir

    array = value.const_value.numpy()
    floats = array if numpy.issubdtype(array.dtype, numpy.integer) else array.astype(numpy.float32)
    return _add_initializer(graph, value, onnx_ir.tensor(floats.astype(type.numpy()), dtype=type))


def _add_initializer(graph: Any, value: Any, tensor: Any) -> Any:
    """A new one, whose name begins as that of the value that it takes the place of."""
    import onnx_ir

    name = f"{value.name}_{tensor.dtype.name.lower()}"
    while name in graph.initializers:
        name += "_"
    tensor.name = name
    added = onnx_ir.Value(name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers.add(added)
    return added


def _remove_unread(graph: Any, values: Iterable[Any]) -> None:
    for value in values:
        if not value.uses() and value.name in graph.initializers:
            del graph.initializers[value.name]


def _keep_products(model: Any) -> None:
    """Has onnxruntime see quantized products of two dimensions.

    It makes a Gemm of a MatMul and an Add before it looks for them, and of a MatMul and a Sum it does not.
    """
    for node in model.graph:
        products = [value.producer() for value in node.inputs if value is not None and value.producer() is not None]
        for product in products if node.op_type == "Add" else []:
            sources = [value.producer() for value in product.inputs if value is not None]
            is_quantized = all(source is not None and source.op_type == "DequantizeLinear" for source in sources)
            shape = product.outputs[0].shape
            if product.op_type == "MatMul" and is_quantized and shape is not None and len(shape) == 2:
                node.op_type = "Sum"


def _save(model: Any, path: Path) -> None:
    """Writes a model; of a large one tensors first, into a file of a new name, so that the old model keeps its own."""
    import onnx_ir

    path = path.resolve()
    num_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    data = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.data") if num_bytes >= _LIMIT else None
    try:
        if data is not None:
            with replace_file(data) as tensors:
                model = onnx_ir.external_data.unload_from_model(model, tensors.parent, tensors.name)
        proto = onnx_ir.to_proto(model)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = data.name  # type: ignore[union-attr]
        with replace_file(path) as new:
            new.write_bytes(proto.SerializeToString())
    except BaseException:
        if data is not None:
            data.unlink(missing_ok=True)
        raise
    of_this_path = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.data")
    for other in path.parent.iterdir():
        if of_this_path.fullmatch(other.name) and other != data:
            other.unlink(missing_ok=True)  # of the model that this one took the place of
