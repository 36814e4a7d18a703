"""Checkpoints that are written part by part: the bytes of those that are written at once, and nothing is lost."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle import fake_quantize
from processes import Processes
from safetensors.torch import load_file, save_file

import fxmse
from fxmse.calibration.ranks import Alone
from fxmse.inputs.weights import Weights
from fxmse.observers import Observer
from fxmse.outputs.checkpoint import choose_format
from fxmse.outputs.shards import Shards, _compress
from fxmse.passes.probe import find_probes
from fxmse.streaming.activations import Activations
from fxmse.streaming.work import Work

pytestmark = [
    pytest.mark.filterwarnings("ignore:targets and ignores that matched no module"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]


def make_config(scheme, **weights):
    scheme = preset_name_to_scheme(scheme, ["Linear"])
    scheme.weights = scheme.weights.model_copy(update=weights)
    return QuantizationConfig(config_groups={"group": scheme}, ignore=["lm_head"])


W4A16 = make_config("W4A16", group_size=32)


def load_tensors(folder):
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def list_names(folder):
    return sorted(path.name for path in folder.iterdir())


def check_equal(found, expected):
    """Whether two checkpoints hold the same, bit for bit."""
    assert json.loads((found / "config.json").read_text()) == json.loads((expected / "config.json").read_text())
    found, expected = load_tensors(found), load_tensors(expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def save_model(name, folder, dtype=torch.float32):
    model = ARCHITECTURES[name].make_model().to(dtype)
    model.save_pretrained(folder, max_shard_size="100KB")
    return type(model).from_pretrained(folder).eval()


def make_batches(name):
    return [ARCHITECTURES[name].make_inputs(2, seed) for seed in range(2)]


@pytest.mark.parametrize(
    ("name", "config", "dtype"),
    [
        ("Llama", make_config("FP8"), torch.bfloat16),
        ("Llama", make_config("NVFP4"), torch.float32),
        ("BERT", make_config("W8A8"), torch.float32),
        ("BERT", W4A16, torch.bfloat16),
    ],
    ids=["Llama FP8", "Llama NVFP4", "BERT W8A8", "BERT W4A16"],
)
@pytest.mark.filterwarnings("ignore:the model is torch.float32")
def test_parts_are_written_as_the_whole(name, config, dtype, tmp_path):
    model, batches = save_model(name, tmp_path / "float", dtype), make_batches(name)
    fxmse.save_pretrained(fxmse.quantize(model, config, batches, progress=False), model, tmp_path / "whole")
    out = tmp_path / "parts"
    fxmse.quantize_checkpoint(tmp_path / "float", config, batches, out=out, part_size=1, progress=False)
    check_equal(out, tmp_path / "whole")
    assert len(list(out.glob("*.safetensors"))) > 4
    assert list_names(tmp_path) == ["float", "parts", "whole"]


def test_weights_alone_need_no_data(tmp_path):
    model = save_model("Llama", tmp_path / "float")
    quantized = fxmse.quantize(model, W4A16, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}], progress=False)
    fxmse.save_pretrained(quantized, model, tmp_path / "whole")

    def fail():
        pytest.fail("data was asked for")
        yield

    out = tmp_path / "parts"
    fxmse.quantize_checkpoint(tmp_path / "float", W4A16, out=out, part_size=1, progress=False)
    check_equal(out, tmp_path / "whole")
    with pytest.raises(ValueError, match="no batches"):
        fxmse.quantize_checkpoint(tmp_path / "float", make_config("FP8"), out=tmp_path / "static", progress=False)
    assert not (tmp_path / "static").exists()


@pytest.mark.parametrize("config", [W4A16, make_config("FP8")], ids=["weights", "activations"])
def test_a_run_goes_on_where_it_ended(config, tmp_path, monkeypatch):
    save_model("Llama", tmp_path / "float")
    options = {"part_size": 1, "progress": False}
    batches = make_batches("Llama")
    fxmse.quantize_checkpoint(tmp_path / "float", config, batches, out=tmp_path / "uninterrupted", **options)
    written, write = [], Shards.write

    def write_three(shards, tensors, sites, path):
        if len(written) % 4 == 3:
            written.append(None)
            raise KeyboardInterrupt
        write(shards, tensors, sites, path)
        written.append(path.name)

    monkeypatch.setattr(Shards, "write", write_three)
    out, num_runs = tmp_path / "out", 1
    while True:
        try:
            fxmse.quantize_checkpoint(tmp_path / "float", config, batches, out=out, **options)
            break
        except KeyboardInterrupt:
            assert not out.exists()
            num_runs += 1
    files = [name for name in written if name]
    assert num_runs > 2
    assert len(set(files)) == len(files)  # nothing was done twice
    check_equal(out, tmp_path / "uninterrupted")
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("fxmse.outputs.shards.save_file", {"part_size": 1}),
        ("fxmse.streaming.work.Work.note", {"part_size": 1}),
        ("fxmse.outputs.files._flush_tree", {}),
    ],
    ids=["in a file", "before its note", "at the end"],
)
def test_what_a_killed_run_leaves_is_in_no_checkpoint(place, options, tmp_path, monkeypatch):
    save_model("Llama", tmp_path / "float")
    run = {"folder": tmp_path / "float", "config": make_config("FP8"), "progress": False}
    fxmse.quantize_checkpoint(**run, batches=make_batches("Llama"), out=tmp_path / "alone", **options)
    hidden, left = tmp_path / ".out.fxmse", tmp_path / "left"

    def kill(*arguments, **_):
        for path in arguments:
            if isinstance(path, Path) and not path.is_dir():
                path.write_bytes(b"half of it")
        shutil.copytree(hidden, left)  # nothing is tidied up behind a process that is killed
        raise KeyboardInterrupt

    files = {"notes.md": "of the killed run"}
    with monkeypatch.context() as patch:
        patch.setattr(place, kill)
        with pytest.raises(KeyboardInterrupt):
            fxmse.quantize_checkpoint(**run, batches=make_batches("Llama"), out=tmp_path / "out", extra_files=files)
    shutil.rmtree(hidden, ignore_errors=True)
    left.rename(hidden)
    (hidden / "activations-1" / "00000").mkdir(parents=True)  # of a group
    fxmse.quantize_checkpoint(**run, batches=make_batches("Llama"), out=tmp_path / "out", **options)
    check_equal(tmp_path / "out", tmp_path / "alone")
    assert list_names(tmp_path / "out") == list_names(tmp_path / "alone")
    assert list_names(tmp_path) == ["alone", "float", "out"]


def test_the_hidden_folder_holds_what_its_record_lists(tmp_path):
    def list_all():
        return sorted(str(path.relative_to(hidden)) for path in hidden.rglob("*") if path.is_file())

    hidden = tmp_path / ".out.fxmse"
    with Work(tmp_path / "out", Alone()) as work:
        work.resume({})
        work.activations.write(1, 0, {"x": torch.ones(2)})
        (work.folder / "a").write_text("first part")
        work.note({}, ["a"], 1)
        expected = list_all()
        (work.folder / "b").write_text("second part")
        (work.folder / ".b.fxmse-01234567").mkdir()
        (work.folder / ".b.fxmse-01234567" / "new").write_text("half")
        work.activations.write(0, 0, {"x": torch.ones(2)})
        work.activations.write(2, 0, {"x": torch.ones(2)})
        work.floats.write(2, 0, {"x": torch.ones(2)})
        (hidden / "activations-1").mkdir()
        (hidden / "activations-1" / "x").write_text("of another process")
    with Work(tmp_path / "out", Alone()) as work:
        work.resume({})
        assert list_all() == expected
        assert list_names(work.folder) == ["a"]
        (work.folder / "stray").write_text("")
        work.finish(lambda folder: (folder / "config.json").write_text("{}"))
    assert list_names(tmp_path) == ["out"]
    assert list_names(tmp_path / "out") == ["a", "config.json"]


def test_what_cannot_be_gone_on_with_is_said(tmp_path, monkeypatch):
    save_model("Llama", tmp_path / "float")
    batches, out = make_batches("Llama"), tmp_path / "out"
    config = make_config("FP8")

    def quantize(batches=batches, **options):
        fxmse.quantize_checkpoint(tmp_path / "float", config, batches, out=out, progress=False, **options)

    note = Work.note

    def note_two(work, *arguments):
        if len(work.done) == 2:
            raise KeyboardInterrupt
        note(work, *arguments)

    monkeypatch.setattr(Work, "note", note_two)
    with pytest.raises(KeyboardInterrupt):
        quantize(part_size=1)
    with pytest.raises(ValueError, match="something else as data"):
        quantize(batches[::-1], part_size=1)
    with pytest.raises(ValueError, match="something else as part_size"):
        quantize(part_size=2)
    with pytest.raises(ValueError, match="something else as dtype"):
        quantize(part_size=1, dtype=torch.bfloat16)
    with Work(out, Alone()), pytest.raises(ValueError, match="another process is writing"):
        quantize(part_size=1)
    (tmp_path / ".out.fxmse" / "activations-0" / "00002" / "00000000.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="starting anew"), pytest.raises(KeyboardInterrupt):
        quantize(part_size=1)
    record = tmp_path / ".out.fxmse" / "run.json"
    record.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=re.escape(str(record))):
        quantize(part_size=1)
    monkeypatch.setattr(Work, "note", note)
    quantize(part_size=1, resume=False)
    assert list_names(tmp_path) == ["float", "out"]


def test_parts_can_be_calibrated_on_what_quantized_ones_compute(tmp_path):
    """The input of the MLP is that of a model whose attention is quantized; within a part all is float."""
    model, batches = save_model("Llama", tmp_path / "float"), make_batches("Llama")
    config = make_config("FP8")
    quantize = {"config": config, "batches": batches, "part_size": 1, "progress": False}
    for propagate in ("float", "quantized"):
        out = tmp_path / f"on {propagate}"
        fxmse.quantize_checkpoint(tmp_path / "float", out=out, propagate=propagate, **quantize)
    name = "model.layers.0.mlp.gate_proj.input_scale"
    found = load_tensors(tmp_path / "on quantized")
    before = {n: t for n, t in found.items() if n.endswith("scale") and "mlp.gate_proj.input" not in n}
    folded = fxmse.quantize(model, config, batches, progress=False)
    state = folded.state_dict()
    for scale, tensor in before.items():
        if scale in state:  # a value of several linears has the first one's name
            state[scale].copy_(tensor.reshape(state[scale].shape))
    folded.load_state_dict(state)
    node = next(n for n in folded.graph.nodes if n.name == "model_layers_0_mlp_gate_proj_input_fake_quant")
    args = config.config_groups["group"].input_activations
    observer = Observer.load_from_registry(args.observer, base_name="input", args=args)
    for batch in batches:
        observer(_run_to(folded, node.args[0], batch))
    assert torch.equal(found[name], observer.get_qparams()["scale"])
    assert not torch.equal(found[name], load_tensors(tmp_path / "on float")[name])


def test_weights_make_up_for_what_was_quantized_before_them(tmp_path):
    """The scales of the MLP are those of an observer that is shown its inputs beside those of the float model."""
    model, batches = save_model("Llama", tmp_path / "float"), make_batches("Llama")
    config = make_config("W4A16", group_size=32, observer="output_mse")
    args = config.config_groups["group"].weights
    quantize = {"config": config, "batches": batches, "progress": False, "propagate": "quantized"}
    fxmse.quantize_checkpoint(tmp_path / "float", out=tmp_path / "out", **quantize)
    found, before = load_tensors(tmp_path / "out"), copy.deepcopy(model)
    quantize_linears(before, [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"], found, config)
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        for others in (True, False):
            observer = Observer.load_from_registry("output_mse", base_name="weight", args=args)
            for batch in batches:
                value, reference = (catch_input(m, "model.layers.0.mlp.up_proj", batch) for m in (before, model))
                observer.inputs.expect([reference] if others else [])
                observer.inputs(value)
            is_equal = torch.equal(
                observer(weight).get_qparams()["scale"], found["model.layers.0.mlp.up_proj.weight_scale"]
            )
            assert is_equal == others


@pytest.mark.parametrize("shows_all", [True, False])
def test_experts_make_up_for_what_was_quantized_before_them(shows_all, tmp_path):
    """Where all experts are shown all tokens; else a token may be another expert's than in the float model."""
    model, batches = save_model("Mixtral", tmp_path / "float"), make_batches("Mixtral")
    config = make_config("W4A16", group_size=32, observer="output_mse")
    config.ignore.append("re:.*gate$")
    quantize = {"config": config, "batches": batches, "progress": False, "propagate": "quantized"}
    fxmse.quantize_checkpoint(tmp_path / "float", out=tmp_path / "out", moe_calibrate_all_experts=shows_all, **quantize)
    found, before = load_tensors(tmp_path / "out"), copy.deepcopy(model)
    layer = "model.layers.0"
    quantize_linears(before, [f"{layer}.self_attn.{name}_proj" for name in "qkvo"], found, config)
    experts = model.get_submodule(f"{layer}.mlp.experts")
    for expert, weight in enumerate(experts.gate_up_proj.detach()):
        expected = {}
        for others in (True, False):
            args = config.config_groups["group"].weights
            observer = Observer.load_from_registry("output_mse", base_name="weight", args=args)
            for batch in batches:
                value, reference = (catch_input(m, f"{layer}.mlp", batch) for m in (before, model))
                observer.inputs.expect([reference] if others else [])
                observer.inputs(value)
            expected[others] = observer(weight).get_qparams()["scale"]
        names = [f"{layer}.block_sparse_moe.experts.{expert}.{linear}.weight_scale" for linear in ("w1", "w3")]
        scale = torch.cat([found[name] for name in names])
        is_near = {others: torch.isclose(scale, own, rtol=1e-5).float().mean() for others, own in expected.items()}
        assert (is_near[True] > 0.99) == shows_all
        assert is_near[False] < 0.9


