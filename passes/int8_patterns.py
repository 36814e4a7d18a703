"""The patterns by which Inductor finds int8 products in a graph of quantize and dequantize nodes."""

import warnings

import torch

__all__ = ["register_int8_patterns"]


def register_int8_patterns() -> None:
    """Sees to it that Inductor has the patterns, in this process; says so where that cannot be.

    torch up to 2.13 brings them and registers them itself, when it first freezes a graph. Since 2.14 they are
    torchao's, which registers them once a process, however often it is asked to.
    """
    from torch._inductor.fx_passes import mkldnn_fusion  # slow, and Inductor's own until it compiles

    if not torch.backends.mkldnn.is_available():
        _warn("this torch has no oneDNN, whose kernels they are")
    elif not hasattr(mkldnn_fusion, "_register_quantization_weight_pack_pass"):
        try:
            # Not through torchao's x86 quantizer, which sets an option of Inductor's for the whole process.
            from torchao.quantization.pt2e.inductor_passes.x86 import _register_quantization_weight_pack_pass
        except ImportError:
            _warn(f"torch {torch.__version__} leaves their patterns to torchao: pip install 'fxmse[int8]'")
        else:
            _register_quantization_weight_pack_pass()


def _warn(reason: str) -> None:
    # At the line that runs LowerToQDQ.
    warnings.warn(f"int8 products will run in float: {reason}", UserWarning, stacklevel=5)
