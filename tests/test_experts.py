"""Mixtures of experts: checkpoints with a linear an expert, as llm-compressor writes and transformers loads them."""

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from architectures import MOE
from cases import FP8, copies_pytree_specs, make_args
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle import fake_quantize
from safetensors.torch import load_file
from test_routers import ROUTED
from torch import nn

import fxmse
from fxmse.observers import Observer
from fxmse.outputs.experts import Experts
from fxmse.passes.probe import find_inputs

pytestmark = [
    pytest.mark.filterwarnings("ignore:targets and ignores that matched no module"),
    pytest.mark.filterwarnings("ignore:left in float.*a router"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:the model is .*decompresses fp4 weights"),
]
NUM_EXPERTS = 4
SIZES = {**MOE, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
del SIZES["experts_implementation"]
MODELS = {
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": NUM_EXPERTS, "num_hidden_layers": 2}),
    "Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 32, "head_dim": 32, "num_hidden_layers": 2},
    ),
    # Transposed, interleaved, with biases; and transposed, without a router's choice in the experts.
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {"num_local_experts": NUM_EXPERTS, "head_dim": 32}),
    "Llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            "num_local_experts": NUM_EXPERTS,
            "num_experts_per_tok": 1,
            "head_dim": 32,
            "intermediate_size_mlp": 64,
            "pad_token_id": 0,
        },
    ),
}
IGNORE = ["lm_head", "re:.*gate$", "re:.*router$"]


def make_scheme(num_bits, type="int", strategy="group", group_size=32, symmetric=True, inputs=None):
    args = make_args(num_bits, type, strategy, group_size=group_size, symmetric=symmetric)
    return QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)


SCHEMES = {
    "W4A16": make_scheme(4),
    "W4A16 asymmetric": make_scheme(4, symmetric=False),
    "W8A16 channel": make_scheme(8, strategy="channel", group_size=None),
    "FP8 weights": make_scheme(8, "float", "channel", None),
    "FP8 weights by tensor": make_scheme(8, "float", "tensor", None),
    "W8A8": make_scheme(8, "int", "channel", None, inputs=make_args(8, symmetric=False)),
    **{
        name: preset_name_to_scheme(name, ["Linear"])
        for name in ("FP8", "FP8_DYNAMIC", "NVFP4", "NVFP4A16", "MXFP4A16")
    },
}


def make_config(name):
    scheme = SCHEMES[name].model_copy(deep=True)
    scheme.weights.observer = "memoryless_minmax"  # what is found is another test's subject
    if scheme.input_activations and scheme.input_activations.dynamic is not True:
        scheme.input_activations.observer = "static_minmax"
    return QuantizationConfig(config_groups={"group_0": scheme}, ignore=IGNORE)


def make_inputs(seed):
    return {"input_ids": torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(seed))}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each model as transformers loads it, float32, and its program; made when asked for."""
    made = {}

    def get(name):
        if name not in made:
            model_class, config_class, options = MODELS[name]
            torch.manual_seed(0)
            model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**SIZES, **options}))
            for parameter in model.parameters():
                parameter.data.normal_(std=0.1)  # transformers leaves some as they come
            folder = tmp_path_factory.mktemp("float")
            model.save_pretrained(folder)
            model = getattr(transformers, model_class).from_pretrained(folder, dtype=torch.float32).eval()
            dims = {"input_ids": {0: torch.export.Dim.AUTO}}
            made[name] = model, torch.export.export(model, (), make_inputs(0), dynamic_shapes=dims)
        return made[name]

    return get


@pytest.fixture(scope="module")
def checkpoints(models, tmp_path_factory):
    """The folded graph and the folder of a model in a scheme; made when asked for."""
    made = {}

    @torch.no_grad()
    def get(name, scheme):
        if (name, scheme) not in made:
            model, program = models(name)
            quantized = fxmse.quantize(program, make_config(scheme), [make_inputs(1), make_inputs(2)], progress=False)
            folder = tmp_path_factory.mktemp("checkpoint") / "out"
            fxmse.save_pretrained(quantized, model, folder)
            made[name, scheme] = quantized, folder
        return made[name, scheme]

    return get


def read(folder):
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def oneshot():
    """llm-compressor's whole job: the tensors and the config that it writes."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    processor = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a")
    ids = [*make_inputs(1)["input_ids"].tolist(), *make_inputs(2)["input_ids"].tolist()]
    dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 8] * len(ids)})

    def run(model, scheme, folder):
        model = copy.deepcopy(model)
        config = make_config(scheme)
        recipe = QuantizationModifier(config_groups=config.config_groups, ignore=config.ignore)
        oneshot(
            model=model,
            dataset=dataset,
            processor=processor,
            recipe=recipe,
            num_calibration_samples=len(ids),
            max_seq_length=8,
            output_dir=str(folder),
        )
        return read(folder)

    return run