@pytest.mark.parametrize("observer", ["exact_mse", "output_mse"])
def test_biases_bring_means_back_to_those_of_the_float_model(observer, tmp_path):
    """Of what a part computes first, whose inputs are the quantized model's."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "ffn_dim": 128, "num_attention_heads": 2, "vocab_size": 256, "word_embed_proj_dim": 64}
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, num_hidden_layers=2, use_cache=False))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15)
    model.save_pretrained(tmp_path / "float")
    model, batches = model.from_pretrained(tmp_path / "float").eval(), make_batches("Llama")
    config = make_config("W4A16", group_size=32, num_bits=3, observer=observer)
    means = {}
    for is_corrected in (False, True):
        out = tmp_path / f"corrected {is_corrected}"
        quantize = {"batches": batches, "propagate": "quantized", "progress": False}
        fxmse.quantize_checkpoint(tmp_path / "float", config, out=out, bias_correction=is_corrected, **quantize)
        means[is_corrected] = find_means(model.from_pretrained(out), batches)
    expected = find_means(model, batches)
    for name in ("1.self_attn.v_proj", "1.self_attn.out_proj", "1.fc1", "1.fc2"):
        name = f"model.decoder.layers.{name}"
        off = {key: (mean[name] - expected[name]).abs().max() for key, mean in means.items()}
        assert off[True] < 1e-5 < 1e-3 < off[False]


def find_means(model, batches):
    """The mean of each linear's output."""
    values = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, args, output, name=name: values.setdefault(name, []).append(output.flatten(0, -2))
            )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return {name: torch.cat(own).mean(0) for name, own in values.items()}


