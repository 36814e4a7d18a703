"""Options of the command: what is measured, what is printed, which samples, and what is refused before the search."""

import json
import math
from collections import namedtuple

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from torch import nn

from fxmse.cli import main
from fxmse.inputs.data import Choice, read_batches
from fxmse.inputs.programs import load_program
from fxmse.outputs.reporting import SiteReport
from fxmse.outputs.summaries import as_json, format_sites

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama whose head is tied, and a .pt2 with its data."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**ARCHITECTURES["Llama"].options, "tie_word_embeddings": True})
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "tied")
    mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    dynamic = ({0: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(mlp, (torch.randn(4, 32),), dynamic_shapes=dynamic), folder / "mlp.pt2")
    save_file({"input": torch.randn(12, 32)}, folder / "x.safetensors")
    return folder


def run(*arguments):
    return main([str(argument) for argument in arguments])


def quantize(folder, *arguments, model="mlp.pt2", scheme="FP8", data="x.safetensors"):
    data_arguments = ["--data", folder / data] if data else []
    return run("quantize", folder / model, "--scheme", scheme, *data_arguments, *arguments)


KINDS = {"none": None, "summary": {"weight"}, **{kind: {"weight", "input"} for kind in ("json", "html", "full")}}


@pytest.mark.parametrize(("kind", "measured"), KINDS.items())
def test_a_report_is_as_long_as_wanted(folder, tmp_path, capsys, kind, measured):
    out = tmp_path / "out.pt2"
    assert quantize(folder, "--report", kind, "--out", out, "--json") == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    if measured is None:
        assert not sites
        assert run("inspect", out) == 0
        assert "no report (--report none)" in capsys.readouterr().out
        return
    assert len(sites) == 4
    assert {site["role"] for site in sites if site["sqnr"] is not None} == measured
    assert {site["role"] for site in sites if site["range_ratio"] is not None} == measured
    assert run("inspect", out) == 0
    assert ("2 not measured (--report full)" in capsys.readouterr().out) == (kind == "summary")
    assert all("picture" in site for site in sites) == (kind in ("json", "full"))
    page = tmp_path / "out.html"
    assert page.exists() == (kind in ("html", "full"))
    if page.exists():
        assert run("inspect", page, "--json") == 0
        shown = json.loads(capsys.readouterr().out)
        assert [site["sqnr"] for site in shown["sites"]] == [site["sqnr"] for site in sites]
        assert shown["sites"][0]["picture"]["counts"]


def test_the_page_of_a_folder_is_in_it_and_no_other_file_is_replaced(folder, tmp_path, capsys):
    arguments = ["--report", "html", "--dtype", "bfloat16"]
    for _ in range(2):  # the second replaces it
        assert quantize(folder, *arguments, "--out", tmp_path / "out", model="tied", scheme="W4A16", data=None) == 0
    page = tmp_path / "out" / "fxmse_report.html"
    assert capsys.readouterr().out.splitlines()[-1] == f"to look at: {page}"
    assert run("inspect", page) == 0
    from_page = capsys.readouterr().out
    assert run("inspect", tmp_path / "out" / "fxmse_report.json") == 0
    assert capsys.readouterr().out == from_page
    (tmp_path / "mlp.html").write_text("mine")
    assert quantize(folder, "--report", "html", "--out", tmp_path / "mlp.pt2") == 1
    assert "mlp.html is a page that fxmse did not write" in capsys.readouterr().err
    assert run("inspect", tmp_path / "mlp.html") == 1
    assert "mlp.html has no report" in capsys.readouterr().err


def make_site(place, sqnr, role="weight"):
    return as_json(SiteReport(f"m{place}", role, "int8", 1, 0.1, 0.2, sqnr, math.nan if math.isnan(sqnr) else 1.0))


def test_the_worst_values_come_first():
    sites = [make_site(place, 20.0 + place % 7) for place in range(14)]
    sites += [make_site(14, math.inf), make_site(15, math.nan, "input"), make_site(16, 3.5)]
    assert json.loads(json.dumps(sites, allow_nan=False)) == sites
    lines = format_sites(sites).splitlines()
    modules = [line.split()[0] for line in lines[2:] if line.startswith("m")]
    assert modules == ["m16", "m0", "m7", "m1", "m8", "m2", "m9", "m3", "m10", "m4"]
    assert "7 more in fxmse inspect --all" in lines
    assert lines[-2:] == [
        "weight: 16 values, SQNR at least 3.5 dB, median 23.0 dB",
        "input: 1 values, 1 not measured (--report full)",
    ]
    everything = [line.split()[0] for line in format_sites(sites, show_all=True).splitlines() if line.startswith("m")]
    assert everything[-2:] == ["m14", "m15"]


def test_the_head_of_a_tied_model_stays_in_float_and_that_is_said(folder, tmp_path, capsys):
    arguments = ["--out", tmp_path / "out", "--dtype", "bfloat16", "--device", "cpu"]
    assert quantize(folder, *arguments, model="tied", scheme="FP8_DYNAMIC", data=None) == 0
    printed = capsys.readouterr()
    assert "fxmse: lm_head stays in float, as with --ignore lm_head: " in printed.err
    assert "lm_head" not in printed.out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "lm_head" in config["quantization_config"]["ignore"]
    files = (tmp_path / "out").glob("*.safetensors")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert tensors["model.norm.weight"].dtype == torch.bfloat16


def fail(*args, **kwargs):
    raise AssertionError("weights were searched")


def test_what_a_checkpoint_cannot_hold_is_refused_before_the_search(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fxmse.cli.quantizing.calibrate", fail)
    groups = {"group_0": {"targets": ["Embedding", "Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}}
    (tmp_path / "config.json").write_text(json.dumps({"config_groups": groups}))
    untied = transformers.LlamaForCausalLM(transformers.LlamaConfig(**ARCHITECTURES["Llama"].options))
    untied.save_pretrained(tmp_path / "untied")
    scheme = tmp_path / "config.json"
    assert run("quantize", tmp_path / "untied", "--scheme", scheme, "--out", tmp_path / "out") == 1
    assert "has no place for model.embed_tokens.weight" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "scheme", "out"), [("tied", "FP8_DYNAMIC", "out"), ("mlp.pt2", "FP8", "out.pt2")])
def test_a_disk_without_room_is_refused_before_the_search(folder, tmp_path, capsys, monkeypatch, model, scheme, out):
    monkeypatch.setattr("fxmse.cli.quantizing.calibrate", fail)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("fxmse.outputs.space.shutil.disk_usage", lambda path: usage(10, 9, 100))
    assert quantize(folder, "--out", tmp_path / out, model=model, scheme=scheme, data=None) == 1
    assert "100 bytes are free: free some" in capsys.readouterr().err


def test_arguments_of_an_observer(folder, tmp_path, capsys):
    arguments = ["--observer", "memoryless_mse", "--out", tmp_path / "out.pt2", "--json"]
    ratios = []
    for kwargs in ('{"maxshrink": 0.01}', '{"maxshrink": 0.8, "patience": 100}'):
        assert quantize(folder, *arguments, "--observer-kwargs", kwargs, scheme="NVFP4A16", data=None) == 0
        ratios.append(json.loads(capsys.readouterr().out)["sites"][0]["range_ratio"])
    assert ratios[1] < ratios[0] == 1
    assert quantize(folder, *arguments, "--observer-kwargs", '{"shrink": 1}', scheme="NVFP4A16", data=None) == 1
    assert "has no argument 'shrink'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        quantize(folder, *arguments, "--observer-kwargs", "[1]")
    assert "expected an object" in capsys.readouterr().err


def test_samples_are_chosen_and_shuffled(tmp_path):
    save_file({"a": torch.arange(9)[:, None]}, tmp_path / "a.safetensors")
    torch.save([torch.full((2, 1), float(place)) for place in range(5)], tmp_path / "batches.pt")

    def read(name, *choice):
        batches = read_batches(tmp_path / name, batch_size=4, max_length=8, choice=Choice(*choice))
        return [
            value for batch in batches for value in (batch["a"] if isinstance(batch, dict) else batch)[:, 0].tolist()
        ]

    assert read("a.safetensors", 5) == [0, 1, 2, 3, 4]
    shuffled = read("a.safetensors", None, 1)
    assert sorted(shuffled) == list(range(9)) != shuffled
    assert read("a.safetensors", None, 1) == shuffled != read("a.safetensors", None, 2)
    assert read("a.safetensors", 6, 1) == shuffled[:6]
    assert sorted(read("batches.pt", None, 3)[::2]) == list(range(5))
    with pytest.raises(ValueError, match="holds batches, not samples: choose how many with --max-batches"):
        read("batches.pt", 3)


def test_the_command_takes_so_many_samples(folder, tmp_path, capsys):
    arguments = ["--num-samples", 5, "--seed", 0, "--batch-size", 2, "--out", tmp_path / "out.pt2"]
    assert quantize(folder, *arguments) == 0
    assert "FP8, 3 batches" in capsys.readouterr().out
    assert load_program(tmp_path / "out.pt2")
