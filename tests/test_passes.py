"""Every pass on every front end: a golden of the graph, and beside it what the graph means."""

import copy
import dataclasses

import pytest
import torch
from cases import NVFP4, copies_pytree_specs, make_args
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle import fake_quantize
from expecttest import Expect
from models import FRONT_ENDS, W8A8, Attention, Convolutions, make_config, make_front_ends
from printing import print_graph
from torch import nn

from fxmse.capture.front_ends import capture
from fxmse.observers import Observer
from fxmse.ops import FAKE_QUANTIZE
from fxmse.passes import FoldFakeQuant, FunctionalizeModules, InsertObservers
from fxmse.passes.base import GraphPass
from fxmse.passes.probe import Probe, find_probes


def capture_from(front_end, model, inputs):
    return capture(*make_front_ends(model, inputs)[front_end])


def observe_and_fold(graph_module, *inputs):
    with torch.no_grad():
        for value in inputs:
            graph_module(value)
    return FoldFakeQuant()(graph_module)


def test_functionalize_golden():
    graph_module = torch.fx.symbolic_trace(Attention())
    assert FunctionalizeModules()(graph_module).modified
    Expect("""\
tokens = input
embedding_1 = embedding(tokens, self.embedding.weight, padding_idx=None, scale_grad_by_freq=False, sparse=False)
linear = linear(embedding_1, self.query.weight, self.query.bias)
linear_1 = linear(embedding_1, self.key.weight, None)
mul = mul(linear, linear_1)
linear_2 = linear(mul, self.head.weight, None)
return linear_2""").assert_expected(print_graph(graph_module))


def test_functionalize_convolutions_golden():
    graph_module = torch.fx.symbolic_trace(Convolutions())
    assert FunctionalizeModules()(graph_module).modified
    Expect("""\
x = input
conv1d = conv1d(x, self.one.weight, self.one.bias, [1], same, [1], 1)
getitem = getitem(conv1d, [slice(None, None, None), None])
conv2d = conv2d(getitem, self.two.weight, None, [2, 2], [0, 0], [1, 1], 1)
getitem_1 = getitem(conv2d, [slice(None, None, None), None])
conv3d = conv3d(getitem_1, self.three.weight, self.three.bias, [1, 1, 1], [0, 0, 0], [1, 1, 1], 1)
flatten = .flatten(conv3d, 1, 2)
linear = linear(input=flatten, weight=self.projection)
return linear""").assert_expected(print_graph(graph_module))


@pytest.mark.parametrize("model_class", [Attention, Convolutions])
def test_functionalize_keeps_outputs_state_dict_and_the_users_model(model_class):
    model, inputs = model_class(), model_class.make_inputs()
    graph_module = torch.fx.symbolic_trace(model)
    names = list(graph_module.state_dict())
    FunctionalizeModules()(graph_module)
    assert not FunctionalizeModules()(graph_module).modified
    assert torch.equal(graph_module(inputs), model(inputs))
    assert list(graph_module.state_dict()) == names
    modules = dict(model.named_modules())
    assert not any(modules.get(name) is module for name, module in graph_module.named_modules() if name)


class Unusual(nn.Module):
    """Calls that look like those of plain layers and are not."""

    def __init__(self):
        super().__init__()
        self.padded = nn.Conv1d(8, 8, 3, padding=1, padding_mode="reflect")
        self.renormed = nn.Embedding(4, 8, max_norm=1.0)
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda module, args, output: output * 2)
        self.subclass = type("Doubled", (nn.Linear,), {"forward": lambda self, x: nn.Linear.forward(self, x) * 2})(8, 8)

    def forward(self, x):
        return self.padded(self.subclass(self.hooked(self.renormed(x))).transpose(1, 2))


def test_functionalize_leaves_unusual_modules_alone():
    model, inputs = Unusual(), torch.tensor([[0, 1, 3]])
    graph_module = torch.fx.symbolic_trace(model)
    assert not FunctionalizeModules()(graph_module).modified
    assert torch.equal(graph_module(inputs), model(inputs))


def test_unusual_modules_that_are_targeted_are_said_to_stay_float():
    graph_module = torch.fx.symbolic_trace(Unusual())
    said = r"left in float: renormed \(its hooks, options or own forward hide its weight\); hooked \(.*; padded \("
    with pytest.warns(UserWarning, match=said):
        InsertObservers(make_config("Linear", "Conv1d", "Embedding"))(graph_module)
    # The subclass is traced through: its weight is in the graph.
    assert [site.name for _, probe in find_probes(graph_module) for site in probe.sites] == ["subclass.weight"]


