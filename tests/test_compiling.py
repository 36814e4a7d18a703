"""Compiled searches against uncompiled ones, and when and how often something is compiled.

A graph takes seconds to compile, and most of them for the steps that it looks at one after the other: what is compiled
has few steps where the steps are not the point.
"""

import functools
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from cases import DISTRIBUTIONS, MXFP4, MXFP8, NVFP4, as_groups, make_args, make_weight
from compressed_tensors.quantization import QuantizationArgs
from contract import TIE, assert_follows_contract, shrink_weight
from oracle import calculate_scale, sum_errors
from torch._dynamo.utils import counters

import fxmse.search.compiling as compiling
import fxmse.search.shrinking as shrinking
from fxmse.formats.grids import Format
from fxmse.formats.layout import Layout
from fxmse.observers import Observer
from fxmse.search.compiling import compilation, pays_to_compile, settled
from fxmse.search.options import SearchOptions
from fxmse.search.shrinking import shrink_ranges

pytestmark = pytest.mark.usefixtures("compiled_searches")

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
BLOCKS = {"strategy": "block", "block_structure": [32, 128]}


def few_steps(norm: float) -> SearchOptions:
    return SearchOptions(maxshrink=0.3, grid=20.0, patience=3, norm=norm)


MANY_STEPS = SearchOptions(maxshrink=0.6, grid=50.0, patience=30)  # more than a word of a bit set


class Case(NamedTuple):
    args: QuantizationArgs
    dtype: torch.dtype
    options: SearchOptions = few_steps(2.0)
    base_name: str = "weight"
    importance: bool = False
    one_group: bool = False  # each candidate's own global scale

    def make_value(self, kind, seed=0):
        columns = 1024 if self.base_name == "input" else 256
        value = make_weight(kind, 96, columns, seed)
        return (value if self.base_name == "weight" else value.view(3, 32, columns)).to(self.dtype)

    def search(self, value):
        layout, importance, global_scale = Layout.of(self.args, self.base_name), None, None
        if self.importance:
            generator = torch.Generator().manual_seed(7)
            importance = torch.rand(value.shape[-1], generator=generator).to(value.device)
        if self.one_group:
            layout = layout.as_one_group()
        elif self.args.strategy == "tensor_group":
            global_scale = torch.tensor([100.0], device=value.device)
        return shrink_ranges(
            value,
            Format.of(self.args),
            layout,
            self.options,
            global_scale=global_scale,
            optimize_global_scale=self.one_group,
            importance=importance,
        )


# Each grid, each strategy and each role with each dtype; all widths of integers; each form of the power.
CASES = {
    "int8 tensor": Case(make_args(8), F32, few_steps(2.4)),
    "int4 tensor asymmetric": Case(make_args(4, symmetric=False), BF16),
    "fp8 tensor": Case(make_args(8, "float"), F16),
    "int3 channel": Case(make_args(3, strategy="channel"), F16),
    "int6 channel asymmetric": Case(make_args(6, strategy="channel", symmetric=False), F32, few_steps(3.0)),
    "fp8 channel": Case(make_args(8, "float", "channel"), BF16),
    "fp4 channel": Case(make_args(4, "float", "channel"), F32, few_steps(1.0)),
    "int4 g32": Case(make_args(4, strategy="group", group_size=32), BF16, few_steps(2.4)),
    "int2 g64 asymmetric": Case(make_args(2, strategy="group", group_size=64, symmetric=False), F16),
    "fp8 g32": Case(make_args(8, "float", "group", group_size=32), F32, few_steps(2.1)),
    "fp4 g16": Case(make_args(4, "float", "group", group_size=16), F32, SearchOptions()),
    "fp4 g16 of half precision": Case(make_args(4, "float", "group", group_size=16), F16),
    "int8 block": Case(make_args(8, **BLOCKS), F32, SearchOptions()),
    "int7 block asymmetric": Case(make_args(7, symmetric=False, **BLOCKS), BF16),
    "fp8 block": Case(make_args(8, "float", **BLOCKS), F16),
    "nvfp4": Case(NVFP4, BF16, few_steps(2.4)),
    "nvfp4 of many steps": Case(NVFP4, F32, MANY_STEPS),
    "nvfp4 in one group": Case(NVFP4, F32, one_group=True),
    "mxfp4": Case(MXFP4, BF16),
    "mxfp8": Case(MXFP8, F32),
    "int5 channel by importance": Case(make_args(5, strategy="channel"), F32, few_steps(3.0), importance=True),
    "int4 g32 by importance": Case(make_args(4, strategy="group", group_size=32), BF16, importance=True),
    "nvfp4 by importance": Case(NVFP4, F16, importance=True),
    "int8 input asymmetric": Case(make_args(8, symmetric=False), F32, SearchOptions(), "input"),
    "int4 input asymmetric": Case(make_args(4, symmetric=False), BF16, base_name="input"),
    "int8 g32 input": Case(make_args(8, strategy="group", group_size=32), F32, SearchOptions(), "input"),
    "fp8 g32 input": Case(make_args(8, "float", "group", group_size=32), F16, base_name="input"),
}


