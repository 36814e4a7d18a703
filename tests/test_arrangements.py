"""Which rows of a weight meet which tokens: products of patches and of experts' tokens, against plain arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxmse
from fxmse.observers.inputs import Products
from fxmse.passes.probe import find_inputs

WEIGHTS = {
    "num_bits": 4,
    "strategy": "group",
    "group_size": 4,
    "observer": "output_mse",
    "observer_kwargs": {"strict": True},
}


def observe(model, batches, targets, **kwargs):
    observed = fxmse.prepare(model, {"config_groups": {"all": {"targets": targets, "weights": WEIGHTS}}}, batches[0])
    return fxmse.calibrate(observed, batches, progress=False, **kwargs)


def get_products(observed):
    (products,) = {inputs for _, inputs in find_inputs(observed)}
    assert isinstance(products, Products)
    return products.products


CONVOLUTIONS = {
    "plain": (lambda: nn.Conv2d(8, 12, 3), (8, 9, 7)),
    "strided": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (8, 9, 7)),
    "dilated groups": (lambda: nn.Conv2d(8, 12, 3, stride=(2, 1), padding=(0, 2), dilation=2, groups=2), (8, 9, 11)),
    "same": (lambda: nn.Conv1d(8, 12, 5, padding="same", dilation=2), (8, 10)),
    "depthwise": (lambda: nn.Conv1d(8, 8, 4, padding=1, groups=8), (8, 10)),
    "3d": (lambda: nn.Conv3d(4, 8, (1, 2, 2), padding=1), (4, 5, 6, 7)),
}


@pytest.mark.parametrize("front_end", ["module", "symbolic_trace"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolutions_products_give_the_error_of_its_output(name, front_end):
    torch.manual_seed(0)
    make_convolution, shape = CONVOLUTIONS[name]
    convolution = make_convolution()
    # Neighbours are alike: errors can make up for each other.
    batches = [torch.randn(3, *shape).cumsum(-1) for _ in range(2)]
    model = nn.Sequential(convolution).eval()
    observed = observe(
        torch.fx.symbolic_trace(model) if front_end == "symbolic_trace" else model,
        batches,
        [type(convolution).__name__],
    )
    error = torch.randn_like(convolution.weight)
    with torch.no_grad():
        outputs = [torch.func.functional_call(convolution, {"weight": error, "bias": None}, batch) for batch in batches]
    expected = sum(output.double().square().sum() for output in outputs)
    products = get_products(observed)[:, 0].double()
    rows = error.flatten(1).view(convolution.groups, -1, products.shape[-1]).double()
    torch.testing.assert_close(torch.einsum("gri,gij,grj->", rows, products, rows), expected, rtol=1e-5, atol=0)
    quantized = fxmse.convert(observed)
    plain = fxmse.quantize(
        model,
        {
            "targets": [type(convolution).__name__],
            "weights": {**WEIGHTS, "observer": "exact_mse", "observer_kwargs": {}},
        },
        batches,
        progress=False,
    )
    with torch.no_grad():
        own, other = (sum((m(b) - model(b)).square().sum() for b in batches) for m in (quantized, plain))
    # A group of one channel has nothing beside it to make up for.
    assert own <= other if name == "depthwise" else own < other


class Experts(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(4, 6, 8))

    def forward(self, x, expert):
        if self.kind == "left factor":
            return torch.bmm(self.weight[expert], x.unsqueeze(-1)).squeeze(-1)
        if self.kind == "right factor":
            return torch.bmm(x.unsqueeze(1), self.weight[expert].transpose(1, 2)).squeeze(1)
        if self.kind == "index_select":
            return torch.bmm(x.unsqueeze(1), torch.index_select(self.weight, 0, expert).mT).squeeze(1)
        if self.kind == "loop":
            return sum(F.linear(x * (expert == e)[:, None], self.weight[e]) for e in range(4))
        if self.kind == "batch":
            return torch.bmm(x.view(4, -1, 8), self.weight.mT)
        order = expert.argsort()
        offsets = torch.bincount(expert, minlength=4).cumsum(0).to(torch.int32)
        return torch._grouped_mm(x[order].bfloat16(), self.weight.mT.bfloat16(), offsets)


def sum_products(kind, batches):
    """By expert, float64; the last one meets no token but in a batch."""
    x = torch.cat([x for x, _ in batches]).double()
    if kind == "batch":
        x = torch.stack([x.view(4, -1, 8) for x, _ in batches]).double()
        return torch.einsum("bntc,bntd->ncd", x, x)
    expert = torch.cat([expert for _, expert in batches])
    return torch.stack([x[expert == e].T @ x[expert == e] for e in range(4)])


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", ["left factor", "right factor", "index_select", "loop", "batch", "offsets"])
def test_each_expert_has_the_products_of_its_own_tokens(kind, compile):
    torch.manual_seed(1)
    # A compiled graph may leave out a cast to half precision that is taken back.
    batches = [(torch.randn(16, 8).bfloat16().float(), torch.randint(0, 3, (16,))) for _ in range(3)]
    observed = observe(Experts(kind).eval(), batches, ["re:.*", "Experts"], compile=compile)
    products = get_products(observed)
    torch.testing.assert_close(products[:, 0].double(), sum_products(kind, batches), rtol=1e-5, atol=1e-4)
    scales = [name for name in fxmse.convert(observed).state_dict() if name.endswith("weight_scale")]
    assert scales == ["weight_scale"]


class Columns(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 8))

    def forward(self, x, expert):
        return torch.bmm(self.weight[expert], x)


class TwoStrides(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 2)

    def forward(self, x):
        return self.conv(x).sum() + F.conv1d(x, self.conv.weight, stride=2).sum()


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (Columns(), (torch.randn(16, 8, 8), torch.randint(0, 4, (16,)))),  # as many columns as channels
        (TwoStrides(), (torch.randn(2, 4, 8),)),  # as long as a row has elements
    ],
)
def test_what_is_neither_tokens_nor_one_kind_of_patches_is_named(model, batch):
    with pytest.warns(UserWarning, match="matched no module"):
        observed = observe(model.eval(), [batch], ["re:.*", "Columns", "TwoStrides"])
    with pytest.raises(ValueError, match=r"weight: OutputMSEObserver has seen no activations"):
        fxmse.convert(observed)


def test_an_expert_without_tokens_counts_as_having_met_all():
    torch.manual_seed(1)
    batches = [(torch.randn(16, 8), torch.randint(0, 3, (16,)))]
    ((_, inputs),) = find_inputs(observe(Experts("left factor").eval(), batches, ["re:.*", "Experts"]))
    x = batches[0][0].double()
    mean = inputs.mean(damping=0.0)[3, 0].double()
    torch.testing.assert_close(mean, x.T @ x / x.square().mean() / 16, rtol=1e-5, atol=1e-5)
