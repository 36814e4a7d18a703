"""fxmse: post-training quantization of PyTorch graphs with MSE observers."""

from fxmse.analysis.choosing import choose_schemes
from fxmse.analysis.sensitivity import analyze
from fxmse.calibration.backend import Calibration
from fxmse.inputs.qparams import load_qparams
from fxmse.outputs.checkpoint import save_pretrained
from fxmse.outputs.exporting import export
from fxmse.outputs.onnx import export_onnx
from fxmse.outputs.report_html import write_report
from fxmse.outputs.reporting import report
from fxmse.pipeline import calibrate, convert, prepare, quantize
from fxmse.search.compiling import compilation
from fxmse.streaming.quantizing import quantize_checkpoint

__all__ = [
    "Calibration",
    "__version__",
    "analyze",
    "calibrate",
    "choose_schemes",
    "compilation",
    "convert",
    "export",
    "export_onnx",
    "load_qparams",
    "prepare",
    "quantize",
    "quantize_checkpoint",
    "report",
    "save_pretrained",
    "write_report",
]

__version__ = "0.1.0"
"""The one place of the version: pyproject.toml reads it, and a source tree that is not installed has it, too."""
