"""fxmse's observers and searches inside of llm-compressor, whose recipes name them."""

import copy
import importlib.metadata

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from cases import DISTRIBUTIONS, NVFP4, WEIGHT_ARGS, as_groups, make_args, make_weight
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.observers import Observer as LLMCompressorObserver
from safetensors.torch import load_file
from test_observers import assert_same_qparams
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn

import fxmse.observers
from fxmse.llmcompressor import _check_version, accelerated

OWN = ("memoryless_mse", "mse", "nvfp4_expanded_mse", "imatrix_mse", "nvfp4_expanded_imatrix")


def find(name, args, values, base_name="weight", importance=None):
    observer = LLMCompressorObserver.load_from_registry(name, base_name=base_name, args=copy.deepcopy(args))
    if importance is not None:
        observer._imatrix_sum, observer._imatrix_count = importance, torch.tensor(1)
    for value in values:
        observer(value)
    return observer.get_qparams()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("args_name", ["int4_channel", "int4_asym_g32", "int8_tensor", "int8_block", "fp8_channel"])
@pytest.mark.parametrize("name", OWN)
def test_an_accelerated_search_finds_the_same(name, args_name):
    args, is_weighted = WEIGHT_ARGS[args_name], "imatrix" in name and args_name in ("int4_channel", "int4_asym_g32")
    for kind in DISTRIBUTIONS:
        weight = make_weight(kind)
        importance = torch.rand(weight.shape[1]) if is_weighted else None
        expected = find(name, args, [weight], importance=importance)
        with accelerated():
            found = find(name, args, [weight], importance=importance)
        if is_weighted:
            is_same = torch.isclose(found["scale"], expected["scale"], rtol=1e-5, atol=0)
            assert is_same.float().mean() >= 0.98  # ties may be decided either way
        else:
            norm = {"imatrix_mse": 3.0}.get(name, 2.4)
            assert_same_qparams(found, expected, as_groups(weight, args), args, norm)


