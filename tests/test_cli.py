"""The command line, in this process: what it writes, prints and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import fxmse
from fxmse.cli import main
from fxmse.inputs.data import read_batches
from fxmse.inputs.programs import load_program
from fxmse.outputs.exporting import save_program

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import quantize_minilm as example

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama with MiniLM's tokenizer, a ViT with its processor, and a .pt2, with data for each."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = example.AutoTokenizer.from_pretrained(example.find_model_folder())
    config = transformers.LlamaConfig(
        **{**ARCHITECTURES["Llama"].options, "vocab_size": len(tokenizer), "use_cache": True}
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    ARCHITECTURES["ViT"].make_model().save_pretrained(folder / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    sentences = example.load_sentences()[:12]
    (folder / "texts.txt").write_text("\n".join(sentences))
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": sentence}) for sentence in sentences))
    mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    dynamic = ({0: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(mlp, (torch.randn(4, 32),), dynamic_shapes=dynamic), folder / "mlp.pt2")
    torch.save([torch.randn(4, 32) for _ in range(3)], folder / "batches.pt")
    return folder


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("data", ["texts.txt", "texts.jsonl"])
def test_a_folder_to_a_checkpoint(folder, tmp_path, capsys, data):
    arguments = ["quantize", folder / "llama", "--scheme", "W4A16", "--ignore", "lm_head", "--data", folder / data]
    assert run(*arguments, "--out", tmp_path / "out", "--batch-size", 4, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["batches"] == 3
    assert {site["role"] for site in summary["sites"]} == {"weight"}
    assert all(5 < site["sqnr"] < 60 and 0 < site["scale_min"] <= site["scale_max"] for site in summary["sites"])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.use_cache is True
    assert "lm_head" in loaded.config.quantization_config.quantization_config.ignore
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert run("inspect", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out) == summary


def test_a_program_to_a_program(folder, tmp_path, capsys):
    out = tmp_path / "out.pt2"
    assert run("quantize", folder / "mlp.pt2", "--scheme", "FP8", "--data", folder / "batches.pt", "--out", out) == 0
    printed = capsys.readouterr()
    assert "3/3" in printed.err  # the progress bar
    assert printed.out.count("float8 symmetric tensor") == 4
    assert run("inspect", out) == 0
    assert capsys.readouterr().out == printed.out
    program, batches = load_program(folder / "mlp.pt2")[0], torch.load(folder / "batches.pt")
    expected = fxmse.quantize(program, "FP8", batches, progress=False)
    x = torch.randn(9, 32)
    assert torch.equal(load_program(out)[0].module()(x), expected(x))


def test_a_decomposed_program_needs_no_data_for_weights(folder, tmp_path, capsys):
    out = tmp_path / "out.pt2"
    arguments = ["quantize", folder / "mlp.pt2", "--scheme", "NVFP4A16", "--out", out, "--decompose"]
    assert run(*arguments) == 0
    assert "0 batches" in capsys.readouterr().out
    assert "fxmse" not in str(load_program(out)[0].graph)


@pytest.mark.parametrize(
    ("scheme", "opset", "form"), [("W8A8", 20, "int8 symmetric channel"), ("NVFP4A16", 23, "float4")]
)
def test_a_program_to_an_onnx_model(folder, tmp_path, capsys, scheme, opset, form):
    out = tmp_path / "out.onnx"
    data = ["--data", folder / "batches.pt", "--report", "html"]
    assert run("quantize", folder / "mlp.pt2", "--scheme", scheme, *data, "--out", out) == 0
    printed = capsys.readouterr()
    assert f"{out} is in opset {opset}" in printed.err
    assert form in printed.out
    page = tmp_path / "out.html"
    for written in (out, page):
        assert run("inspect", written) == 0
        assert printed.out == f"{capsys.readouterr().out.rstrip()}\nto look at: {page}\n"


def test_an_onnx_model_is_refused_before_the_search(folder, tmp_path, capsys):
    arguments = ["quantize", folder / "mlp.pt2", "--scheme", "W8A8", "--data", folder / "batches.pt", "--out"]
    assert run(*arguments, tmp_path / "missing" / "out.onnx") == 1
    assert "is no folder that can be written" in capsys.readouterr().err
    assert run(*arguments, tmp_path / "out.onnx", "--decompose") == 1
    assert "--decompose is for a .pt2" in capsys.readouterr().err
    (tmp_path / "text.onnx").write_text("no model")
    assert run("inspect", tmp_path / "text.onnx") == 1
    assert "text.onnx cannot be read as an ONNX model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("observer", "data", "expected"),
    [("auto", True, "output_mse"), ("auto", False, "exact_mse"), ("memoryless_mse", True, "memoryless_mse")],
)
def test_weights_get_the_observer_that_is_asked_for(folder, tmp_path, observer, data, expected):
    out = tmp_path / "out.pt2"
    arguments = ["quantize", folder / "mlp.pt2", "--scheme", "NVFP4A16", "--out", out, "--observer", observer]
    assert run(*arguments, *(["--data", folder / "batches.pt"] if data else [])) == 0
    program, batches = load_program(folder / "mlp.pt2")[0], torch.load(folder / "batches.pt")
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    scheme.weights.observer = expected
    quantized = fxmse.quantize(program, scheme, batches if data else [], progress=False)
    state = load_program(out)[0].state_dict
    for name, tensor in quantized.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_biases_are_corrected_where_that_is_asked_for(folder, tmp_path):
    out = tmp_path / "out.pt2"
    arguments = ["quantize", folder / "mlp.pt2", "--scheme", "NVFP4A16", "--out", out, "--bias-correction"]
    assert run(*arguments, "--data", folder / "batches.pt") == 0
    program, batches = load_program(folder / "mlp.pt2")[0], torch.load(folder / "batches.pt")
    quantized = fxmse.quantize(program, "NVFP4A16", batches, bias_correction=True, progress=False)
    biases = {name: tensor for name, tensor in quantized.state_dict().items() if name.endswith("bias")}
    assert biases
    for name, bias in biases.items():
        assert torch.equal(load_program(out)[0].state_dict[name], bias)
        assert not torch.equal(program.state_dict[name], bias)


def test_an_observer_that_is_not_known_is_named(folder, tmp_path, capsys):
    arguments = ["quantize", folder / "mlp.pt2", "--scheme", "NVFP4A16", "--out", tmp_path / "out.pt2"]
    assert run(*arguments, "--observer", "best") == 1
    assert "observer='best': expected one of" in capsys.readouterr().err


def test_a_folder_of_images(folder, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for shade in (0, 90, 200):
        Image.new("RGB", (40, 50), (shade, 0, 255 - shade)).save(tmp_path / "images" / f"{shade}.png")
    out = tmp_path / "out.pt2"
    arguments = ["quantize", folder / "vit", "--scheme", "FP8", "--data", tmp_path / "images", "--out", out]
    assert run(*arguments, "--batch-size", 2, "--json") == 0
    assert json.loads(capsys.readouterr().out)["batches"] == 2


def test_schemes_are_the_presets(capsys):
    assert run("schemes", "--json") == 0
    rows = {row["scheme"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(PRESET_SCHEMES)
    assert rows["W4A16"] == {"scheme": "W4A16", "weights": "int4 symmetric group 128", "inputs": None}
    assert run("schemes") == 0
    assert "int4 symmetric group 128" in capsys.readouterr().out


def test_it_is_installed_as_a_command_and_helps(capsys):
    done = subprocess.run([Path(sys.executable).parent / "fxmse", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "fxmse quantize model.pt2 --scheme W8A8" in done.stdout
    for command in ("quantize", "inspect", "schemes", "plan", "analyze"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        assert "fxmse quantize model.pt2 --scheme W8A8" in capsys.readouterr().out
    assert subprocess.run([sys.executable, "-m", "fxmse.cli"], capture_output=True).returncode == 2


def make_foreign_data(tmp_path, folder):
    save_file({"tokens": torch.zeros(4, 8)}, tmp_path / "foreign.safetensors")
    return tmp_path / "foreign.safetensors"


def make_data_of_another_dtype(tmp_path, folder):
    torch.save([torch.randn(4, 32), torch.randn(4, 32).double()], tmp_path / "double.pt")
    return tmp_path / "double.pt"


def make_truncated_data(tmp_path, folder):
    whole = (folder / "batches.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    return tmp_path / "cut.pt"


def make_nan(tmp_path, folder):
    torch.save([torch.randn(4, 32), torch.full((4, 32), float("nan"))], tmp_path / "nan.pt")
    return tmp_path / "nan.pt"


@pytest.mark.parametrize(
    ("make_data", "message"),
    [
        (make_foreign_data, r"batch 1 of the data has tokens \(torch.float32 of 2 dimensions\): expected input 0"),
        (make_data_of_another_dtype, r"batch 2 of the data has input 0 \(torch.float64"),
        (make_truncated_data, r"cut.pt cannot be read as tensors alone"),
        (make_nan, r"NaN or Inf in batch 2"),
        (lambda tmp_path, folder: folder / "texts.txt", r"holds texts, and a .pt2 has no tokenizer"),
        (lambda tmp_path, folder: tmp_path, r"holds images, and a .pt2 has no processor"),
        (lambda tmp_path, folder: tmp_path / "none.pt", r"none.pt does not exist"),
        (lambda tmp_path, folder: folder / "mlp.pt2", r"expected a .safetensors, .pt, .txt or .jsonl file"),
    ],
)
def test_bad_data_is_one_line_and_leaves_nothing(folder, tmp_path, capsys, make_data, message):
    data, out = make_data(tmp_path, folder), tmp_path / "out" / "out.pt2"
    out.parent.mkdir()
    assert run("quantize", folder / "mlp.pt2", "--scheme", "FP8", "--data", data, "--out", out) == 1
    assert_one_line(capsys, message)
    assert not list(out.parent.iterdir())


def assert_one_line(capsys, message):
    import re

    printed = capsys.readouterr()
    lines = [line for line in printed.err.replace("\r", "\n").splitlines() if line.startswith("fxmse: error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert "Traceback" not in printed.err
    assert not printed.out


def test_inputs_that_a_folders_model_does_not_have_are_named(folder, tmp_path, capsys):
    data, out = make_foreign_data(tmp_path, folder), tmp_path / "out"
    assert run("quantize", folder / "llama", "--scheme", "FP8", "--data", data, "--out", out) == 1
    assert_one_line(capsys, r"foreign.safetensors has tokens: LlamaForCausalLM takes input_ids, attention_mask")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/mlp.pt2", "--scheme", "W9A9", "--out", "{out}.pt2"], r"config='W9A9': expected one of the presets"),
        (["{folder}/mlp.pt2", "--scheme", "W4A16", "--out", "{out}.pt2"], r"0.weight: .*128"),
        (["{folder}/mlp.pt2", "--scheme", "FP8", "--out", "{out}"], r"a checkpoint needs a Hugging Face folder"),
        (["{folder}/mlp.pt2", "--scheme", "FP8", "--out", "{out}.pt2"], r"0 batches of calibration data"),
        (["{folder}/mlp.pt2", "--scheme", "FP8", "--out", "{out}/no/a.pt2"], r"is no folder that can be written"),
        (["{folder}/llama", "--scheme", "FP8", "--out", "{folder}/texts.txt"], r"is a file: expected a folder"),
        (["{folder}/llama", "--scheme", "FP8", "--out", "{out}", "--decompose"], r"--decompose is for a .pt2"),
        (["{folder}/llama", "--scheme", "FP8", "--out", "{folder}/llama"], r"llama exists and holds no quantized"),
        (["{folder}/mlp.pt2", "--scheme", "W4A16", "--out", "{out}.pt2", "--bias-correction"], r"give --data"),
        (["{folder}", "--scheme", "FP8", "--out", "{out}"], r"expected a .pt2, or a folder with a config.json"),
        (
            ["{folder}/mlp.pt2", "--scheme", "w4a16", "--ignore", "0", "2", "--out", "{out}.pt2"],
            r"matched nothing",
        ),
        (["{folder}/texts.txt", "--scheme", "FP8", "--out", "{out}"], r"expected a .pt2, or a folder"),
        (
            ["{folder}/mlp.pt2", "--scheme", "a.yaml", "--ignore", "0", "--out", "{out}.pt2"],
            r"--ignore goes with a pre",
        ),
    ],
)
def test_bad_arguments_are_one_line(folder, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert run("quantize", *(a.format(folder=folder, out=out) for a in arguments)) == 1
    assert_one_line(capsys, message)
    assert not list(tmp_path.iterdir())


def test_a_truncated_or_foreign_output_cannot_be_inspected(folder, tmp_path, capsys):
    assert run("inspect", folder / "mlp.pt2") == 1
    assert_one_line(capsys, "mlp.pt2 has no report")
    assert run("inspect", tmp_path) == 1
    assert_one_line(capsys, "has no report")
    (tmp_path / "cut.pt2").write_bytes((folder / "mlp.pt2").read_bytes()[:500])
    assert run("inspect", tmp_path / "cut.pt2") == 1
    assert_one_line(capsys, r"cut.pt2 cannot be read as a .pt2")


def test_debug_shows_where(tmp_path):
    with pytest.raises(ValueError, match="has no report"):
        run("inspect", tmp_path, "--debug")


def test_an_interrupt_writes_nothing(folder, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fxmse.cli.quantizing.calibrate", interrupt)
    out = tmp_path / "out.pt2"
    arguments = ["quantize", folder / "mlp.pt2", "--scheme", "FP8", "--data", folder / "batches.pt", "--out", out]
    assert run(*arguments) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_code_in_data_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save([Payload()], tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt cannot be read as tensors alone"):
        read_batches(tmp_path / "evil.pt", batch_size=1, max_length=8)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", r"a.jsonl, line 1 is no JSON"),
        ("a.jsonl", '"a"\n{"txt": 1}', r'line 2: expected a string, or an object with a "text"'),
        ("a.txt", "\n\n", r"a.txt holds no samples"),
        ("a.safetensors", "no", r"a.safetensors cannot be read"),
    ],
)
def test_data_that_holds_something_else(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_batches(tmp_path / name, batch_size=1, max_length=8, model_folder=example.find_model_folder())


def test_tensors_are_cut_into_batches(tmp_path):
    tensors = {"a": torch.arange(5.0)[:, None], "b": torch.arange(5)}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pt")
    for file in ("a.safetensors", "a.pt"):
        batches = read_batches(tmp_path / file, batch_size=2, max_length=8)
        assert [batch["b"].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
        assert batches[2]["a"].shape == (1, 1)
    save_file({"a": torch.ones(3, 1), "b": torch.ones(2, 1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="expected as many samples of each input"):
        read_batches(tmp_path / "b.safetensors", batch_size=2, max_length=8)


def test_what_a_program_was_calibrated_with_can_be_saved_again(folder, tmp_path):
    program, extra = load_program(folder / "mlp.pt2")
    save_program(program, tmp_path / "again.pt2", {"note": "text", **extra})
    assert load_program(tmp_path / "again.pt2")[1]["note"] == "text"


def test_a_program_of_positional_inputs_takes_named_data(tmp_path, capsys):
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.randn(16, 8)
    dynamic = ({0: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(model, (x[:4],), dynamic_shapes=dynamic), tmp_path / "model.pt2")
    torch.export.save(torch.export.export(model, (x[:4],)), tmp_path / "static.pt2")
    save_file({"input": x}, tmp_path / "x.safetensors")
    for name, batches in (("model", 2), ("static", 4)):
        arguments = ["--scheme", "W8A8", "--data", tmp_path / "x.safetensors", "--out", tmp_path / "q.pt2"]
        assert run("quantize", tmp_path / f"{name}.pt2", *arguments) == 0
        assert f"W8A8, {batches} batches" in capsys.readouterr().out


def test_names_that_a_program_does_not_have_are_one_line(tmp_path, capsys):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(8, 4)

        def forward(self, x, y):
            return self.fc(x) + self.fc(y)

    x = torch.randn(4, 8)
    torch.export.save(torch.export.export(Two(), (x, x + 1)), tmp_path / "model.pt2")
    save_file({"x": x, "z": x + 1}, tmp_path / "x.safetensors")
    arguments = ["--scheme", "W8A8", "--data", tmp_path / "x.safetensors", "--out", tmp_path / "q.pt2"]
    assert run("quantize", tmp_path / "model.pt2", *arguments) == 1
    assert_one_line(capsys, r"batch 1 of the data has x .*, z .*: expected input 0 .*, input 1")


def test_a_plan_is_of_a_folder(folder, capsys):
    assert run("plan", folder / "mlp.pt2", "--scheme", "FP8") == 1
    assert_one_line(capsys, r"mlp.pt2: expected a Hugging Face folder")
