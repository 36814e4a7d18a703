"""Formats and data that the tests share."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from fxmse.formats.layout import Layout

FP8 = torch.float8_e4m3fn

# For tests that copy graphs deeply, or call what of torch does: torch up to 2.13 says so of a class of its own.
copies_pytree_specs = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")


def make_args(num_bits: int = 8, type: str = "int", strategy: str = "tensor", **kwargs) -> QuantizationArgs:
    return QuantizationArgs(num_bits=num_bits, type=type, strategy=strategy, **kwargs)


NVFP4 = make_args(4, "float", "tensor_group", group_size=16, scale_dtype=FP8, zp_dtype=FP8)
MXFP4 = make_args(4, "float", "group", group_size=32, scale_dtype=torch.uint8, zp_dtype=torch.uint8)
MXFP8 = make_args(8, "float", "group", group_size=32, scale_dtype=torch.uint8, zp_dtype=torch.uint8)

# Every format but tensor_group, whose search the reference dropped, with the strategies it is used with.
WEIGHT_ARGS = {
    **{f"int{b}_channel": make_args(b, strategy="channel") for b in range(2, 9)},
    **{f"int{b}_asym_channel": make_args(b, strategy="channel", symmetric=False) for b in range(2, 9)},
    "int4_g32": make_args(4, strategy="group", group_size=32),
    "int4_asym_g32": make_args(4, strategy="group", group_size=32, symmetric=False),
    "int3_g16": make_args(3, strategy="group", group_size=16),
    "int8_tensor": make_args(8),
    "int8_asym_tensor": make_args(8, symmetric=False),
    "int8_block": make_args(8, strategy="block", block_structure=[16, 32]),
    "fp8_tensor": make_args(8, "float"),
    "fp8_channel": make_args(8, "float", "channel"),
    "fp8_block": make_args(8, "float", "block", block_structure=[16, 32]),
    "fp8_g32": make_args(8, "float", "group", group_size=32),
    "fp4_g16": make_args(4, "float", "group", group_size=16),
    "fp4_channel": make_args(4, "float", "channel"),
    "mxfp4": MXFP4,
    "mxfp8": MXFP8,
}
ACTIVATION_ARGS = {
    "int8_tensor": make_args(8),
    "int8_asym_tensor": make_args(8, symmetric=False),
    "int4_asym_tensor": make_args(4, symmetric=False),
    "fp8_tensor": make_args(8, "float"),
    "int8_g32": make_args(8, strategy="group", group_size=32),
}
DYNAMIC_ARGS = {
    "int8_token": make_args(8, strategy="token", dynamic=True),
    "int8_asym_token": make_args(8, strategy="token", symmetric=False, dynamic=True),
    "int4_token": make_args(4, strategy="token", dynamic=True),
    "int8_dynamic_tensor": make_args(8, dynamic=True),
    "int8_asym_dynamic_tensor": make_args(8, symmetric=False, dynamic=True),
    "int4_asym_dynamic_g32": make_args(4, strategy="group", group_size=32, symmetric=False, dynamic=True),
    "fp8_token": make_args(8, "float", "token", dynamic=True),
    "fp8_dynamic_g32": make_args(8, "float", "group", group_size=32, dynamic=True),
    "nvfp4_local": NVFP4.model_copy(update={"dynamic": "local"}),
    "mxfp4_dynamic": MXFP4.model_copy(update={"dynamic": True}),
    "mxfp8_dynamic": MXFP8.model_copy(update={"dynamic": True}),
}


def make_weight(kind: str, rows: int = 24, columns: int = 96, seed: int = 0) -> Tensor:
    """A weight of one of several distributions; "special" has dead, constant and outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    if kind == "normal":
        return normal
    if kind == "heavy":
        return normal**3
    if kind == "skewed":
        return normal.exp() - 0.3
    assert kind == "special"
    normal[1] = 0.0
    normal[2] = 0.7
    normal[3] = -0.7
    normal[4, 5] = 50.0
    normal[5] *= 1e-3
    normal[6] = normal[6].abs()
    normal[7, 1:] = 0.0
    return normal


DISTRIBUTIONS = ("normal", "heavy", "skewed", "special")


def as_groups(value: Tensor, args: QuantizationArgs, base_name: str = "weight") -> Tensor:
    """The elements of each group, (groups, elements), in the order of the scales."""
    tiles = Layout.of(args, base_name).tiles(value, 1 << 20)
    return torch.cat([tile.flatten(1, -2).transpose(0, 1).flatten(1) for tile in tiles])