# Three front ends give the same graph, to the letter.
_INSERTED_EXPORTED = Expect("""\
tokens = input
embedding = aten.embedding(self.head.weight, tokens)
query_weight_observer = self.query.weight_observer(self.query.weight)
query_input_observer = self.query.input_observer(embedding)
linear = aten.linear(query_input_observer, query_weight_observer, self.query.bias)
key_weight_observer = self.key.weight_observer(self.key.weight)
linear_1 = aten.linear(query_input_observer, key_weight_observer)
mul = aten.mul(linear, linear_1)
head_weight_observer = self.head.weight_observer(self.head.weight)
head_input_observer = self.head.input_observer(mul)
linear_2 = aten.linear(head_input_observer, head_weight_observer)
return [linear_2]""")
INSERTED = {
    "symbolic_trace": Expect("""\
tokens = input
embedding_1 = embedding(tokens, self.embedding.weight, padding_idx=None, scale_grad_by_freq=False, sparse=False)
query_weight_observer = self.query.weight_observer(self.query.weight)
query_input_observer = self.query.input_observer(embedding_1)
linear = linear(query_input_observer, query_weight_observer, self.query.bias)
key_weight_observer = self.key.weight_observer(self.key.weight)
linear_1 = linear(query_input_observer, key_weight_observer, None)
mul = mul(linear, linear_1)
head_weight_observer = self.head.weight_observer(self.head.weight)
head_input_observer = self.head.input_observer(mul)
linear_2 = linear(head_input_observer, head_weight_observer, None)
return linear_2"""),
    "export": _INSERTED_EXPORTED,
    "export_strict": Expect("""\
tokens = input
embedding = aten.embedding(self.embedding.weight, tokens)
query_weight_observer = self.query.weight_observer(self.query.weight)
query_input_observer = self.query.input_observer(embedding)
linear = aten.linear(query_input_observer, query_weight_observer, self.query.bias)
key_weight_observer = self.key.weight_observer(self.key.weight)
linear_1 = aten.linear(query_input_observer, key_weight_observer)
mul = aten.mul(linear, linear_1)
head_weight_observer = self.head.weight_observer(self.embedding.weight)
head_input_observer = self.head.input_observer(mul)
linear_2 = aten.linear(head_input_observer, head_weight_observer)
return [linear_2]"""),
    "export_module": _INSERTED_EXPORTED,
    "module": _INSERTED_EXPORTED,
}


@copies_pytree_specs
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_insert_observers_golden(front_end):
    model, inputs = Attention().eval(), Attention.make_inputs()
    graph_module = capture_from(front_end, model, inputs)
    assert InsertObservers(W8A8)(graph_module).modified
    INSERTED[front_end].assert_expected(print_graph(graph_module))
    # The observed graph computes what the model computes, and a second run changes nothing.
    assert torch.equal(graph_module(inputs), model(inputs))
    before = print_graph(graph_module)
    assert not InsertObservers(W8A8)(graph_module).modified
    assert print_graph(graph_module) == before
    # query and key read one value, and have one probe; the probes are named after the sites.
    sites = [[site.name for site in probe.sites] for _, probe in find_probes(graph_module)]
    assert sites == [["query.weight"], ["query.input", "key.input"], ["key.weight"], ["head.weight"], ["head.input"]]
    copied = copy.deepcopy(graph_module)
    assert torch.equal(copied(inputs), model(inputs))


