"""Which candidate a search ends with: ties, patience, and steps that are not taken."""

from dataclasses import replace

import pytest
import torch
from cases import DISTRIBUTIONS, MXFP4, NVFP4, WEIGHT_ARGS, make_args, make_weight
from contract import assert_follows_contract, search_as_on_a_device, shrink_weight

import fxmse.search.patience as patience
import fxmse.search.shrinking as shrinking
from fxmse.formats.grids import Format
from fxmse.formats.layout import Layout
from fxmse.formats.scales import calculate_exact_scale
from fxmse.formats.stored_scales import count_stored_scales, list_stored_scales
from fxmse.search.compiling import compilation
from fxmse.search.options import SearchOptions

# 101 steps apart, and in the few that compile in seconds.
MANY = SearchOptions(expand=1.8, grid=200.0, maxshrink=0.55)
FEW = SearchOptions(expand=1.782, grid=4.0, maxshrink=0.75)


@pytest.mark.parametrize(("mode", "options"), [("never", MANY), ("never", FEW), ("always", FEW)])
def test_of_two_scales_that_round_alike_the_wider_range_is_kept(mode, options):
    # 1.782 and .891 times this group's range are the two best, and equal: the latter's scale is half of the former's.
    group = [-0.5, -2.25, -1.75, -1.25, 1.5, 2.25, -1.25, 0.0, -2.75, -0.75, -0.5, 0.75, -0.5, 0.0, -0.5, 1.75]
    weight = torch.tensor(group) * torch.linspace(1, 2, 2000)[:, None]
    args, options = make_args(4, "float", "group", group_size=16), replace(options, patience=len(options.factors))
    with compilation(mode):
        found = shrink_weight(weight, args, options)
    torch.testing.assert_close(found.min[:, 0], weight.amin(1) * 1.782, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "options",
    [SearchOptions(), SearchOptions(maxshrink=0.8, grid=7.0), SearchOptions(expand=1.8, grid=200.0, maxshrink=0.55)],
    ids=str,
)
@pytest.mark.parametrize("args", [NVFP4, MXFP4], ids=["nvfp4", "mxfp4"])
def test_first_steps_of_stored_scales_are_those_that_counting_finds(args, options):
    format_, layout = Format.of(args), Layout.of(args, "weight")
    num_scales = count_stored_scales(format_, options.factors[-1])
    problem = shrinking.ShrinkProblem.of(format_, torch.float32, options, layout)
    problem = replace(problem, num_scales=num_scales, grid=options.grid)
    absmax = torch.cat([torch.logspace(-9, 4, 60_001, dtype=torch.float64).float(), torch.zeros(1)])
    # Magnitudes whose shrunk ranges lie on the bounds themselves, and next to them.
    _, bounds = list_stored_scales(calculate_exact_scale(-absmax, absmax, format_, None), format_, num_scales)
    factors = torch.tensor(options.factors)
    on_bounds = (bounds[1:, ::997, None] * (1 if format_.is_mx else 6) / factors).flatten()
    absmax = torch.cat([absmax, *(on_bounds[on_bounds > 0] * (1 + ulps * 2.0**-23) for ulps in (-1, 0, 1))])
    exact = calculate_exact_scale(-absmax, absmax, format_, None)
    _, bounds = list_stored_scales(exact, format_, num_scales)
    counted = torch.zeros_like(bounds)
    for factor in factors:
        shrunk = absmax * factor
        counted += calculate_exact_scale(-shrunk, shrunk, format_, None) > bounds
    counted[0] = 0

    def find(problem, low, high):
        return patience._find_first_steps(problem, low, high, len(factors), None)

    for is_compiled in (False, True):
        assert torch.equal(shrinking.run(is_compiled, find, problem, -absmax, absmax), counted), is_compiled


def test_patience_counts_steps_over_all_groups():
    # The first group improves at most steps and so keeps the search of the second going.
    options = SearchOptions(patience=2, maxshrink=0.5, grid=20.0)
    flat = torch.tensor([[1.0, -1.0] * 16])
    falling = torch.cat([torch.full((1, 31), 0.3), torch.tensor([[1.0]])], 1)
    args = make_args(2, strategy="channel")
    both = torch.cat([flat, falling])
    assert_follows_contract(both, args, options)
    assert_follows_contract(flat, args, options)
    # Alone, the second group's search ends early.
    alone = shrink_weight(falling, args, options)
    together = shrink_weight(both, args, options)
    assert alone.max.item() == 1.0
    assert together.max[1].item() < 0.6


@pytest.mark.parametrize("patience", [1, 2, 3, 5])
@pytest.mark.parametrize("args_name", ["int8_channel", "int4_g32", "fp8_block"])
def test_candidates_that_are_not_evaluated_change_nothing(args_name, patience, monkeypatch):
    args = WEIGHT_ARGS[args_name]
    options = SearchOptions(maxshrink=0.5, patience=patience)
    evaluated = []
    sum_errors = shrinking.sum_errors

    def note(problem, values, factors, *tensors):
        evaluated.append(len(factors))
        return sum_errors(problem, values, factors, *tensors)

    monkeypatch.setattr(shrinking, "sum_errors", note)
    monkeypatch.setattr(shrinking, "MAX_TABLE", 400)  # 8 groups a tile
    for kind in DISTRIBUTIONS:
        weight = make_weight(kind)
        evaluated.clear()
        found = shrink_weight(weight, args, options)
        num_evaluated = list(evaluated)
        with monkeypatch.context() as patch:
            search_as_on_a_device(patch)
            evaluated.clear()
            expected = shrink_weight(weight, args, options)
        assert torch.equal(found.min, expected.min)
        assert torch.equal(found.max, expected.max)
        assert set(evaluated) == {50}
        if args_name == "int8_channel" and patience == 1:
            assert sum(num_evaluated) < sum(evaluated) / 2


def test_an_improvement_in_a_later_tile_is_looked_for_in_earlier_ones(monkeypatch):
    # The first row is best at step 10 and far from it at all steps before; the last one improves at every step.
    args = make_args(4, strategy="channel")
    weight = torch.full((64, 64), 0.7)
    weight[0, 1:] = 0.9 * 6 / 7.5
    weight[0, 0] = 1.0
    weight[-1] = torch.linspace(-1, 1, 64).pow(9)
    options = SearchOptions(patience=3)
    alone = shrink_weight(weight[:1], args, options)
    whole = shrink_weight(weight, args, options)
    monkeypatch.setattr(shrinking, "MAX_TABLE", 160)  # 8 groups a tile
    tiled = shrink_weight(weight, args, options)
    assert torch.equal(whole.max, tiled.max)
    assert alone.max.item() == 1.0
    assert whole.max[0].item() < 0.95