OWN_CODE = """
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class OwnConfig(PreTrainedConfig):
    model_type = "own"


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding, self.linear = nn.Embedding(256, 64), nn.Linear(64, 64)
        self.post_init()

    def forward(self, input_ids):
        return self.linear(self.embedding(input_ids))
"""


@pytest.mark.parametrize("auto_class", ["AutoModel", "AutoModelForCausalLM"])
def test_code_of_a_models_own_goes_with_it(auto_class, tmp_path):
    folder, out = tmp_path / "float", tmp_path / "out"
    folder.mkdir()
    (folder / "own.py").write_text(OWN_CODE)
    auto_map = {"AutoConfig": "own.OwnConfig", auto_class: "own.OwnModel"}
    config = {"model_type": "own", "auto_map": auto_map, "architectures": ["OwnModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"embedding.weight": (256, 64), "linear.weight": (64, 64), "linear.bias": (64,)}
    save_file(
        {name: torch.randn(shape) for name, shape in shapes.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    batch = {"input_ids": torch.arange(8)[None]}
    fxmse.quantize_checkpoint(folder, "W8A8", [batch], out=out, trust_remote_code=True, progress=False)
    load = getattr(transformers, auto_class).from_pretrained
    model, loaded = (load(path, trust_remote_code=True) for path in (folder, out))
    expected = model(**batch)
    torch.testing.assert_close(loaded(**batch), expected, rtol=0, atol=0.05 * expected.abs().max().item())


def test_a_list_of_code_is_none(tmp_path):
    save_model("Llama", tmp_path / "float")
    path = tmp_path / "float" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": ["own.OwnModel"]}))
    fxmse.quantize_checkpoint(tmp_path / "float", W4A16, out=tmp_path / "out", progress=False)
    assert load_tensors(tmp_path / "out")


def quantize_linears(model, names, checkpoint, config):
    """Rounds weights as a checkpoint has them."""
    for name in names:
        weight, scale = model.get_submodule(name).weight, checkpoint[f"{name}.weight_scale"]
        weight.data = fake_quantize(weight.data, scale, None, config.config_groups["group"].weights)


def catch_input(model, name, batch):
    caught = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    model(**batch)
    hook.remove()
    return caught[0]


def _run_to(graph_module, node, batch):
    values = {}

    class Interpreter(torch.fx.Interpreter):
        def run_node(self, n):
            values[n] = super().run_node(n)
            return values[n]

    Interpreter(graph_module).run(*batch.values())
    return values[node]


def quantize_in_processes(folder, batches, out, *, ends_at=None, config=None):
    """One process's part of the work, which may end in the middle of it."""
    import torch.distributed as dist

    note = Work.note

    def end(work, *arguments):
        if len(work.done) == ends_at:
            raise RuntimeError("no power")
        note(work, *arguments)

    Work.note = end
    try:
        fxmse.quantize_checkpoint(folder, config, batches, out=out, part_size=1, progress=False, group=dist.group.WORLD)
    finally:
        Work.note = note


def test_several_processes_write_what_one_does(tmp_path):
    save_model("Llama", tmp_path / "float")
    batches, config = make_batches("Llama"), make_config("FP8")
    config.config_groups["group"].input_activations.observer = "static_minmax"
    fxmse.quantize_checkpoint(tmp_path / "float", config, batches, out=tmp_path / "alone", part_size=1, progress=False)
    common = {"folder": tmp_path / "float", "out": tmp_path / "out", "config": config}
    shards = [{"batches": [batch]} for batch in batches]
    with Processes(2) as processes:
        # The second one ends after three parts; then both go on.
        found = processes(quantize_in_processes, [shards[0], {**shards[1], "ends_at": 3}], **common)
        assert "rank 1 failed: RuntimeError: no power" in str(found[0])
        record = json.loads((tmp_path / ".out.fxmse" / "run.json").read_text())
        assert len(record["parts"]) == 3
        assert not (tmp_path / "out").exists()
        processes(quantize_in_processes, shards, **common)
    check_equal(tmp_path / "out", tmp_path / "alone")
    assert list_names(tmp_path) == ["alone", "float", "out"]


def test_space_is_looked_for_first(tmp_path, monkeypatch):
    save_model("Llama", tmp_path / "float")
    Usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 99_990))
    with pytest.raises(ValueError, match=r"needs at least \d\d\d\.\d\d kB, and 99\.99 kB are free"):
        fxmse.quantize_checkpoint(tmp_path / "float", W4A16, out=tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


OUTPUT = make_config("W4A16", group_size=32, observer="output_mse")


@pytest.mark.parametrize(
    ("config", "options"),
    [(W4A16, {}), (make_config("FP8"), {}), (OUTPUT, {"propagate": "quantized"})],
    ids=["weights", "activations", "both models' activations"],
)
def test_space_is_that_of_what_is_missing(config, options, tmp_path, monkeypatch):
    """On a disk of the size that a run has needed the same run is begun and gone on with, and on a smaller one not."""
    save_model("Llama", tmp_path / "float")
    hidden, out, sizes, capacity = tmp_path / ".out.fxmse", tmp_path / "out", [], 1 << 40

    def measure():
        return sum(path.stat().st_size for path in hidden.rglob("*") if path.is_file())

    def quantize():
        batches = [ARCHITECTURES["Llama"].make_inputs(size, size) for size in (8, 56)]  # those of the second are most
        fxmse.quantize_checkpoint(tmp_path / "float", config, batches, out=out, part_size=1, progress=False, **options)

    write, note, Usage = Activations.write, Work.note, type(shutil.disk_usage(tmp_path))

    def write_and_measure(*arguments):
        write(*arguments)
        sizes.append(measure())

    def note_and_end(work, *arguments):
        sizes.append(measure())
        note(work, *arguments)
        if len(work.done) in ends_at:
            raise KeyboardInterrupt

    ends_at = ()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(capacity, measure(), capacity - measure()))
    monkeypatch.setattr(Activations, "write", write_and_measure)
    monkeypatch.setattr(Work, "note", note_and_end)
    quantize()
    shutil.rmtree(out)
    capacity = int(0.8 * max(sizes))
    more = "" if config is W4A16 else r" and about \d+\.\d+ .B more until it is done"
    message = rf"needs at least \d+\.\d+ kB{more}, and \d+\.\d+ .B are free"
    with pytest.raises(ValueError, match=message):
        quantize()
    assert not hidden.exists()
    capacity, ends_at = int(1.3 * max(sizes)), (2, 6)
    for _ in ends_at:
        with pytest.raises(KeyboardInterrupt):
            quantize()
    quantize()


@pytest.mark.filterwarnings("ignore:the model is torch.float32")
def test_what_it_takes_is_known_before(tmp_path):
    model = save_model("Llama", tmp_path / "float")
    for scheme in ("W4A16_ASYM", "NVFP4", "FP8"):
        config = make_config(scheme, **{"group_size": 32} if scheme == "W4A16_ASYM" else {})
        observed = fxmse.prepare(model, config, make_batches("Llama")[0])
        sites = [site for _, probe in find_probes(observed) for site in probe.sites]
        out = tmp_path / scheme
        fxmse.quantize_checkpoint(tmp_path / "float", config, make_batches("Llama"), out=out, progress=False)
        expected = sum(tensor.nbytes for tensor in load_tensors(out).values())
        assert expected <= Shards(model, config, sites).measure() <= 1.01 * expected


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x.chunk(2, 1)[1],
        lambda x: x.transpose(1, 2)[:, ::2],
        lambda x: x[1, 2:3].expand(4, 16),
        lambda x: x[:0],
        lambda x: x[1, 2, 3],
    ],
)
def test_pieces_keep_their_strides_and_no_more_than_their_memory(cut, tmp_path):
    """Kernels choose by strides how to add up."""
    whole = torch.randn(4, 8, 16)
    piece = cut(whole)
    activations = Activations(tmp_path / "activations")
    activations.write(0, 0, {"piece": piece})
    found = activations.read(0, 0)["piece"]
    assert torch.equal(found, piece)
    assert found.stride() == piece.stride()
    assert found.untyped_storage().nbytes() < whole.nbytes


