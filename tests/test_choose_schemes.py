"""Which format where: the program against enumeration, sizes and choices against the checkpoints that come of them."""

import dataclasses
import itertools
import json
import math
import sys

import pytest
import torch
import transformers
import yaml
from architectures import ARCHITECTURES, TEXT
from cases import make_args
from compressed_tensors.compressors import compress_module
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle import initialize_module_for_quantization
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Attention, Convolutions
from safetensors import safe_open
from torch import nn

import fxmse
from fxmse.analysis.layers import measure_bits
from fxmse.analysis.program import find_least_cost, solve
from fxmse.analysis.results import Analysis, LayerGroup, SiteError
from fxmse.cli import main

OPTIONS = {"progress": False}
CANDIDATES = ["W4A16", "NVFP4A16", "FP8_DYNAMIC", None]

numbers = st.one_of(st.integers(0, 40), st.floats(0, 1e-3), st.floats(1e-9, 1e6))


@st.composite
def draw_program(draw):
    errors, costs = [], []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 4))
        errors.append(draw(st.lists(numbers, min_size=size, max_size=size)))
        costs.append(draw(st.lists(st.integers(0, 30), min_size=size, max_size=size)))
    least, most = find_least_cost(costs), sum(map(max, costs))
    return errors, costs, draw(st.one_of(st.just(least), st.just(most), st.integers(least, most)))


@settings(max_examples=150, deadline=None)
@given(draw_program())
def test_the_program_finds_what_enumeration_does(program):
    errors, costs, budget = program
    found = solve(errors, costs, budget)
    choices = itertools.product(*(range(len(row)) for row in errors))
    allowed = [c for c in choices if sum(row[p] for row, p in zip(costs, c, strict=True)) <= budget]
    least = min(sum(row[p] for row, p in zip(errors, c, strict=True)) for c in allowed)
    assert tuple(found.choice) in allowed
    assert found.error == pytest.approx(least, rel=1e-7, abs=1e-12)
    assert found.cost == sum(row[p] for row, p in zip(costs, found.choice, strict=True))
    assert found.gap <= 1e-6


def test_a_large_program_is_solved_to_the_end(capfd):
    generator = torch.Generator().manual_seed(0)
    bits = torch.tensor([3.25, 4.25, 4.5, 6.25, 8.06, 16.0], dtype=torch.float64)
    sizes = torch.randint(1, 9, (400, 1), generator=generator) * 1e6
    spread = torch.rand(400, 6, generator=generator, dtype=torch.float64) + 0.5
    errors = 10 ** (-4 * torch.rand(400, 1, generator=generator, dtype=torch.float64)) * 4**-bits * spread
    costs = (sizes * bits).tolist()
    found = solve(errors.tolist(), costs, 5 * sizes.sum().item())
    assert found.gap == 0
    assert 0.999 < found.cost / (5 * sizes.sum().item()) <= 1
    assert capfd.readouterr().out == ""


def make_analysis(groups, errors, sizes):
    """Modules m0, m1 ... in groups, with errors and bits a weight by candidate; each has 100 weights."""
    names = [name for name in sizes if name != "float"]
    modules = [module for group in groups for module in group]
    sites = tuple(
        SiteError(f"{m}.weight", (f"{m}.weight",), m, "weight", name, "", 100, 0.0, 0.0, 0.0, errors[m][name])
        for m in modules
        for name in names
    )
    made = tuple(LayerGroup(g, 100 * len(g), {n: 100.0 * len(g) * b for n, b in sizes.items()}) for g in groups)
    return Analysis("nats", tuple(names), sites, (), {}, made, 1, {})


ANALYSIS = make_analysis(
    [("m0", "m1"), ("m2",), ("m3",)],
    {f"m{n}": {"W4A16": e, "W8A16": e / 256} for n, e in enumerate((1.0, 0.1, 0.9, 0.3))},
    {"W4A16": 4.5, "W8A16": 8.5, "float": 16.0},
)


