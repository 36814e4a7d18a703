"""Weights that are read in several ways, through views, or computed of parameters: rows are those that the op reads."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import make_config
from plain import quantize_blocks, quantize_nvfp4, quantize_tensor, quantize_weight
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fxmse

WEIGHTS = make_config(weights={"num_bits": 8, "strategy": "channel", "observer": "memoryless_minmax"})


class Reads(nn.Module):
    """Reads a parameter by ``read``, with every weight passed through ``quantize``: none, or a reference by hand."""

    def __init__(self, shape, read, other=None):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(shape) * torch.logspace(-1, 1, shape[-1]))
        self.other = None if other is None else nn.Parameter(torch.rand(other) + 0.5)
        self.read = read

    def forward(self, x):
        return self.read(self, x, lambda weight: weight)


def read_both_ways(m, x, quantize):
    return F.linear(F.relu(F.linear(x, quantize(m.weight))), quantize(m.weight.t()))


def read_as_key_and_value(m, x, quantize):
    # Absorbed attention: one matrix as (out, in) and, by a product from the right, as (in, out).
    return torch.matmul(F.linear(x, quantize(m.weight)), quantize(m.weight.t()).t())


READS = {
    "transposed, too": ((16, 16), read_both_ways, (4, 16), None),
    "transposed, not square": ((8, 16), read_both_ways, (4, 16), None),
    "from both sides": ((16, 16), read_as_key_and_value, (4, 16), None),
    "squeezed": ((8, 16, 1), lambda m, x, q: F.linear(x, q(m.weight.squeeze(-1))), (4, 16), None),
    "flattened": ((8, 3, 4, 4), lambda m, x, q: F.linear(x, q(m.weight.flatten(1))), (4, 48), None),
    "viewed": ((8, 3, 4, 4), lambda m, x, q: F.linear(x, q(m.weight.view(8, -1))), (4, 48), None),
    "one tap": ((8, 16, 3), lambda m, x, q: F.linear(x, q(m.weight[:, :, -1])), (4, 16), None),
    "some columns": ((8, 16), lambda m, x, q: F.linear(x, q(m.weight[:, 4:12])), (4, 8), None),
    "some rows": ((8, 16), lambda m, x, q: F.linear(x, q(m.weight[2:6])), (4, 16), None),
    "regrouped": ((8, 16), lambda m, x, q: F.linear(x, q(m.weight.reshape(4, 32))), (4, 32), None),
    "permuted": ((4, 8, 16), lambda m, x, q: F.linear(x, q(m.weight.permute(1, 0, 2).reshape(8, 64))), (3, 64), None),
    "repeated": ((8, 16), lambda m, x, q: F.linear(x, q(m.weight.repeat(2, 1))), (4, 16), None),
    "flat": (
        (192,),
        lambda m, x, q: F.linear(F.linear(x, q(m.weight[:128].view(8, 16))), q(m.weight[128:].view(8, 8))),
        (4, 16),
        None,
    ),
    "bmm of a flattened": (
        (2, 16, 4),
        lambda m, x, q: torch.bmm(x, q(m.weight.reshape(2, 8, 8).mT.reshape(16, 8)).reshape(2, 8, 8).mT),
        (2, 3, 8),
        None,
    ),
    "bmm of an expanded": (
        (16, 4),
        lambda m, x, q: torch.bmm(x, q(m.weight.t()).t().expand(2, 16, 4)),
        (2, 3, 16),
        None,
    ),
    "product": ((8, 16), lambda m, x, q: F.linear(x, q(m.weight * m.other)), (4, 16), (8, 1)),
    "low rank": ((8, 4), lambda m, x, q: F.linear(x, q(m.weight @ m.other)), (4, 16), (4, 16)),
    "a sum with low rank": (
        (16, 16),
        lambda m, x, q: F.linear(x, q(m.weight + 0.5 * torch.mm(m.other, m.other.t()))),
        (4, 16),
        (16, 4),
    ),
    "normed": ((8, 16), lambda m, x, q: F.linear(x, q(F.normalize(m.weight, dim=1))), (4, 16), None),
    "convolution standardised": (
        (6, 3, 3, 3),
        lambda m, x, q: F.conv2d(x, q(m.weight - m.weight.mean((1, 2, 3), keepdim=True))),
        (2, 3, 8, 8),
        None,
    ),
}


@pytest.mark.filterwarnings("ignore:Reads was exported with the first dimension fixed")  # by products of one size
@pytest.mark.parametrize("front_end", ["module", "symbolic_trace"])
@pytest.mark.parametrize("name", READS)
def test_rows_are_those_that_the_op_reads(name, front_end):
    shape, read, input_shape, other = READS[name]
    model, x = Reads(shape, read, other), torch.randn(input_shape)
    with torch.no_grad():
        expected = read(model, x, quantize_weight)
        assert not torch.allclose(expected, model(x), rtol=1e-4)
    config = make_config("Linear", "Conv2d", weights=WEIGHTS.config_groups["group_0"].weights.model_dump())
    traced = model if front_end == "module" else torch.fx.symbolic_trace(model)
    with pytest.warns(UserWarning, match="matched no module"):
        quantized = fxmse.quantize(traced, config, [x], progress=False)
    torch.testing.assert_close(quantized(x), expected, rtol=1e-6, atol=1e-6)


PICKS = {
    "slice": lambda p: p[3:9],
    "every other": lambda p: p[::2],
    "narrow": lambda p: p.narrow(0, 5, 8),
    "chunk": lambda p: p.chunk(2)[0],
    "split": lambda p: p.split([4, 12])[1],
    "index": lambda p: p[[1, 3, 6]],
    "index_select": lambda p: p.index_select(0, torch.tensor([9, 1, 0])),
    "other order": lambda p: p.index_select(0, torch.tensor([9, 1, 0, 4, 11, 2, 13, 5, 6, 7, 8, 3, 10, 12, 14, 15])),
    "a matrix": lambda p: p.view(2, 8, 32)[0],
}
SHARED_BY_ROWS = {
    "tensor": ({"num_bits": 8, "strategy": "tensor"}, quantize_tensor),
    "block": ({"num_bits": 8, "strategy": "block", "block_structure": [4, 16]}, lambda w: quantize_blocks(w, 4, 16)),
    "tensor_group": (
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": "float8_e4m3fn"},
        quantize_nvfp4,
    ),
}


@pytest.mark.parametrize("front_end", ["export", "symbolic_trace"])
@pytest.mark.parametrize("strategy", SHARED_BY_ROWS)
@pytest.mark.parametrize("name", PICKS)
def test_rows_that_are_not_read_have_no_say(name, strategy, front_end):
    args, quantize = SHARED_BY_ROWS[strategy]
    model = Reads((16, 32), lambda m, x, q: F.linear(x, q(PICKS[name](m.weight))))
    model.weight.data *= torch.logspace(2, -2, 16)[:, None]
    x = torch.randn(4, 32)
    with torch.no_grad():
        expected = model.read(model, x, quantize)
    traced = torch.export.export(model, (x,)) if front_end == "export" else torch.fx.symbolic_trace(model)
    config = make_config(weights={**args, "observer": "memoryless_minmax"})
    quantized = fxmse.quantize(traced, config, progress=False)
    torch.testing.assert_close(quantized(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("strategy", SHARED_BY_ROWS)
def test_pieces_of_a_parameter_have_scales_of_their_own(strategy):
    args, quantize = SHARED_BY_ROWS[strategy]
    model = Reads((48, 32), lambda m, x, q: sum(F.linear(x, q(m.weight.chunk(3)[i])) for i in range(3)))
    model.weight.data *= torch.logspace(2, -2, 48)[:, None]
    x = torch.randn(4, 32)
    with torch.no_grad():
        expected = model.read(model, x, quantize)
    config = make_config(weights={**args, "observer": "memoryless_minmax"})
    quantized = fxmse.quantize(torch.fx.symbolic_trace(model), config, progress=False)
    names = [name for name in quantized.state_dict() if name.endswith("weight_scale")]
    assert names == ["weight_scale", "linear_1_weight_scale", "linear_2_weight_scale"]
    if strategy != "tensor_group":  # whose global scale linears share that read one value
        torch.testing.assert_close(quantized(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_groups_are_those_of_the_matrix_that_is_read():
    model = Reads((8, 3, 4, 4), lambda m, x, q: F.linear(x, q(m.weight.flatten(1))))
    config = make_config(weights={"num_bits": 4, "strategy": "group", "group_size": 16})
    quantized = fxmse.quantize(model, config, [torch.randn(4, 48)], progress=False)
    assert quantized.state_dict()["weight_scale"].shape == (8, 3)


def test_equal_ways_of_reading_share_and_others_do_not():
    model = Reads((8, 8), lambda m, x, q: F.linear(F.linear(F.linear(x, m.weight.t()), m.weight), m.weight.mT))
    quantized = fxmse.quantize(model, WEIGHTS, [torch.randn(4, 8)], progress=False)
    scales = {name: scale for name, scale in quantized.state_dict().items() if name.endswith("scale")}
    assert list(scales) == ["weight_scale", "linear_1_weight_scale"]
    by_column, by_row = (torch.finfo(torch.float32).eps + model.weight.abs().amax(dim) / 127.5 for dim in (0, 1))
    torch.testing.assert_close(scales["weight_scale"].flatten(), by_column)
    torch.testing.assert_close(scales["linear_1_weight_scale"].flatten(), by_row)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.fc = nn.Embedding(32, 16), nn.Linear(16, 16)

    def forward(self, tokens):
        return F.linear(self.fc(self.embedding(tokens)), self.embedding.weight)


@pytest.mark.parametrize("front_end", ["module", "symbolic_trace"])
def test_a_tied_parameter_in_two_formats_has_scales_of_both(front_end):
    model, tokens = Tied(), torch.randint(0, 32, (4, 6))
    weights = {"strategy": "channel", "observer": "memoryless_minmax"}
    config = {
        "config_groups": {
            "embedding": {"targets": ["Embedding"], "weights": {**weights, "num_bits": 8}},
            "linear": {"targets": ["Linear"], "weights": {**weights, "num_bits": 4}},
        }
    }
    traced = model if front_end == "module" else torch.fx.symbolic_trace(model)
    quantized = fxmse.quantize(traced, config, [tokens], progress=False)
    with torch.no_grad():
        x = F.embedding(tokens, quantize_weight(model.embedding.weight, 8))
        x = F.linear(x, quantize_weight(model.fc.weight, 4), model.fc.bias)
        expected = F.linear(x, quantize_weight(model.embedding.weight, 4))
    torch.testing.assert_close(quantized(tokens), expected, rtol=1e-6, atol=1e-6)
    first, second, third = sorted(name for name in quantized.state_dict() if name.endswith("scale"))
    assert (second, third) == ("embedding.weight_scale", "fc.weight_scale")
    assert first.startswith("embedding.linear")


@pytest.mark.parametrize("inputs", [None, {"num_bits": 8, "symmetric": False, "observer": "static_minmax"}])
def test_a_weight_norm_is_quantized_as_computed(inputs):
    torch.manual_seed(0)
    model = nn.Sequential(weight_norm(nn.Linear(32, 32)), nn.ReLU(), nn.Linear(32, 8)).eval()
    x = torch.randn(64, 32)
    config = make_config(weights=WEIGHTS.config_groups["group_0"].weights.model_dump(), inputs=inputs)
    quantized = fxmse.quantize(model, config, [x], progress=False)
    state = quantized.state_dict()
    largest = model[0].weight.detach().abs().amax(1)
    torch.testing.assert_close(state["0.weight_scale"].flatten(), largest / 127.5)
    assert ("0.input_scale" in state) == (inputs is not None)


def test_a_changed_parameter_of_a_computed_weight_is_searched_again():
    model = Reads((8, 16), lambda m, x, q: F.linear(x, m.weight * m.other), (8, 1))
    x = torch.randn(4, 16)
    observed = fxmse.prepare(model, WEIGHTS, x)
    before = fxmse.convert(fxmse.calibrate(observed, progress=False)).weight_scale
    calls = []
    probe = observed.weight_observer
    observe = probe.observer.observe
    probe.observer.observe = lambda value: (calls.append(value), observe(value))
    observed(x)
    assert not calls
    with torch.no_grad():
        model.other.mul_(2)
    after = fxmse.convert(fxmse.calibrate(observed, progress=False)).weight_scale
    assert len(calls) == 1
    torch.testing.assert_close(after, 2 * before)


@pytest.mark.filterwarnings("ignore:Reads was exported with the first dimension fixed")  # by products of one size
def test_a_second_run_changes_nothing():
    for name in ("flattened", "product", "transposed, too", "bmm of a flattened"):
        shape, read, input_shape, other = READS[name]
        observed = fxmse.prepare(Reads(shape, read, other), WEIGHTS, torch.randn(input_shape))
        before = observed.code
        assert not fxmse.passes.InsertObservers(WEIGHTS)(observed).modified
        assert observed.code == before


class Scaled(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("input_scale", torch.tensor(3.0))

    def forward(self, x):
        return F.linear(x * self.input_scale, self.weight, self.bias)


class Named(nn.Linear):
    """Has a parameter and a module of names that scales and observers would have."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.weight_scale = nn.Parameter(torch.tensor(2.0))
        self.input_observer = nn.Linear(*sizes)

    def forward(self, x):
        return F.linear(self.input_observer(x), self.weight * self.weight_scale, self.bias)