def test_an_accelerated_search_of_nvfp4_and_of_activations_finds_the_same():
    weight = make_weight("heavy")
    values = [torch.randn(3, 7, 96, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    for name, args, seen, role in (
        ("memoryless_mse", NVFP4, [weight], "weight"),
        ("nvfp4_expanded_mse", NVFP4, [weight], "weight"),
        ("mse", make_args(8, symmetric=False), values, "input"),
        ("mse", make_args(8, "float"), values, "output"),
    ):
        expected = find(name, args, seen, role)
        with accelerated():
            found = find(name, args, seen, role)
        same = torch.isclose(found["scale"].float(), expected["scale"].float(), rtol=1e-5, atol=0)
        assert same.float().mean() >= 0.98
        assert found["scale"].dtype == expected["scale"].dtype
        assert (found["global_scale"] is None) == (expected["global_scale"] is None)


def test_the_searches_are_llm_compressors_own_again():
    from llmcompressor.observers import imatrix, mse

    before = mse._grid_search_mse, imatrix._grid_search
    with accelerated():
        assert before[0] is not mse._grid_search_mse
    assert (mse._grid_search_mse, imatrix._grid_search) == before


@pytest.mark.parametrize("args_name", ["int4_channel", "int4_asym_g32", "int8_tensor", "int8_block", "fp8_channel"])
def test_exact_mse_is_fxmses(args_name):
    args, weight = WEIGHT_ARGS[args_name], make_weight("heavy")
    own = fxmse.observers.Observer.load_from_registry("exact_mse", base_name="weight", args=args, negative_scale=False)
    expected, found = own(weight).get_qparams(), find("exact_mse", args, [weight])
    assert torch.equal(found["scale"], expected["scale"])
    assert torch.equal(found["zero_point"], expected["zero_point"])


def test_exact_mse_of_activations_and_what_it_has_not():
    values = [torch.randn(3, 7, 96, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    args = make_args(8, symmetric=False)
    own = fxmse.observers.Observer.load_from_registry("exact_mse", base_name="input", args=args)
    for value in values:
        own(value)
    assert torch.equal(find("exact_mse", args, values, "input")["scale"], own.get_qparams()["scale"])
    observer = LLMCompressorObserver.load_from_registry("exact_mse", base_name="weight", args=copy.deepcopy(args))
    assert not observer.has_statistics
    assert not hasattr(observer, "min_vals")
    for name in ("importance", "negative_scale"):
        with pytest.raises(ValueError, match=f"exact_mse has no {name}=True in llm-compressor: leave it out"):
            LLMCompressorObserver.load_from_registry(
                "exact_mse", base_name="weight", args=copy.deepcopy(args), **{name: True}
            )


@pytest.mark.parametrize("args_name", ["int4_channel", "int4_asym_g32", "fp8_channel"])
@torch.no_grad()
def test_output_mse_is_fxmses_with_the_inputs_that_its_hook_sees(args_name):
    args, weight = WEIGHT_ARGS[args_name], make_weight("heavy")
    linear = nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight.copy_(weight)
    batches = [torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    own = fxmse.observers.Observer.load_from_registry("output_mse", base_name="weight", args=args, negative_scale=False)
    observer = LLMCompressorObserver.load_from_registry("output_mse", base_name="weight", args=copy.deepcopy(args))
    observer.attach(linear)
    for batch in batches:
        own.inputs(batch)
        linear(batch)
    with HooksMixin.disable_hooks():
        linear(100 * batches[0])
    observer(weight)
    expected, found = own(weight).get_qparams(), observer.get_qparams()
    assert torch.equal(found["scale"], expected["scale"])
    assert torch.equal(found["zero_point"], expected["zero_point"])
    observer.detach(linear)
    linear(batches[0])
    assert observer._products is None
    with pytest.warns(UserWarning, match="seen no activations"):
        observer(weight)


CONFIGS = {
    "W4A16": {"weights": make_args(4, strategy="group", group_size=32)},
    "FP8": {"weights": make_args(8, "float", "channel"), "input_activations": make_args(8, "float")},
    "NVFP4": {"weights": NVFP4, "input_activations": NVFP4.model_copy(update={"dynamic": "local"})},
}


@pytest.fixture(scope="module")
def run_oneshot():
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    processor = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a")
    ids = torch.randint(0, 256, (4, 8), generator=torch.Generator().manual_seed(0)).tolist()
    dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 8] * len(ids)})

    def run(folder, scheme, observer, modifier=QuantizationModifier, **options):
        args = {
            role: own if own.dynamic else own.model_copy(update={"observer": observer, "observer_kwargs": {}})
            for role, own in copy.deepcopy(CONFIGS[scheme]).items()
        }
        ARCHITECTURES["Llama"].make_model().save_pretrained(folder / "float")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "float").eval()
        recipe = modifier(config_groups={"group_0": {"targets": ["Linear"], **args}}, ignore=["lm_head"], **options)
        oneshot(
            model=model,
            dataset=dataset,
            processor=processor,
            recipe=recipe,
            num_calibration_samples=len(ids),
            max_seq_length=8,
            output_dir=str(folder),
        )
        dtype = torch.bfloat16 if scheme == "NVFP4" else None  # what compressed-tensors decompresses fp4 to
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        return load_file(folder / "model.safetensors"), loaded(torch.tensor(ids)).logits.float()

    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("scheme", "modifier"),
    [
        ("W4A16", QuantizationModifier),
        ("FP8", QuantizationModifier),
        ("NVFP4", QuantizationModifier),
        ("W4A16", GPTQModifier),
    ],
)
@torch.no_grad()
def test_a_recipe_that_names_exact_mse(run_oneshot, tmp_path, scheme, modifier):
    expected, _ = run_oneshot(tmp_path / "own", scheme, "memoryless_mse", modifier)
    tensors, logits = run_oneshot(tmp_path / "exact", scheme, "exact_mse", modifier)
    shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in own.items()} for own in (tensors, expected)]
    assert shapes[0] == shapes[1]
    scale = next(name for name in tensors if name.endswith("q_proj.weight_scale"))
    assert not torch.equal(tensors[scale].float(), expected[scale].float())
    ids = torch.randint(0, 256, (4, 8), generator=torch.Generator().manual_seed(0))
    float_logits = ARCHITECTURES["Llama"].make_model()(ids).logits
    assert logits.isfinite().all()
    assert torch.cosine_similarity(logits, float_logits, dim=-1).mean() > 0.95


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_recipe_that_names_output_mse_moves_outputs_less(run_oneshot, tmp_path):
    ids = torch.randint(0, 256, (4, 8), generator=torch.Generator().manual_seed(0))
    float_logits = ARCHITECTURES["Llama"].make_model()(ids).logits
    errors = []
    for observer in ("output_mse", "exact_mse"):
        _, logits = run_oneshot(tmp_path / observer, "W4A16", observer, requires_calibration_data=True)
        errors.append((logits - float_logits).square().mean())
    assert errors[0] < 0.9 * errors[1]


def test_another_version_is_refused_by_name(monkeypatch):
    _check_version()
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.15.0" if name == "llmcompressor" else version(name)
    )
    with pytest.raises(ImportError, match=r"llmcompressor 0.15.0 is not what fxmse.llmcompressor was tested with"):
        _check_version()