def test_the_choice_is_the_best_within_the_budget():
    choice = fxmse.choose_schemes(None, ["W4A16", "W8A16", None], 6.5, analysis=ANALYSIS)
    # m0 and m1 go together; one of two others is left, which is m2.
    assert choice.chosen == {"m0": "W8A16", "m1": "W8A16", "m2": "W4A16", "m3": "W4A16"} or choice.chosen == {
        "m0": "W4A16",
        "m1": "W4A16",
        "m2": "W8A16",
        "m3": "W8A16",
    }
    errors = [1.1, 0.9, 0.3]
    sums = {c: sum(e / (256 if own else 1) for e, own in zip(errors, c, strict=True)) for c in [(1, 0, 0), (0, 1, 1)]}
    assert choice.error == pytest.approx(min(sums.values()))
    assert choice.size == 6.5
    assert choice.gap == 0
    targets = {name: scheme.targets for name, scheme in choice.config.config_groups.items()}
    assert sorted(module for own in targets.values() for module in own) == ["m0", "m1", "m2", "m3"]
    sizes, least = zip(*choice.curve, strict=True)
    assert list(sizes) == sorted(sizes)
    assert list(least) == sorted(least, reverse=True)
    assert (sizes[0], sizes[-1], least[-1]) == (4.5, 16.0, 0.0)
    assert json.loads(json.dumps(choice.to_dict(), allow_nan=False))["size"] == 6.5


def test_units_and_tables_of_costs():
    in_bytes = fxmse.choose_schemes(None, ["W4A16", "W8A16"], 6.5 * 400 / 8, analysis=ANALYSIS, unit="bytes")
    in_bits = fxmse.choose_schemes(None, ["W4A16", "W8A16"], 6.5, analysis=ANALYSIS)
    assert in_bytes.chosen == in_bits.chosen
    assert in_bytes.size == 325
    # Seconds, by which m3 alone gains.
    costs = {f"m{n}": {"W4A16": 1.0, "W8A16": 9.0 if n < 3 else 1.5, "float": 20} for n in range(4)}
    by_cost = fxmse.choose_schemes(None, ["W4A16", "W8A16"], 5, analysis=ANALYSIS, costs=costs)
    assert by_cost.chosen == {"m0": "W4A16", "m1": "W4A16", "m2": "W4A16", "m3": "W8A16"}
    assert (by_cost.unit, by_cost.size) == ("cost", 4.5)
    del costs["m1"]["W8A16"]
    with pytest.raises(ValueError, match="costs have no W8A16 for m1"):
        fxmse.choose_schemes(None, ["W4A16", "W8A16"], 5, analysis=ANALYSIS, costs=costs)
    costs["m1"]["W8A16"] = math.nan
    with pytest.raises(ValueError, match=r"costs\['m1'\]\['W8A16'\]=nan: expected a number of at least 0"):
        fxmse.choose_schemes(None, ["W4A16", "W8A16"], 5, analysis=ANALYSIS, costs=costs)


def test_float_is_a_candidate_and_names_may_be_given():
    schemes = {"narrow": QuantizationScheme(targets=["x"], weights=make_args(4, strategy="channel"))}
    choice = fxmse.choose_schemes(Convolutions().eval(), {**schemes, "wide": None}, 1e9, make_inputs(), **conv())
    assert set(choice.chosen.values()) == {"float"}
    assert choice.config.config_groups == {}
    assert sorted(choice.config.ignore) == sorted(choice.chosen)
    assert choice.error == 0


def make_inputs():
    return [Convolutions.make_inputs(seed=seed) for seed in range(2)]


def conv():
    return {**OPTIONS, "targets": ["Conv1d"]}


SCHEME = QuantizationScheme(targets=["Linear"], weights=make_args(4, strategy="channel"))