# Three front ends give the same graph, to the letter.
_FOLDED_EXPORTED = Expect("""\
tokens = input
embedding = aten.embedding(self.head.weight, tokens)
query_weight_fake_quant = fxmse.fake_quantize(self.query.weight, self.query.weight_scale, None, None, 8, int, channel)
query_input_fake_quant = fxmse.fake_quantize(embedding, self.query.input_scale, self.query.input_zero_point, None, 8, int, tensor)
linear = aten.linear(query_input_fake_quant, query_weight_fake_quant, self.query.bias)
key_weight_fake_quant = fxmse.fake_quantize(self.key.weight, self.key.weight_scale, None, None, 8, int, channel)
linear_1 = aten.linear(query_input_fake_quant, key_weight_fake_quant)
mul = aten.mul(linear, linear_1)
head_weight_fake_quant = fxmse.fake_quantize(self.head.weight, self.head.weight_scale, None, None, 8, int, channel)
head_input_fake_quant = fxmse.fake_quantize(mul, self.head.input_scale, self.head.input_zero_point, None, 8, int, tensor)
linear_2 = aten.linear(head_input_fake_quant, head_weight_fake_quant)
return [linear_2]""")
FOLDED = {
    "symbolic_trace": Expect("""\
tokens = input
embedding_1 = embedding(tokens, self.embedding.weight, padding_idx=None, scale_grad_by_freq=False, sparse=False)
query_weight_fake_quant = fxmse.fake_quantize(self.query.weight, self.query.weight_scale, None, None, 8, int, channel)
query_input_fake_quant = fxmse.fake_quantize(embedding_1, self.query.input_scale, self.query.input_zero_point, None, 8, int, tensor)
linear = linear(query_input_fake_quant, query_weight_fake_quant, self.query.bias)
key_weight_fake_quant = fxmse.fake_quantize(self.key.weight, self.key.weight_scale, None, None, 8, int, channel)
linear_1 = linear(query_input_fake_quant, key_weight_fake_quant, None)
mul = mul(linear, linear_1)
head_weight_fake_quant = fxmse.fake_quantize(self.head.weight, self.head.weight_scale, None, None, 8, int, channel)
head_input_fake_quant = fxmse.fake_quantize(mul, self.head.input_scale, self.head.input_zero_point, None, 8, int, tensor)
linear_2 = linear(head_input_fake_quant, head_weight_fake_quant, None)
return linear_2"""),
    "export": _FOLDED_EXPORTED,
    "export_strict": Expect("""\
tokens = input
embedding = aten.embedding(self.embedding.weight, tokens)
query_weight_fake_quant = fxmse.fake_quantize(self.query.weight, self.query.weight_scale, None, None, 8, int, channel)
query_input_fake_quant = fxmse.fake_quantize(embedding, self.query.input_scale, self.query.input_zero_point, None, 8, int, tensor)
linear = aten.linear(query_input_fake_quant, query_weight_fake_quant, self.query.bias)
key_weight_fake_quant = fxmse.fake_quantize(self.key.weight, self.key.weight_scale, None, None, 8, int, channel)
linear_1 = aten.linear(query_input_fake_quant, key_weight_fake_quant)
mul = aten.mul(linear, linear_1)
head_weight_fake_quant = fxmse.fake_quantize(self.embedding.weight, self.head.weight_scale, None, None, 8, int, channel)
head_input_fake_quant = fxmse.fake_quantize(mul, self.head.input_scale, self.head.input_zero_point, None, 8, int, tensor)
linear_2 = aten.linear(head_input_fake_quant, head_weight_fake_quant)
return [linear_2]"""),
    "export_module": _FOLDED_EXPORTED,
    "module": _FOLDED_EXPORTED,
}


def quantize_by_hand(model, inputs):
    """The same by compressed-tensors' fake_quantize, with observers that are shown the float model's values by hand."""
    weight_args, input_args = make_args(8, strategy="channel"), make_args(8, symmetric=False)

    def quantize(value, seen, base_name, args, name):
        found = Observer.load_from_registry(name, base_name=base_name, args=args)(seen).get_qparams()
        return fake_quantize(value, found["scale"], found["zero_point"], args)

    def run(x, weights):
        return nn.functional.linear(x, weights[0], model.query.bias) * nn.functional.linear(x, weights[1])

    floats = [module.weight for module in (model.query, model.key, model.head)]
    weights = [quantize(weight, weight, "weight", weight_args, "exact_mse") for weight in floats]
    x = model.embedding(inputs)
    y = run(quantize(x, x, "input", input_args, "exact_mse"), weights)
    return nn.functional.linear(quantize(y, run(x, floats), "input", input_args, "exact_mse"), weights[2])


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_fold_golden(front_end):
    model, inputs = Attention().eval(), Attention.make_inputs()
    graph_module = capture_from(front_end, model, inputs)
    InsertObservers(W8A8)(graph_module)
    assert observe_and_fold(graph_module, inputs).modified
    FOLDED[front_end].assert_expected(print_graph(graph_module))
    with torch.no_grad():
        assert torch.equal(graph_module(inputs), quantize_by_hand(model, inputs))
    assert not FoldFakeQuant()(graph_module).modified
    names = set(graph_module.state_dict())
    assert {"query.weight_scale", "query.input_scale", "query.input_zero_point", "head.weight_scale"} <= names
    assert not any("observer" in name for name in names)
    assert not any(isinstance(module, Probe) for module in graph_module.modules())
    assert not any(hasattr(model.query, name) for name in ("weight_scale", "weight_observer"))