def add_mask(batch):
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


FULL, OTHER = make_batches("Llama")
EMPTY = {"input_ids": FULL["input_ids"][:0]}


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([add_mask(FULL), OTHER], r"batch 2 has other inputs than \w+, \w+, .*missing .*'attention_mask'"),
        ([FULL, OTHER, add_mask(OTHER)], r"batch 3 has other inputs than input_ids, .*unexpected .*'attention_mask'"),
        ([FULL, EMPTY], "batch 2 is empty: expected tensors of at least one element"),
        ([EMPTY, FULL], "batch 1 is empty: expected tensors of at least one element"),
    ],
    ids=["less", "more", "empty", "empty first"],
)
def test_batches_that_do_not_fit_are_named_before_the_first_search(batches, message, tmp_path, monkeypatch):
    save_model("Llama", tmp_path / "float")
    monkeypatch.setattr(Weights, "fill", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(ValueError, match=message):
        fxmse.quantize_checkpoint(
            tmp_path / "float", make_config("FP8"), iter(batches), out=tmp_path / "out", progress=False
        )
    assert list_names(tmp_path) == ["float"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes/readme.md": ""}, "extra_files has 'notes/readme.md': expected a file's name alone"),
        ({"..": ""}, "extra_files has '..': expected a file's name alone"),
        ({"": ""}, "extra_files has '': expected a file's name alone"),
        ({"config.json": "{}"}, "extra_files has 'config.json', which the checkpoint has itself: choose another"),
        ({"model-00001-of-00001.safetensors": ""}, "which the checkpoint has itself"),
        ({"notes.md": b""}, r"extra_files\['notes.md'\] is a bytes: expected the text"),
    ],
)
def test_extra_files_are_looked_at_before_the_model(files, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fxmse.quantize_checkpoint(tmp_path / "none", W4A16, out=tmp_path / "out", extra_files=files)
    assert list_names(tmp_path) == []


def test_extra_files_are_utf8_whatever_the_locale(tmp_path, monkeypatch):
    save_model("Llama", tmp_path / "float")
    write_text = Path.write_text

    def write_in_ascii(path, text, encoding=None, **options):
        return write_text(path, text, encoding or "ascii", **options)

    monkeypatch.setattr(Path, "write_text", write_in_ascii)  # as in the locale C before Python 3.15
    out, files = tmp_path / "out", {"é.md": "größer"}
    fxmse.quantize_checkpoint(tmp_path / "float", W4A16, out=out, progress=False, extra_files=files)
    assert (out / "é.md").read_bytes() == "größer".encode()


def test_a_folder_that_lacks_tensors_is_refused(tmp_path):
    save_model("Llama", tmp_path / "float")
    file = next((tmp_path / "float").glob("*.safetensors"))
    tensors = load_file(file)
    name, tensor = tensors.popitem()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"there is no {re.escape(name)}"):
        fxmse.quantize_checkpoint(tmp_path / "float", W4A16, out=tmp_path / "out")
    save_file({**tensors, name: torch.cat([tensor, tensor])}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(name)):
        fxmse.quantize_checkpoint(tmp_path / "float", W4A16, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_BLOCK", "NVFP4", "MXFP4"])
def test_large_weights_are_compressed_by_rows(scheme, monkeypatch):
    from compressed_tensors.quantization import initialize_module_for_quantization

    module = torch.nn.Linear(256, 300, bias=False)
    args = preset_name_to_scheme(scheme, ["Linear"])
    initialize_module_for_quantization(module, args)
    choose_format(module)
    weight = module.weight.detach()
    qparams = {n: p.detach() for n, p in module.named_parameters() if n.startswith("weight_")}
    for name, tensor in qparams.items():
        qparams[name] = tensor.copy_(torch.rand(tensor.shape) * 0.01 + 0.01 if tensor.is_floating_point() else 1)
    tensors = {"weight": weight, **qparams}
    expected = _compress(module, dict(tensors))
    monkeypatch.setattr("fxmse.outputs.shards._AT_A_TIME", 1)
    found = _compress(module, dict(tensors))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
