"""The same BERT with its channels in another order: what differs after quantization is chance.

Which channels share a scale and which values are rounded up or down together changes the outputs of a quantized model
by more than some observers differ. Two observers are told apart by the mean over several orders.
"""

import copy

import torch
from torch import Tensor, nn

__all__ = ["permute_channels"]


@torch.no_grad()
def permute_channels(model: nn.Module, seed: int) -> nn.Module:
    """A copy of a transformers ``BertModel``; its outputs are the same but for their order (and rounding).

    Moved are the hidden channels, each head's values and the intermediate channels of each layer.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randperm(model.config.hidden_size, generator=generator)

    embeddings = model.embeddings
    for table in (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings):
        _permute_columns(table, hidden)
    _permute_rows(embeddings.LayerNorm, hidden)
    for layer in model.encoder.layer:
        attention, output = layer.attention.self, layer.attention.output
        for linear in (attention.query, attention.key, attention.value):
            _permute_columns(linear, hidden)
        size = attention.attention_head_size
        starts = range(0, attention.all_head_size, size)
        values = torch.cat([start + torch.randperm(size, generator=generator) for start in starts])
        _move_between(attention.value, output.dense, values)
        _permute_columns(layer.intermediate.dense, hidden)
        _move_between(
            layer.intermediate.dense,
            layer.output.dense,
            torch.randperm(model.config.intermediate_size, generator=generator),
        )
        for written in (output, layer.output):
            _permute_rows(written.dense, hidden)
            _permute_rows(written.LayerNorm, hidden)
    if model.pooler is not None:
        _permute_columns(model.pooler.dense, hidden)
    return model


def _move_between(first: nn.Module, second: nn.Module, order: Tensor) -> None:
    """Permutes the channels that ``first`` writes and ``second`` reads."""
    _permute_rows(first, order)
    _permute_columns(second, order)


def _permute_rows(module: nn.Module, order: Tensor) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.copy_(parameter[order])


def _permute_columns(module: nn.Module, order: Tensor) -> None:
    module.weight.copy_(module.weight[:, order])  # type: ignore[operator,union-attr,index]