@pytest.mark.parametrize(
    ("candidates", "budget", "options", "message"),
    [
        (["W4A16", "W8A16"], 4, {}, "budget=4 cannot be met: the least that these candidates take is 4.5"),
        (["W4A16", "W4A16"], 5, {}, "candidates W4A16 and W4A16 quantize the same"),
        ([SCHEME, SCHEME.model_copy(update={"targets": ["x"]})], 5, {}, "quantize the same in the same formats"),
        ([None], 5, {}, "candidates have no format"),
        ([], 5, {}, "candidates have no format"),
        (["W4A16", None, None], 5, {}, "None twice"),
        ({"float": "W4A16", "other": "W8A16"}, 5, {}, "a candidate is called float, as what stays as it is"),
        ("W4A16", 5, {}, "candidates is one str: expected a list"),
        (["W4A16", "W5"], 5, {}, "config='W5': expected one of the presets"),
        (["W4A16", "W4A8"], 5, {}, "the analysis is of W4A16, W8A16, without W4A8"),
        (["W4A16"], math.nan, {}, "budget=nan: expected a number of bits"),
        (["W4A16"], "5", {}, "budget='5': expected a number of bits"),
        (["W4A16"], 5, {"unit": "bit"}, "unit='bit': expected one of bits, bytes"),
        (["W4A16"], 5, {"num_points": -1}, "num_points=-1: expected a number of at least 0"),
        ([QuantizationConfig(config_groups={"a": SCHEME})], 5, {}, "a candidate is a whole config"),
        (
            [QuantizationScheme(targets=["Linear"], input_activations=make_args(8))],
            5,
            {},
            "quantizes no weights: there is no size to choose by",
        ),
        (
            [SCHEME.model_copy(update={"format": "float-quantized"})],
            5,
            {},
            "has format=float-quantized, and compressed-tensors stores it as pack-quantized",
        ),
    ],
)
def test_errors(candidates, budget, options, message):
    with pytest.raises(ValueError, match=message):
        fxmse.choose_schemes(None, candidates, budget, analysis=ANALYSIS, **options)


def test_errors_of_data_and_modules():
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    scheme = QuantizationScheme(targets=[], weights=make_args(8), input_activations=make_args(8))
    with pytest.raises(ValueError, match="no batches: what a format costs"):
        fxmse.choose_schemes(model, [scheme], 9, [], **OPTIONS)
    batches = [torch.randn(2, 16)]
    with pytest.raises(ValueError, match="matched nothing"):
        fxmse.choose_schemes(model, [scheme], 9, batches, targets=["Conv2d"], **OPTIONS)
    with pytest.raises(TypeError, match="exakt"):
        fxmse.choose_schemes(model, [scheme], 9, batches, exakt=True)
    empty = dataclasses.replace(ANALYSIS, groups=())
    with pytest.raises(ValueError, match="no module with a weight"):
        fxmse.choose_schemes(None, ["W4A16"], 5, analysis=empty)
    lost = [dataclasses.replace(site, exact_error=math.nan) for site in ANALYSIS.sites]
    with pytest.raises(ValueError, match="errors of m0, m1, m2, m3 are not finite"):
        fxmse.choose_schemes(None, ["W4A16"], 5, analysis=dataclasses.replace(ANALYSIS, sites=tuple(lost)))


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"needs scipy, .*pip install 'fxmse\[mixed\]'"):
        fxmse.choose_schemes(None, ["W4A16"], 5, analysis=ANALYSIS)


