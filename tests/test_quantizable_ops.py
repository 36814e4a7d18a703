"""Every op that can be quantized, in every way it can be written: the folded graph against compressed-tensors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import make_args
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle import fake_quantize
from expecttest import Expect
from models import make_config
from printing import print_graph
from torch import nn

import fxmse
from fxmse.ops import FAKE_QUANTIZE
from fxmse.passes import InsertObservers
from fxmse.passes.probe import find_probes


def list_rows(shape, layout, groups=1):
    """Which elements of a parameter make up the row of each output channel, in plain loops."""
    index = torch.arange(torch.Size(shape).numel()).reshape(shape)
    if layout == "rows":
        return index
    if layout == "columns":
        return torch.stack([torch.stack(list(matrix.T)) for matrix in index.reshape(-1, *shape[-2:])]).reshape(
            *shape[:-2], shape[-1], shape[-2]
        )
    if layout == "convolution":
        return torch.stack([channel.flatten() for channel in index])
    num_inputs, num_outputs = shape[:2]
    by_group = index.split(num_inputs // groups)
    return torch.stack([by_group[g][:, o].flatten() for g in range(groups) for o in range(num_outputs)])


class Functional(nn.Module):
    """A weight of a given shape, and a function of it and the input."""

    def __init__(self, shape, function):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(6))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def wrap(module):
    return nn.Sequential(module).eval()


# name: (model, input, layout of the weight, groups)
X, X2, X3 = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(2, 5, 4)
IMAGE = torch.randn(2, 4, 5, 5)
OPS = {
    "Linear": (wrap(nn.Linear(4, 6)), X, "rows", 1),
    "F.linear with keywords": (Functional((6, 4), lambda m, x: F.linear(input=x, weight=m.weight)), X, "rows", 1),
    "F.linear of a transpose": (Functional((4, 6), lambda m, x: F.linear(x, m.weight.t(), m.bias)), X, "columns", 1),
    "F.linear of chosen rows": (
        Functional((2, 6, 4), lambda m, x: F.linear(x, m.weight[0]) + F.linear(x, m.weight[1])),
        X,
        "rows",
        1,
    ),
    "F.linear of halves": (
        Functional((6, 4), lambda m, x: F.linear(x, m.weight.chunk(2)[0]) * F.linear(x, m.weight.chunk(2)[1])),
        X,
        "rows",
        1,
    ),
    "matmul": (Functional((4, 6), lambda m, x: torch.matmul(x, m.weight)), X, "columns", 1),
    "matmul with keywords": (Functional((4, 6), lambda m, x: torch.matmul(x, other=m.weight)), X, "columns", 1),
    "matmul operator": (Functional((4, 6), lambda m, x: x @ m.weight), X, "columns", 1),
    "matmul method": (Functional((4, 6), lambda m, x: x.matmul(m.weight)), X, "columns", 1),
    "matmul of a transpose": (Functional((6, 4), lambda m, x: x @ m.weight.transpose(0, 1)), X, "rows", 1),
    "matmul of T": (Functional((6, 4), lambda m, x: x @ m.weight.T), X, "rows", 1),
    "matmul of a permutation": (Functional((6, 4), lambda m, x: x @ m.weight.permute(1, 0)), X, "rows", 1),
    "mm": (Functional((4, 6), lambda m, x: torch.mm(x, m.weight)), X2, "columns", 1),
    "addmm": (Functional((4, 6), lambda m, x: torch.addmm(m.bias, x, m.weight)), X2, "columns", 1),
    "addmm of a transpose": (Functional((6, 4), lambda m, x: torch.addmm(m.bias, x, m.weight.t())), X2, "rows", 1),
    "bmm": (Functional((2, 4, 6), lambda m, x: torch.bmm(x, m.weight)), X3, "columns", 1),
    "bmm of a transpose": (Functional((2, 6, 4), lambda m, x: torch.bmm(x, m.weight.transpose(1, 2))), X3, "rows", 1),
    "baddbmm": (Functional((2, 4, 6), lambda m, x: torch.baddbmm(m.bias, x, m.weight)), X3, "columns", 1),
    "bmm on the left": (
        Functional((3, 6, 4), lambda m, x: torch.bmm(m.weight[[0, 2]], x.unsqueeze(-1)).squeeze(-1)),
        X3[:, 0],
        "rows",
        1,
    ),
    "matmul on the left": (Functional((6, 4), lambda m, x: m.weight @ x.transpose(1, 2)), X, "rows", 1),
    "Conv1d": (wrap(nn.Conv1d(4, 6, 3, groups=2)), IMAGE[..., 0], "convolution", 2),
    "Conv2d": (wrap(nn.Conv2d(4, 6, 3)), IMAGE, "convolution", 1),
    "Conv3d": (wrap(nn.Conv3d(1, 6, 2)), IMAGE[:, None], "convolution", 1),
    "ConvTranspose1d": (wrap(nn.ConvTranspose1d(4, 6, 3, stride=2)), IMAGE[..., 0], "transposed", 1),
    "ConvTranspose2d": (
        wrap(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)),
        IMAGE,
        "transposed",
        2,
    ),
    "ConvTranspose3d": (wrap(nn.ConvTranspose3d(4, 2, 2, dilation=2)), IMAGE[:, :, None], "transposed", 1),
    "F.conv_transpose2d": (
        Functional((4, 3, 2, 2), lambda m, x: F.conv_transpose2d(x, m.weight, m.bias, groups=2)),
        IMAGE,
        "transposed",
        2,
    ),
}
TARGETS = ("Linear", "re:.*", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")


def find_weight(model):
    return next(parameter for name, parameter in model.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize("front_end", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", OPS)
@pytest.mark.filterwarnings("ignore:targets and ignores that matched no module")
def test_quantizes_each_output_channel(name, front_end):
    model, x, layout, groups = OPS[name]
    args, inputs = {"num_bits": 4, "strategy": "channel"}, {"num_bits": 8, "symmetric": False}
    config = make_config(*TARGETS, weights=args, inputs=inputs)
    traced = torch.fx.symbolic_trace(model) if front_end == "symbolic_trace" else torch.export.export(model, (x,))
    observed = fxmse.prepare(traced, config)
    assert torch.equal(observed(x), model(x))
    quantized = fxmse.convert(fxmse.calibrate(observed, [x], progress=False))

    state = {key.rpartition(".")[2]: value for key, value in quantized.state_dict().items()}
    expected, weight = copy.deepcopy(model), find_weight(model)
    rows = list_rows(weight.shape, layout, groups)
    scale = state["weight_scale"]
    assert scale.shape == (*rows.shape[:-1], 1)
    fake = fake_quantize(weight.detach().flatten()[rows], scale, None, make_args(**args))
    find_weight(expected).data.view(-1)[rows] = fake
    fake_x = fake_quantize(x, state["input_scale"], state["input_zero_point"], make_args(**inputs))
    assert torch.equal(quantized(x), expected(fake_x))
    # A second run finds its own probes.
    assert not InsertObservers(config)(observed).modified


def print_observed_and_folded(model, config, *inputs):
    observed = fxmse.prepare(torch.fx.symbolic_trace(model), config)
    folded = fxmse.convert(fxmse.calibrate(observed, [inputs], progress=False))
    return print_graph(observed), print_graph(folded)


def test_columns_golden():
    config = make_config("re:.*", inputs={"num_bits": 8})
    observed, folded = print_observed_and_folded(OPS["addmm"][0], config, X2)
    Expect("""\