# Those whose error the oracle knows: neither global scales nor importance nor powers of two.
PLAIN = [
    name
    for name, case in CASES.items()
    if not case.importance and not name.startswith("mx") and case.args.strategy != "tensor_group"
]


def are_ties(case, value, differing, found):
    """Whether ranges of the same groups have one error in float64: the contract leaves either to be chosen.

    Where a group's elements are nearly on the grid, as those of a constant one, float32 does not tell such errors
    apart: of -.7 a scale of .17 makes -.68 and one of .18 makes -.72.
    """
    groups = as_groups(value, case.args, case.base_name).double()[differing]
    errors = []
    for low, high in found:
        low, high = low.flatten()[differing].double(), high.flatten()[differing].double()
        scale, zero_point = calculate_scale(low, high, case.args)
        errors.append(sum_errors(groups, scale.to(case.dtype).double(), zero_point, case.args, case.options.norm))
    return (errors[0] - errors[1]).abs() <= TIE * errors[1]


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_search_finds_what_the_uncompiled_one_does(name, device):
    case = CASES[name]
    num_groups = num_differing = 0
    for seed, kind in enumerate(DISTRIBUTIONS):
        value = case.make_value(kind, seed).to(device)
        compiled = case.search(value)
        with compilation("never"):
            uncompiled = case.search(value)
        num_groups += compiled.max.numel()
        differing = ((compiled.min != uncompiled.min) | (compiled.max != uncompiled.max)).flatten().nonzero()[:, 0]
        if device.type == "cpu":  # a GPU does not wait for near ties to be settled
            assert not len(differing)
        num_differing += len(differing)
        if len(differing) and name in PLAIN:
            num_differing -= are_ties(case, value, differing, (compiled, uncompiled)).sum().item()
    assert num_differing <= 1e-3 * num_groups  # ties
    # What is not finite stays so.
    for bad in (torch.nan, torch.inf):
        value.view(-1)[5] = bad
        assert not case.search(value).max.isfinite().all()


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.dtype == F32 and not case.importance and name != "mxfp8"]
)
def test_a_compiled_search_follows_the_contract(name, device):
    args, _, options, base_name, _, one_group = CASES[name]
    global_scale = torch.tensor([100.0]) if args.strategy == "tensor_group" and not one_group else None
    for seed, kind in enumerate(DISTRIBUTIONS):
        value = CASES[name].make_value(kind, seed)
        step = assert_follows_contract(value, args, options, global_scale, one_group, base_name, device)
    if options == MANY_STEPS:
        assert len(step.unique()) > 4


@pytest.mark.parametrize("name", ["int4 g32", "nvfp4"])
def test_tiles_of_any_size_are_searched_alike(name, monkeypatch):
    case = CASES[name]
    value = case.make_value("heavy")
    whole = case.search(value)
    monkeypatch.setattr(shrinking, "MAX_TABLE", 600)
    cut = case.search(value)
    assert torch.equal(whole.min, cut.min)
    assert torch.equal(whole.max, cut.max)


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
def test_bfloat16_read_in_pairs_is_searched_as_its_float32_copy(strategy):
    sizes = {"group": {"group_size": 64}, "block": {"block_structure": [16, 64]}}.get(strategy, {})
    # Symmetric where a group's elements are beside each other.
    args = make_args(4, strategy=strategy, symmetric=strategy in ("channel", "group"), scale_dtype=F32, **sizes)
    layout = Layout.of(args, "weight")
    weight = make_weight("heavy", rows=96, columns=256).bfloat16()
    assert shrinking.holds_pairs(weight, layout)
    found, expected = (shrink_weight(value, args, few_steps(2.0)) for value in (weight, weight.float()))
    assert torch.equal(found.min, expected.min)
    assert torch.equal(found.max, expected.max)
    # The first element is no even one of memory, or the rows are not beside each other.
    for apart in (weight.flatten()[1:-255].view(95, 256), weight[:, :128]):
        assert not shrinking.holds_pairs(apart, layout)
        if strategy == "group":
            found, expected = (shrink_weight(value, args, few_steps(2.0)).max for value in (apart, apart.float()))
            assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["never", "always"])
