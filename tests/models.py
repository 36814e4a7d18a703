"""Small models, seeded, that the graph tests share."""

import torch
import torch.nn.functional as F
from cases import make_args
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from torch import Tensor, nn


class Attention(nn.Module):
    """Two linears that read one value, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, 8)
        self.query = nn.Linear(8, 8)
        self.key = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.query(x) * self.key(x))

    @staticmethod
    def make_inputs(batch: int = 3, seed: int = 1) -> Tensor:
        return torch.randint(0, 16, (batch, 5), generator=torch.Generator().manual_seed(seed))


class Convolutions(nn.Module):
    """Convolutions of one to three dimensions and a functional linear with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv1d(4, 6, 3, padding="same")
        self.two = nn.Conv2d(1, 2, (3, 2), stride=2, bias=False)
        self.three = nn.Conv3d(1, 2, 1, groups=1)
        self.projection = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x)[:, None])
        x = self.three(x[:, None]).flatten(1, 2)
        return F.linear(input=x, weight=self.projection)

    @staticmethod
    def make_inputs(batch: int = 2, seed: int = 1) -> Tensor:
        return torch.randn(batch, 4, 7, generator=torch.Generator().manual_seed(seed))


class Products(nn.Module):
    """Three linears that read one value, and a larger one that reads another."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.alpha, self.beta, self.gamma = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 8)
        self.omega = nn.Linear(8, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.omega(self.alpha(x) * self.beta(x) + self.gamma(x))

    @staticmethod
    def make_batches(count: int = 7) -> list[Tensor]:
        return [torch.randn(4 + i, 16, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def make_config(
    *targets: str, weights: dict | None = None, inputs: dict | None = None, outputs: dict | None = None, ignore=()
) -> QuantizationConfig:
    """One group: weights int8 per channel unless said otherwise."""
    scheme = QuantizationScheme(
        targets=list(targets or ("Linear",)),
        weights=make_args(**(weights or {"num_bits": 8, "strategy": "channel"})),
        input_activations=make_args(**inputs) if inputs else None,
        output_activations=make_args(**outputs) if outputs else None,
    )
    return QuantizationConfig(config_groups={"group_0": scheme}, ignore=list(ignore))


W8A8 = make_config(inputs={"num_bits": 8, "symmetric": False})


def make_front_ends(model: nn.Module, inputs: Tensor) -> dict:
    """The same model as each front end gives it to ``fxmse.prepare``, and the example inputs that go with it."""
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    return {
        "symbolic_trace": (torch.fx.symbolic_trace(model), None),
        "export": (torch.export.export(model, (inputs,), dynamic_shapes=dynamic), None),
        "export_strict": (torch.export.export(model, (inputs,), dynamic_shapes=dynamic, strict=True), None),
        "export_module": (torch.export.export(model, (inputs,), dynamic_shapes=dynamic).module(), None),
        "module": (model, (inputs,)),
    }


FRONT_ENDS = ("symbolic_trace", "export", "export_strict", "export_module", "module")