# Mixtral's own names, by which transformers and vLLM load it; llm-compressor 0.14 writes others, which neither knows.
OWN_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("Mixtral", "NVFP4"),
        ("Qwen3-MoE", "FP8"),
        ("Qwen3-MoE", "W4A16 asymmetric"),
        ("gpt-oss", "NVFP4"),
        ("gpt-oss", "W8A8"),
    ],
)
def test_the_keys_are_those_of_llm_compressor(models, checkpoints, oneshot, tmp_path, name, scheme):
    expected, expected_config = oneshot(models(name)[0], scheme, tmp_path)
    if name == "Mixtral":
        expected = {re.sub(r"(?<=\.)(gate|up|down)_proj", lambda m: OWN_NAMES[m[0]], k): v for k, v in expected.items()}
    tensors, config = read(checkpoints(name, scheme)[1])
    assert sorted(tensors) == sorted(expected)
    assert all((t.shape, t.dtype) == (expected[key].shape, expected[key].dtype) for key, t in tensors.items())
    own, other = config["quantization_config"], expected_config["quantization_config"]
    assert sorted(own["ignore"]) == sorted(other["ignore"])
    assert [group["targets"] for group in own["config_groups"].values()] == [["Linear"]]
    assert own["format"] == other["format"]


# What DecompressExperts of transformers 5.17 knows: packed integers without zero points, and FP8, in bfloat16.
@torch.no_grad()
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
@pytest.mark.parametrize("scheme", ["W4A16", "FP8 weights", "FP8 weights by tensor"])
def test_transformers_computes_what_the_folded_graph_does(models, checkpoints, name, scheme):
    quantized, folder = checkpoints(name, scheme)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = quantized(**make_inputs(3))[0]
    # It rounds the weights of FP8 experts to bfloat16.
    tolerance = 1e-5 if scheme == "W4A16" else 2**-7
    torch.testing.assert_close(loaded(**make_inputs(3))[0], expected, rtol=0, atol=tolerance * expected.abs().max())
    difference = (models(name)[0](**make_inputs(3))[0] - expected).abs().max()
    assert difference > 10 * (loaded(**make_inputs(3))[0] - expected).abs().max()


def rebuild(model, folder, scheme):
    """The float model with the weights that compressed-tensors makes of a checkpoint."""
    tensors, _ = read(folder)
    by_module = {}
    for name, tensor in tensors.items():
        by_module.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = tensor
    from compressed_tensors.compressors.format import infer_module_format

    compressor = BaseCompressor.get_value_from_registry(infer_module_format(nn.Linear, SCHEMES[scheme]).value)
    rebuilt, experts = copy.deepcopy(model), {}
    for path, state in by_module.items():
        if "weight_scale" not in state:
            continue
        state = compressor.decompress(state, SCHEMES[scheme])
        path = path.replace("block_sparse_moe", "mlp")
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", path):
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = state
        else:
            rebuilt.get_submodule(path).weight.data = state["weight"].float()
    for path, linears in experts.items():
        module = rebuilt.get_submodule(path)
        is_own = (0, "w1") in linears
        gate, up, down = ("w1", "w3", "w2") if is_own else ("gate_proj", "up_proj", "down_proj")
        for kind, ending in (("weight", ""), ("bias", "_bias")):
            if not hasattr(module, f"down_proj{ending}"):
                continue
            parts = {
                n: torch.stack([linears[e, n][kind].float() for e in range(NUM_EXPERTS)]) for n in (gate, up, down)
            }
            interleaves = type(module).__name__ == "GptOssExperts"
            both = torch.stack([parts[gate], parts[up]], 2).flatten(1, 2) if interleaves else None
            both = torch.cat([parts[gate], parts[up]], 1) if both is None else both
            is_transposed = kind == "weight" and type(module).__name__ in ("GptOssExperts", "Llama4TextExperts")
            for leaf, value in (("gate_up_proj", both), ("down_proj", parts[down])):
                getattr(module, f"{leaf}{ending}").data = value.transpose(1, 2) if is_transposed else value
    assert experts
    return rebuilt


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("Mixtral", "W4A16 asymmetric"),
        ("Mixtral", "NVFP4A16"),
        ("Qwen3-MoE", "W8A16 channel"),
        ("Qwen3-MoE", "MXFP4A16"),
        ("gpt-oss", "W4A16"),
        ("gpt-oss", "NVFP4A16"),
        ("Llama4", "FP8 weights by tensor"),
        ("Llama4", "W4A16 asymmetric"),
    ],
)
def test_what_transformers_cannot_load_is_what_the_folded_graph_computes(models, checkpoints, name, scheme):
    quantized, folder = checkpoints(name, scheme)
    model, _ = models(name)
    expected = quantized(**make_inputs(3))[0]
    own = rebuild(model, folder, scheme)(**make_inputs(3))[0]
    # compressed-tensors makes bfloat16 of fp4, whose products of e4m3 and powers of two it can hold, but not of all.
    tolerance = 2**-7 if "FP4" in scheme else 1e-5
    torch.testing.assert_close(own, expected, rtol=0, atol=tolerance * expected.abs().max().item())
    assert (model(**make_inputs(3))[0] - expected).abs().max() > 10 * (own - expected).abs().max()


