"""all-MiniLM-L6-v2: its weights, sentences and activations."""

import functools
from collections import defaultdict

import torch
from calibrate import Batches, example
from torch import Tensor, nn

WEIGHTS = (
    "encoder.layer.0.attention.self.query",
    "encoder.layer.2.attention.output.dense",
    "encoder.layer.3.intermediate.dense",
    "encoder.layer.5.output.dense",
)


@functools.cache
def load_model() -> nn.Module:
    """all-MiniLM-L6-v2."""
    return example.AutoModel.from_pretrained(example.find_model_folder()).eval()


def load_batches(num_batches: int) -> tuple[Batches, Batches]:
    """Batches for calibration, and half as many held-out ones."""
    batches = example.load_batches(example.find_model_folder(), num_batches + max(1, num_batches // 2))
    return batches[:num_batches], batches[num_batches:]


def collect_inputs(model: nn.Module, batches: Batches) -> dict[str, list[Tensor]]:
    """The inputs of all Linears, by the name of the first of those that read the same value."""
    collected: dict[str, list[Tensor]] = defaultdict(list)
    seen: set[tuple[int, torch.Size]] = set()

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # Whatever was collected is kept, so that no other value has its address.
        identity = inputs[0].data_ptr(), inputs[0].shape
        if identity not in seen:
            seen.add(identity)
            collected[name].append(inputs[0])

    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    hooks = [linear.register_forward_pre_hook(functools.partial(keep, name)) for name, linear in linears]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return collected