x = input
transpose = transpose(self.weight, -2, -1)
weight_observer = self.weight_observer(transpose)
transpose_1 = transpose(weight_observer, -2, -1)
input_observer = self.input_observer(x)
addmm = addmm(self.bias, input_observer, transpose_1)
return addmm""").assert_expected(observed)
    Expect("""\
x = input
transpose = transpose(self.weight, -2, -1)
weight_fake_quant = fxmse.fake_quantize(transpose, self.weight_scale, None, None, 8, int, channel)
transpose_1 = transpose(weight_fake_quant, -2, -1)
input_fake_quant = fxmse.fake_quantize(x, self.input_scale, None, None, 8, int, tensor)
addmm = addmm(self.bias, input_fake_quant, transpose_1)
return addmm""").assert_expected(folded)


def test_transposed_convolution_golden():
    model = wrap(nn.ConvTranspose1d(4, 6, 3, groups=2))
    observed, folded = print_observed_and_folded(model, make_config("ConvTranspose1d"), IMAGE[..., 0])
    Expect("""\
input_1 = input
unflatten = unflatten(self.0.weight, 0, [2, -1])
transpose = transpose(unflatten, 1, 2)
flatten = flatten(transpose, 0, 1)
flatten_1 = flatten(flatten, 1)
_0_weight_observer = self.0.weight_observer(flatten_1)
reshape = reshape(_0_weight_observer, [2, 3, 2, 3])
transpose_1 = transpose(reshape, 1, 2)
flatten_2 = flatten(transpose_1, 0, 1)
conv_transpose1d = conv_transpose1d(input_1, flatten_2, self.0.bias, [1], [0], [0], 2, [1])
return conv_transpose1d""").assert_expected(observed)
    Expect("""\