def test_insert_observers_convolutions_golden():
    graph_module = torch.fx.symbolic_trace(Convolutions())
    InsertObservers(make_config("Conv1d", "Conv2d", "Conv3d", "Linear", inputs={"num_bits": 8}))(graph_module)
    Expect("""\
x = input
flatten_1 = flatten(self.one.weight, 1)
one_weight_observer = self.one.weight_observer(flatten_1)
reshape = reshape(one_weight_observer, [6, 4, 3])
one_input_observer = self.one.input_observer(x)
conv1d = conv1d(one_input_observer, reshape, self.one.bias, [1], same, [1], 1)
getitem = getitem(conv1d, [slice(None, None, None), None])
flatten_2 = flatten(self.two.weight, 1)
two_weight_observer = self.two.weight_observer(flatten_2)
reshape_1 = reshape(two_weight_observer, [2, 1, 3, 2])
two_input_observer = self.two.input_observer(getitem)
conv2d = conv2d(two_input_observer, reshape_1, None, [2, 2], [0, 0], [1, 1], 1)
getitem_1 = getitem(conv2d, [slice(None, None, None), None])
flatten_3 = flatten(self.three.weight, 1)
three_weight_observer = self.three.weight_observer(flatten_3)
reshape_2 = reshape(three_weight_observer, [2, 1, 1, 1, 1])
three_input_observer = self.three.input_observer(getitem_1)
conv3d = conv3d(three_input_observer, reshape_2, self.three.bias, [1, 1, 1], [0, 0, 0], [1, 1, 1], 1)
flatten = .flatten(conv3d, 1, 2)
projection_weight_observer = self.projection_weight_observer(self.projection)
projection_input_observer = self.projection_input_observer(flatten)
linear = linear(input=projection_input_observer, weight=projection_weight_observer)
return linear""").assert_expected(print_graph(graph_module))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("strategy", [{}, {"strategy": "channel"}, {"strategy": "group", "group_size": 1}])
def test_convolutions_are_quantized_as_rows(front_end, strategy):
    model, inputs = Convolutions().eval(), Convolutions.make_inputs()
    graph_module = capture_from(front_end, model, inputs)
    config = make_config(
        "Conv1d", "Conv2d", "Conv3d", "Linear", weights={"num_bits": 4, "observer": "memoryless_mse", **strategy}
    )
    InsertObservers(config)(graph_module)
    assert torch.equal(graph_module(inputs), model(inputs))
    assert not InsertObservers(config)(graph_module).modified
    observe_and_fold(graph_module, inputs)
    args = make_args(4, **strategy)
    quantized = copy.deepcopy(model)
    for parameter in (quantized.one.weight, quantized.two.weight, quantized.three.weight, quantized.projection):
        rows = parameter.data.flatten(1)
        found = Observer.load_from_registry("memoryless_mse", base_name="weight", args=args)(rows).get_qparams()
        parameter.data = fake_quantize(rows, found["scale"], found["zero_point"], args).reshape(parameter.shape)
    torch.testing.assert_close(graph_module(inputs), quantized(inputs), rtol=0, atol=0)
    assert "projection_weight_scale" in graph_module.state_dict()


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_tied_weights_stay_tied(front_end):
    model, inputs = Attention().eval(), Attention.make_inputs()
    graph_module = capture_from(front_end, model, inputs)
    InsertObservers(make_config("Linear", "Embedding"))(graph_module)
    (tied,) = [probe for _, probe in find_probes(graph_module) if len(probe.sites) == 2]
    assert [site.name for site in tied.sites] == ["embedding.weight", "head.weight"]
    observe_and_fold(graph_module, inputs)
    scales = [name for name in graph_module.state_dict() if name.endswith("weight_scale")]
    assert sorted(scales) == ["embedding.weight_scale", "key.weight_scale", "query.weight_scale"]


