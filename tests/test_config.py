"""Which module gets which scheme, against compressed-tensors itself."""

import pytest
import torch
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
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: None)
        found = match_schemes(config, modules)
    apply_quantization_config(model, config, show_progress=False)
    expected = {n: m.quantization_scheme for n, m in modules.items() if hasattr(m, "quantization_scheme")}
    assert {n: s.weights.num_bits for n, s in found.items()} == {n: s.weights.num_bits for n, s in expected.items()}


def test_targets_and_ignores_that_match_nothing_are_named_once():
    config = QuantizationConfig(config_groups={"a": scheme("Linear", "Conv2d")}, ignore=["lm_head", "head"])
    modules = {n: m for n, m in Model().named_modules() if isinstance(m, nn.Linear)}
    with pytest.warns(UserWarning, match="matched no module: Conv2d, lm_head$") as caught:
        match_schemes(config, modules)
    assert len(caught) == 1


def test_a_config_that_matches_nothing_is_an_error():
    config = QuantizationConfig(config_groups={"a": scheme("Conv2d")}, ignore=["head"])
    modules = {"fc": nn.Linear(2, 2)}
    with pytest.raises(ValueError, match=r"targets \['Conv2d'\].*matched nothing.*Linear \(fc\)"):
        match_schemes(config, modules)
    with pytest.raises(ValueError, match="can be quantized are none"):
        match_schemes(config, {})


def test_configs_come_as_a_config_a_scheme_or_a_preset():
    config = resolve_config("W4A16")
    assert config.config_groups["group_0"].weights.num_bits == 4
    assert resolve_config(config) is config
    assert resolve_config(scheme("Linear", num_bits=3)).config_groups["group_0"].weights.num_bits == 3
    with pytest.raises(ValueError, match=r"config='W9A9': expected one of the presets .*W4A16"):
        resolve_config("W9A9")
    with pytest.raises(TypeError, match="config is a dict"):
        resolve_config({"num_bits": 8})


def test_sites_have_names_and_default_observers():
    assert make_site("blocks.0.fc", "", "weight", make_args()).args.observer == "memoryless_mse"
    assert make_site("blocks.0.fc", "", "input", make_args()).args.observer == "mse"
    assert make_site("fc", "", "input", make_args(observer="minmax")).args.observer == "minmax"
    assert Site("blocks.0.fc", "", "weight", make_args()).name == "blocks.0.fc.weight"
    assert Site("", "w1_", "input", make_args()).name == "w1_input"


@pytest.mark.parametrize(
    ("role", "args", "named"),
    [
        ("input", make_args(strategy="token", dynamic=True), "fc.input: dynamic=True formats are not calibrated"),
        ("weight", make_args(strategy="attn_head"), "fc.weight: strategy=attn_head makes no sense"),
        ("input", make_args(4, "float", symmetric=False, zp_dtype=torch.int8), "fc.input: symmetric=False"),
    ],
)
def test_sites_that_cannot_be_calibrated_are_named(role, args, named):
    with pytest.raises(ValueError, match=named):
        make_site("fc", "", role, args)