def test_what_fits_no_candidate_stays_in_float():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    groups = [QuantizationScheme(targets=[], weights=make_args(b, strategy="group", group_size=16)) for b in (3, 4)]
    groups.append(QuantizationScheme(targets=[], weights=make_args(4, strategy="group", group_size=12)))
    with pytest.warns(
        UserWarning, match=r"do not fit all modules: int3 symmetric group 16 without 2, 4 \(2.weight: .*"
    ):
        choice = fxmse.choose_schemes(model, groups, 8, [torch.randn(8, 16)], **OPTIONS)
    assert choice.chosen.keys() == {"0", "2"}
    assert choice.chosen["2"] == "int4 symmetric group 12"
    other = dataclasses.replace(ANALYSIS, groups=(LayerGroup(("lost",), 1, {"float": 16.0}), *ANALYSIS.groups))
    with pytest.warns(UserWarning, match="left in float, since no candidate fits: lost"):
        assert "lost" not in fxmse.choose_schemes(None, ["W4A16"], 5, analysis=other).chosen


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder of a model of two layers, in bfloat16, and batches for it."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**TEXT, "num_hidden_layers": 2})
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "float")
    return folder, [ARCHITECTURES["Llama"].make_inputs(4, seed) for seed in range(4)]


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def read(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def mixed(llama):
    """A mix of all candidates."""
    folder, batches = llama
    model = load(folder / "float")
    return model, fxmse.choose_schemes(model, CANDIDATES, 7, batches, ignore=["lm_head"], **OPTIONS)


def test_a_mix_becomes_checkpoints_that_transformers_loads(llama, mixed, tmp_path):
    folder, batches = llama
    model, choice = mixed
    assert len(set(choice.chosen.values())) >= 3
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        assert len({choice.chosen[f"{attention}.{name}_proj"] for name in "qkv"}) == 1
        assert choice.chosen[f"{mlp}.gate_proj"] == choice.chosen[f"{mlp}.up_proj"]
    quantized = fxmse.quantize(model, choice.config, batches, progress=False)
    fxmse.save_pretrained(quantized, model, tmp_path / "whole")
    fxmse.quantize_checkpoint(folder / "float", choice.config, batches, out=tmp_path / "parts", progress=False)
    loaded, streamed = load(tmp_path / "whole"), load(tmp_path / "parts")
    with torch.no_grad():
        expected = quantized(**batches[0]).logits
        assert not torch.equal(expected, model(**batches[0]).logits)
        assert torch.equal(loaded(**batches[0]).logits, expected)
        assert torch.equal(streamed(**batches[0]).logits, expected)
    own = {name: t for name, t in read(tmp_path / "whole").items() if name.rpartition(".")[0] in choice.chosen}
    num_weights = sum(model.get_submodule(module).weight.numel() for module in choice.chosen)
    assert choice.size == pytest.approx(sum(t.nbytes for t in own.values()) * 8 / num_weights, rel=1e-9)
    # What a runtime reads: every linear is a target's or is ignored.
    config = json.loads((tmp_path / "whole" / "config.json").read_text())["quantization_config"]
    named = {target for group in config["config_groups"].values() for target in group["targets"]}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert named | set(config["ignore"]) >= linears
    assert not named & set(config["ignore"])


@pytest.mark.parametrize("shape", [(128, 256), (72, 128)])
@pytest.mark.parametrize("preset", ["W4A16", "W4A16_ASYM", "W8A8", "FP8", "FP8_BLOCK", "NVFP4", "MXFP4", "MXFP8"])
def test_bits_are_those_of_compressed_tensors(preset, shape):
    scheme = preset_name_to_scheme(preset, ["Linear"])
    module = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
    initialize_module_for_quantization(module, scheme)
    for name, parameter in module.named_parameters():
        if name != "weight":
            parameter.data.fill_(1)
    compress_module(module)
    stored = sum(parameter.nbytes * 8 for parameter in module.parameters())
    assert measure_bits(shape, scheme, torch.bfloat16) == stored


@pytest.mark.filterwarnings("ignore:left in float. model.layers.0.mlp.gate .a router")
def test_experts_are_one_group(tmp_path):
    architecture = ARCHITECTURES["Mixtral"]
    model = architecture.make_model().eval()
    model.save_pretrained(tmp_path / "float")
    batches = [architecture.make_inputs(4, seed) for seed in range(2)]
    choice = fxmse.choose_schemes(model, ["W4A16", "W8A16"], 6, batches, ignore=["lm_head"], **OPTIONS)
    (experts,) = [group for group in choice.analysis.groups if any("experts" in m for m in group.modules)]
    assert experts.num_weights == 4 * 3 * 128 * 256
    quantized = fxmse.quantize(model, choice.config, batches, progress=False)
    fxmse.save_pretrained(quantized, model, tmp_path / "whole")
    fxmse.quantize_checkpoint(tmp_path / "float", choice.config, batches, out=tmp_path / "parts", progress=False)
    with torch.no_grad():
        expected = quantized(**batches[0]).logits
        for folder in ("whole", "parts"):
            loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
            torch.testing.assert_close(loaded(**batches[0]).logits, expected, rtol=1e-4, atol=1e-5)


def test_tied_weights_have_one_format():
    candidates = {f"int{b}": QuantizationScheme(targets=[], weights=make_args(b, strategy="channel")) for b in (3, 8)}
    tokens = [Attention.make_inputs(seed=seed) for seed in range(2)]
    choice = fxmse.choose_schemes(
        Attention().eval(), candidates, 20, tokens, targets=["Linear", "Embedding"], **OPTIONS
    )
    assert choice.chosen["embedding"] == choice.chosen["head"]
    assert choice.chosen["query"] == choice.chosen["key"]
    quantized = fxmse.quantize(Attention().eval(), choice.config, tokens, progress=False)
    assert sum(name.endswith("weight_scale") for name in quantized.state_dict()) == 3


def test_the_command(llama, tmp_path, capsys):
    folder, batches = llama
    torch.save(batches, tmp_path / "batches.pt")
    arguments = ["analyze", folder / "float", "--data", tmp_path / "batches.pt", "--ignore", "lm_head", "--candidates"]
    out, report = tmp_path / "mixed.yaml", tmp_path / "report.json"

    def run(*own):
        return main(list(map(str, own)))

    chosen = [*arguments, "W4A16", "FP8", "none", "--budget", "6.5 bits", "--out", out, "--report", report, "--json"]
    assert run(*chosen) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads(report.read_text())
    assert summary["choice"]["size"] <= 6.5
    config = yaml.safe_load(out.read_text())
    assert config["config_groups"].keys() == {"W4A16", "FP8"}
    assert run("inspect", report) == 0
    printed = capsys.readouterr().out
    assert "more with --all" in printed
    assert "bits a weight of 6.5; error" in printed
    options = ["--data", tmp_path / "batches.pt", "--out", tmp_path / "out", "--report", "none"]
    assert run("quantize", folder / "float", "--scheme", out, *options) == 0
    assert load(tmp_path / "out").config.quantization_config is not None
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert run(*arguments, "W4A16", "FP8", "--report", page) == 0
    assert "sum over values" in capsys.readouterr().out
    assert run("inspect", page) == 0
    assert "W4A16" in page.read_text()
    in_bytes = [*arguments, "W4A16", "FP8", "--budget", "1MB", "--out", tmp_path / "mixed.json"]
    assert run(*in_bytes) == 0
    assert json.loads((tmp_path / "mixed.json").read_text())["config_groups"].keys() == {"FP8"}
    for wrong, message in [
        ([*arguments, "W4A16", "--out", out], "give a --budget"),
        ([*arguments, "W4A16", "--budget", "5bits", "--out", tmp_path / "x.txt"], "expected a file that ends in .yaml"),
        ([*arguments, "W4A16", "--report", tmp_path / "x.txt"], "expected a file that ends in .json"),
        ([*arguments, "W4A16", "--budget", "3bits"], "cannot be met: the least that these candidates take is"),
        (["inspect", tmp_path / "mixed.json"], "that cannot be read"),
    ]:
        capsys.readouterr()
        assert run(*wrong) == 1
        assert message in capsys.readouterr().err
