"""fxmse: post-training quantization of PyTorch graphs with MSE observers."""

from fxmse.calibration import Calibration
from fxmse.checkpoint import load_qparams, save_pretrained
from fxmse.exact import ExactMSEObserver as _ExactMSEObserver  # noqa: F401 - has it registered
from fxmse.exporting import export
from fxmse.pipeline import calibrate, convert, prepare, quantize
from fxmse.reporting import report

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