def test_tied_weights_of_different_formats_have_a_probe_each():
    config = QuantizationConfig(
        config_groups={
            "a": QuantizationScheme(targets=["Linear"], weights=make_args(4, strategy="channel")),
            "b": QuantizationScheme(targets=["Embedding"], weights=make_args(8, strategy="channel")),
        }
    )
    graph_module = torch.fx.symbolic_trace(Attention())
    InsertObservers(config)(graph_module)
    observe_and_fold(graph_module, Attention.make_inputs())
    assert {"embedding.weight_scale", "head.weight_scale"} <= set(graph_module.state_dict())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.fc(x)))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_module_that_is_called_twice_has_one_observer(front_end):
    model, inputs = Twice().eval(), torch.randn(3, 4)
    graph_module = capture_from(front_end, model, inputs)
    inputs_config = {"num_bits": 8, "observer": "static_minmax"}
    InsertObservers(make_config(inputs=inputs_config))(graph_module)
    probes = [probe for _, probe in find_probes(graph_module) if not probe.is_weight]
    assert len(probes) == 2
    assert probes[0] is probes[1]
    observe_and_fold(graph_module, inputs)
    both = torch.cat([inputs, torch.relu(model.fc(inputs))])
    expected = Observer.load_from_registry("static_minmax", base_name="input", args=make_args(8))(both).get_qparams()
    assert torch.equal(graph_module.get_buffer("fc.input_scale"), expected["scale"])


def test_outputs_are_observed_between_the_op_and_all_its_readers():
    model, inputs = Twice().eval(), torch.randn(3, 4)
    config = make_config(outputs={"num_bits": 8, "observer": "static_minmax"}, inputs={"num_bits": 4})
    graph_module = torch.fx.symbolic_trace(model)
    InsertObservers(config)(graph_module)
    assert not InsertObservers(config)(graph_module).modified
    assert torch.equal(graph_module(inputs), model(inputs))
    observe_and_fold(graph_module, inputs)
    Expect("""\
x = input
fc_weight_fake_quant = fxmse.fake_quantize(self.fc.weight, self.fc.weight_scale, None, None, 8, int, channel)
fc_input_fake_quant = fxmse.fake_quantize(x, self.fc.input_scale, None, None, 4, int, tensor)
linear = linear(fc_input_fake_quant, fc_weight_fake_quant, self.fc.bias)
fc_output_fake_quant = fxmse.fake_quantize(linear, self.fc.output_scale, None, None, 8, int, tensor)
relu = relu(fc_output_fake_quant)
fc_input_fake_quant_1 = fxmse.fake_quantize(relu, self.fc.input_scale, None, None, 4, int, tensor)
linear_1 = linear(fc_input_fake_quant_1, fc_weight_fake_quant, self.fc.bias)
fc_output_fake_quant_1 = fxmse.fake_quantize(linear_1, self.fc.output_scale, None, None, 8, int, tensor)
return fc_output_fake_quant_1""").assert_expected(print_graph(graph_module))


def test_an_output_and_the_next_input_of_equal_format_share_a_probe():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    args = {"num_bits": 8, "observer": "static_minmax"}
    graph_module = torch.fx.symbolic_trace(model)
    InsertObservers(make_config(inputs=args, outputs=args))(graph_module)
    sites = [[site.name for site in probe.sites] for _, probe in find_probes(graph_module)]
    assert ["0.output", "1.input"] in sites
    assert not InsertObservers(make_config(inputs=args, outputs=args))(graph_module).modified


def test_readers_that_are_no_sites_read_the_value_as_it_is():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.fc(x)

    graph_module = torch.fx.symbolic_trace(Residual())
    InsertObservers(W8A8)(graph_module)
    Expect("""\
x = input
fc_weight_observer = self.fc.weight_observer(self.fc.weight)
fc_input_observer = self.fc.input_observer(x)
linear = linear(fc_input_observer, fc_weight_observer, self.fc.bias)
add = add(x, linear)
return add""").assert_expected(print_graph(graph_module))


