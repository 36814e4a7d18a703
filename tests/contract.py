"""A shrinking search held to the contract's loop in float64."""

import torch
from cases import as_groups
from oracle import search as search_by_contract

import fxmse.search.patience as patience
import fxmse.search.shrinking as shrinking
from fxmse.formats.grids import Format
from fxmse.formats.layout import Layout
from fxmse.search.options import SearchOptions
from fxmse.search.shrinking import shrink_ranges

# A tie: the contract leaves either candidate to be chosen.
TIE = 1e-6
SLOW_OPTIONS = SearchOptions(maxshrink=0.8, grid=80.0, patience=64)


def shrink_weight(weight, args, options, **kwargs):
    return shrink_ranges(weight, Format.of(args), Layout.of(args, "weight"), options, **kwargs)


def search_as_on_a_device(monkeypatch):
    """Searches as where no flag can be read without waiting for a device: all steps are evaluated."""
    for module in (shrinking, patience):
        monkeypatch.setattr(module, "reads_flags", lambda tensor: False)


def assert_follows_contract(
    weight, args, options, global_scale=None, optimize_global_scale=False, base_name="weight", device="cpu"
):
    """Each group's step is the contract's, or one whose float64 error ties with it."""
    value, given = weight.to(device), None if global_scale is None else global_scale.to(device)
    layout = Layout.of(args, base_name)
    if optimize_global_scale:
        one_group = layout.as_one_group()
        found = shrink_ranges(value, Format.of(args), one_group, options, optimize_global_scale=True)
        groups = weight.reshape(1, -1)
    else:
        found = shrink_ranges(value, Format.of(args), layout, options, global_scale=given)
        groups = as_groups(weight, args, base_name)
    assert found.min.device.type == found.max.device.type == value.device.type
    found_low, found_high = (end.cpu().flatten()[:, None] for end in found)
    expected = search_by_contract(
        groups,
        args,
        len(options.factors),
        options.grid,
        options.norm,
        options.patience,
        1.0 if global_scale is None else global_scale.double(),
        optimize_global_scale,
    )
    low, high = groups.amin(1).float(), groups.amax(1).float()
    factors = torch.tensor(options.factors)
    matches = (found_high == high[:, None] * factors) & (found_low == low[:, None] * factors)
    assert matches.any(1).all(), "a range that is no candidate"
    step = matches.int().argmax(1)
    assert (step < expected.num_steps_done).all(), "a step behind the end of the search"
    chosen = expected.errors.gather(1, step[:, None])[:, 0]
    best = expected.errors.gather(1, expected.step[:, None])[:, 0]
    # Errors of next to nothing (a channel that every candidate represents) are float32 noise on both sides.
    is_tie = (chosen <= best * (1 + TIE)) | (best < 1e-12 * groups.abs().amax(1) ** options.norm)
    assert ((step == expected.step) | is_tie).all()
    return step