input_1 = input
unflatten = unflatten(self.0.weight, 0, [2, -1])
transpose = transpose(unflatten, 1, 2)
flatten = flatten(transpose, 0, 1)
flatten_1 = flatten(flatten, 1)
_0_weight_fake_quant = fxmse.fake_quantize(flatten_1, self.0.weight_scale, None, None, 8, int, channel)
reshape = reshape(_0_weight_fake_quant, [2, 3, 2, 3])
transpose_1 = transpose(reshape, 1, 2)
flatten_2 = flatten(transpose_1, 0, 1)
conv_transpose1d = conv_transpose1d(input_1, flatten_2, self.0.bias, [1], [0], [0], 2, [1])
return conv_transpose1d""").assert_expected(folded)


@pytest.mark.parametrize("strategy", [{"strategy": "tensor"}, {"strategy": "group", "group_size": 2}])
def test_experts_keep_their_leading_dimension(strategy):
    model = OPS["bmm"][0]
    observed = fxmse.prepare(torch.fx.symbolic_trace(model), make_config("re:.*", weights={"num_bits": 4, **strategy}))
    scale = fxmse.convert(fxmse.calibrate(observed, progress=False)).state_dict()["weight_scale"]
    assert scale.shape == ((2, 1, 1) if strategy["strategy"] == "tensor" else (2, 6, 2))


def test_experts_in_blocks():
    model = Functional((2, 8, 6), lambda m, x: torch.bmm(x, m.weight))
    args = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 3]}
    observed = fxmse.prepare(torch.fx.symbolic_trace(model), make_config("re:.*", weights=args))
    quantized = fxmse.convert(fxmse.calibrate(observed, progress=False))
    scale = quantized.state_dict()["weight_scale"]
    assert scale.shape == (2, 2, 3)
    x = torch.randn(2, 3, 8)
    rows = model.weight.detach().transpose(1, 2)
    fake = torch.stack([fake_quantize(m, s, None, make_args(**args)) for m, s in zip(rows, scale, strict=True)])
    assert torch.equal(quantized(x), torch.bmm(x, fake.transpose(1, 2)))


def make_activation_config(*targets, kv_cache=None, **inputs):
    scheme = QuantizationScheme(targets=list(targets), input_activations=make_args(**inputs) if inputs else None)
    groups = {"group_0": scheme} if inputs else {}
    return QuantizationConfig(config_groups=groups, kv_cache_scheme=kv_cache)


def test_products_of_activations_are_quantized_where_a_target_names_them():
    class Product(nn.Module):
        def forward(self, x, y):
            return torch.matmul(x, y.transpose(1, 2))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.product = Product()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, y):
            return self.product(self.fc(x), y)

    x, y = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    model = Model()
    for target in ("matmul", "Product", "product", "re:prod.*"):
        observed = fxmse.prepare(model, make_activation_config(target, num_bits=8), (x, y))
        sites = [site.name for _, probe in find_probes(observed) for site in probe.sites]
        assert sites == ["product.matmul_input", "product.matmul_other_input"]
    quantized = fxmse.convert(fxmse.calibrate(observed, [(x, y)], progress=False))
    state = quantized.state_dict()
    left = fake_quantize(model.fc(x), state["product.matmul_input_scale"], None, make_args())
    right = fake_quantize(y.transpose(1, 2), state["product.matmul_other_input_scale"], None, make_args())
    assert torch.equal(quantized(x, y), left @ right)


def test_vectors_and_constants_are_no_weights():
    model = Functional((6, 4), lambda m, x: F.linear(x, m.weight) @ m.bias + (x @ m.constant).sum(-1))
    model.register_buffer("constant", torch.randn(4, 3))
    observed = fxmse.prepare(torch.fx.symbolic_trace(model), make_config("re:.*"))
    assert [site.name for _, probe in find_probes(observed) for site in probe.sites] == ["weight"]


class Attention(nn.Module):
    """Grouped queries: two heads of keys and values for four of queries."""

    def __init__(self, is_eager=False, has_repeats=True):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)
        self.o_proj = nn.Linear(16, 8)
        self.is_eager = is_eager

    def split(self, x):
        return x.unflatten(-1, (-1, 4)).transpose(1, 2)

    def repeat(self, x):
        batch, heads, tokens, dim = x.shape
        return x[:, :, None].expand(batch, heads, 2, tokens, dim).reshape(batch, heads * 2, tokens, dim)

    def attend(self, q, k, v):
        if not self.is_eager:
            return F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v))
        weights = torch.matmul(q, self.repeat(k).transpose(2, 3)) * 0.5
        weights = F.softmax(weights + 0.0, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(F.dropout(weights, 0.1, self.training), self.repeat(v))

    def forward(self, x):
        attended = self.attend(self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.v_proj(x)))
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, is_eager=False):
        super().__init__()
        self.self_attn = Attention(is_eager)

    def forward(self, x):
        return x + self.self_attn(x)


TOKENS = torch.randn(2, 5, 8)


def attend_quantized(layer, x, args, state, roles):
    """The layer with its states quantized by compressed-tensors."""
    attention = layer.self_attn
    states = {role: attention.split(getattr(attention, f"{role}_proj")(x)) for role in "qkv"}
    for role in roles:
        states[role] = fake_quantize(states[role], state[f"self_attn.{role}_scale"], None, args)
    attended = attention.attend(*states.values())
    return x + attention.o_proj(attended.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
@pytest.mark.parametrize("is_eager", [False, True])
def test_attention_quantizes_queries_keys_and_values(is_eager, strategy):
    layer, args = Layer(is_eager).eval(), make_args(8, "float", strategy)
    shapes = {"tensor": [(1,)] * 3, "attn_head": [(4, 1, 1), (2, 1, 1), (2, 1, 1)]}[strategy]
    for target in ("Attention", "re:.*self_attn$"):
        scheme = QuantizationScheme(targets=[target], input_activations=args)
        quantized = fxmse.quantize(layer, scheme, [TOKENS], progress=False)
        state = quantized.state_dict()
        # The heads of keys and values are quantized before they are repeated.
        assert [tuple(state[f"self_attn.{role}_scale"].shape) for role in "qkv"] == shapes
        torch.testing.assert_close(
            quantized(TOKENS), attend_quantized(layer, TOKENS, args, state, "qkv"), rtol=1e-5, atol=1e-6
        )


def test_attention_golden():
    scheme = QuantizationScheme(targets=["re:.*self_attn$"], input_activations=make_args(8, "float"))
    observed = fxmse.prepare(Layer().eval(), scheme, TOKENS)
    folded = fxmse.convert(fxmse.calibrate(observed, [TOKENS], progress=False))
    Expect("""\