@pytest.mark.parametrize(("name", "scheme"), [("Qwen3-MoE", "FP8"), ("gpt-oss", "NVFP4")])
def test_all_experts_have_the_scale_of_their_inputs_and_one_global_scale(checkpoints, name, scheme):
    quantized, folder = checkpoints(name, scheme)
    tensors, _ = read(folder)
    kind = "global_scale" if scheme == "NVFP4" else "scale"
    qparams = quantized.state_dict()
    for expert in range(NUM_EXPERTS):
        path = "model.layers.0.mlp.experts"
        for linear, leaf in (("gate_proj", "gate_up_proj"), ("up_proj", "gate_up_proj"), ("down_proj", "down_proj")):
            found = tensors[f"{path}.{expert}.{linear}.input_{kind}"]
            assert torch.equal(found, qparams[f"{path}.{leaf}_input_{kind}"])
            own = tensors[f"{path}.{expert}.{linear}.weight_{kind}"]
            assert torch.equal(own, qparams[f"{path}.{leaf}_weight_{kind}"][expert].reshape(1))
    assert len(qparams[f"{path}.down_proj_weight_{kind}"].unique()) > 1


@pytest.mark.parametrize("strategy", [{"strategy": "tensor"}, {"strategy": "tensor_group", "group_size": 16}])
@pytest.mark.parametrize("observer", ["memoryless_minmax", "memoryless_mse", "exact_mse"])
def test_an_experts_scales_are_those_of_its_matrix_alone(observer, strategy):
    torch.manual_seed(0)
    weight = torch.randn(3, 8, 32) * torch.tensor([1.0, 5.0, 0.1])[:, None, None]
    scale_dtype = FP8 if "group_size" in strategy else None
    args = make_args(4, "float", scale_dtype=scale_dtype, zp_dtype=scale_dtype, **strategy)

    def find(value):
        return Observer.load_from_registry(observer, base_name="weight", args=args)(value).get_qparams()

    found = find(weight)
    for expert, matrix in enumerate(weight):
        for kind, value in find(matrix).items():
            if value is not None:
                assert torch.equal(found[kind][expert].flatten(), value.flatten())


def test_targets_that_name_the_experts_name_their_linears(models, tmp_path):
    model, program = models("Mixtral")
    scheme = SCHEMES["W4A16"]
    groups = {
        "first": scheme.model_copy(update={"targets": ["re:.*layers.0.mlp.experts$"]}),
        "attention": preset_name_to_scheme("FP8_DYNAMIC", ["re:.*self_attn.*"]),
    }
    quantized = fxmse.quantize(program, QuantizationConfig(config_groups=groups), progress=False)
    fxmse.save_pretrained(quantized, model, tmp_path / "out")
    tensors, config = read(tmp_path / "out")
    config = config["quantization_config"]
    experts = next(group for group in config["config_groups"].values() if group["weights"]["num_bits"] == 4)
    (target,) = experts["targets"][1:]
    own = "model.layers.{}.{}.experts.3.{}"
    for path in (own.format(0, "block_sparse_moe", "w1"), own.format(0, "mlp", "down_proj")):
        assert re.match(target.removeprefix("re:"), path)
    assert not re.match(target.removeprefix("re:"), own.format(1, "mlp", "w1"))
    assert own.format(0, "block_sparse_moe", "w1") + ".weight_packed" in tensors
    assert own.format(1, "block_sparse_moe", "w1") + ".weight" in tensors


