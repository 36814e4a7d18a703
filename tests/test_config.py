"""Which module gets which scheme, against compressed-tensors itself."""

import json

import pytest
import torch
import yaml
from cases import make_args
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
from torch import nn

from fxmse.config import Site, make_site, match_schemes, resolve_config


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attention": nn.Linear(8, 8), "mlp": nn.Linear(8, 8)}) for _ in range(2)
        )
        self.head = nn.Linear(8, 8)


def find_modules(model, classes):
    return {(n, type(m).__name__): m for n, m in model.named_modules() if isinstance(m, classes)}


def scheme(*targets, num_bits=8):
    return QuantizationScheme(targets=list(targets), weights=make_args(num_bits, strategy="channel"))


@pytest.mark.parametrize(
    ("schemes", "ignore"),
    [
        ([scheme("Linear")], []),
        ([scheme("Linear")], ["head"]),
        ([scheme("Linear")], ["re:.*mlp$", "Embedding"]),
        ([scheme("re:.*attention", num_bits=4), scheme("Linear")], ["head"]),
        ([scheme("Linear"), scheme("blocks.0.mlp", num_bits=3), scheme("re:blocks.0.*", num_bits=5)], []),
        ([scheme("Embedding", "Linear")], []),
    ],
)
def test_matches_what_compressed_tensors_matches(schemes, ignore):
    config = QuantizationConfig(config_groups={f"group_{i}": s for i, s in enumerate(schemes)}, ignore=ignore)
    model = Model()
    modules = find_modules(model, nn.Linear | nn.Embedding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: None)
        found = match_schemes(config, modules, {}).modules
    apply_quantization_config(model, config, show_progress=False)
    expected = {key: m.quantization_scheme for key, m in modules.items() if hasattr(m, "quantization_scheme")}
    assert {n: s.weights.num_bits for n, s in found.items()} == {n: s.weights.num_bits for n, s in expected.items()}


def test_targets_and_ignores_that_match_nothing_are_named_once():
    config = QuantizationConfig(config_groups={"a": scheme("Linear", "Conv2d")}, ignore=["lm_head", "head"])
    modules = find_modules(Model(), nn.Linear)
    with pytest.warns(UserWarning, match="matched no module: Conv2d, lm_head$") as caught:
        match_schemes(config, modules, {})
    assert len(caught) == 1


def test_a_config_that_matches_nothing_is_an_error():
    config = QuantizationConfig(config_groups={"a": scheme("Conv2d")}, ignore=["head"])
    modules = {("fc", "Linear"): nn.Linear(2, 2)}
    with pytest.raises(ValueError, match=r"targets \['Conv2d'\].*matched nothing.*Linear \(fc\)"):
        match_schemes(config, modules, {})
    with pytest.raises(ValueError, match="can be quantized are none"):
        match_schemes(config, {}, {})


def test_configs_come_as_a_config_a_scheme_or_a_preset():
    config = resolve_config("W4A16")
    assert config.config_groups["group_0"].weights.num_bits == 4
    assert resolve_config(config) is config
    assert resolve_config(scheme("Linear", num_bits=3)).config_groups["group_0"].weights.num_bits == 3
    with pytest.raises(ValueError, match=r"config='W9A9': expected one of the presets .*W4A16"):
        resolve_config("W9A9")
    with pytest.raises(TypeError, match="config is a int"):
        resolve_config(8)


def make_full_config():
    return QuantizationConfig(
        config_groups={
            "group_0": scheme("re:.*attention", num_bits=4),
            "group_1": QuantizationScheme(
                targets=["Linear"],
                weights=make_args(8, "float", "block", block_structure=[4, 4], observer="mse"),
                input_activations=make_args(8, "float", "group", group_size=4, dynamic=True),
            ),
        },
        kv_cache_scheme=make_args(8, "float"),
        ignore=["head"],
    )


