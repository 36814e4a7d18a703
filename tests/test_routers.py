"""Routers stay in float unless a target names them; what only looks like one is quantized."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from plain import quantize_weight
from torch import nn

import fxmse
from fxmse.passes.probe import find_probes

WEIGHTS = {"num_bits": 4, "strategy": "channel", "observer": "memoryless_minmax"}
NUM_EXPERTS, TOP_K = 6, 2


class Experts(nn.Module):
    """A block of experts; subclasses choose and use them in the ways that models do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 16)
        self.gate = nn.Linear(16, NUM_EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(NUM_EXPERTS, 16, 16) / 4)
        self.last = nn.Linear(16, 16)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(x + self.mix(x, self.gate(x)))


class Indexed(Experts):
    """The weights of the chosen experts, token by token."""

    def mix(self, x, scores):
        values, indices = F.softmax(scores, dim=-1).topk(TOP_K, dim=-1)
        chosen = self.up[indices.reshape(-1)]
        tokens = x.repeat_interleave(TOP_K, 0).unsqueeze(1)
        return (torch.bmm(tokens, chosen).reshape(-1, TOP_K, 16) * values.unsqueeze(-1)).sum(1)


class Grouped(Experts):
    """Tokens sorted by their experts, whose numbers are the groups of one product."""

    def mix(self, x, scores):
        values, indices = torch.topk(scores.sigmoid(), TOP_K, dim=-1)
        flat = indices.reshape(-1)
        order = torch.argsort(flat)
        counts = (flat.unsqueeze(-1) == torch.arange(NUM_EXPERTS)).sum(0)
        which = (torch.arange(x.shape[0] * TOP_K).unsqueeze(-1) >= counts.cumsum(0)).sum(-1)
        given = torch.bmm(x[order // TOP_K].unsqueeze(1), self.up[which]).squeeze(1)
        given = given * values.reshape(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order // TOP_K, given)


class Dense(Experts):
    """All experts on all tokens, times a matrix that is 0 but for the chosen ones."""

    def mix(self, x, scores):
        values, indices = torch.topk(scores, TOP_K, dim=-1)
        weights = torch.zeros_like(scores).scatter_(1, indices, values.softmax(-1))
        given = torch.bmm(x.unsqueeze(0).expand(NUM_EXPERTS, -1, -1), self.up)
        return (given * weights.transpose(0, 1).unsqueeze(-1)).sum(0)


class InGroups(Experts):
    """The best groups of experts first, then the best experts of these."""

    def mix(self, x, scores):
        scores = scores.sigmoid()
        best = scores.view(-1, 3, 2).topk(2, dim=-1)[0].sum(-1)
        mask = torch.zeros_like(best)
        mask.scatter_(1, best.topk(2, dim=-1)[1], 1)
        allowed = mask.unsqueeze(-1).expand(-1, 3, 2).reshape(-1, NUM_EXPERTS)
        indices = scores.masked_fill(allowed == 0, 0.0).topk(TOP_K, dim=-1)[1]
        values = scores.gather(1, indices)
        given = torch.bmm(x.repeat_interleave(TOP_K, 0).unsqueeze(1), self.up[indices.reshape(-1)])
        return (given.reshape(-1, TOP_K, 16) * values.unsqueeze(-1)).sum(1)


class OneHot(Experts):
    """One expert a token."""

    def mix(self, x, scores):
        mask = F.one_hot(scores.argmax(-1), NUM_EXPERTS).to(x.dtype)
        given = torch.bmm(x.unsqueeze(0).expand(NUM_EXPERTS, -1, -1), self.up)
        return torch.einsum("etd,te->td", given, mask)


class Labelled(Indexed):
    """The experts' numbers have an embedding, too, which is read first."""

    def __init__(self):
        super().__init__()
        self.labels = nn.Embedding(NUM_EXPERTS, 16)

    def mix(self, x, scores):
        return self.labels(scores.argmax(-1)) + super().mix(x, scores)


ROUTED = {kind.__name__: kind for kind in (Indexed, Grouped, Dense, InGroups, OneHot, Labelled)}


class Head(nn.Module):
    """A language model's head, whose best tokens are returned."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.gate = nn.Linear(16, 16), nn.Linear(16, 32)

    def forward(self, x):
        return torch.topk(self.gate(self.first(x)), 3, dim=-1)


class Sampler(Head):
    """Logits of all but the best tokens are cut off."""

    def forward(self, x):
        logits = self.gate(self.first(x))
        mask = torch.zeros_like(logits).scatter(1, logits.topk(3, dim=-1)[1], 1.0)
        return (logits * mask).softmax(-1)


class NextToken(Head):
    """The best token is the next input."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(32, 16)

    def forward(self, x):
        return self.first(self.tokens(self.gate(self.first(x)).argmax(-1)))


class Detector(Head):
    """The best places go on."""

    def forward(self, x):
        x = self.first(x)
        places = self.gate(x).amax(-1).topk(4)[1]
        return self.first(x[places])


NOT_ROUTED = (Head, Sampler, NextToken, Detector)


def prepare(model, targets, x, capture):
    scheme = {"targets": targets, "weights": WEIGHTS}
    if capture == "symbolic_trace":
        model = torch.fx.symbolic_trace(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        observed = fxmse.prepare(model, scheme, None if capture == "symbolic_trace" else x)
    said = [str(warning.message) for warning in caught if "left in float" in str(warning.message)]
    return observed, said


def list_modules(observed):
    return {site.module for _, probe in find_probes(observed) for site in probe.sites}


@pytest.mark.parametrize("capture", ["export", "symbolic_trace"])
@pytest.mark.parametrize("name", ROUTED)
def test_a_router_stays_in_float_and_is_named(name, capture):
    model, x = ROUTED[name]().eval(), torch.randn(10, 16)
    observed, said = prepare(model, ["Linear"], x, capture)
    assert {"first", "last"} <= list_modules(observed)
    assert "gate" not in list_modules(observed)
    assert len(said) == 1
    assert "gate (a router" in said[0]

    quantized, expected = fxmse.convert(fxmse.calibrate(observed)), copy.deepcopy(model)
    for site in list_modules(observed) - {""}:
        linear = expected.get_submodule(site)
        linear.weight = nn.Parameter(quantize_weight(linear.weight, 4))
    if "" in list_modules(observed):  # experts read as a weight (in, out)
        rows = torch.stack([quantize_weight(expert.T, 4).T for expert in expected.up])
        expected.up = nn.Parameter(rows)
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), expected(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["gate", "re:.*gate$", "re:.*"])
@pytest.mark.parametrize("name", ROUTED)
def test_a_target_that_names_a_router_quantizes_it(name, target):
    observed, said = prepare(ROUTED[name]().eval(), [target], torch.randn(10, 16), "export")
    assert "gate" in list_modules(observed)
    assert not any("router" in text for text in said)


@pytest.mark.parametrize("capture", ["export", "symbolic_trace"])
@pytest.mark.parametrize("kind", NOT_ROUTED)
def test_what_chooses_no_experts_is_no_router(kind, capture):
    observed, said = prepare(kind().eval(), ["Linear"], torch.randn(10, 16), capture)
    assert {"first", "gate"} <= list_modules(observed)
    assert not said


def test_routers_stay_in_float_while_torch_compile_calibrates():
    model, x = Dense().eval(), torch.randn(10, 16)
    calibration = fxmse.Calibration({"targets": ["Linear"], "weights": WEIGHTS})
    compiled = torch.compile(model, backend=calibration)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"gate \(a router"):
        compiled(x)
    calibration.fold()
    assert {name.partition(".")[0] for name in calibration.qparams} == {"first", "last", "up_weight_scale"}
