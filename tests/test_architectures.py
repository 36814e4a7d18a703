"""Whole models: the folded graph against compressed-tensors quantizing the model itself with the same qparams."""

import functools

import pytest
import torch
from architectures import ARCHITECTURES
from cases import make_args
from compressed import apply_qparams, list_sites
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from test_left_in_float import list_called, list_silent
from torch.utils._pytree import tree_leaves

import fxmse
from fxmse.ops import is_fake_quantize

pytestmark = pytest.mark.slow

EXPORTING = [name for name, architecture in ARCHITECTURES.items() if not architecture.reason]
FORMATS = {
    "W8A8 static": QuantizationScheme(
        targets=["Linear"],
        weights=make_args(8, strategy="channel"),
        input_activations=make_args(8, symmetric=False),
    ),
    **{name: preset_name_to_scheme(name, ["Linear"]) for name in ("W4A16", "FP8", "NVFP4")},
}
# Projections from 8 channels, which no group size of these formats divides, weights of blocks, whose inputs cannot be
# reached from outside of the module, and an einsum's.
IGNORED = ["re:.*dt_proj$", "re:.*rg_lru$", "re:.*rel_attn$"]


def make_config(format_name):
    """The format on every linear, on experts' weights, and, where it has no groups, on convolutions."""
    scheme = FORMATS[format_name]
    groups = {
        "linears": scheme,
        # What goes into experts' second product cannot be reached from outside of the module.
        "experts": scheme.model_copy(update={"targets": ["re:.*experts$"], "input_activations": None}),
    }
    if not scheme.weights.group_size:
        groups["convolutions"] = scheme.model_copy(update={"targets": ["Conv2d"]})
    elif not scheme.input_activations:
        # 3 x 3 kernels of 128 channels have whole groups, the first convolutions of an image have not.
        groups["convolutions"] = scheme.model_copy(update={"targets": ["re:.*encoder.*convolution$"]})
    return QuantizationConfig(config_groups=groups, ignore=IGNORED)


@functools.cache
def export(name):
    model = ARCHITECTURES[name].make_model()
    inputs = ARCHITECTURES[name].make_inputs(2, 0)
    dynamic = {key: {0: torch.export.Dim.AUTO} for key in inputs}
    return model, torch.export.export(model, (), inputs, dynamic_shapes=dynamic)


def list_tensors(outputs):
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:targets and ignores that matched no module")
@pytest.mark.filterwarnings("ignore:left in float.*a router")
@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "format_name"), [(n, f) for n in EXPORTING for f in FORMATS if (n, f) != ("ResNet", "NVFP4")]
)
def test_folded_graph_equals_compressed_tensors(name, format_name):
    model, program = export(name)
    config = make_config(format_name)
    batches = [ARCHITECTURES[name].make_inputs(2, seed) for seed in (1, 2)]
    quantized = fxmse.quantize(program, config, batches, progress=False)
    assert sum(is_fake_quantize(node) for node in quantized.graph.nodes) >= 2
    reference = apply_qparams(model, config, quantized)
    inputs = ARCHITECTURES[name].make_inputs(3, 3)
    ours, expected = list_tensors(quantized(**inputs)), list_tensors(dict(reference(**inputs)))
    assert len(ours) == len(expected) > 0
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
    in_float = list_tensors(dict(model(**inputs)))
    assert not torch.equal(ours[0], in_float[0])


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", EXPORTING)
def test_what_is_matched_is_quantized_or_named(name):
    model, program = export(name)
    inputs = ARCHITECTURES[name].make_inputs(2, 0)
    silent = list_silent(model, program, ["Linear", "Conv1d", "Conv2d", "Embedding"])
    assert not silent & list_called(model, **inputs)


def test_a_network_of_convolutions_has_no_nvfp4():
    _, program = export("ResNet")
    with pytest.raises(ValueError, match=r"targets \['Linear', 're:.*experts\$'\].*matched nothing"):
        fxmse.prepare(program, make_config("NVFP4"))
    convolutions = preset_name_to_scheme("NVFP4", ["re:.*encoder.*convolution$"])
    with pytest.raises(ValueError, match="input: strategy=tensor_group needs the channels in the last dimension"):
        fxmse.prepare(program, convolutions)


ATTENTION_ARGS = make_args(8, "float")
ATTENTION_CONFIGS = {
    "kv cache": QuantizationConfig(config_groups={}, kv_cache_scheme=ATTENTION_ARGS),
    "kv cache beside FP8": QuantizationConfig(config_groups={"FP8": ["Linear"]}, kv_cache_scheme=ATTENTION_ARGS),
    "kv cache by head": QuantizationConfig(config_groups={}, kv_cache_scheme=make_args(8, "float", "attn_head")),
    "attention": QuantizationConfig(
        config_groups={"a": QuantizationScheme(targets=["LlamaAttention"], input_activations=ATTENTION_ARGS)}
    ),
    "attention by head, int8": QuantizationConfig(
        config_groups={
            "a": QuantizationScheme(
                targets=["re:.*self_attn$"], input_activations=make_args(8, strategy="attn_head", symmetric=False)
            )
        }
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ATTENTION_CONFIGS)
def test_attention_equals_compressed_tensors(name):
    model, program = export("Llama")
    config = ATTENTION_CONFIGS[name]
    batches = [ARCHITECTURES["Llama"].make_inputs(2, seed) for seed in (1, 2)]
    quantized = fxmse.quantize(program, config, batches, progress=False)
    roles = {site.rpartition("self_attn.")[2] for site in list_sites(quantized)}
    assert {"k", "v"} <= roles
    assert ("q" in roles) == name.startswith("attention")
    reference = apply_qparams(model, config, quantized)
    inputs = ARCHITECTURES["Llama"].make_inputs(3, 3)
    expected = reference(**inputs).logits
    torch.testing.assert_close(quantized(**inputs)[0], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert not torch.equal(expected, model(**inputs).logits)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in EXPORTING])
def test_what_does_not_export_fails_for_the_reason_that_is_listed(name):
    architecture = ARCHITECTURES[name]
    with pytest.raises(Exception, match=architecture.reason):
        torch.export.export(architecture.make_model(), (), architecture.make_inputs(2, 0))