x = input
sym_size_int_3 = aten.sym_size(x, 0)
sym_size_int_4 = aten.sym_size(x, 1)
linear = aten.linear(x, self.self_attn.q_proj.weight, self.self_attn.q_proj.bias)
unflatten = aten.unflatten(linear, -1, [-1, 4])
transpose = aten.transpose(unflatten, 1, 2)
linear_1 = aten.linear(x, self.self_attn.k_proj.weight, self.self_attn.k_proj.bias)
unflatten_1 = aten.unflatten(linear_1, -1, [-1, 4])
transpose_1 = aten.transpose(unflatten_1, 1, 2)
linear_2 = aten.linear(x, self.self_attn.v_proj.weight, self.self_attn.v_proj.bias)
unflatten_2 = aten.unflatten(linear_2, -1, [-1, 4])
transpose_2 = aten.transpose(unflatten_2, 1, 2)
slice_1 = aten.slice(transpose_1, 0, 0, 9223372036854775807)
self_attn_k_observer = self.self_attn.k_observer(slice_1)
unsqueeze = aten.unsqueeze(self_attn_k_observer, 2)
expand = aten.expand(unsqueeze, [sym_size_int_3, 2, 2, sym_size_int_4, 4])
reshape = aten.reshape(expand, [sym_size_int_3, 4, sym_size_int_4, 4])
slice_2 = aten.slice(transpose_2, 0, 0, 9223372036854775807)
self_attn_v_observer = self.self_attn.v_observer(slice_2)
unsqueeze_1 = aten.unsqueeze(self_attn_v_observer, 2)
expand_1 = aten.expand(unsqueeze_1, [sym_size_int_3, 2, 2, sym_size_int_4, 4])
reshape_1 = aten.reshape(expand_1, [sym_size_int_3, 4, sym_size_int_4, 4])
self_attn_q_observer = self.self_attn.q_observer(transpose)
scaled_dot_product_attention = aten.scaled_dot_product_attention(self_attn_q_observer, reshape, reshape_1)
transpose_3 = aten.transpose(scaled_dot_product_attention, 1, 2)
flatten = aten.flatten(transpose_3, 2)
linear_3 = aten.linear(flatten, self.self_attn.o_proj.weight, self.self_attn.o_proj.bias)
add = aten.add(x, linear_3)
return [add]""").assert_expected(print_graph(observed))
    Expect("""\
