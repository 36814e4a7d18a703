"""Checkpoints as transformers loads them, in a process that knows nothing of fxmse, and qparams read back."""

import copy
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from cases import make_args
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module
from safetensors.torch import load_file, save_file
from torch import nn

import fxmse
from fxmse.config import CONFIG_KEY, resolve_config
from fxmse.outputs.checkpoint import _foresee_qparams, find_tied, read_sites
from fxmse.outputs.shards import Shards
from fxmse.passes.probe import find_probes

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import quantize_minilm as example

pytestmark = [
    pytest.mark.filterwarnings("ignore:targets and ignores that matched no module"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]
W8A8_STATIC = QuantizationScheme(
    targets=["Linear"], weights=make_args(8, strategy="channel"), input_activations=make_args(8, symmetric=False)
)
SEARCHED_BELOW_ZERO = QuantizationScheme(
    targets=["Linear"], weights=make_args(4, strategy="group", group_size=32, observer="exact_mse")
)
PRESETS = ("W8A8", "W4A16", "W4A16_ASYM", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP4")
CONFIGS = {
    "W8A8 static": QuantizationConfig(config_groups={"group": W8A8_STATIC}, ignore=["lm_head"]),
    "scales below 0": QuantizationConfig(config_groups={"group": SEARCHED_BELOW_ZERO}, ignore=["lm_head"]),
    **{
        name: QuantizationConfig(config_groups={"group": preset_name_to_scheme(name, ["Linear"])}, ignore=["lm_head"])
        for name in PRESETS
    },
    "mixed": QuantizationConfig(
        config_groups={
            "mlp": preset_name_to_scheme("W4A16", ["re:.*mlp.*"]),
            "attention": preset_name_to_scheme("FP8", ["re:.*self_attn.*"]),
        }
    ),
}
# compressed-tensors 0.20 does not know the attention of transformers 5.24, whose cache goes by another name.
KNOWS_CACHE = any(map(is_cached_attention_module, ARCHITECTURES["Llama"].make_model().modules()))
KV_CACHE = QuantizationConfig(
    config_groups={"FP8": ["Linear"]}, kv_cache_scheme=make_args(8, "float"), ignore=["lm_head"]
)
if KNOWS_CACHE:
    CONFIGS["kv cache"] = KV_CACHE
if transformers.__version__ == "5.24.0":
    # It expects zero points that are not packed, of compressed-tensors' own checkpoints, too.
    del CONFIGS["W4A16_ASYM"]
# compressed-tensors decompresses fp4 to bfloat16, whatever the model's dtype.
IN_BFLOAT16 = ("NVFP4", "NVFP4A16", "MXFP4")
LOAD = """
import sys, torch, transformers
folder, model_class, inputs, outputs = sys.argv[1:]
found = {}
for name, batch in torch.load(inputs).items():
    model = getattr(transformers, model_class).from_pretrained(f"{folder}/{name}", dtype="auto")
    with torch.no_grad():
        found[name] = model(**batch)[0]
torch.save(found, outputs)
assert "fxmse" not in sys.modules
"""


def make_llama(folder, dtype):
    """The model as transformers loads it: what it keeps in float32 (rotary frequencies) is."""
    ARCHITECTURES["Llama"].make_model().save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def make_inputs(seed):
    return ARCHITECTURES["Llama"].make_inputs(2, seed)


def export(model, inputs):
    return torch.export.export(model, (), inputs, dynamic_shapes={name: {0: torch.export.Dim.AUTO} for name in inputs})


def load_in_new_process(folder, model_class, batches, tmp_path):
    torch.save(batches, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", LOAD, str(folder), model_class, str(tmp_path / "inputs.pt")]
    subprocess.run([*command, str(tmp_path / "outputs.pt")], check=True, capture_output=True)
    return torch.load(tmp_path / "outputs.pt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The float model and its program in both dtypes."""
    folder = tmp_path_factory.mktemp("llama")
    models = {dtype: make_llama(folder, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return {dtype: (model, export(model, make_inputs(0))) for dtype, model in models.items()}


@pytest.fixture(scope="module")
def checkpoints(llama, tmp_path_factory):
    """A folder with a checkpoint of each config, the folded graphs, and what transformers computes."""
    folder, graphs = tmp_path_factory.mktemp("checkpoints"), {}
    with torch.no_grad():
        for name, config in CONFIGS.items():
            model, program = llama[torch.bfloat16 if name in IN_BFLOAT16 else torch.float32]
            graphs[name] = fxmse.quantize(program, config, [make_inputs(1), make_inputs(2)], progress=False)
            fxmse.save_pretrained(graphs[name], model, folder / name)
    batches = dict.fromkeys(CONFIGS, make_inputs(3))
    loaded = load_in_new_process(folder, "AutoModelForCausalLM", batches, tmp_path_factory.mktemp("outputs"))
    return folder, graphs, loaded


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_transformers_computes_what_the_folded_graph_does(llama, checkpoints, name):
    _, graphs, loaded = checkpoints
    model, _ = llama[torch.bfloat16 if name in IN_BFLOAT16 else torch.float32]
    expected = graphs[name](**make_inputs(3))[0]
    torch.testing.assert_close(loaded[name], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert not torch.allclose(model(**make_inputs(3))[0], expected, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_checkpoint_is_a_graph_again(llama, checkpoints, name):
    folder, graphs, _ = checkpoints
    _, program = llama[torch.bfloat16 if name in IN_BFLOAT16 else torch.float32]
    observed = fxmse.prepare(program, folder / name / "config.json")
    assert fxmse.load_qparams(observed, folder / name) is observed
    assert torch.equal(fxmse.convert(observed)(**make_inputs(3))[0], graphs[name](**make_inputs(3))[0])


@pytest.mark.parametrize(
    ("name", "format", "weight"),
    [
        ("W8A8 static", "int-quantized", torch.int8),
        ("W4A16", "pack-quantized", torch.int32),
        ("FP8", "float-quantized", torch.float8_e4m3fn),
        ("NVFP4", "nvfp4-pack-quantized", torch.uint8),
        ("MXFP4", "mxfp4-pack-quantized", torch.uint8),
        ("mixed", "mixed-precision", torch.int32),
    ],
)
def test_weights_are_compressed_as_their_format_says(checkpoints, name, format, weight):
    folder, _, _ = checkpoints
    config = json.loads((folder / name / "config.json").read_text())["quantization_config"]
    assert config["format"] == format
    assert config["quantization_status"] == "compressed"
    tensors = load_file(folder / name / "model.safetensors")
    up = {key.rpartition(".")[2]: t for key, t in tensors.items() if "layers.0.mlp.up_proj" in key}
    assert up["weight_packed" if "weight_packed" in up else "weight"].dtype == weight


@torch.no_grad()
@pytest.mark.parametrize("name", ["W4A16", "W8A8 static", "FP8", "NVFP4A16"])
def test_subclasses_of_linear_are_compressed(name, tmp_path):
    """Falcon has Linears of its own class."""
    architecture = ARCHITECTURES["Falcon"]
    model, inputs = architecture.make_model().bfloat16().eval(), architecture.make_inputs(2, 0)
    folded = fxmse.quantize(model, CONFIGS[name], [inputs], progress=False)
    fxmse.save_pretrained(folded, model, tmp_path / "at once")
    model.save_pretrained(tmp_path / "float")
    fxmse.quantize_checkpoint(tmp_path / "float", CONFIGS[name], [inputs], out=tmp_path / "in parts", progress=False)
    for out in (tmp_path / "at once", tmp_path / "in parts"):
        tensors = {n: t for file in out.glob("*.safetensors") for n, t in load_file(file).items()}
        layer = "transformer.h.0.self_attention.query_key_value"
        weight = tensors.get(f"{layer}.weight_packed", tensors.get(f"{layer}.weight"))
        assert weight.dtype in (torch.int32, torch.int8, torch.uint8, torch.float8_e4m3fn)
        assert json.loads((out / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]
        if f"{layer}.weight" in tensors:  # transformers' Falcon cannot be loaded without
            loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
            with torch.no_grad():
                torch.testing.assert_close(loaded(**inputs).logits, folded(**inputs).logits, rtol=0.02, atol=0.02)


def test_minilm_with_its_tokenizer(tmp_path):
    source = example.find_model_folder()
    model = example.AutoModel.from_pretrained(source).eval()
    batches = example.load_batches(source, 3)
    quantized = fxmse.quantize(example.export(model, batches[0]), example.CONFIG, batches[:2], progress=False)
    fxmse.save_pretrained(quantized, model, tmp_path / "minilm")
    loaded = load_in_new_process(tmp_path, "AutoModel", {"minilm": batches[2]}, tmp_path)["minilm"]
    torch.testing.assert_close(loaded, quantized(**batches[2])[0], rtol=1e-4, atol=1e-4)
    tokenizer = example.AutoTokenizer.from_pretrained(tmp_path / "minilm")
    assert tokenizer("a word")["input_ids"] == example.AutoTokenizer.from_pretrained(source)("a word")["input_ids"]


def test_scales_below_zero_are_stored(checkpoints):
    tensors = load_file(checkpoints[0] / "scales below 0" / "model.safetensors")
    scales = torch.cat([tensor.flatten() for name, tensor in tensors.items() if name.endswith("weight_scale")])
    assert 0.2 < (scales < 0).float().mean() < 0.8


def test_corrected_biases_are_stored_and_read_back(tmp_path):
    model = ARCHITECTURES["Qwen2"].make_model().eval()
    batches = [ARCHITECTURES["Qwen2"].make_inputs(2, seed) for seed in (1, 2)]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights.group_size = 32
    config = QuantizationConfig(config_groups={"group": scheme}, ignore=["lm_head"])
    quantized = fxmse.quantize(model, config, batches, bias_correction=True, progress=False)
    fxmse.save_pretrained(quantized, model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    biases = {name: tensor for name, tensor in quantized.state_dict().items() if name.endswith("_proj.bias")}
    assert len(biases) == 3 * model.config.num_hidden_layers
    for name, bias in biases.items():
        assert torch.equal(stored[name], bias), name
        assert not torch.equal(bias, before[name]), name
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    observed = fxmse.prepare(model, tmp_path / "out" / "config.json", batches[0])
    again = fxmse.convert(fxmse.load_qparams(observed, tmp_path / "out"))
    assert torch.equal(again(**batches[1])[0], quantized(**batches[1])[0])


def test_the_float_model_is_not_changed(llama, checkpoints):
    model, _ = llama[torch.float32]
    assert not any("scale" in name for name, _ in model.named_parameters())
    assert type(model.model.layers[0].mlp.up_proj.forward.__func__) is type(nn.Linear.forward)
    assert not hasattr(model.model.layers[0].mlp.up_proj, "quantization_scheme")


@pytest.mark.skipif(KNOWS_CACHE, reason="compressed-tensors has a place for it")
def test_a_cache_that_compressed_tensors_does_not_know_is_refused(llama, tmp_path):
    model, program = llama[torch.float32]
    quantized = fxmse.quantize(program, KV_CACHE, [make_inputs(1)], progress=False)
    with pytest.raises(ValueError, match=r"no place for model.layers.0.self_attn.k; model.layers.0.self_attn.v"):
        fxmse.save_pretrained(quantized, model, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_what_has_no_place_is_named(tmp_path):
    architecture = ARCHITECTURES["Mixtral"]
    model, inputs = architecture.make_model(), architecture.make_inputs(2, 0)
    outputs = {"num_bits": 8, "observer": "static_minmax"}  # of a product that is two in a checkpoint
    scheme = QuantizationScheme(
        targets=["re:.*experts$"], weights=SEARCHED_BELOW_ZERO.weights, output_activations=outputs
    )
    quantized = fxmse.quantize(export(model, inputs), scheme, [inputs], progress=False)
    with pytest.raises(ValueError, match=r"no place for .*experts.gate_up_proj_weight.*Leave these out of the config"):
        fxmse.save_pretrained(quantized, model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_kind_of_model_or_graph_is_refused(llama, tmp_path):
    model, program = llama[torch.float32]
    with pytest.raises(ValueError, match=r"model is a Linear: expected a transformers.PreTrainedModel"):
        fxmse.save_pretrained(program.module(), nn.Linear(2, 2), tmp_path / "out")
    with pytest.raises(ValueError, match=r"no fake-quantize nodes that fxmse folded: make it with fxmse.convert"):
        fxmse.save_pretrained(program.module(), model, tmp_path / "out")


def test_fp4_of_a_float32_model_is_warned_of(llama, tmp_path):
    model, program = llama[torch.float32]
    quantized = fxmse.quantize(program, CONFIGS["NVFP4A16"], progress=False)
    with pytest.warns(UserWarning, match="decompresses fp4 weights to bfloat16: load it with dtype=torch.bfloat16"):
        fxmse.save_pretrained(quantized, model, tmp_path / "out")


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_what_was_there(llama, checkpoints, tmp_path, monkeypatch, exists):
    _, graphs, _ = checkpoints
    if exists:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text('{"quantization_config": {}}')

    def fail(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ModelCompressor, "update_config", fail)
    with pytest.raises(OSError, match="No space left"):
        fxmse.save_pretrained(graphs["FP8"], llama[torch.float32][0], tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == (["out", "config.json"] if exists else [])
    monkeypatch.undo()
    fxmse.save_pretrained(graphs["FP8"], llama[torch.float32][0], tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@torch.no_grad()
def test_a_folder_of_something_else_is_not_replaced(llama, checkpoints, tmp_path):
    model, _ = llama[torch.float32]
    _, graphs, _ = checkpoints
    model.save_pretrained(tmp_path / "float")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    for name in ("float", "notes"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=rf"{name} exists and holds no quantized checkpoint: choose a new folder"):
            fxmse.save_pretrained(graphs["FP8"], model, tmp_path / name)
        assert sorted(tmp_path.rglob("*")) == before


@torch.no_grad()
@pytest.mark.parametrize("has_links", [False, True])
def test_what_somebody_put_into_a_checkpoints_folder_stays(llama, checkpoints, tmp_path, monkeypatch, has_links):
    folder, graphs, _ = checkpoints
    out = tmp_path / "out"
    shutil.copytree(folder / "W4A16", out)
    (out / "README.md").write_text("mine")
    (out / "runs" / "deep").mkdir(parents=True)
    (out / "runs" / "deep" / "log").write_text("mine, too")
    (out / "runs" / "latest").symlink_to("deep")
    (out / "elsewhere").symlink_to("/nowhere")
    for stale in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "fxmse_report.json"):
        (out / stale).write_text("old")

    def refuse(*_, **__):
        raise OSError("no links here")

    if not has_links:
        monkeypatch.setattr("os.link", refuse)
    fxmse.save_pretrained(graphs["FP8"], llama[torch.float32][0], out)
    own = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == own | {"README.md", "runs", "elsewhere"}
    assert (out / "README.md").read_text() == "mine"
    assert (out / "runs" / "latest" / "log").read_text() == "mine, too"
    assert (out / "elsewhere").readlink() == Path("/nowhere")
    assert load_file(out / "model.safetensors").keys() == load_file(folder / "FP8" / "model.safetensors").keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@torch.no_grad()
def test_places_that_are_others_are_refused_before_anything_is_done(llama, checkpoints, tmp_path, monkeypatch):
    _, graphs, _ = checkpoints
    model = copy.copy(llama[torch.float32][0])
    model.name_or_path = str(tmp_path / "float")
    for name, config in (("float", {}), ("awq", {"quantization_config": {"quant_method": "awq"}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "link").symlink_to("awq")
    monkeypatch.setattr(ModelCompressor, "from_pretrained_model", None)
    for name, message in (
        ("awq", "awq holds a checkpoint of awq, which fxmse did not write"),
        ("link", "link is a symbolic link to awq"),
        ("float", "float exists and holds no quantized checkpoint"),
        ("float/out", "float/out is in .*float, which is read"),
        ("none/out", "none is no folder that can be written"),
    ):
        with pytest.raises(ValueError, match=message):
            fxmse.save_pretrained(graphs["FP8"], model, tmp_path / name)


def test_a_tied_weight_is_named(tmp_path):
    model = ARCHITECTURES["GPT-2"].make_model()
    assert model.lm_head.weight is model.transformer.wte.weight
    inputs = ARCHITECTURES["GPT-2"].make_inputs(2, 0)
    quantized = fxmse.quantize(
        export(model, inputs), {"config_groups": {"FP8_BLOCK": ["re:.*lm_head"]}}, progress=False
    )
    with pytest.raises(ValueError, match=r"wte.weight and lm_head.weight are one tied parameter.*ignore list"):
        fxmse.save_pretrained(quantized, model, tmp_path / "out")


def plan_shards(observed, model):
    sites = [site for _, probe in find_probes(observed) for site in probe.sites]
    return Shards(model, observed.meta[CONFIG_KEY], sites)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_can_be_saved_is_known_before_the_search(llama, checkpoints, name):
    folder, graphs, _ = checkpoints
    model, program = llama[torch.bfloat16 if name in IN_BFLOAT16 else torch.float32]
    observed = fxmse.prepare(program, CONFIGS[name])
    size = plan_shards(observed, model).measure()
    foreseen = {s.name: set(_foresee_qparams(s.args)) for _, probe in find_probes(observed) for s in probe.sites}
    found = {
        site: {k for k, v in qparams.items() if v is not None} for site, qparams in read_sites(graphs[name])[0].items()
    }
    assert foreseen == found
    expected = sum(tensor.nbytes for tensor in load_file(folder / name / "model.safetensors").values())
    assert expected <= size <= 1.01 * expected
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_what_cannot_be_saved_is_known_before_the_search(llama):
    _, program = llama[torch.float32]
    observed = fxmse.prepare(program, CONFIGS["FP8"])
    with pytest.raises(ValueError, match=r"model is a Linear: expected a transformers.PreTrainedModel"):
        plan_shards(observed, nn.Linear(2, 2))
    model, inputs = ARCHITECTURES["GPT-2"].make_model(), ARCHITECTURES["GPT-2"].make_inputs(2, 0)
    config = resolve_config({"config_groups": {"FP8_BLOCK": ["re:.*lm_head"]}})
    with pytest.raises(ValueError, match=r"wte.weight and lm_head.weight are one tied parameter.*ignore list"):
        plan_shards(fxmse.prepare(export(model, inputs), config), model)
    assert find_tied(config, model) == {"lm_head": "transformer.wte.weight and lm_head.weight"}
    assert not find_tied(config.model_copy(update={"ignore": ["lm_head"]}), model)


def copy_with(folder, tmp_path, change):
    """A checkpoint whose tensors ``change`` has changed."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def remove_scale(tensors):
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]


def cut_scale(tensors):
    name = "model.layers.0.mlp.up_proj.weight_scale"
    tensors[name] = tensors[name][:-1].clone()


def change_one_input(tensors):
    tensors["model.layers.0.self_attn.k_proj.input_scale"] *= 2


def add_scale(tensors):
    tensors["lm_head.weight_scale"] = torch.ones(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_scale, r"there is no model.layers.0.mlp.up_proj.weight_scale"),
        (cut_scale, r"up_proj.*(decompressed|has shape)"),
        (change_one_input, r"self_attn.q_proj.input_scale, .*k_proj.input_scale, .*differ, but are of one value"),
        (add_scale, r"the checkpoint quantizes lm_head.weight, which the graph does not observe"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(llama, checkpoints, tmp_path, change, message):
    folder, _, _ = checkpoints
    _, program = llama[torch.float32]
    observed = fxmse.prepare(program, CONFIGS["W8A8 static"])
    with pytest.raises(ValueError, match=message):
        fxmse.load_qparams(observed, copy_with(folder / "W8A8 static", tmp_path, change))
    with pytest.raises(ValueError, match="nothing was seen by"):
        fxmse.convert(observed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("null", "index.json holds None: expected a JSON object"),
        ("{}", "index.json has weight_map="),
        ('{"weight_map": ["a"]}', "index.json has weight_map="),
        ('{"weight_map": {"a": 1}}', "index.json names 1"),
        ('{"weight_map": {"a": "../a"}}', r"index.json names '../a': expected .safetensors files in its own folder"),
        ('{"weight_map": {"a": "none"}}', "names 'none': expected .safetensors files"),
    ],
)
def test_an_index_of_something_else_is_refused(llama, tmp_path, content, message):
    observed = fxmse.prepare(llama[torch.float32][1], CONFIGS["FP8"])
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        fxmse.load_qparams(observed, tmp_path)


def test_a_truncated_or_missing_file_is_refused(llama, checkpoints, tmp_path):
    folder, _, _ = checkpoints
    observed = fxmse.prepare(llama[torch.float32][1], CONFIGS["FP8"])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: No such file"):
        fxmse.load_qparams(observed, tmp_path)
    whole = (folder / "FP8" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors"):
        fxmse.load_qparams(observed, tmp_path)


def run_mlp(mlp, x):
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))


def run_in_regions(mlp, x):
    """The other branches are never taken."""

    def run_without_gradients(x):
        with torch.no_grad():
            return run_mlp(mlp, x)

    def branch(x):
        return torch.cond(x.abs().mean() >= 0, run_without_gradients, lambda v: v.clone(), (x,))

    return torch.cond(x.abs().sum() >= 0, branch, lambda v: v.clone(), (x,))


@torch.no_grad()
def test_linears_in_regions_are_saved_and_read_back(llama, tmp_path, monkeypatch):
    model, plain = llama[torch.float32]
    config, batches = CONFIGS["W8A8 static"], [make_inputs(1), make_inputs(2)]
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", run_in_regions)
    program = export(model, make_inputs(0))
    monkeypatch.undo()
    quantized = fxmse.quantize(program, config, batches, progress=False)
    fxmse.save_pretrained(quantized, model, tmp_path / "saved")
    expected = quantized(**make_inputs(3))[0]
    # All that the model has without regions is there, and the same.
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    state = fxmse.quantize(plain, config, batches, progress=False).state_dict()
    scales = {key: tensor for key, tensor in state.items() if key.endswith("_scale")}
    assert "model.layers.0.mlp.down_proj.input_scale" in scales
    assert all(torch.equal(saved[key].flatten(), scale.flatten()) for key, scale in scales.items())
    loaded = load_in_new_process(tmp_path, "AutoModelForCausalLM", {"saved": make_inputs(3)}, tmp_path)
    torch.testing.assert_close(loaded["saved"], expected, rtol=1e-5, atol=1e-5)
    observed = fxmse.prepare(program, str(tmp_path / "saved" / "config.json"))
    read = fxmse.convert(fxmse.load_qparams(observed, tmp_path / "saved"))
    assert torch.equal(read(**make_inputs(3))[0], expected)


@torch.no_grad()
def test_what_a_checkpoint_has_no_place_for_is_named_in_regions(llama, tmp_path, monkeypatch):
    model = copy.deepcopy(llama[torch.float32][0])
    mlp = model.model.layers[0].mlp
    mlp.conv = nn.Conv1d(128, 128, 1)

    def convolve(mlp, x):
        y = run_mlp(mlp, x)
        return mlp.conv(y.transpose(1, 2)).transpose(1, 2).contiguous() if hasattr(mlp, "conv") else y

    monkeypatch.setattr(
        type(mlp), "forward", lambda mlp, x: torch.cond(x.sum() >= -1e9, partial(convolve, mlp), torch.clone, (x,))
    )
    scheme = QuantizationScheme(targets=["Linear", "Conv1d"], weights=make_args(8, strategy="channel"))
    config = QuantizationConfig(config_groups={"group": scheme}, ignore=["lm_head"])
    quantized = fxmse.quantize(export(model, make_inputs(0)), config, progress=False)
    with pytest.raises(ValueError, match=r"no place for model\.layers\.0\.mlp\.conv\.weight"):
        fxmse.save_pretrained(quantized, model, tmp_path / "saved")
