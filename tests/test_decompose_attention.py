"""Fused attention as Dynamo's graphs have it: the same values, and every product quantized."""

import pytest
import torch
from models import make_config
from plain import quantize_weight
from torch import nn

import fxmse
from fxmse.passes import DecomposeAttention, InlineRegions

INPUTS = [torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
CONFIG = make_config(weights={"num_bits": 8, "strategy": "channel", "observer": "memoryless_minmax"})
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)


class Attention(nn.Module):
    def __init__(self, inputs=lambda x: (x, x, x), options=None, **arguments):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **arguments)
        self.head = nn.Linear(16, 4)
        self.inputs, self.options = inputs, options or {}

    def forward(self, x):
        output, weights = self.attention(*self.inputs(x), **self.options)
        return (self.head(output),) if weights is None else (self.head(output), weights)


class Encoder(nn.Module):
    def __init__(self, options=None, **arguments):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **arguments)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)
        self.options = options or {}

    def forward(self, x):
        return (self.head(self.encoder(x, **self.options)),)


MODELS = {
    "weights": lambda: Attention(),
    "no_weights": lambda: Attention(options={"need_weights": False}),
    "weights_of_heads": lambda: Attention(options={"average_attn_weights": False}),
    "cross": lambda: Attention(lambda x: (x, x + 1, x + 1)),
    "three_inputs": lambda: Attention(lambda x: (x, x + 1, x * 2), bias=False),
    "unbatched": lambda: Attention(lambda x: (x[0], x[0], x[0])),
    "two_sizes": lambda: Attention(lambda x: (x, x[..., :8], x[..., 8:12]), kdim=8, vdim=4),
    "padding": lambda: Attention(options={"key_padding_mask": PADDING}),
    "both_masks": lambda: Attention(options={"key_padding_mask": PADDING, "attn_mask": CAUSAL, "need_weights": False}),
    "float_mask": lambda: Attention(options={"attn_mask": CAUSAL * -3.0}),
    "masks_of_heads": lambda: Attention(options={"attn_mask": CAUSAL.expand(4, 5, 5)}),
    "causal": lambda: Attention(options={"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    "encoder": lambda: Encoder(),
    "encoder_norm_first": lambda: Encoder(norm_first=True, activation="gelu"),
    "encoder_mask": lambda: Encoder({"mask": CAUSAL, "is_causal": False}),
    "encoder_padding": lambda: Encoder({"src_key_padding_mask": PADDING}),
    "encoder_masks": lambda: Encoder({"mask": CAUSAL, "is_causal": False, "src_key_padding_mask": PADDING}),
}


# Without gradients a layer takes its fast path.
@pytest.mark.parametrize(
    ("name", "with_grad"), [*((name, False) for name in MODELS), ("encoder", True), ("encoder_masks", True)]
)
def test_attention_is_written_out(name, with_grad):
    torch._dynamo.reset()
    model = MODELS[name]().eval()
    results = []

    def check(graph_module, example_inputs):
        InlineRegions()(graph_module)
        assert DecomposeAttention()(graph_module).modified
        assert not DecomposeAttention()(graph_module).modified
        results.append(graph_module)
        return graph_module

    with torch.set_grad_enabled(with_grad):
        found, expected = torch.compile(model, backend=check)(INPUTS[0]), model(INPUTS[0])
    assert results
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["weights", "cross", "three_inputs", "two_sizes", "encoder", "encoder_norm_first"])
@torch.no_grad()
def test_all_of_its_weights_are_quantized(name):
    torch._dynamo.reset()
    model = MODELS[name]().eval()
    calibration = fxmse.Calibration(CONFIG)
    step = torch.compile(model, backend=calibration)
    for x in INPUTS:
        step(x)
    calibration.fold()
    matrices = {key: weight for key, weight in model.named_parameters() if weight.dim() > 1}
    own = {key if key.endswith(".weight") else f"{key}_weight" for key in matrices}
    assert set(calibration.qparams) == {f"{key}_scale" for key in own}
    found = step(INPUTS[0])
    for weight in matrices.values():
        weight.copy_(quantize_weight(weight))
    torch._dynamo.reset()
    for one, other in zip(found, model(INPUTS[0]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_written_out_is_named():
    torch._dynamo.reset()
    model = Attention(add_bias_kv=True).eval()
    with pytest.warns(UserWarning, match=r"attention.* \(multi_head_attention_forward reads its weight"):
        torch.compile(model, backend=fxmse.Calibration(CONFIG))(INPUTS[0])
