"""The search against the contract's loop in float64."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import DISTRIBUTIONS, FP8, MXFP4, NVFP4, WEIGHT_ARGS, make_args, make_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import calculate_scale, global_scale_of, sum_errors
from oracle import search as search_by_contract
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode

import fxmse.search.compiling as compiling
import fxmse.search.patience as patience
import fxmse.search.shrinking as shrinking
import fxmse.search.tiles as tiles
from fxmse.formats.grids import Format
from fxmse.formats.layout import Layout
from fxmse.formats.scales import calculate_exact_scale, calculate_global_scale
from fxmse.formats.stored_scales import count_stored_scales, list_stored_scales
from fxmse.observers import Observer
from fxmse.search.compiling import compilation
from fxmse.search.options import SearchOptions
from fxmse.search.shrinking import shrink_global_range, shrink_ranges
from fxmse.search.tiles import measure_range

# A tie: the contract leaves either candidate to be chosen.
TIE = 1e-6


def as_groups(weight, layout):
    return torch.cat([tile.flatten(1, -2).transpose(0, 1).flatten(1) for tile in layout.tiles(weight, 1 << 20)])


def assert_follows_contract(weight, args, options, global_scale=None, optimize_global_scale=False):
    """Each group's step is the contract's, or one whose float64 error ties with it."""
    layout = Layout.of(args, "weight")
    if optimize_global_scale:
        one_group = layout.as_one_group()
        found = shrink_ranges(weight, Format.of(args), one_group, options, optimize_global_scale=True)
        groups = weight.reshape(1, -1)
    else:
        found = shrink_ranges(weight, Format.of(args), layout, options, global_scale=global_scale)
        groups = as_groups(weight, layout)
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
    low, high = groups.amin(1), groups.amax(1)
    factors = torch.tensor(options.factors)
    candidates_high = high[:, None] * factors
    candidates_low = low[:, None] * factors
    matches = (found.max.flatten()[:, None] == candidates_high) & (found.min.flatten()[:, None] == candidates_low)
    assert matches.any(1).all(), "a range that is no candidate"
    step = matches.int().argmax(1)
    assert (step < expected.num_steps_done).all(), "a step behind the end of the search"
    chosen = expected.errors.gather(1, step[:, None])[:, 0]
    best = expected.errors.gather(1, expected.step[:, None])[:, 0]
    # Errors of next to nothing (a channel that every candidate represents) are float32 noise on both sides.
    is_tie = (chosen <= best * (1 + TIE)) | (best < 1e-12 * groups.abs().amax(1) ** options.norm)
    assert ((step == expected.step) | is_tie).all()
    return step


SLOW_OPTIONS = SearchOptions(maxshrink=0.8, grid=80.0, patience=64)
ALL_OPTIONS = [
    SearchOptions(),
    SearchOptions(norm=2.0),
    SearchOptions(norm=1.0, patience=1),
    SearchOptions(norm=3.0, maxshrink=0.5, grid=40.0, patience=3),
    SLOW_OPTIONS,
]


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=str)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("name", [n for n in WEIGHT_ARGS if not n.startswith("mx")])
def test_follows_the_contract(name, kind, options):
    assert_follows_contract(make_weight(kind), WEIGHT_ARGS[name], options)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("options", [SearchOptions(), SLOW_OPTIONS], ids=str)
def test_global_scale_is_used_in_every_candidate(kind, options):
    weight = make_weight(kind)
    global_scale = global_scale_of(weight.abs().max()).reshape(1)
    assert_follows_contract(weight, NVFP4, options, global_scale)
    assert_follows_contract(weight, make_args(4, strategy="channel"), options, torch.tensor([3.7]))


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("options", [SearchOptions(), SearchOptions(norm=2.0), SLOW_OPTIONS], ids=str)
def test_global_scale_is_optimized_with_each_candidates_own(kind, options):
    assert_follows_contract(make_weight(kind), NVFP4, options, optimize_global_scale=True)


def test_scales_of_a_candidate_are_rounded_as_they_are_stored():
    # Neighbouring candidates often have one e4m3 scale, and so one error: then the wider is kept.
    weight, layout = make_weight("normal", rows=64, columns=16), Layout.of(NVFP4, "weight")
    found = shrink_ranges(weight, Format.of(NVFP4), layout, SearchOptions(), global_scale=torch.tensor([1.0]))
    low, high = weight.double().amin(1), weight.double().amax(1)
    step = ((1 - found.max[:, 0] / high) * 100).round()
    scale, wider = (calculate_scale(low * p, high * p, NVFP4)[0] for p in (1 - step / 100, 1 - (step - 1) / 100))
    assert torch.equal(scale.to(FP8).double(), scale)
    assert (step > 0).sum() > 10
    assert ((scale < wider) | (step == 0)).all()


def test_compiled_search_follows_the_contract_and_equals_the_uncompiled_one():
    weights = [make_weight(kind, rows=96, columns=256, seed=s) for s, kind in enumerate(DISTRIBUTIONS)]
    for name in ("int8_asym_channel", "int4_g32", "fp8_tensor", "int8_asym_tensor"):
        args = WEIGHT_ARGS[name]
        compiled = [assert_follows_contract(weight, args, SearchOptions()) for weight in weights]
        with compilation("never"):
            eager = [assert_follows_contract(weight, args, SearchOptions()) for weight in weights]
        differing = sum((a != b).sum().item() for a, b in zip(compiled, eager, strict=True))
        assert differing <= 1e-3 * sum(map(len, eager))  # ties
    step = assert_follows_contract(weights[0], NVFP4, SLOW_OPTIONS, torch.tensor([100.0]))
    assert len(step.unique()) > 4


@torch._dynamo.config.patch(error_on_recompile=True)
def test_one_graph_per_scheme_over_shapes_batches_and_ranks():
    torch._dynamo.reset()
    compiling._compile.cache_clear()
    counters.clear()

    def search_weights(args, *shapes):
        for shape in shapes:
            shrink_ranges(torch.randn(shape), Format.of(args), Layout.of(args, "weight"), SearchOptions())
        return counters["stats"]["unique_graphs"]

    # All schemes share the graph of what improved, those of one group size that of their ranges, and have one each.
    groups = (64, 128), (96, 256), (33, 192), (512, 64), (17, 4096)
    assert search_weights(make_args(4, strategy="group", group_size=64), *groups) == 3
    assert search_weights(make_args(3, strategy="group", group_size=32), *groups) == 5
    # Rows are cut into parts of 128; 8192 x 512 is several tiles.
    rows = (64, 512), (96, 768), (12, 11008), (512, 8192), (8192, 512)
    assert search_weights(make_args(8, strategy="channel"), *rows) == 7
    args = make_args(8)
    # These are cut into parts of 1024, 128 and 64; bfloat16 of which two are not in a row is copied.
    for num_graphs, dtype in ((10, torch.float32), (14, torch.bfloat16)):
        for shape in ((8, 16, 64), (2, 31, 96), (128, 384), (3, 5, 7, 256), (64, 65, 2), (3, 700, 512)):
            shrink_ranges(torch.randn(shape).to(dtype), Format.of(args), Layout.of(args, "input"), SearchOptions())
        assert counters["stats"]["unique_graphs"] == num_graphs
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]


@torch._dynamo.config.patch(error_on_recompile=True)
def test_whoever_asks_for_a_search_gets_the_same_graph():
    args, options = make_args(7), SearchOptions(norm=2.2)
    observer = Observer.load_from_registry("memoryless_mse", base_name="input", args=args, norm=2.2)
    value = torch.randn(3, 64, 96)

    def search_value(value):
        return shrink_ranges(value, Format.of(args), Layout.of(args, "input"), options)

    found = [search_value(value), search_value(torch.nn.Parameter(value)), search_value(value.expand(1, -1, -1, -1)[0])]
    found.append(torch.ops.fxmse.measure(value, None, observer._spec))
    with torch.inference_mode():
        found += [search_value(value), search_value(value.clone())]
    torch._dynamo.reset()  # whatever else is compiled may ask for that
    search_value(value[:2])
    found.append(search_value(value))
    for later in found[1:]:
        torch.testing.assert_close(later, found[0], rtol=0, atol=0, check_device=True)


def test_many_schemes_stay_compiled():
    # A limit of recompilations per function silently ended the reference's compiled version at the eighth.
    counters.clear()
    value = torch.randn(64, 128)
    for norm in range(12):
        options = SearchOptions(norm=1.5 + norm / 100)
        shrink_ranges(value, Format.of(make_args()), Layout.of(make_args(), "weight"), options)
    assert counters["stats"]["unique_graphs"] == 12


WITHOUT_COMPILER = """
import sys, warnings, torch
from compressed_tensors.quantization import QuantizationArgs
from fxmse.observers.base import Observer
from fxmse.search.compiling import compilation
args = QuantizationArgs(num_bits=3, strategy="channel")
weights = torch.load(sys.argv[1])
with warnings.catch_warnings(record=True) as caught, compilation("always"):
    warnings.simplefilter("always")
    found = [Observer.load_from_registry("memoryless_mse", base_name="weight", args=args)(w).max_vals for w in weights]
