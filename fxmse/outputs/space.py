"""How large what is written will at least be, and whether there is room for it."""

import math
import shutil
from pathlib import Path

from torch.fx import GraphModule

from fxmse.passes.constants import find_weights

__all__ = ["check_space", "estimate_onnx", "estimate_program", "format_size"]

_UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3}


def check_space(path: Path, num_bytes: int, meanwhile: int = 0) -> None:
    """Raises ValueError where fewer bytes are free beside ``path``; what is there is replaced only at the end.

    Args:
        path: what will be written.
        num_bytes: of it.
        meanwhile: about how many more there will be beside it until it is done.
    """
    free = shutil.disk_usage(path.absolute().parent).free
    if free < num_bytes + meanwhile:
        more = f" and about {format_size(meanwhile)} more until it is done" if meanwhile else ""
        raise ValueError(
            f"{path} needs at least {format_size(num_bytes)}{more}, and {format_size(free)} are free: free some, or "
            "write it elsewhere"
        )


def format_size(num_bytes: int) -> str:
    """A number of bytes in the unit that says most."""
    for unit, size in _UNITS.items():
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} bytes"


def estimate_program(observed: GraphModule) -> int:
    """Bytes that a .pt2 of an observed graph has at least: its parameters and buffers, each once, stay in float."""
    tensors = {tensor.data_ptr() or id(tensor): tensor for tensor in observed.state_dict().values()}
    return sum(tensor.nbytes for tensor in tensors.values())


def estimate_onnx(observed: GraphModule) -> int:
    """Bytes that an ONNX model has at least: the parameters, those that are quantized in their bits, without scales."""
    num_bytes = sum(parameter.nbytes for parameter in observed.parameters())
    for probe, rows in find_weights(observed).items():
        num_bytes -= rows.nbytes - math.ceil(rows.numel() * probe.sites[0].args.num_bits / 8)
    return num_bytes
