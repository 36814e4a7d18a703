"""The observers that are compared, with one interface, and the errors of what they find."""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle import fake_quantize
from formats import has_scales_below_zero, is_int_tensor, is_tensor_group
from llmcompressor.observers import Observer as LLMCompressorObserver
from search import measure_ms
from torch import Tensor
from torchao.quantization.pt2e import HistogramObserver  # type: ignore[import-untyped]

from fxmse.observers import Observer


class Peer(NamedTuple):
    """An observer that is compared, and the formats that it is for."""

    make: functools.partial[Any]
    is_for: Callable[[QuantizationArgs], bool] = lambda args: True


class Found(NamedTuple):
    """What an observer found and how long it took."""

    qparams: Mapping[str, Tensor | None]
    observe_ms: list[float]  # of each value
    finish_ms: float


class Histogram:
    """torchao's HistogramObserver with llm-compressor's interface.

    Args:
        base_name: not looked at.
        args: an integer format, strategy tensor.
        searches_num_bits: tell its search how many values the format has; by itself it takes 2 ** 8 whatever
            quant_min and quant_max are.
    """

    def __init__(self, base_name: str, args: QuantizationArgs, searches_num_bits: bool = False) -> None:
        half = 2 ** (args.num_bits - 1)
        self.observer = HistogramObserver(
            dtype=torch.int8,
            qscheme=torch.per_tensor_symmetric if args.symmetric else torch.per_tensor_affine,
            quant_min=-half,
            quant_max=half - 1,
        )
        if searches_num_bits:
            self.observer.dst_nbins = 2 * half

    def __call__(self, value: Tensor) -> None:
        """Observes ``value``."""
        self.observer(value)

    def get_qparams(self) -> dict[str, Tensor | None]:
        """By the names that compressed-tensors has for them."""
        scale, zero_point = self.observer.calculate_qparams()
        return {"scale": scale, "zero_point": zero_point, "global_scale": None}


def of_fxmse(name: str, **kwargs: Any) -> functools.partial[Any]:
    """Makes fxmse's observer of that name."""
    return functools.partial(Observer.load_from_registry, name, **kwargs)


def of_llm_compressor(name: str, **kwargs: Any) -> functools.partial[Any]:
    """Makes llm-compressor's observer of that name."""
    return functools.partial(LLMCompressorObserver.load_from_registry, name, **kwargs)


MINMAX, REFERENCE = "min-max", "llm-compressor mse"
WEIGHT_PEERS = {
    MINMAX: Peer(of_fxmse("memoryless_minmax")),
    "fxmse memoryless_mse": Peer(of_fxmse("memoryless_mse")),
    "fxmse memoryless_mse, norm 2": Peer(of_fxmse("memoryless_mse", norm=2.0)),
    "fxmse nvfp4_expanded_mse": Peer(of_fxmse("nvfp4_expanded_mse"), is_tensor_group),
    "fxmse exact_mse": Peer(of_fxmse("exact_mse")),
    "fxmse exact_mse, scales above 0": Peer(of_fxmse("exact_mse", negative_scale=False), has_scales_below_zero),
    "llm-compressor memoryless_mse": Peer(of_llm_compressor("memoryless_mse")),
    "llm-compressor nvfp4_expanded_mse": Peer(of_llm_compressor("nvfp4_expanded_mse"), is_tensor_group),
    "torchao histogram": Peer(functools.partial(Histogram), is_int_tensor),
}
INPUT_PEERS = {
    "fxmse mse": Peer(of_fxmse("mse")),
    "fxmse mse, norm 2, averaging .1": Peer(of_fxmse("mse", norm=2.0, averaging_constant=0.1)),
    "fxmse static_minmax": Peer(of_fxmse("static_minmax")),
    "fxmse minmax": Peer(of_fxmse("minmax")),
    "fxmse exact_mse": Peer(of_fxmse("exact_mse")),
    "fxmse exact_mse, norm 2": Peer(of_fxmse("exact_mse", norm=2.0)),
    REFERENCE: Peer(of_llm_compressor("mse")),
    "torchao histogram": Peer(functools.partial(Histogram), is_int_tensor),
    "torchao histogram, dst_nbins 16": Peer(
        functools.partial(Histogram, searches_num_bits=True), functools.partial(is_int_tensor, max_bits=4)
    ),
}


def list_peers(peers: Mapping[str, Peer], args: QuantizationArgs) -> dict[str, Peer]:
    """Those that can be used for a format."""
    return {label: peer for label, peer in peers.items() if peer.is_for(args)}


def find_qparams(peer: Peer, values: Iterable[Tensor], base_name: str, args: QuantizationArgs) -> Found:
    """Shows a new observer all of ``values``."""
    observer = peer.make(base_name=base_name, args=copy.deepcopy(args))  # llm-compressor writes into args
    observe_ms = [measure_ms(functools.partial(observer, value), "cpu") for value in values]
    found: list[Mapping[str, Tensor | None]] = []
    finish_ms = measure_ms(lambda: found.append(observer.get_qparams()), "cpu")
    return Found(found[0], observe_ms, finish_ms)


def sum_errors(values: Iterable[Tensor], qparams: Mapping[str, Tensor | None], args: QuantizationArgs) -> float:
    """The summed squared error with qparams as they are stored."""
    scale, zero_point, global_scale = (qparams[name] for name in ("scale", "zero_point", "global_scale"))
    assert scale is not None
    total = 0.0
    for value in (value.float() for value in values):
        stored = fake_quantize(value, scale.float(), zero_point, args, global_scale=global_scale)
        total += (stored.double() - value.double()).square().sum().item()
    return total
