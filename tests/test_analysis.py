"""What formats cost a model, against eager arithmetic: errors measured by hand, and gradients by finite differences."""

import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from cases import make_args
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from models import Attention, Convolutions
from plain import quantize_groups, quantize_input, quantize_weight
from scipy.stats import spearmanr
from torch import nn
from torch.func import functional_call

import fxmse
from fxmse.analysis.divergences import make_divergence

MINMAX = {"observer": "memoryless_minmax"}
INT8 = make_args(8, strategy="channel", **MINMAX)
INT4 = make_args(4, strategy="group", group_size=8, **MINMAX)
INPUT = make_args(8, symmetric=False, observer="static_minmax")


class Net(nn.Module):
    """Two linears that read one value, a nonlinear product, and a head."""

    def __init__(self, name="logits"):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.head = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 5)
        self.name = name

    def forward(self, x):
        return {self.name: self.compute(x, x)}

    def compute(self, read, passed):
        """What the linears read, and what passes them by."""
        return 4 * self.head(torch.tanh(self.q(read)) * self.k(read) + passed)


class Tied(Attention):
    """Logits of tokens."""

    def forward(self, tokens):
        return {"logits": super().forward(tokens)}


def make_batches(num=3, rows=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 4, 16, generator=generator) for _ in range(num)]


def make_config(weights=None, inputs=None, targets=("Linear",), **others):
    scheme = QuantizationScheme(targets=list(targets), weights=weights, input_activations=inputs)
    return QuantizationConfig(config_groups={"all": scheme}, **others)


def analyze(model, config, batches, **options):
    return fxmse.analyze(model, config, batches, progress=False, **options)


def find(analysis, name, candidate=None):
    (site,) = (s for s in analysis.sites if s.name == name and candidate in (None, s.candidate))
    return site


def call(model, x, **weights):
    """The model's output with other weights."""
    (output,) = functional_call(model, {name.replace("_", "."): w for name, w in weights.items()}, (x,)).values()
    return output


