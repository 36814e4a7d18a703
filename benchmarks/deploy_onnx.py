"""all-MiniLM-L6-v2 by onnxruntime on a CPU: float, W8A8 of fxmse's, and of onnxruntime's own quantize_static.

    python benchmarks/deploy_onnx.py [--batches 16] [--length 128] [--runs 7]

All are calibrated on the same 8 batches and run in turn in one process, on batches of 16 sentences padded to one
length, which quantize_static's histograms need; medians. "fxmse" is the example's config. quantize_static has weights
in int8 per channel and activations in uint8, of the same products: those with a weight; "all ops" quantizes whatever
else it can, too. The cosine is that of the sentence embeddings to the float model's. Needs the benchmarks extra.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

import fxmse

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import quantize_minilm as example
from deploy import compare_runs, main, pad

Batches = list[dict[str, Tensor]]
NUM_CALIBRATION = 8
METHODS = ("MinMax", "Entropy", "Percentile")


class Reader(CalibrationDataReader):
    """Batches as onnxruntime's calibration asks for them."""

    def __init__(self, batches: Batches) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch."""
        batch = next(self._batches, None)
        return None if batch is None else {name: tensor.numpy() for name, tensor in batch.items()}


def load(path: Path) -> Callable[..., tuple[Tensor]]:
    """A model that is called as torch's are."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(**batch: Tensor) -> tuple[Tensor]:
        return (torch.from_numpy(session.run(None, {name: batch[name].numpy() for name in names})[0]),)

    return run


def list_products(path: Path) -> list[str]:
    """The names of the products with a weight."""
    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    products = (node for node in graph.node if node.op_type in ("MatMul", "Gemm"))
    return [node.name for node in products if weights.intersection(node.input[:2])]


def make_models(folder: Path, calibration: Batches) -> dict[str, Path]:
    """Writes all models; their files by name."""
    model = example.AutoModel.from_pretrained(example.find_model_folder()).eval()
    program = example.export(model, calibration[0])
    paths = {name: folder / f"{name.replace(' ', '_')}.onnx" for name in ("float", "fxmse")}
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    assert exported is not None
    exported.save(paths["float"])
    quantized = fxmse.quantize(program, example.CONFIG, calibration, progress=False)
    fxmse.export_onnx(quantized, calibration[0], paths["fxmse"])
    prepared = folder / "prepared.onnx"
    quant_pre_process(paths["float"], prepared, skip_symbolic_shape=True)
    kinds: dict[str, tuple[str, list[str]]] = {method: (method, list_products(prepared)) for method in METHODS}
    for name, (method, nodes) in {**kinds, "MinMax, all ops": ("MinMax", [])}.items():
        paths[name] = folder / f"{len(paths)}.onnx"
        quantize_static(
            prepared,
            paths[name],
            Reader(calibration),
            op_types_to_quantize=["MatMul", "Gemm"] if nodes else None,
            nodes_to_quantize=nodes,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=getattr(CalibrationMethod, method),
        )
        print(f"{name}: calibrated", file=sys.stderr, flush=True)
    return paths


@torch.no_grad()
def compare(num_batches: int, length: int, num_runs: int) -> list[dict[str, Any]]:
    """The table's rows."""
    loaded = example.load_batches(example.find_model_folder(), NUM_CALIBRATION + num_batches)
    batches = [pad(batch, length) for batch in loaded]
    calibration, held_out = batches[:NUM_CALIBRATION], batches[NUM_CALIBRATION:]
    with tempfile.TemporaryDirectory() as folder:
        paths = make_models(Path(folder), calibration)
        sizes = {name: path.stat().st_size / 1e6 for name, path in paths.items()}
        runs = {name: load(path) for name, path in paths.items()}
    return compare_runs(runs, held_out, num_runs, "MB", sizes)


if __name__ == "__main__":
    main(compare, __doc__)
