"""Front ends: what comes in, and that the user's model is left as it was."""

import pytest
import torch
from models import FRONT_ENDS, Attention, make_front_ends
from torch import nn

from fxmse.capture.front_ends import capture, copy_graph_module, split_inputs


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_graphs_share_parameters_and_keep_outputs(front_end):
    model, inputs = Attention().eval(), Attention.make_inputs()
    graph_module = capture(*make_front_ends(model, inputs)[front_end])
    assert torch.equal(graph_module(inputs), model(inputs))
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in graph_module.parameters()} == pointers


def test_an_exported_modules_dimensions_may_vary():
    model = Attention()
    graph_module = capture(model, Attention.make_inputs(batch=3))
    for batch in (1, 2, 7):
        inputs = Attention.make_inputs(batch)
        assert torch.equal(graph_module(inputs), model(inputs))


def test_modules_are_captured_in_evaluation_mode_and_stay_in_theirs():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9), nn.Sequential(nn.Linear(4, 4)).eval())
    before = [module.training for module in model.modules()]
    inputs = torch.randn(3, 4)
    graph_module = capture(model, (inputs,))
    assert [module.training for module in model.modules()] == before
    assert torch.equal(graph_module(inputs), model.eval()(inputs))


def test_a_module_without_example_inputs_is_an_error():
    with pytest.raises(ValueError, match="Attention has to be exported, which needs example_inputs"):
        capture(Attention())


def test_a_copys_graph_is_its_own():
    graph_module = torch.fx.symbolic_trace(Attention())
    copied = copy_graph_module(graph_module)
    for node in reversed(copied.graph.nodes):
        copied.graph.erase_node(node)
    assert len(graph_module.graph.nodes) > 0


def test_inputs_come_as_a_dict_a_sequence_or_a_tensor():
    x = torch.zeros(1)
    assert split_inputs({"x": x}) == ((), {"x": x})
    assert split_inputs([x, 1]) == ((x, 1), {})
    assert split_inputs(x) == ((x,), {})