def test_what_stays_float_is_said_once():
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(nn.functional.linear(x, self.weight * x.mean()))

    graph_module = torch.fx.symbolic_trace(Computed())
    with pytest.warns(
        UserWarning, match=r"left in float: linear \(its weight depends on the data, or the graph writes it\)$"
    ):
        InsertObservers(make_config())(graph_module)
    graph_module = torch.fx.symbolic_trace(Attention())
    with pytest.warns(UserWarning, match=r"left in float: the input of embedding \(it is an index\)$"):
        InsertObservers(make_config("Linear", "Embedding", inputs={"num_bits": 8}))(graph_module)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (
            make_config(weights={"num_bits": 4, "strategy": "group", "group_size": 3}),
            "query.weight: group_size=3",
        ),
        (
            make_config(inputs={"num_bits": 8, "strategy": "group", "group_size": 3}),
            "query.input: group_size=3",
        ),
        (make_config(weights={"num_bits": 8, "observer": "mesh"}), "query.weight: observer='mesh'"),
        (make_config(weights={"observer_kwargs": {"gird": 3}}), "query.weight: .*no argument 'gird'"),
        (make_config("LSTM"), r"targets \['LSTM'\].*matched nothing.*Embedding \(embedding\), Linear \(head\)"),
        (make_config(weights={"dynamic": True}), "query.weight: dynamic=True: weights are static"),
        (
            make_config(weights={"num_bits": 4, "strategy": "group", "group_size": 5}, ignore=["query"]),
            r"cannot be quantized so:\n  key.weight: group_size=5 .*\n  head.weight: group_size=5",
        ),
    ],
)
def test_insert_observers_names_what_does_not_fit_and_changes_nothing(config, named):
    model, inputs = Attention().eval(), Attention.make_inputs()
    graph_module = capture_from("export", model, inputs)
    before = print_graph(graph_module)
    with pytest.raises(ValueError, match=named) as caught:
        InsertObservers(config)(graph_module)
    assert caught.value.__notes__ == ["while running the pass InsertObservers"]
    assert print_graph(graph_module) == before


def test_convolution_inputs_have_no_groups():
    config = make_config("Conv1d", inputs={"strategy": "group", "group_size": 1})
    with pytest.raises(ValueError, match=r"one.input: strategy=group needs the channels in the last dimension"):
        InsertObservers(config)(torch.fx.symbolic_trace(Convolutions()))


def test_a_folded_graph_is_not_observed_again():
    graph_module = torch.fx.symbolic_trace(Attention())
    InsertObservers(W8A8)(graph_module)
    observe_and_fold(graph_module, Attention.make_inputs())
    with pytest.raises(ValueError, match="folded already"):
        InsertObservers(W8A8)(graph_module)


def test_fold_names_all_that_saw_nothing_and_changes_nothing():
    graph_module = torch.fx.symbolic_trace(Attention())
    InsertObservers(W8A8)(graph_module)
    before = print_graph(graph_module)
    with pytest.raises(ValueError, match=r"seen by query.input, key.input; head.input: run"):
        FoldFakeQuant()(graph_module)
    assert print_graph(graph_module) == before


def test_passes_are_frozen_values():
    assert InsertObservers(W8A8) == InsertObservers(copy.deepcopy(W8A8))
    assert "W8A8" not in repr(FoldFakeQuant())
    assert all(issubclass(p, GraphPass) for p in (InsertObservers, FoldFakeQuant, FunctionalizeModules))
    with pytest.raises(dataclasses.FrozenInstanceError):
        InsertObservers(W8A8).config = None
    assert not FoldFakeQuant()(torch.fx.symbolic_trace(Attention())).modified


FORMATS = {
    "tensor_group": NVFP4.model_copy(update={"group_size": 8}),
    "block": make_args(8, "float", "block", block_structure=[3, 5]),
    "group_asymmetric": make_args(4, strategy="group", group_size=4, symmetric=False),
}


@pytest.mark.parametrize("name", FORMATS)
def test_folded_weights_equal_compressed_tensors(name):
    args = FORMATS[name]
    model = nn.Sequential(nn.Linear(16, 7)).eval()
    graph_module = torch.fx.symbolic_trace(model)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    InsertObservers(QuantizationConfig(config_groups={"a": scheme}))(graph_module)
    inputs = torch.randn(3, 16)
    observe_and_fold(graph_module, inputs)
    buffers = dict(graph_module.named_buffers())
    weight = fake_quantize(
        model[0].weight.data,
        buffers["0.weight_scale"],
        buffers.get("0.weight_zero_point"),
        args,
        global_scale=buffers.get("0.weight_global_scale"),
    )
    assert torch.equal(graph_module(inputs), nn.functional.linear(inputs, weight, model[0].bias))
    assert ("0.weight_global_scale" in buffers) == (name == "tensor_group")
    assert any(node.target is FAKE_QUANTIZE for node in graph_module.graph.nodes)
