"""Graphs that were traced on the CPU compute on another device: here on meta, where a tensor of the CPU is an error."""

import pytest
import torch
from architectures import ARCHITECTURES
from torch import nn

import fxmse
from fxmse.passes import MoveToDevice


class Constants(nn.Module):
    """Values that are made on the CPU, in a buffer, of numbers, and under autocast."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4))
        self.register_buffer("passing", torch.ones(4), persistent=False)

    def forward(self, x):
        steps = torch.arange(4, device=x.device) + torch.tensor([1, 2, 3, 4])
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            y = self.linear(x + self.shift)
        return y + steps.to(x.device) * self.passing


def move(graph_module):
    """On meta, parameters too."""
    assert MoveToDevice("meta")(graph_module).modified
    for module in graph_module.modules():
        for name, parameter in list(module._parameters.items()):
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    return graph_module


def test_constants_move_and_what_is_shared_stays():
    model, x = Constants().eval(), torch.randn(2, 4)
    graph_module = torch.export.export(model, (x,)).module()
    assert not MoveToDevice("cpu")(graph_module).modified
    before = graph_module(x)
    moved = move(torch.export.export(model, (x,)).module())
    assert moved(x.to("meta")).is_meta
    assert not MoveToDevice("meta")(moved).modified
    assert torch.equal(graph_module(x), before)
    assert not model.shift.is_meta


@pytest.mark.filterwarnings("ignore:left in float")
@pytest.mark.parametrize("name", ["Llama", "BERT", "Mixtral"])
def test_observed_models_move(name):
    inputs = ARCHITECTURES[name].make_inputs(2, 0)
    observed = fxmse.prepare(ARCHITECTURES[name].make_model().eval(), {"config_groups": {"W4A16": ["Linear"]}}, inputs)
    for node in list(observed.graph.nodes):
        if node.op == "call_module":  # probes, which look at values
            node.replace_all_uses_with(node.args[0])
            observed.graph.erase_node(node)
    observed.recompile()
    outputs = move(observed)(**{name: tensor.to("meta") for name, tensor in inputs.items()})
    assert all(t.is_meta for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor))