# What others and newer versions write beside it.
NEW = {"provider": "auto-round", "moe_sparsity_config": None, "of_tomorrow": None}


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_configs_come_as_a_mapping_or_a_file_of_one(suffix, tmp_path):
    config = make_full_config()
    fields = json.loads(config.model_dump_json())
    path = tmp_path / f"config.{suffix}"
    for content in (fields, {"quantization_config": {**fields, "version": "0.19", "sparsity_config": {}, **NEW}}):
        path.write_text(json.dumps(content) if suffix == "json" else yaml.safe_dump(content))
        for form in (content, path, str(path)):
            assert resolve_config(form).model_dump() == config.model_dump()
    one_scheme = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}}
    assert resolve_config(one_scheme).config_groups["group_0"].weights.num_bits == 4
    presets = {"config_groups": {"FP8": ["re:.*mlp"], "W4A16": ["Linear"]}}
    assert resolve_config(presets).config_groups["FP8"].weights.type == "float"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "config has quant_method='gptq': expected compressed-tensors"),
        (
            {"config_groups": {"W4A16": ["Linear"]}, "moe_sparsity_config": {"a": 1}},
            "config has moe_sparsity_config, which fxmse does not apply",
        ),
        ({"config_groups": {"W4A16": ["Linear"]}, "chunk_size": 4}, "config has chunk_size: expected the fields"),
        ({"num_bits": 8}, "config has num_bits: expected the fields of a QuantizationScheme, targets"),
        ({"config_groups": {}, "ignored": ["head"]}, "config has ignored: expected the fields of a QuantizationConfig"),
        ({"config_groups": {"W9A9": ["Linear"]}}, "Unknown preset scheme name W9A9"),
        ({"config_groups": {"W8A8": ["Linear"]}, "transform_config": {"a": 1}}, "transform_config, which fxmse does"),
        ({"targets": ["Linear"], "weights": {"num_bits": "many"}}, "num_bits"),
        ({"targets": ["Linear"], "input_activations": {"strategy": "channel"}}, "strategy is not supported"),
        ({"targets": ["Linear"]}, r"config_groups \['group_0'\] quantize nothing"),
        ("missing.json", "missing.json cannot be read"),
    ],
)
def test_configs_that_say_something_else_are_named(config, named):
    with pytest.raises(ValueError, match=named):
        resolve_config(config)


def test_files_that_hold_no_mapping_are_named(tmp_path):
    for content, named in (("[1, 2]", "expected a mapping"), ("{", "cannot be read")):
        path = tmp_path / "config.yaml"
        path.write_text(content)
        with pytest.raises(ValueError, match=named):
            resolve_config(path)


def test_ops_of_activations_get_schemes_without_weights_whose_target_is_narrow():
    attention = type("Attention", (nn.Module,), {})()
    modules = {("layer.attn.q_proj", "Linear"): nn.Linear(2, 2)}
    functions = {("layer.attn", "scaled_dot_product_attention"): attention}

    def match(*targets, **kwargs):
        args = {"input_activations": make_args(8, "float"), **kwargs}
        config = QuantizationConfig(config_groups={"a": QuantizationScheme(targets=list(targets), **args)})
        return match_schemes(config, modules, functions)

    for target in ("Attention", "layer.attn", "re:.*attn$"):
        assert list(match(target).functions) == list(functions)
        assert not match(target).modules
    assert list(match("re:.*attn.*").modules) == list(modules)
    assert not match("re:.*attn.*").functions  # it matches the linear inside, too
    assert not match("re:layer.*", "Linear").functions  # and this the layer around
    assert not match("Attention", "Linear", weights=make_args()).functions


def test_sites_have_names_and_default_observers():
    assert make_site("blocks.0.fc", "", "weight", make_args()).args.observer == "exact_mse"
    assert make_site("blocks.0.fc", "", "input", make_args()).args.observer == "exact_mse"
    assert make_site("fc", "", "input", make_args(observer="minmax")).args.observer == "minmax"
    assert make_site("fc", "", "input", make_args(dynamic=True)).args.observer is None
    assert Site("blocks.0.fc", "", "weight", make_args()).name == "blocks.0.fc.weight"
    assert Site("", "w1_", "input", make_args()).name == "w1_input"


@pytest.mark.parametrize(
    ("role", "args", "named"),
    [
        ("weight", make_args(dynamic=True), "fc.weight: dynamic=True: weights are static"),
        ("output", make_args(3, "float", dynamic=True, zp_dtype=torch.int8), "fc.output: num_bits=3, type=float"),
        ("input", make_args(4, symmetric=False, zp_dtype=torch.uint8), "fc.input: zp_dtype=torch.uint8 cannot hold"),
        ("weight", make_args(strategy="attn_head"), "fc.weight: strategy=attn_head makes no sense"),
        ("input", make_args(4, "float", symmetric=False, zp_dtype=torch.int8), "fc.input: symmetric=False"),
    ],
)
def test_sites_that_cannot_be_quantized_are_named(role, args, named):
    with pytest.raises(ValueError, match=named):
        make_site("fc", "", role, args)