def test_experts_that_stay_in_float_are_ignored(models, tmp_path):
    model, program = models("Qwen3-MoE")
    config = make_config("FP8_DYNAMIC")
    config.ignore.append("re:.*experts$")
    quantized = fxmse.quantize(program, config, progress=False)
    fxmse.save_pretrained(quantized, model, tmp_path / "out")
    tensors, config = read(tmp_path / "out")
    assert tensors["model.layers.0.mlp.experts.0.gate_proj.weight"].dtype == torch.float32
    ignored = [entry for entry in config["quantization_config"]["ignore"] if "experts" in entry]
    assert len(ignored) == 1
    assert re.match(ignored[0].removeprefix("re:"), "model.layers.1.mlp.experts.3.down_proj")


def test_blocks_of_two_linears_are_refused():
    module = nn.Module()
    module.gate_up_proj, module.down_proj = (nn.Parameter(torch.empty(2, *shape)) for shape in ((12, 8), (8, 6)))
    experts = Experts.of("experts", module)
    qparams = {"scale": torch.ones(2, 3, 1)}
    with pytest.raises(ValueError, match="a block of 4 rows has rows of both gate_proj and up_proj"):
        experts.split_site("experts.gate_up_proj_weight", qparams, (4, 8))
    assert len(experts.split_site("experts.gate_up_proj_weight", {"scale": torch.ones(2, 4, 1)}, (3, 8))) == 4


def observe(model, batch, all_experts, **kwargs):
    """The observed graph after one batch."""
    weights = {"num_bits": 4, "strategy": "group", "group_size": 4, "observer": "output_mse"}
    inputs = {"num_bits": 8, "symmetric": False, "observer": "static_minmax"}
    scheme = {"targets": ["re:^$"], "weights": weights, "input_activations": inputs}
    example = None if isinstance(model, torch.fx.GraphModule) else batch
    observed = fxmse.prepare(model, scheme, example, moe_calibrate_all_experts=all_experts)
    return fxmse.calibrate(observed, [batch], progress=False, **kwargs)


def list_products(observed):
    """The sums of x xᵀ by expert."""
    (inputs,) = (found for _, found in find_inputs(observed))
    return inputs.products[:, 0].double()


@torch.no_grad()
@pytest.mark.parametrize("capture", ["export", "symbolic_trace"])
@pytest.mark.parametrize("kind", ["Indexed", "Grouped", "InGroups", "Labelled"])
def test_all_experts_meet_all_tokens_and_outputs_stay(kind, capture):
    torch.manual_seed(0)
    model, x = ROUTED[kind]().eval(), torch.randn(10, 16)
    source = torch.fx.symbolic_trace(model) if capture == "symbolic_trace" else model
    tokens = torch.tanh(model.first(x)).double()
    expected = (tokens.T @ tokens).expand(6, -1, -1)
    for all_experts in (True, False):
        observed = observe(source, x, all_experts)
        assert torch.equal(observed(x), model(x))
        # It has seen the batch twice.
        assert torch.allclose(list_products(observed) / 2, expected, rtol=1e-5, atol=1e-5) == all_experts
        quantized = fxmse.convert(observed)
        assert not any("experts" in name for name, _ in quantized.named_modules())
        assert torch.equal(copy.deepcopy(quantized)(x), quantized(x))


@copies_pytree_specs
@torch.no_grad()
def test_all_experts_in_a_compiled_graph_and_a_copy():
    torch.manual_seed(0)
    model, x = ROUTED["Grouped"]().eval(), torch.randn(10, 16)
    inputs = {"num_bits": 8, "observer": "static_minmax"}
    observed = copy.deepcopy(fxmse.prepare(model, {"targets": ["re:^$"], "input_activations": inputs}, x[:2]))
    fxmse.calibrate(observed, [x[:2], x], progress=False, compile=True)
    largest = torch.tanh(model.first(x)).abs().max()
    torch.testing.assert_close(fxmse.convert(observed).state_dict()["up_input_scale"], largest.reshape(1) / 127.5)


