"""Whatever is wrong is one line on stderr, with its name, and exit code 1; before anything is written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from torch import nn

import fxmse
from fxmse.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
NO_FILE = "No such file"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A .pt2, a small Llama, and data for each."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    dynamic = ({0: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(mlp, (torch.randn(4, 32),), dynamic_shapes=dynamic), folder / "mlp.pt2")
    torch.save([torch.randn(4, 32) for _ in range(2)], folder / "data.pt")
    torch.save([torch.randn(4, 32), torch.randn(4, 31)], folder / "narrow.pt")
    torch.save([{"input_ids": torch.randint(0, 100, (2, 8))}], folder / "tokens.pt")
    torch.save([{"input_ids": torch.full((2, 8), 10**6)}], folder / "unknown_tokens.pt")
    torch.save([numpy.zeros((4, 32))], folder / "numpy.pt")
    ARCHITECTURES["Llama"].make_model().save_pretrained(folder / "llama")
    return folder


def run(capsys, *arguments):
    """The exit code and what stderr has; of a progress bar its last state."""
    code = main([str(argument) for argument in arguments])
    return code, [line.rpartition("\r")[2] for line in capsys.readouterr().err.split("\n") if line.strip()]


def assert_one_line(capsys, tmp_path, *arguments, named, bars=0):
    before = sorted(tmp_path.rglob("*"))
    code, lines = run(capsys, *arguments)
    assert code == 1
    assert len(lines) == 1 + bars, lines
    assert lines[-1].startswith("fxmse: error: ")
    for name in named:
        assert name in lines[-1]
    assert sorted(tmp_path.rglob("*")) == before


def quantize(folder, tmp_path, *, model="mlp.pt2", scheme="FP8", data="data.pt", out="out.pt2"):
    return ["quantize", folder / model, "--scheme", scheme, "--data", folder / data, "--out", tmp_path / out]


CONTENTS = {
    "junk": (b"{[", "cannot be read"),
    "bytes": (b"\xff\xfe\x00", "cannot be read"),
    "empty": (b"", "None: expected a"),
    "null": (b"null", "None: expected a"),
    "list": (b"[1, 2]", "[1, 2]: expected a"),
    "long list": (json.dumps([0] * 99).encode(), "...: expected a"),
}


@pytest.mark.parametrize(("content", "message"), CONTENTS.values(), ids=CONTENTS)
def test_configs_and_indices_of_something_else(folder, tmp_path, capsys, content, message):
    config = tmp_path / "config.json"
    config.write_bytes(content)
    found = f"{message.partition(':')[0]} (--debug" if "expected" in message else message
    assert_one_line(capsys, tmp_path, *quantize(folder, tmp_path, scheme=config), named=[str(config), found])
    message = "cannot be read as JSON" if content == b"" else message
    # The same as config.json and as index of a model, and as config.json of the checkpoint that shall be replaced.
    shutil.copytree(folder / "llama", tmp_path / "llama")
    arguments = quantize(tmp_path, tmp_path, model="llama", out="out", data=folder / "tokens.pt")
    for name in ("model.safetensors.index.json", "config.json"):
        (tmp_path / "llama" / name).write_bytes(content)
        assert_one_line(capsys, tmp_path, *arguments, named=[f"llama/{name}", message])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_bytes(content)
    assert_one_line(capsys, tmp_path, *arguments, named=["out/config.json", message])
    (tmp_path / "llama" / "fxmse_report.json").write_bytes(content)
    assert_one_line(
        capsys, tmp_path, "inspect", tmp_path / "llama", named=["llama", "fxmse_report.json", "cannot be read"]
    )


def test_yaml_and_fields_that_are_none(folder, tmp_path, capsys):
    for name, content, message in (
        ("a.yaml", "a: [", "cannot be read"),
        ("a.yaml", "", "expected a mapping of a config's fields, found None"),
        ("a.json", '{"quantization_config": null}', "quantization_config=None: expected a mapping"),
        ("a.json", '{"quantization_config": [1]}', "quantization_config=[1]: expected a mapping"),
        ("a.json", '{"config_groups": 3}', "config_groups: Input should be a valid dictionary"),
        ("a.json", '{"config_groups": {"FP8": ["re:("]}}', "'re:(' is no regular expression"),
        ("a.json", '{"config_groups": {"FP8": ["Linear"]}, "ignore": ["re:*"]}', "'re:*' is no regular expr"),
    ):
        (tmp_path / name).write_text(content)
        assert_one_line(capsys, tmp_path, *quantize(folder, tmp_path, scheme=tmp_path / name), named=[name, message])
    (tmp_path / "folder.json").mkdir()
    for name, message in (("none.json", NO_FILE), ("folder.json", "is a folder: expected a file")):
        assert_one_line(capsys, tmp_path, *quantize(folder, tmp_path, scheme=tmp_path / name), named=[name, message])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".pt2"])
def test_data_and_models_of_something_else(folder, tmp_path, capsys, suffix):
    file, what = tmp_path / f"file{suffix}", "model" if suffix == ".pt2" else "data"
    for content in (b"junk", b"null", b""):
        file.write_bytes(content)
        assert_one_line(capsys, tmp_path, *quantize(folder, tmp_path, **{what: file}), named=[f"{file} cannot be read"])
    file.unlink()
    assert_one_line(capsys, tmp_path, *quantize(folder, tmp_path, **{what: file}), named=[str(file)])
    if suffix == ".pt2":
        assert_one_line(capsys, tmp_path, "inspect", file, named=[str(file), NO_FILE])


def test_data_that_does_not_fit_is_named_behind_a_progress_bar(folder, tmp_path, capsys):
    narrow = quantize(folder, tmp_path, data="narrow.pt")
    assert_one_line(capsys, tmp_path, *narrow, named=["mlp.pt2 with ", "narrow.pt: "], bars=2)
    assert_one_line(capsys, tmp_path, *quantize(folder, tmp_path, data="numpy.pt"), named=["numpy.pt cannot be read"])
    unknown = quantize(folder, tmp_path, model="llama", data="unknown_tokens.pt", out="out")
    code, lines = run(capsys, *unknown)
    assert code == 1
    assert "unknown_tokens.pt: IndexError: index out of range" in lines[-1]
    assert not any("Traceback" in line or "File " in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "there is no model.layers.1.input_layernorm.weight; there is no model.layers.1.mlp"),
        ({"intermediate_size": 288}, "mlp.down_proj.weight has shape (128, 256), the model needs (128, 288)"),
        ({"hidden_size": 65}, "llama cannot be loaded by transformers"),
        ({"model_type": "nonsense"}, "llama cannot be loaded by transformers"),
        ({"quantization_config": [1]}, "llama is quantized already"),
    ],
)
def test_a_checkpoint_that_is_not_what_its_config_says(folder, tmp_path, capsys, changes, message):
    shutil.copytree(folder / "llama", tmp_path / "llama")
    config = tmp_path / "llama" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    arguments = quantize(tmp_path, tmp_path, model="llama", data=folder / "tokens.pt", out="out")
    code, lines = run(capsys, *arguments)
    assert code == 1
    assert message in lines[-1]
    assert not (tmp_path / "out").exists()


def test_tensors_that_no_model_uses_are_warned_of(folder, tmp_path):
    from fxmse.inputs.models import load_source

    shutil.copytree(folder / "llama", tmp_path / "llama")
    config = tmp_path / "llama" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["LlamaModel"]}))
    with pytest.warns(UserWarning, match="llama has tensors that the model of its config.json does not use: lm_head"):
        load_source(tmp_path / "llama")
    tied = ARCHITECTURES["GPT-2"].make_model()  # of which one name is not in the file
    tied.save_pretrained(tmp_path / "tied")
    assert isinstance(load_source(tmp_path / "tied").model, transformers.GPT2LMHeadModel)


def test_out_may_not_be_or_be_in_what_is_read(folder, tmp_path, capsys, monkeypatch):
    shutil.copytree(folder / "llama", tmp_path / "llama")
    shutil.copy(folder / "mlp.pt2", tmp_path / "mlp.pt2")
    (tmp_path / "link.pt2").symlink_to("mlp.pt2")
    monkeypatch.chdir(tmp_path)
    for model, out, message in (
        ("mlp.pt2", "mlp.pt2", "is the same as"),
        ("link.pt2", "llama/../mlp.pt2", "is the same as"),
        ("mlp.pt2", "link.pt2", "is a symbolic link to mlp.pt2"),
        ("llama", "llama/out.pt2", "is in"),
        ("llama", "llama/out", "is in"),
        ("llama", "llama", "exists and holds no quantized checkpoint"),
    ):
        arguments = ["quantize", model, "--scheme", "FP8", "--out", out]
        assert_one_line(capsys, tmp_path, *arguments, named=[out, message])


X = torch.ones(4, 32)


@pytest.fixture(scope="module")
def graphs():
    model = nn.Sequential(nn.Linear(32, 8)).eval()
    observed = fxmse.prepare(model, "FP8", X)
    return {"model": model, "observed": observed, "folded": fxmse.quantize(model, "FP8", [X], progress=False)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: fxmse.calibrate(g["model"], [X]), "found a Sequential: expected the graph that fxmse.prepare"),
        (lambda g: fxmse.convert(g["model"]), "found a Sequential: expected the graph that fxmse.prepare returns"),
        (lambda g: fxmse.report(g["model"], [X]), "found a Sequential: expected the graph that fxmse.convert"),
        (lambda g: fxmse.export(g["model"], X), "found a Sequential: expected the graph that fxmse.convert"),
        (lambda g: fxmse.load_qparams(g["model"], "x"), "found a Sequential: expected the graph that fxmse.prepare"),
        (lambda g: fxmse.save_pretrained(g["model"], g["model"], "x"), "found a Sequential: expected the graph that"),
        (lambda g: fxmse.prepare(g["observed"], "FP8"), "the graph has observers already: calibrate it, and fold it"),
        (lambda g: fxmse.export(g["observed"], X), "the graph has observers already: calibrate it, and fold it"),
        (lambda g: fxmse.report(g["observed"], [X]), "no fake-quantize nodes: make it with fxmse.convert"),
        (lambda g: fxmse.prepare(g["folded"], "FP8"), "folded already: start from the float model"),
        (lambda g: fxmse.calibrate(g["folded"], [X]), "folded already"),
        (lambda g: fxmse.convert(g["folded"]), "folded already"),
        (lambda g: fxmse.prepare(g["model"], "FP8", X.numpy()), "a batch has numpy arrays: expected tensors"),
        (lambda g: fxmse.calibrate(g["observed"], [X.numpy()]), "a batch has numpy arrays: expected tensors"),
        (lambda g: fxmse.calibrate(g["observed"], X.numpy()), "a batch has numpy arrays: expected tensors"),
        (lambda g: fxmse.report(g["folded"], [{"input": X.numpy()}]), "a batch has numpy arrays: expected tensors"),
        (lambda g: fxmse.calibrate(g["observed"], {"input": X}), "batches is one dict: expected a list"),
        (lambda g: fxmse.calibrate(g["observed"], X), "batches is one tensor: expected a list"),
        (lambda g: fxmse.quantize(g["model"], "FP8", {"input": X}), "batches is one dict: expected a list"),
        (lambda g: fxmse.calibrate(g["observed"], [X, (X, X)]), r"batch 2 has other inputs than input, .* too many"),
        (lambda g: fxmse.calibrate(g["observed"], [X, {"x": X}]), r"batch 2 has other inputs than input, .* missing"),
        (lambda g: fxmse.quantize(g["model"], "FP8", [X[:0], X]), "batch 1 is empty"),
        (lambda g: fxmse.report(g["folded"], {"input": X}), "batches is one dict: expected a list"),
        (lambda g: fxmse.report(g["folded"], X), "batches is one tensor: expected a list"),
    ],
)
def test_what_is_no_graph_or_no_batches_is_said(graphs, call, message):
    with pytest.raises(ValueError, match=message):
        call(graphs)


def test_an_interrupt_says_whether_the_output_was_written(folder, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fxmse.outputs.summaries.tabulate", interrupt)
    code, lines = run(capsys, *quantize(folder, tmp_path))
    assert code == 130
    assert lines[-1] == f"fxmse: interrupted; {tmp_path / 'out.pt2'} was written"
    monkeypatch.setattr("fxmse.outputs.files.os.replace", interrupt)
    code, lines = run(capsys, *quantize(folder, tmp_path))
    assert code == 130
    assert lines[-1] == "fxmse: interrupted; nothing was written"


def test_an_interrupt_of_the_imports_is_one_line(tmp_path):
    (tmp_path / "fxmse").mkdir()
    # Imports that keep exceptions for themselves, as some of torch's do.
    (tmp_path / "fxmse" / "__init__.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept BaseException:\n    pass"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = Path(fxmse.__file__).parents[1] / "fxmse_command.py"
    done = subprocess.run(
        [sys.executable, "-P", command, "schemes"], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (130, "fxmse: interrupted\n")


def test_a_reader_that_has_seen_enough_is_no_error_and_a_full_disk_is(capsys, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as broken, open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", broken)
        assert main(["schemes"]) == 0
        monkeypatch.setattr("sys.stdout", full)
        assert main(["schemes"]) == 1
    monkeypatch.undo()
    error = capsys.readouterr().err
    assert error.startswith("fxmse: error: [Errno 28] stdout: No space left on device")
    assert error.count("\n") == 1
