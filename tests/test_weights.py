"""Models without weights are what transformers loads of a folder, and the folder's tensors have one name each."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from architectures import ARCHITECTURES, ENCODER, TEXT, Architecture
from safetensors.torch import load_file, save_file
from test_streaming import check_equal, load_tensors, make_config

import fxmse
from fxmse.inputs.weights import load_skeleton

pytestmark = [
    pytest.mark.filterwarnings("ignore:targets and ignores that matched no module"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

TIED = {
    "Llama": dataclasses.replace(ARCHITECTURES["Llama"], options={**TEXT, "tie_word_embeddings": True}),
    "BERT": Architecture("BertForMaskedLM", "BertConfig", ENCODER),
    "T5": ARCHITECTURES["T5"],
}
FP8 = make_config("FP8")


def make_folder(architecture, folder, change=None, dtype=torch.float32):
    """The model as transformers loads it of a folder whose tensors were changed."""
    model = architecture.make_model().to(dtype)
    model.save_pretrained(folder)
    if change:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return type(model).from_pretrained(folder).eval()


def add_to(source, *aliases, is_equal=True, has_source=True):
    """A change: aliases of a tensor, whose values are the same or others."""

    def add(tensors):
        added = {name: tensors[source] * (1 if is_equal else -place) for place, name in enumerate(aliases, 1)}
        return {name: tensor for name, tensor in tensors.items() if has_source or name != source} | added

    return add


def list_tensors(model):
    """The dtype of each parameter and buffer, and the first name of the same one."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first = {id(tensor): name for name, tensor in reversed(tensors)}
    return {name: (tensor.dtype, first[id(tensor)]) for name, tensor in tensors}


FOLDERS = {
    "equal": {"is_equal": True},
    "different": {"is_equal": False},
    "without the source": {"has_source": False},
    "different, without the source": {"has_source": False, "is_equal": False},
}
NAMES = {
    "Llama": ("model.embed_tokens.weight", "lm_head.weight"),
    "BERT": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    "BERT's bias": ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    "T5": ("shared.weight", "encoder.embed_tokens.weight", "lm_head.weight"),
}


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_tensors_are_one_where_transformers_has_them_one(names, folder, request, tmp_path):
    architecture = TIED[request.node.callspec.id.split("-")[0].removesuffix("'s bias")]
    model = make_folder(architecture, tmp_path / "float", add_to(*names, **FOLDERS[folder]))
    skeleton = load_skeleton(tmp_path / "float")
    assert list_tensors(skeleton.model) == list_tensors(model)
    model.save_pretrained(tmp_path / "saved")
    expected, found = load_tensors(tmp_path / "saved"), skeleton.weights.load(skeleton.weights.names)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for name, parameter in skeleton.model.named_parameters(remove_duplicate=False):
        assert torch.equal(found[skeleton.weights.find(parameter)], model.get_parameter(name)), name


def test_tied_tensors_that_do_not_fit_are_named(tmp_path):
    make_folder(TIED["Llama"], tmp_path)
    embedding, head = NAMES["Llama"]
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, head: tensors[embedding][1:].clone()}, file)
    with pytest.raises(ValueError, match=f": {head} has shape"):
        load_skeleton(tmp_path)
    del tensors[embedding]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"there is no {head}; there is no {embedding}"):
        load_skeleton(tmp_path)


@pytest.mark.parametrize("folder", ["equal", "different", "without the source"])
def test_what_a_folder_has_twice_is_written_as_in_memory(folder, tmp_path):
    architecture = TIED["Llama"]
    model = make_folder(architecture, tmp_path / "float", add_to(*NAMES["Llama"], **FOLDERS[folder]))
    batches = [architecture.make_inputs(2, seed) for seed in range(2)]
    fxmse.save_pretrained(fxmse.quantize(model, FP8, batches, progress=False), model, tmp_path / "whole")
    out = tmp_path / "parts"
    fxmse.quantize_checkpoint(tmp_path / "float", FP8, batches, out=out, part_size=1, progress=False)
    check_equal(out, tmp_path / "whole")


QUANTIZE = """
import sys
import fxmse
from fxmse.streaming.work import Work
from test_weights import FP8, TIED
folder, out, num_parts = sys.argv[1:]
note = Work.note
def end(work, *arguments):
    note(work, *arguments)
    if len(work.done) == int(num_parts):
        sys.exit("no power")
Work.note = end
batches = [TIED["Llama"].make_inputs(2, seed) for seed in range(2)]
fxmse.quantize_checkpoint(folder, FP8, batches, out=out, part_size=1, progress=False)
"""


def test_another_process_goes_on_with_the_same_names(tmp_path):
    """With each of the two seeds, another of two names comes last in a set."""
    make_folder(TIED["Llama"], tmp_path / "float", add_to(*NAMES["Llama"]))
    batches = [TIED["Llama"].make_inputs(2, seed) for seed in range(2)]
    alone = tmp_path / "alone"
    fxmse.quantize_checkpoint(tmp_path / "float", FP8, batches, out=alone, part_size=1, progress=False)
    for seed, num_parts in (("0", 2), ("1", 0)):
        assert not (tmp_path / "out").exists()
        command = [sys.executable, "-c", QUANTIZE, tmp_path / "float", tmp_path / "out", str(num_parts)]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) == (num_parts == 0), done.stderr
        assert num_parts == 0 or "no power" in done.stderr, done.stderr
    check_equal(tmp_path / "out", alone)


DEEPSEEK = {
    **TEXT,
    "num_hidden_layers": 2,  # what a router chooses passes to a second one
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 0,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}
KEPT = {
    "DeepSeek-V3": Architecture("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK),
    "GPT-OSS": Architecture(
        "GptOssForCausalLM", "GptOssConfig", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
    ),
}
KEPT |= {name: ARCHITECTURES[name] for name in ARCHITECTURES}


@pytest.mark.parametrize("name", KEPT)
def test_dtypes_are_those_that_transformers_loads(name, tmp_path):
    model = KEPT[name].make_model()
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        skeleton = load_skeleton(tmp_path, dtype)
        expected = type(model).from_pretrained(tmp_path, dtype=dtype)
        assert list_tensors(skeleton.model) == list_tensors(expected)
        for buffer, value in expected.named_buffers():
            assert torch.equal(skeleton.model.get_buffer(buffer), value), buffer


def put_biases(tensors):
    """Biases of routers that bfloat16 cannot tell apart."""
    near = {name: 5 + 0.01 * torch.randn(t.shape) for name, t in tensors.items() if name.endswith("correction_bias")}
    assert near
    return tensors | near


@pytest.mark.parametrize(
    ("name", "change", "dtype", "config"),
    [
        ("DeepSeek-V3", put_biases, torch.bfloat16, make_config("W4A16", group_size=32, observer="output_mse")),
        ("T5", None, torch.float16, FP8),
    ],
    ids=["DeepSeek-V3", "T5"],
)
def test_what_stays_in_float32_is_calibrated_as_in_memory(name, change, dtype, config, tmp_path):
    architecture = KEPT[name]
    model = make_folder(architecture, tmp_path / "float", change, dtype)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype, torch.float32}
    batches = [architecture.make_inputs(2, seed) for seed in range(2)]
    config = config.model_copy(update={"ignore": ["lm_head", "re:.*gate$"]})
    fxmse.save_pretrained(fxmse.quantize(model, config, batches, progress=False), model, tmp_path / "whole")
    out = tmp_path / "parts"
    fxmse.quantize_checkpoint(tmp_path / "float", config, batches, out=out, part_size=1, progress=False)
    check_equal(out, tmp_path / "whole")