@pytest.mark.parametrize("layer", [Scaled, Named])
def test_the_models_own_names_are_left_to_it(layer):
    torch.manual_seed(0)
    model, x = nn.Sequential(layer(8, 8)), torch.randn(4, 8)
    own = copy.deepcopy(model.state_dict())
    inputs = {"num_bits": 8, "symmetric": False, "observer": "static_minmax"}
    quantized = fxmse.quantize(model, make_config(inputs=inputs), [x], progress=False)
    state = quantized.state_dict()
    assert all(torch.equal(state[name], value) for name, value in own.items())
    with torch.no_grad():
        assert 0 < (quantized(x) - model(x)).norm() < 0.05 * model(x).norm()


def test_a_replaced_forward_is_not_overruled():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    forward = model[0].forward
    model[0].forward = lambda x: 2 * forward(x) + 1
    x = torch.randn(4, 8)
    with pytest.warns(UserWarning, match=r"left in float: 0 \(its hooks, options or own forward hide its weight\)"):
        quantized = fxmse.quantize(torch.fx.symbolic_trace(model), WEIGHTS, [x], progress=False)
    with torch.no_grad():
        expected = F.linear(model[0](x), quantize_weight(model[1].weight), model[1].bias)
    torch.testing.assert_close(quantized(x), expected, rtol=1e-6, atol=1e-6)


def test_what_a_layer_holds_beside_its_weight_can_still_be_read():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.fc.register_buffer("mask", torch.rand(8))
            self.fc.plain = torch.rand(8)

        def forward(self, x):
            return self.fc(x * self.fc.mask) + self.fc.plain

    model, x = Masked(), torch.randn(4, 8)
    quantized = fxmse.quantize(torch.fx.symbolic_trace(model), WEIGHTS, [x], progress=False)
    with torch.no_grad():
        expected = F.linear(x * model.fc.mask, quantize_weight(model.fc.weight), model.fc.bias) + model.fc.plain
    torch.testing.assert_close(quantized(x), expected, rtol=1e-6, atol=1e-6)
