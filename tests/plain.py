"""A reference of a few lines: the eager model's layers quantized by hand, with nothing of fxmse."""

import copy

import torch
from torch import nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)


def quantize_weight(weight, num_bits=8):
    """Symmetric, a scale for each slice of the first dimension, from its largest magnitude."""
    largest = weight.abs().amax([*range(1, weight.dim())], keepdim=True)
    scale = (largest / ((2**num_bits - 1) / 2)).clamp(min=torch.finfo(weight.dtype).eps)
    limit = 2 ** (num_bits - 1)
    return (weight / scale).round().clamp(-limit, limit - 1) * scale


def quantize_input(x, low, high, num_bits=8):
    """Asymmetric, one scale for all, of a range that is made to hold 0."""
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    scale = torch.tensor((high - low) / (2**num_bits - 1), dtype=x.dtype)
    limit = 2 ** (num_bits - 1)
    zero_point = torch.clamp(torch.round(-limit - low / scale), -limit, limit - 1)
    return ((x / scale + zero_point).round().clamp(-limit, limit - 1) - zero_point) * scale


@torch.no_grad()
def quantize_by_hand(model, batches, x, *, layers=LAYERS, inputs=True):
    """What ``model`` gives for ``x`` with its layers' weights, and inputs by their ranges in ``batches``, quantized."""
    model = copy.deepcopy(model).eval()
    found = {name: module for name, module in model.named_modules() if isinstance(module, layers)}
    ranges = {}

    def see(name, module, args):
        low, high = ranges.get(name, (0.0, 0.0))
        ranges[name] = min(low, args[0].min().item()), max(high, args[0].max().item())

    has_input = {name: m for name, m in found.items() if inputs and not isinstance(m, nn.Embedding)}
    hooks = [m.register_forward_pre_hook(lambda m, args, n=name: see(n, m, args)) for name, m in has_input.items()]
    for batch in batches:
        model(batch.clone())
    for hook in hooks:
        hook.remove()
    quantized = {id(m.weight): nn.Parameter(quantize_weight(m.weight)) for m in found.values()}
    for module in found.values():
        module.weight = quantized[id(module.weight)]
    for name, module in has_input.items():
        module.register_forward_pre_hook(lambda m, args, n=name: (quantize_input(args[0], *ranges[n]), *args[1:]))
    return model(x.clone())