x = input
sym_size_int_3 = aten.sym_size(x, 0)
sym_size_int_4 = aten.sym_size(x, 1)
linear = aten.linear(x, self.self_attn.q_proj.weight, self.self_attn.q_proj.bias)
unflatten = aten.unflatten(linear, -1, [-1, 4])
transpose = aten.transpose(unflatten, 1, 2)
linear_1 = aten.linear(x, self.self_attn.k_proj.weight, self.self_attn.k_proj.bias)
unflatten_1 = aten.unflatten(linear_1, -1, [-1, 4])
transpose_1 = aten.transpose(unflatten_1, 1, 2)
linear_2 = aten.linear(x, self.self_attn.v_proj.weight, self.self_attn.v_proj.bias)
unflatten_2 = aten.unflatten(linear_2, -1, [-1, 4])
transpose_2 = aten.transpose(unflatten_2, 1, 2)
slice_1 = aten.slice(transpose_1, 0, 0, 9223372036854775807)
self_attn_k_fake_quant = fxmse.fake_quantize(slice_1, self.self_attn.k_scale, None, None, 8, float, tensor)
unsqueeze = aten.unsqueeze(self_attn_k_fake_quant, 2)
expand = aten.expand(unsqueeze, [sym_size_int_3, 2, 2, sym_size_int_4, 4])
reshape = aten.reshape(expand, [sym_size_int_3, 4, sym_size_int_4, 4])
slice_2 = aten.slice(transpose_2, 0, 0, 9223372036854775807)
self_attn_v_fake_quant = fxmse.fake_quantize(slice_2, self.self_attn.v_scale, None, None, 8, float, tensor)
unsqueeze_1 = aten.unsqueeze(self_attn_v_fake_quant, 2)
expand_1 = aten.expand(unsqueeze_1, [sym_size_int_3, 2, 2, sym_size_int_4, 4])
reshape_1 = aten.reshape(expand_1, [sym_size_int_3, 4, sym_size_int_4, 4])
self_attn_q_fake_quant = fxmse.fake_quantize(transpose, self.self_attn.q_scale, None, None, 8, float, tensor)
scaled_dot_product_attention = aten.scaled_dot_product_attention(self_attn_q_fake_quant, reshape, reshape_1)
transpose_3 = aten.transpose(scaled_dot_product_attention, 1, 2)
flatten = aten.flatten(transpose_3, 2)
linear_3 = aten.linear(flatten, self.self_attn.o_proj.weight, self.self_attn.o_proj.bias)
add = aten.add(x, linear_3)
return [add]""").assert_expected(print_graph(folded))


@pytest.mark.parametrize("is_eager", [False, True])
def test_kv_cache_scheme_quantizes_keys_and_values_beside_the_linears(is_eager):
    layer, args = Layer(is_eager).eval(), make_args(8, "float")
    config = make_config("Linear").model_copy(update={"kv_cache_scheme": args})
    observed = fxmse.prepare(layer, config, TOKENS)
    names = {site.name for _, probe in find_probes(observed) for site in probe.sites}
    assert {"self_attn.k", "self_attn.v"} < names
    assert "self_attn.q" not in names
    alone = fxmse.quantize(layer, make_activation_config(kv_cache=args), [TOKENS], progress=False)
    state = alone.state_dict()
    torch.testing.assert_close(alone(TOKENS), attend_quantized(layer, TOKENS, args, state, "kv"), rtol=1e-5, atol=1e-6)


def test_attention_is_not_what_a_scheme_with_weights_or_a_wide_target_means():
    layer = Layer().eval()
    observed = fxmse.prepare(layer, make_config("re:.*self_attn.*", inputs={"num_bits": 8}), TOKENS)
    roles = {site.role for _, probe in find_probes(observed) for site in probe.sites}
    assert roles == {"weight", "input"}
    scheme = QuantizationScheme(targets=["re:.*self_attn.*"], input_activations=make_args())
    observed = fxmse.prepare(layer, scheme, TOKENS)
    names = [site.name for _, probe in find_probes(observed) for site in probe.sites]
    assert all("proj" in name for name in names)


def test_a_kv_cache_scheme_without_attention_is_said():
    config = make_config("Linear").model_copy(update={"kv_cache_scheme": make_args(8, "float")})
    with pytest.warns(UserWarning, match="left in float: the kv cache"):
        fxmse.prepare(wrap(nn.Linear(4, 4)), config, X)


def test_a_second_attention_of_the_same_call_has_scales_of_its_own():
    class Twice(nn.Module):
        def forward(self, x):
            x = F.scaled_dot_product_attention(x, x, x)
            return F.scaled_dot_product_attention(x, x, x * 2)

    x = torch.randn(1, 2, 3, 4)
    quantized = fxmse.quantize(Twice(), make_activation_config(kv_cache=make_args(8, "float")), [x], progress=False)
    assert sum(node.target is FAKE_QUANTIZE for node in quantized.graph.nodes) == 3  # x is key and value of the first
    assert len([name for name in quantized.state_dict() if name.endswith("scale")]) == 3
