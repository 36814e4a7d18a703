"""What holds on any device, where there is none but the CPU.

Tensors of the meta device stand in for a GPU's: they take the branches that are not the CPU's, whoever reads one waits
for what is not there, and none meets a tensor of the CPU.
"""

import pytest
import torch
from cases import ACTIVATION_ARGS, NVFP4, WEIGHT_ARGS
from compressed_tensors.quantization import QuantizationArgs

from fxmse.formats.grids import Format
from fxmse.formats.layout import Layout
from fxmse.observers import Observer
from fxmse.search.compiling import compilation
from fxmse.search.power import AbsolutePower
from fxmse.search.tiles import Arithmetic, count_parts, cut_groups, find_max_elements

OBSERVERS = ("exact_mse", "memoryless_mse", "mse", "static_minmax")
META = torch.device("meta")
WEIGHTS = {**WEIGHT_ARGS, "nvfp4": NVFP4}


def observe(name: str, base_name: str, args: QuantizationArgs, shape: tuple[int, ...], **kwargs: object) -> Observer:
    observer = Observer.load_from_registry(name, base_name=base_name, args=args, **kwargs)
    with compilation("never"):
        for _ in range(2):
            observer.observe(torch.empty(shape, dtype=torch.bfloat16, device=META))
    return observer


@pytest.mark.parametrize("args_name", WEIGHTS)
@pytest.mark.parametrize("name", OBSERVERS)
def test_weights_are_observed_without_waiting_for_their_device(name, args_name):
    state = observe(name, "weight", WEIGHTS[args_name], (64, 128)).state
    assert {tensor.device for tensor in state if tensor is not None} == {META}


@pytest.mark.parametrize("args_name", ACTIVATION_ARGS)
@pytest.mark.parametrize("name", OBSERVERS)
def test_activations_are_observed_without_waiting_for_their_device(name, args_name):
    state = observe(name, "input", ACTIVATION_ARGS[args_name], (4, 8, 128)).state
    assert {tensor.device for tensor in state if tensor is not None} == {META}


def test_a_given_global_scale_goes_where_the_value_is():
    assert observe("memoryless_mse", "weight", NVFP4, (64, 128), global_scale=3.0).state.min_vals.device == META


@pytest.mark.parametrize("strategy", ["channel", "group", "block"])
def test_tiles_of_a_device_are_larger_than_a_cpus_caches(strategy):
    size = {"group_size": 128} if strategy == "group" else {}
    size |= {"block_structure": [128, 128]} if strategy == "block" else {}
    layout = Layout.of(QuantizationArgs(num_bits=8, strategy=strategy, **size), "weight")
    value = torch.empty(1 << 15, 8192, dtype=torch.bfloat16, device=META)
    tiles = list(layout.tiles(value, 1 << 26))
    assert len(tiles) == 4
    channels = torch.empty(8192, device=META)
    if strategy != "block":
        assert len(list(layout.channel_tiles(channels, value.shape, 1 << 26))) == len(tiles)


def test_copies_on_a_device_are_larger_than_a_cpus_caches():
    args = QuantizationArgs(num_bits=8)
    arithmetic = Arithmetic(Format.of(args), AbsolutePower.of(2.0), reads_pairs=False)
    value = torch.empty(1 << 14, 1 << 14, dtype=torch.bfloat16, device=META)
    assert find_max_elements(arithmetic, value) == 1 << 26
    tile = cut_groups(next(Layout.of(args, "weight").tiles(value, 1)), None)
    assert count_parts(arithmetic, tile.values_OQPG, 20) == 4