def measure_kl(expected, found):
    return F.kl_div(found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none").sum(-1)


@torch.no_grad()
def test_one_weight_at_a_time_is_measured_as_by_hand():
    model, batches = Net().eval(), make_batches()
    analysis = analyze(model, make_config(INT4), batches, exact=True)
    assert analysis.unit == "nats"
    for name, module in model.named_children():
        quantized = quantize_groups(module.weight, 8)
        site = find(analysis, f"{name}.weight")
        noise, signal = (quantized - module.weight).square().sum(), module.weight.square().sum()
        assert site.squared_error == pytest.approx(noise.item(), rel=1e-5)
        assert site.value_error == pytest.approx((noise / signal).item(), rel=1e-5)
        changes = [measure_kl(call(model, x), call(model, x, **{f"{name}_weight": quantized})) for x in batches]
        assert site.exact_error == pytest.approx(torch.cat(changes).mean().item(), rel=1e-3, abs=1e-7)
        assert site.num_elements == module.weight.numel()
    x = batches[0]
    for name in ("q", "k"):
        module = model.get_submodule(name)
        own, moved = module(x), F.linear(x, quantize_groups(module.weight, 8), module.bias)
        expected = ((own - moved).square().sum() / own.square().sum()).item()
        assert find(analysis, f"{name}.weight").output_error == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_inputs_and_depth_are_measured_as_by_hand():
    model, batches = Net().eval(), make_batches()
    analysis = analyze(model, make_config(INT8, INPUT), batches, exact=True)
    site = find(analysis, "q.input")
    assert site.names == ("q.input", "k.input")
    low, high = min(x.min() for x in batches), max(x.max() for x in batches)
    quantized = [quantize_input(x, low, high) for x in batches]
    noise = sum((q - x).square().sum() for q, x in zip(quantized, batches, strict=True))
    assert site.value_error == pytest.approx((noise / sum(x.square().sum() for x in batches)).item(), rel=1e-4)
    changes = [measure_kl(call(model, x), model.compute(q, x)) for q, x in zip(quantized, batches, strict=True)]
    assert site.exact_error == pytest.approx(torch.cat(changes).mean().item(), rel=2e-2, abs=1e-7)
    # Of two readers' outputs.
    own, moved = ([m(value) for m in (model.q, model.k)] for value in (batches[0], quantized[0]))
    errors = sum((a - b).square().sum() for a, b in zip(own, moved, strict=True))
    assert site.output_error == pytest.approx((errors / sum(a.square().sum() for a in own)).item(), rel=1e-3)
    # With all of it quantized.
    folded = fxmse.quantize(model, make_config(INT8, INPUT), batches, progress=False)
    expected, found = model(batches[0])["logits"], folded(batches[0])["logits"]
    assert analysis.totals["int8 symmetric channel, inputs int8 asymmetric tensor"] == pytest.approx(
        measure_kl(expected, found).mean().item(), rel=1e-3
    )
    by_module = {error.module: error.error for error in analysis.depth}
    assert list(by_module) == ["q", "k", "head"]
    logits = [value / 4 for value in (expected, found)]
    assert by_module["head"] == pytest.approx(
        ((logits[1] - logits[0]).square().sum() / logits[0].square().sum()).item(), rel=1e-3
    )
    first = F.linear(quantized[0], quantize_weight(model.q.weight), model.q.bias)
    exact = model.q(batches[0])
    assert by_module["q"] == pytest.approx(((first - exact).square().sum() / exact.square().sum()).item(), rel=1e-3)


def test_gradients_are_those_of_finite_differences():
    model, batches = Net().double().eval(), [batch.double() for batch in make_batches(2, 3)]

    def loss(outputs, batch):
        return (outputs["logits"] * torch.linspace(-1, 1, 5)).square().mean() + batch["x"].mean()

    with torch.no_grad():
        analysis = analyze(model, make_config(INT4, INPUT), batches, loss=loss)
        assert analysis.unit == "loss"
        for name, module in model.named_children():
            change = quantize_groups(module.weight, 8) - module.weight
            expected = 0.0
            for x, row in itertools.product(batches, range(len(change))):
                step = torch.zeros_like(change)
                step[row] = change[row] * 1e-4
                up, down = (
                    loss({"logits": call(model, x, **{f"{name}_weight": module.weight + s})}, {"x": x})
                    for s in (step, -step)
                )
                expected += ((up - down) / 2e-4).item() ** 2
            assert find(analysis, f"{name}.weight").model_error == pytest.approx(expected / 2, rel=1e-2)
        low, high = min(x.min() for x in batches), max(x.max() for x in batches)
        expected = 0.0
        for x in batches:
            change = quantize_input(x, low, high) - x
            for sample, token in itertools.product(range(3), range(4)):
                step = torch.zeros_like(change)
                step[sample, token] = change[sample, token] * 1e-4
                up, down = (loss({"logits": model.compute(x + s, x)}, {"x": x}) for s in (step, -step))
                expected += ((up - down) / 2e-4).item() ** 2
        assert find(analysis, "q.input").model_error == pytest.approx(expected / 2, rel=1e-2)


@pytest.mark.parametrize("kind", ["kl", "squared"])
def test_random_gradients_have_the_curvature_for_their_covariance(kind):
    torch.manual_seed(0)
    logits, num = torch.randn(1, 6) * 2, 40000
    outputs = {"logits": logits.expand(num, 6).clone().requires_grad_()}
    divergence = make_divergence(outputs, kind, None, None, None)
    drawn = divergence.draw(outputs, {}, torch.Generator().manual_seed(0))
    (gradients,) = drawn.gradients
    p = logits.softmax(-1)[0]
    expected = torch.diag(p) - p[:, None] * p if kind == "kl" else torch.eye(6)
    torch.testing.assert_close(gradients.T @ gradients / num, expected, rtol=0.05, atol=0.02)
    # And that is what is measured of a small change.
    change = torch.randn(6) * 1e-2
    mean = (gradients @ change).square().sum().item() * drawn.factor / drawn.size
    moved = {"logits": outputs["logits"] + change}
    assert mean == pytest.approx(divergence.measure(outputs, moved, {}).mean, rel=0.05)


@pytest.mark.parametrize(("name", "unit"), [("logits", "nats"), ("hidden", "relative")])
def test_the_gradients_rank_values_as_one_at_a_time_does(name, unit):
    model = Net(name).eval()
    candidates = ["FP8", make_config(INT4, INPUT), make_config(make_args(3, strategy="channel"))]
    analysis = analyze(model, candidates, make_batches(24), exact=True)
    assert analysis.unit == unit
    found, exact = zip(*((site.model_error, site.exact_error) for site in analysis.sites), strict=True)
    assert len(found) == 13
    assert spearmanr(found, exact)[0] > 0.95
    assert all(0.6 < own / measured < 1.6 for own, measured in zip(found, exact, strict=True))


def mix(**others):
    """A config with another format for one of the linears that read one value."""
    config = make_config(INT8, INPUT, ["q", "head"])
    inputs = make_args(4, symmetric=False, observer="static_minmax")
    config.config_groups["k"] = QuantizationScheme(targets=["k"], weights=INT4, input_activations=inputs)
    return config.model_copy(update=others)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_formats_that_are_searched_together_are_those_that_are_searched_alone(order):
    model, batches = Net().eval(), make_batches()
    alone = [make_config(INT8, INPUT), mix(), "NVFP4"]
    together = analyze(model, [alone[place] for place in order], batches, exact=True)
    for place, config in enumerate(alone):
        own = analyze(model, config, batches, exact=True)
        name = together.candidates[order.index(place)]
        found = [site for site in together.sites if site.candidate == name]
        assert [site.names for site in sorted(found, key=lambda s: s.name)] == [
            site.names for site in sorted(own.sites, key=lambda s: s.name)
        ]
        for site in found:
            other = find(own, site.name)
            for field in ("value_error", "output_error", "exact_error", "model_error"):
                assert getattr(site, field) == pytest.approx(getattr(other, field), rel=1e-5), field
        assert together.totals[name] == pytest.approx(own.totals[own.candidates[0]], rel=1e-5)


def test_nothing_of_the_model_changes_and_batches_may_come_once():
    model = Net()
    model.train()
    before = copy.deepcopy(model.state_dict())
    analysis = analyze(model, ["W8A8", "FP8"], iter(make_batches()))
    assert analysis.num_batches == 3
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    again = analyze(model, ["W8A8", "FP8"], make_batches())
    assert [site.model_error for site in again.sites] == [site.model_error for site in analysis.sites]
    with torch.inference_mode():
        inside = analyze(model, ["W8A8", "FP8"], make_batches())
    assert [site.model_error for site in inside.sites] == [site.model_error for site in analysis.sites]


def test_it_is_json():
    analysis = analyze(Net().eval(), ["W8A8", "FP8_DYNAMIC"], make_batches())
    fields = json.loads(json.dumps(analysis.to_dict(), allow_nan=False))
    assert fields["candidates"] == ["W8A8", "FP8_DYNAMIC"]
    assert len(fields["sites"]) == len(analysis.sites) == 10
    assert fields["groups"][0]["modules"] == ["q", "k"]


def test_what_is_fused_or_tied_is_one_group():
    tokens = [Tied.make_inputs(seed=seed) for seed in range(24)]
    config = make_config(INT8, targets=["Linear", "Embedding"])
    analysis = analyze(Tied().eval(), config, tokens, exact=True)
    assert [group.modules for group in analysis.groups] == [("embedding", "head"), ("query", "key")]
    assert [group.num_weights for group in analysis.groups] == [128, 128]
    site = find(analysis, "embedding.weight")
    assert site.names == ("embedding.weight", "head.weight")
    # Both readers have the quantized weight, to which both gradients belong.
    model, quantized = Tied().eval(), Tied().eval()
    quantized.embedding.weight.data = quantize_weight(model.embedding.weight.data)
    changes = [measure_kl(model(x)["logits"], quantized(x)["logits"]).flatten() for x in tokens]
    assert site.exact_error == pytest.approx(torch.cat(changes).mean().item(), rel=1e-2)
    assert 0.5 < site.model_error / site.exact_error < 2


@pytest.mark.filterwarnings("ignore:candidates that do not fit")
def test_convolutions_and_what_does_not_fit():
    batches = [Convolutions.make_inputs(seed=seed) for seed in range(24)]
    config = make_config(INT8, targets=["Conv1d", "Conv2d", "Conv3d", "Linear"])
    groups = make_config(make_args(4, strategy="group", group_size=6), targets=["Conv1d", "Conv2d", "Linear"])
    analysis = analyze(Convolutions().eval(), [config, groups], batches, exact=True)
    assert analysis.unit == "relative"
    assert len([site for site in analysis.sites if site.candidate == analysis.candidates[0]]) == 4
    # 6 divides 12 and 6, and not 5.
    assert [site.name for site in analysis.sites if site.candidate == analysis.candidates[1]] == [
        "one.weight",
        "two.weight",
    ]
    for site in analysis.sites:
        assert 0.5 < site.model_error / site.exact_error < 2
    with pytest.warns(UserWarning, match="do not fit all modules: int4 symmetric group 6 without .*group_size=6"):
        analyze(Convolutions().eval(), [config, groups], batches)


class Masked(Net):
    """Of what tokens see of each other."""

    def forward(self, x, attention_mask):
        return super().forward(x * attention_mask[..., None])


def test_padding_does_not_count():
    (batch,), mask = make_batches(1, 2), torch.ones(2, 4)
    padded = torch.cat([batch, torch.full((2, 3, 16), 9.0)], 1)
    longer = torch.cat([mask, torch.zeros(2, 3)], 1)
    config = make_config(INT4)
    whole = analyze(Masked().eval(), config, [{"x": batch, "attention_mask": mask}] * 16, exact=True)
    inputs = [{"x": padded, "attention_mask": longer}] * 16
    masked = analyze(Masked().eval(), config, inputs, exact=True, mask="attention_mask")
    for site, other in zip(masked.sites, whole.sites, strict=True):
        assert site.exact_error == pytest.approx(other.exact_error, rel=1e-4)
        assert 0.4 < site.model_error / other.model_error < 2.5
    with pytest.raises(ValueError, match="mask='padding': expected one of the batches' inputs, x, attention_mask"):
        analyze(Masked().eval(), config, inputs, mask="padding")


class Detached(Net):
    """Half of it has no gradient."""

    def forward(self, x):
        return {self.name: self.head(self.q(x).detach() * self.k(x))}


def test_what_has_no_gradient_is_named():
    with pytest.warns(UserWarning, match="no gradient reaches q.weight: their errors count as 0; exact=True"):
        analysis = analyze(Detached().eval(), make_config(INT4), make_batches(), exact=True)
    assert find(analysis, "q.weight").model_error == 0 < find(analysis, "q.weight").exact_error
    assert find(analysis, "k.weight").model_error > 0


class Branch(nn.Module):
    """A linear in a branch, and one that a loop calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = torch.cond(x.sum() > 0, lambda x: torch.tanh(self.inner(self.inner(x))), lambda x: x.sin(), (x,))
        return {"logits": self.head(x)}


def test_branches():
    batches = [batch.abs() for batch in make_batches(24)]
    analysis = analyze(Branch().eval(), [make_config(INT4), "W8A8"], batches, exact=True)
    assert {site.name for site in analysis.sites} == {"inner.weight", "inner.input", "head.weight", "head.input"}
    for site in analysis.sites:
        assert 0.5 < site.model_error / site.exact_error < 2


class InPlace(Net):
    """It writes its input."""

    def forward(self, x):
        y = self.q(x)
        x.mul_(2)
        return self.head(y + self.k(x))


def test_a_graph_may_write_its_input():
    model, batches = InPlace().eval(), make_batches()
    before = [batch.clone() for batch in batches]
    analysis = analyze(torch.fx.symbolic_trace(model), [make_config(INT4, INPUT)], batches, exact=True)
    assert all(map(torch.equal, batches, before))
    with torch.no_grad():
        quantized, expected = quantize_groups(model.k.weight, 8), [model(batch.clone()) for batch in batches]
        model.k.weight.data = quantized
        found = [model(batch.clone()) for batch in batches]
    noise, signal = (torch.cat(own).double() for own in (found, expected))
    exact = ((noise - signal).square().sum() / signal.square().sum()).item()
    assert find(analysis, "k.weight").exact_error == pytest.approx(exact, rel=1e-4)
    assert find(analysis, "k.weight").model_error == pytest.approx(exact, rel=0.5)


class Undifferentiable(Net):
    """It writes what its gradient would need."""

    def forward(self, x):
        y = (self.q(x) + self.k(x)).sigmoid_()
        return self.head(y.mul_(y))


def fail(outputs, batch):
    return outputs["logits"].mean() * float("nan")


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (["W8A8", "W8A8"], {}, "candidates W8A8 and W8A8 quantize the same"),
        ([], {}, "no candidates"),
        (["W8A8", "W9"], {}, "config='W9': expected one of the presets"),
        ("W8A8", {"divergence": "cosine"}, "divergence='cosine': expected 'kl', 'squared' or None"),
        ("W8A8", {"loss": fail, "output": "logits"}, "loss takes the place of divergence and output"),
        ("W8A8", {"loss": fail}, "loss gave nan: expected a finite number"),
        ("W8A8", {"loss": lambda outputs, batch: outputs["logits"]}, r"loss gave a tensor of shape \(7, 4, 5\)"),
        ("W8A8", {"loss": lambda outputs, batch: 1.0}, "loss gave 1.0: expected a float tensor"),
        ("W8A8", {"output": "hidden"}, "output='hidden': expected one of the model's outputs, logits"),
        ("W8A8", {"mask": "mask"}, "mask='mask': expected one of the batches' inputs, x"),
    ],
)
def test_errors(config, options, message):
    with pytest.raises(ValueError, match=message):
        analyze(Net().eval(), config, make_batches(1), **options)


def test_errors_of_batches():
    model = Net().eval()
    with pytest.raises(ValueError, match="no batches: what a format costs"):
        analyze(model, "W8A8", [])
    with pytest.raises(ValueError, match="batches is one tensor"):
        analyze(model, "W8A8", make_batches()[0])
    with pytest.raises(TypeError, match="exakt"):
        analyze(model, "W8A8", make_batches(), exakt=True)
    with pytest.raises(ValueError, match="the model cannot be run backwards, as autograd says: one of the variables"):
        analyze(Undifferentiable().eval(), "FP8", make_batches())
    with pytest.raises(ValueError, match=r"candidate W4A16: nothing can be quantized so: .*group_size=128"):
        analyze(model, ["FP8", "W4A16"], make_batches())
    model.head.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf in the model's outputs"):
        analyze(model, make_config(INT8, targets=["q"]), make_batches())


def test_the_cost_of_the_exact_form_is_said_before(capsys):
    fxmse.analyze(Net().eval(), make_config(INT8), make_batches(2), exact=True)
    assert (
        "exact: 3 values and formats x 2 batches are 6 runs of the model, about 0.0 minutes" in capsys.readouterr().out
    )
