"""fxmse: post-training quantization of PyTorch graphs with MSE observers."""

from fxmse.pipeline import calibrate, convert, prepare, quantize
from fxmse.reporting import report

__all__ = ["calibrate", "convert", "prepare", "quantize", "report"]
