"""The formats that the benchmarks of quality compare observers at, by name."""

from typing import Any

from compressed_tensors.quantization import QuantizationArgs
from search import WEIGHTS as SEARCHED_WEIGHTS

Fields = dict[str, Any]
MORE_WEIGHTS: dict[str, Fields] = {
    "int8 g128": {"num_bits": 8, "strategy": "group", "group_size": 128},
    "int4 channel": {"num_bits": 4, "strategy": "channel"},
    "int4 g32": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "int3 g64": {"num_bits": 3, "strategy": "group", "group_size": 64},
    "int2 g32": {"num_bits": 2, "strategy": "group", "group_size": 32},
    "fp8 tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "mxfp8": {**SEARCHED_WEIGHTS["mxfp4"], "num_bits": 8},
}
WEIGHTS = dict(sorted({**SEARCHED_WEIGHTS, **MORE_WEIGHTS}.items()))
INPUTS: dict[str, Fields] = {
    "input int8 asymmetric": {"num_bits": 8, "strategy": "tensor", "symmetric": False},
    "input int4 asymmetric": {"num_bits": 4, "strategy": "tensor", "symmetric": False},
    "input int8 symmetric": {"num_bits": 8, "strategy": "tensor"},
    "input fp8": {"num_bits": 8, "type": "float", "strategy": "tensor"},
}


def is_tensor_group(args: QuantizationArgs) -> bool:
    """Whether the format has a global scale."""
    return args.strategy == "tensor_group"


def has_scales_below_zero(args: QuantizationArgs) -> bool:
    """Whether exact_mse takes scales below 0, too."""
    return args.type == "int" and args.symmetric and args.num_bits < 8


def is_int_tensor(args: QuantizationArgs, max_bits: int = 8) -> bool:
    """Whether torchao's histogram can be used."""
    return args.type == "int" and args.strategy == "tensor" and args.num_bits <= max_bits