def list_expert_inputs(model, inputs):
    """What goes into the two products of each layer's experts, of all tokens at all experts."""
    found = {}

    def compute(path, module, x):
        gate_up = torch.einsum("ti,eoi->eto", x.flatten(0, -2), module.gate_up_proj)
        found[f"{path}.gate_up_proj"] = x
        found[f"{path}.down_proj"] = module._apply_gate(gate_up)

    hooks = [
        module.register_forward_pre_hook(lambda module, args, path=path: compute(path, module, args[0]))
        for path, module in model.named_modules()
        if path.endswith("experts")
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def test_ranges_of_experts_inputs_are_those_of_all_tokens_at_all_experts(models):
    model, program = models("Qwen3-MoE")
    batches = [make_inputs(1), make_inputs(2)]
    both = fxmse.quantize(program, make_config("FP8"), batches, progress=False)
    chosen = fxmse.quantize(program, make_config("FP8"), batches, progress=False, moe_calibrate_all_experts=False)
    values = [list_expert_inputs(model, batch) for batch in batches]
    assert len(values[0]) == 4
    wider = []
    for name in values[0]:
        largest = max(found[name].abs().max() for found in values)
        own, other = (graph.state_dict()[f"{name}_input_scale"] for graph in (both, chosen))
        torch.testing.assert_close(own, largest.reshape(1) / 448, rtol=1e-5, atol=0)
        assert own >= other
        wider += [name] if own > other else []
    assert wider
    assert not any("gate_up" in name for name in wider)  # all tokens are at some expert


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Indexed", "Grouped"])
def test_a_report_counts_the_tokens_of_each_expert(kind):
    torch.manual_seed(0)
    model, batches = ROUTED[kind]().eval(), [torch.randn(10, 16), torch.randn(7, 16)]
    weights = {"num_bits": 8, "strategy": "tensor", "observer": "memoryless_minmax"}
    quantized = fxmse.quantize(model, {"targets": ["re:^$", "first"], "weights": weights}, batches, progress=False)
    first, up = fxmse.report(quantized, batches)
    chosen = torch.cat([model.gate(quantized_first(model, quantized, x)).topk(2)[1].flatten() for x in batches])
    assert up.tokens_per_expert == tuple(torch.bincount(chosen, minlength=6).tolist())
    assert first.tokens_per_expert is None


def quantized_first(model, quantized, x):
    """What the router reads."""
    weight = model.first.weight.detach()
    args = make_args(8)
    return torch.tanh(
        F.linear(x, fake_quantize(weight, quantized.state_dict()["first.weight_scale"], None, args), model.first.bias)
    )


@torch.no_grad()
def test_a_report_counts_the_tokens_of_grouped_products(models, checkpoints):
    quantized, _ = checkpoints("Qwen3-MoE", "W4A16")
    sites = [site for site in fxmse.report(quantized, [make_inputs(3)]) if site.tokens_per_expert]
    assert len(sites) == 4
    assert all(
        sum(site.tokens_per_expert) == 2 * 8 * 2 and len(site.tokens_per_expert) == NUM_EXPERTS for site in sites
    )


def test_a_matrix_that_is_one_block_has_a_scale_of_rows_and_columns():
    module = nn.Module()
    module.gate_up_proj = nn.Parameter(torch.empty(NUM_EXPERTS, 256, 128))
    module.down_proj = nn.Parameter(torch.empty(NUM_EXPERTS, 128, 128))
    experts = Experts.of("experts", module)
    scales = {name: torch.rand(NUM_EXPERTS, count, 1) for name, count in (("gate_up_proj", 2), ("down_proj", 1))}
    for name, scale in scales.items():
        qparams = {"scale": scale, "zero_point": None, "global_scale": None}
        split = experts.split_site(f"experts.{name}_weight", qparams, [128, 128])
        for expert in range(NUM_EXPERTS):
            linears = ("gate_proj", "up_proj") if name == "gate_up_proj" else ("down_proj",)
            own = [split[f"experts.{expert}.{linear}.weight"] for linear in linears]
            assert all(q["zero_point"] is None and q["scale"].shape == (1, 1) for q in own)
            assert torch.equal(torch.cat([q["scale"] for q in own]), scale[expert])
