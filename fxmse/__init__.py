"""fxmse: post-training quantization of PyTorch graphs with MSE observers."""

from fxmse.calibration.backend import Calibration
from fxmse.inputs.qparams import load_qparams
from fxmse.outputs.checkpoint import save_pretrained
from fxmse.outputs.exporting import export
from fxmse.outputs.reporting import report
from fxmse.pipeline import calibrate, convert, prepare, quantize

__all__ = [
    "Calibration",
    "calibrate",
    "convert",
    "export",
    "load_qparams",
    "prepare",
    "quantize",
    "report",
    "save_pretrained",
]