def test_one_row_is_weighted_as_one_of_many(mode):
    # A graph is made for one group, and another for several.
    row, importance = make_weight("heavy", rows=1, columns=4096), torch.rand(4096)
    with compilation(mode):
        for args in (make_args(4, strategy="channel"), NVFP4)[: 1 if mode == "always" else 2]:
            options = SearchOptions(norm=3.0)
            alone, twice = (
                shrink_weight(value, args, options, importance=importance) for value in (row, row.expand(2, -1))
            )
            assert torch.equal(alone.max, twice.max[:1])
            with compilation("never"):
                assert not torch.equal(alone.max, shrink_weight(row, args, options).max)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("fp4 g16", (4096, 2048)),
        ("int8 block", (2048, 2048)),
        ("int8 input asymmetric", (16, 256, 1024)),
        ("int8 g32 input", (16, 256, 1024)),
    ],
)
def test_no_temporary_of_the_datas_size(name, shape):
    value = torch.randn(shape)
    CASES[name].search(value)
    with torch.profiler.profile(profile_memory=True) as profile:
        CASES[name].search(value)
    largest = max(event.cpu_memory_usage for event in profile.events() if not event.cpu_children)
    assert 0 < largest < 0.3 * value.nbytes


@pytest.fixture
def own_graphs(monkeypatch):
    """No graph that another test made, and none left to it."""
    monkeypatch.setattr(compiling, "_compile", functools.cache(compiling._compile.__wrapped__))
    counters.clear()


def test_many_schemes_stay_compiled(own_graphs, monkeypatch):
    # A limit of recompilations per function silently ended the reference's compiled version at the eighth. It is
    # Dynamo's: nobody needs the code.
    compile_ = torch.compile

    def make_graph(function, *, options, **kwargs):
        guards = {"guard_filter_fn": options["guard_filter_fn"]}
        return compile_(function, backend="eager", options=guards, **kwargs)

    monkeypatch.setattr(torch, "compile", make_graph)
    value = torch.randn(64, 128)
    for norm in range(12):
        shrink_weight(value, make_args(), few_steps(1.5 + norm / 100))
    assert counters["stats"]["unique_graphs"] == 12


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
        shrink_weight(torch.randn(rows, columns), args, SearchOptions(norm=2.1))
        assert len(set(compiled)) == 1
        return compiled[0]

    with compilation("auto"):
        assert [is_compiled(64) for _ in range(4)] == [False, False, True, True]
        assert not is_compiled(1)
    with compilation("never"):
        assert not is_compiled(64)
    with pytest.raises(ValueError, match=r"mode='sometimes': expected one of auto, always, never"):
        compilation("sometimes").__enter__()


WITHOUT_COMPILER = """
import sys, warnings, torch
from compressed_tensors.quantization import QuantizationArgs
from fxmse.observers.base import Observer
from fxmse.search.compiling import compilation
args = QuantizationArgs(num_bits=3, strategy="channel", observer_kwargs={"maxshrink": 0.3, "grid": 20, "norm": 2})
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
        with compilation("never"):
            expected = shrink_weight(weight, args, SearchOptions(maxshrink=0.3, grid=20, norm=2)).max
        assert (found == expected).float().mean() > 0.98  # the others tie


def test_traces_into_a_graph_of_the_callers():
    args = make_args(8, symmetric=False)
    layout, format_, options = Layout.of(args, "input"), Format.of(args), few_steps(2.0)

    @torch.compile(fullgraph=True)
    def double_and_search(x):
        return shrink_ranges(x * 2, format_, layout, options)

    x = torch.randn(8, 33, 64)
    torch.testing.assert_close(double_and_search(x), shrink_ranges(x * 2, format_, layout, options))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_one_graph_per_scheme_over_shapes_batches_and_ranks(own_graphs):
    options = few_steps(2.0)

    def search_weights(args, *shapes):
        for shape in shapes:
            shrink_weight(torch.randn(shape), args, options)
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
            shrink_ranges(torch.randn(shape, dtype=dtype), Format.of(args), Layout.of(args, "input"), options)
        assert counters["stats"]["unique_graphs"] == num_graphs
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]


@torch._dynamo.config.patch(error_on_recompile=True)
def test_whoever_asks_for_a_search_gets_the_same_graph():
    args, options = make_args(7), SearchOptions(norm=2.0)
    observer = Observer.load_from_registry("memoryless_mse", base_name="input", args=args, norm=2.0)
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


@pytest.mark.parametrize(
    ("mode", "num_errors", "expected"),
    [
        ("auto", 1 << 20, False),
        ("auto", 1 << 40, True),
        ("always", 1, True),
        ("never", 1 << 40, False),
    ],
)
def test_a_run_compiles_all_of_its_searches_or_none(mode, num_errors, expected):
    value = torch.zeros(1 << 20)
    with compilation(mode), settled(num_errors):
        assert [pays_to_compile(("settled", mode), value, 100) for _ in range(20)] == [expected] * 20