torch.save(found, sys.argv[2])
said = [str(w.message) for w in caught if w.category is RuntimeWarning]
assert len(said) == 1 and "runs uncompiled" in said[0] and "Install a C++ compiler" in said[0], said
"""


def test_a_machine_without_a_compiler_gets_one_warning_and_the_same_ranges(tmp_path):
    weights = [torch.randn(70, 90), torch.randn(33, 200)]
    torch.save(weights, tmp_path / "weights.pt")
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", WITHOUT_COMPILER, tmp_path / "weights.pt", tmp_path / "found.pt"]
    subprocess.run(command, check=True, env=environment)
    args = make_args(3, strategy="channel")
    for weight, found in zip(weights, torch.load(tmp_path / "found.pt"), strict=True):
        expected = shrink_ranges(weight, Format.of(args), Layout.of(args, "weight"), SearchOptions()).max
        assert (found == expected).float().mean() > 0.98  # the others tie


@pytest.mark.parametrize("name", ["int8_asym_tensor", "int4_asym_g32", "fp8_block", "mxfp4"])
def test_nothing_waits_for_the_device(name, monkeypatch):
    # A fake tensor has no data: whatever reads a value on the host raises.
    monkeypatch.setattr(shrinking, "MAX_TABLE", 1000)
    args = WEIGHT_ARGS[name]
    with FakeTensorMode():
        shrink_ranges(torch.empty(96, 96), Format.of(args), Layout.of(args, "weight"), SearchOptions())


@pytest.mark.parametrize(
    ("base_name", "shape", "args"),
    [
        ("weight", (4096, 2048), make_args(4, "float", "group", group_size=16)),
        ("weight", (2048, 2048), make_args(8, strategy="block", block_structure=[128, 128])),
        ("input", (16, 256, 1024), make_args(8, symmetric=False)),
        ("input", (16, 256, 1024), make_args(8, strategy="group", group_size=32)),
    ],
)
def test_no_temporary_of_the_datas_size(base_name, shape, args):
    value = torch.randn(shape)
    layout, format_ = Layout.of(args, base_name), Format.of(args)
    shrink_ranges(value, format_, layout, SearchOptions())
    with torch.profiler.profile(profile_memory=True) as profile:
        shrink_ranges(value, format_, layout, SearchOptions())
    largest = max(event.cpu_memory_usage for event in profile.events() if not event.cpu_children)
    assert 0 < largest < 0.3 * value.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["int8_channel", "int4_g32", "int8_asym_channel", "fp8_channel", "int8_tensor", "fp4_g16"]
)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_half_precision_is_never_worse_than_minmax(dtype, name, kind):
    # The reference adds up in the input's dtype: in float16 its int8 channels never leave p = 1, in bfloat16 13.7 %
    # end worse than min-max.
    args, options = WEIGHT_ARGS[name], SearchOptions()
    layout = Layout.of(args, "weight")
    weight = make_weight(kind).to(dtype)
    groups = as_groups(weight, layout).double()

    def measure_error(found):
        scale, zero_point = calculate_scale(found.min.flatten().double(), found.max.flatten().double(), args)
        stored = scale.to(dtype).double().clamp(min=torch.finfo(dtype).smallest_normal)
        return sum_errors(groups, stored, zero_point, args, options.norm)

    best = measure_error(shrink_ranges(weight, Format.of(args), layout, options))
    minmax = measure_error(measure_range(weight, layout))
    assert (best <= minmax * (1 + TIE)).all()
    if kind == "normal" and name in ("int8_channel", "int4_g32", "fp4_g16"):
        assert (best < minmax * 0.999).any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(sorted(WEIGHT_ARGS)), st.integers(-30, 30))
def test_properties(seed, name, exponent):
    args, options = WEIGHT_ARGS[name], SearchOptions()
    layout, format_ = Layout.of(args, "weight"), Format.of(args)
    weight = make_weight("heavy", rows=16, columns=32, seed=seed)
    found = shrink_ranges(weight, format_, layout, options)
    own = measure_range(weight, layout)
    assert (found.min >= own.min.clamp(max=0) - 1e-30).all() or (own.min > 0).any()
    assert (found.max.abs() <= own.max.abs()).all()
    # A power of two in x is a power of two in the range.
    scaled = shrink_ranges(weight * 2.0**exponent, format_, layout, options)
    assert torch.equal(scaled.max, found.max * 2.0**exponent)
    assert torch.equal(scaled.min, found.min * 2.0**exponent)
    # Never worse than min-max.
    groups = as_groups(weight, layout).double()
    if name.startswith("mx"):
        return
    errors = [
        sum_errors(groups, *calculate_scale(r.min.flatten().double(), r.max.flatten().double(), args), args, 2.4)
        for r in (found, own)
    ]
    assert (errors[0] <= errors[1] * (1 + TIE)).all()


@pytest.mark.parametrize("num_rows", [200, 2000])  # uncompiled and compiled
def test_of_two_scales_that_round_alike_the_wider_range_is_kept(num_rows):
    # Steps 2 and 101 of 200 are the two best of this group, and equal: the latter's scale is half of the former's.
    group = [-0.5, -2.25, -1.75, -1.25, 1.5, 2.25, -1.25, 0.0, -2.75, -0.75, -0.5, 0.75, -0.5, 0.0, -0.5, 1.75]
    weight = torch.tensor(group) * torch.linspace(1, 2, num_rows)[:, None]
    args, options = make_args(4, "float", "group", group_size=16), SearchOptions(expand=1.8, grid=200.0, maxshrink=0.55)
    options = replace(options, patience=len(options.factors))
    found = shrink_ranges(weight, Format.of(args), Layout.of(args, "weight"), options)
    torch.testing.assert_close(found.min[:, 0], weight.amin(1) * 1.8 * (1 - 2 / 200), rtol=1e-6, atol=0)


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
        assert torch.equal(shrinking.run(is_compiled, find, problem, -absmax, absmax), counted)


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
    alone = shrink_ranges(falling, Format.of(args), Layout.of(args, "weight"), options)
    together = shrink_ranges(both, Format.of(args), Layout.of(args, "weight"), options)
    assert alone.max.item() == 1.0
    assert together.max[1].item() < 0.6


@pytest.mark.parametrize("patience", [1, 2, 3, 5])
@pytest.mark.parametrize("args_name", ["int8_channel", "int4_g32", "fp8_block"])
def test_candidates_that_are_not_evaluated_change_nothing(args_name, patience, monkeypatch):
    args = WEIGHT_ARGS[args_name]
    layout, format_ = Layout.of(args, "weight"), Format.of(args)
    options = SearchOptions(maxshrink=0.5, patience=patience)
    evaluated = []
    sum_errors = shrinking.sum_errors

    def note(problem, values, factors, *tensors):
        evaluated.append(len(factors))
        return sum_errors(problem, values, factors, *tensors)

    monkeypatch.setattr(shrinking, "sum_errors", note)
    monkeypatch.setattr(shrinking, "MAX_TABLE", 400)  # 8 groups a tile
    with compilation("never"):
        for kind in DISTRIBUTIONS:
            weight = make_weight(kind)
            evaluated.clear()
            found = shrink_ranges(weight, format_, layout, options)
            num_evaluated = list(evaluated)
            with monkeypatch.context() as patch:
                patch.setattr(shrinking, "reads_flags", lambda tensor: False)
                evaluated.clear()
                expected = shrink_ranges(weight, format_, layout, options)
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
    layout, format_, options = Layout.of(args, "weight"), Format.of(args), SearchOptions(patience=3)
    alone = shrink_ranges(weight[:1], format_, layout, options)
    whole = shrink_ranges(weight, format_, layout, options)
    monkeypatch.setattr(shrinking, "MAX_TABLE", 160)  # 8 groups a tile
    tiled = shrink_ranges(weight, format_, layout, options)
    assert torch.equal(whole.max, tiled.max)
    assert alone.max.item() == 1.0
    assert whole.max[0].item() < 0.95


@pytest.mark.parametrize("kind", ["normal", "uniform", "outliers", "few", "constant"])
@pytest.mark.parametrize("patience", [1, 5])
def test_global_range_of_the_largest_groups_is_that_of_all(kind, patience, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(512, 256)
    if kind == "uniform":
        weight = torch.rand(512, 256) * 2 - 1
    elif kind == "outliers":
        weight[::7, 3] *= 40
    elif kind == "few":
        weight = torch.zeros(512, 256)
        weight[100, 50:66] = torch.linspace(-3, 1, 16)
    elif kind == "constant":
        weight = torch.ones(512, 256)
    layout, format_ = Layout.of(NVFP4, "weight"), Format.of(NVFP4)
    options = SearchOptions(patience=patience)
    found = shrink_global_range(weight, format_, layout, options)
    monkeypatch.setattr(shrinking, "reads_flags", lambda tensor: False)
    expected = shrink_global_range(weight, format_, layout, options)
    assert torch.equal(calculate_global_scale(*found), calculate_global_scale(*expected))


def test_a_scheme_is_compiled_once_its_searches_took_as_long_as_compiling(monkeypatch):
    args = make_args(5, strategy="channel")
    compiled = []
    run = shrinking.run

    def record(is_compiled, stage, *args):
        if stage is not shrinking.choose_candidates:  # among so few groups never
            compiled.append(is_compiled)
        return run(False, stage, *args)

    monkeypatch.setattr(shrinking, "run", record)
    monkeypatch.setattr(compiling, "_COMPILATION_WORK", 3 * 64 * 128 * 20)

    def is_compiled(rows, columns=128):
        compiled.clear()
        shrink_ranges(torch.randn(rows, columns), Format.of(args), Layout.of(args, "weight"), SearchOptions(norm=2.1))
        assert len(set(compiled)) == 1
        return compiled[0]

    with compilation("auto"):
        assert [is_compiled(64) for _ in range(4)] == [False, False, True, True]
        assert not is_compiled(1)
    with compilation("never"):
        assert not is_compiled(64)
    with pytest.raises(ValueError, match=r"mode='sometimes': expected one of auto, always, never"):
        compilation("sometimes").__enter__()


def test_a_value_that_is_cut_into_tiles_gives_the_same_ranges(monkeypatch):
    weight = make_weight("heavy", rows=64, columns=96)
    args = make_args(4, strategy="group", group_size=16)
    options = SearchOptions(patience=2)
    whole = shrink_ranges(weight, Format.of(args), Layout.of(args, "weight"), options)
    monkeypatch.setattr(shrinking, "MAX_TABLE", 400)  # 20 groups a tile
    cut = shrink_ranges(weight, Format.of(args), Layout.of(args, "weight"), options)
    assert torch.equal(whole.min, cut.min)
    assert torch.equal(whole.max, cut.max)


@pytest.mark.parametrize("args", [make_args(4, strategy="channel"), NVFP4], ids=["channel", "nvfp4"])
def test_one_row_is_weighted_as_one_of_many(args):
    torch.manual_seed(0)
    row, importance = make_weight("heavy", rows=1, columns=4096), torch.rand(4096)
    layout, format_, options = Layout.of(args, "weight"), Format.of(args), SearchOptions(norm=3.0)
    alone, twice = (
        shrink_ranges(value, format_, layout, options, importance=importance) for value in (row, row.expand(2, -1))
    )
    assert torch.equal(alone.max, twice.max[:1])
    assert not torch.equal(alone.max, shrink_ranges(row, format_, layout, options).max)


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_bfloat16_read_in_pairs_is_searched_as_its_float32_copy(strategy, symmetric):
    sizes = {"group": {"group_size": 64}, "block": {"block_structure": [16, 64]}}.get(strategy, {})
    args = make_args(4, strategy=strategy, symmetric=symmetric, scale_dtype=torch.float32, **sizes)
    layout, format_, options = Layout.of(args, "weight"), Format.of(args), SearchOptions()
    weight = make_weight("heavy", rows=96, columns=256).bfloat16()
    assert shrinking.holds_pairs(weight, layout)
    found, expected = (shrink_ranges(value, format_, layout, options) for value in (weight, weight.float()))
    assert torch.equal(found.min, expected.min)
    assert torch.equal(found.max, expected.max)
    # The first element is no even one of memory, or the rows are not beside each other.
    for apart in (weight.flatten()[1:-255].view(95, 256), weight[:, :128]):
        assert not shrinking.holds_pairs(apart, layout)
        assert torch.equal(
            shrink_ranges(apart, format_, layout, options).max,
            shrink_ranges(apart.float(), format_, layout, options).max,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("args", [make_args(4, symmetric=False), make_args(4, strategy="group", group_size=16)])
def test_errors_of_many_observations_add_up(args, dtype, monkeypatch):
    value = make_weight("heavy", rows=60, columns=64).reshape(4, 15, 64).to(dtype)
    layout, format_, options = Layout.of(args, "input"), Format.of(args), SearchOptions(maxshrink=0.6)
    whole = shrink_ranges(value, format_, layout, options)
    assert (whole.max < measure_range(value, layout).max).any()
    num_parts = []

    def count_parts(*arguments):
        num_parts.append(tiles.count_parts(*arguments))
        return num_parts[-1]

    monkeypatch.setattr(tiles, "MAX_TABLE", 1000)
    monkeypatch.setattr(shrinking, "count_parts", count_parts)
    cut = shrink_ranges(value, format_, layout, options)
    assert min(num_parts) > 1
    assert torch.equal(whole.min, cut.min)
    assert torch.equal(whole.max, cut.max)


def test_traces_into_a_graph_of_the_callers():
    args = make_args(8, symmetric=False)
    layout, format_, options = Layout.of(args, "input"), Format.of(args), SearchOptions()

    @torch.compile(fullgraph=True)
    def double_and_search(x):
        return shrink_ranges(x * 2, format_, layout, options)

    x = torch.randn(8, 33, 64)
    torch.testing.assert_close(double_and_search(x), shrink_ranges(x * 2, format_, layout, options))


@pytest.mark.parametrize(
    ("maxshrink", "grid", "num_steps"),
    [(0.29, 100, 29), (0.2, 100.0, 20), (1.0, 7, 7), (0.07, 100, 7), (0.57, 100, 57)],
)
def test_steps_are_counted_in_decimal(maxshrink, grid, num_steps):
    # int(.29 * 100) is 28.
    assert len(SearchOptions(maxshrink=maxshrink, grid=grid).factors) == num_steps


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"maxshrink": 0}, "maxshrink=0: expected"),
        ({"maxshrink": 1.5}, "maxshrink=1.5"),
        ({"grid": 0}, "grid=0: expected"),
        ({"grid": math.inf}, "grid=inf"),
        ({"norm": -1}, "norm=-1: expected a number above 0"),
        ({"norm": "2"}, "norm='2'"),
        ({"norm": math.nan}, "norm=nan"),
        ({"patience": 0}, "patience=0: expected a whole number"),
        ({"patience": 1.5}, "patience=1.5"),
        ({"patience": True}, "patience=True"),
        ({"maxshrink": 0.005}, "make no search step"),
    ],
)
def test_options_out_of_range_are_named(kwargs, named):
    with pytest.raises(ValueError, match=named):
        SearchOptions(**kwargs)


def test_a_zero_value_keeps_its_range():
    found = shrink_ranges(torch.zeros(4, 8), Format.of(MXFP4), Layout.of(make_args(), "weight"), SearchOptions())
    assert found.min.item() == found.max.item() == 0
    assert calculate_global_scale(*found).item() == 1
