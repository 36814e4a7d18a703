"""Layouts against the reference's shapes and values, and what makes no sense."""

import pytest
import torch
from cases import ACTIVATION_ARGS, NVFP4, WEIGHT_ARGS, make_args
from llmcompressor.observers.helpers import flatten_for_calibration

from fxmse.formats.layout import Layout


def merge_tiles(layout, value, max_groups):
    return torch.cat([tile.flatten(1, -2) for tile in layout.tiles(value, max_groups)], 1)


@pytest.mark.parametrize("max_groups", [1, 7, 10_000])
@pytest.mark.parametrize("args", [*WEIGHT_ARGS.values(), NVFP4], ids=[*WEIGHT_ARGS, "nvfp4"])
def test_weight_tiles_hold_the_references_groups(args, max_groups):
    weight = torch.randn(40, 96)  # 40 is no multiple of a block's 16 rows
    layout = Layout.of(args, "weight")
    reference = flatten_for_calibration(weight, "weight", args)
    tiles = merge_tiles(layout, weight, max_groups)
    assert layout.qparam_shape(weight.shape) == tuple(reference.shape[1:-1])
    assert torch.equal(tiles.amin((0, 2)), reference.amin((0, -1)).flatten())
    sums = tiles.double().pow(2).sum((0, 2))
    torch.testing.assert_close(sums, reference.double().pow(2).sum((0, -1)).flatten())


@pytest.mark.parametrize("name", ["q", "input", "output"])
@pytest.mark.parametrize("args", [*ACTIVATION_ARGS.values(), make_args(strategy="tensor")])
def test_activation_tiles_hold_the_references_groups(name, args):
    value = torch.randn(2, 4, 5, 64) if name == "q" else torch.randn(2, 5, 64)
    if name == "q":
        args = make_args(strategy="attn_head") if args.strategy == "group" else args
    layout = Layout.of(args, name)
    reference = flatten_for_calibration(value, name, args)
    tiles = merge_tiles(layout, value, 100)
    assert layout.qparam_shape(value.shape) == tuple(reference.shape[1:-1])
    assert torch.equal(tiles.amax((0, 2)), reference.amax((0, -1)).flatten())


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 5, 64)])
def test_the_last_dimension_of_an_activation_is_its_channels(shape):
    # The reference gives 2 and 4 dimensions a wrong shape of scales.
    layout = Layout.of(make_args(strategy="group", group_size=16), "input")
    assert layout.qparam_shape(torch.Size(shape)) == (4,)
    assert merge_tiles(layout, torch.randn(shape), 10).shape[1:] == (4, 16)


def test_experts_keep_their_leading_dimension():
    layout = Layout.of(make_args(strategy="group", group_size=16), "weight")
    assert layout.qparam_shape(torch.Size((3, 8, 64))) == (3, 8, 4)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)])
def test_tensor_tiles_are_views_whatever_the_order_of_dimensions(order):
    value = torch.randn(4, 6, 8, 10).permute(order)
    (tile,) = Layout.of(make_args(), "input").tiles(value, 1)
    assert tile.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    assert torch.equal(tile.flatten().sort().values, value.flatten().sort().values)


@pytest.mark.parametrize(
    ("base_name", "args"),
    [
        ("input", make_args(strategy="channel")),
        ("input", make_args(strategy="block", block_structure=[4, 4])),
        ("q", make_args(strategy="group", group_size=8)),
        ("weight", make_args(strategy="attn_head")),
        ("weight", make_args(strategy="token", dynamic=True)),
    ],
)
def test_strategies_that_make_no_sense_are_named(base_name, args):
    with pytest.raises(ValueError, match=f"strategy={args.strategy} makes no sense for a static {base_name}"):
        Layout.of(args, base_name)


def test_unknown_role_is_named():
    with pytest.raises(ValueError, match="base_name='wieght': expected one of weight"):
        Layout.of(make_args(), "wieght")


def test_group_size_that_does_not_divide_is_named():
    layout = Layout.of(make_args(strategy="group", group_size=32), "weight")
    with pytest.raises(ValueError, match=r"group_size=32 does not divide .* \(4, 40\)"):
        layout.qparam_shape(torch.Size((4, 40)))


def test_blocks_are_of_the_last_two_dimensions():
    layout = Layout.of(make_args(strategy="block", block_structure=[4, 4]), "weight")
    with pytest.raises(ValueError, match=r"2 dimensions or more, found shape \(8,\)"):
        layout.qparam_shape(torch.Size((8,)))
    experts = torch.randn(3, 6, 8)
    assert layout.qparam_shape(experts.shape) == (3, 2, 2)
    tiles = torch.cat(list(layout.tiles(experts, 1000)), 1)
    one_by_one = [tile for expert in experts for tile in layout.tiles(expert, 1000)]
    assert torch.equal(tiles, torch.cat(one_by_one, 1))
