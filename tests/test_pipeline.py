"""The whole path, and everything that bad input must not do."""

import copy
import re

import pytest
import torch
from cases import NVFP4, copies_pytree_specs, make_weight
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
from models import FRONT_ENDS, W8A8, Attention, make_config, make_front_ends
from torch import nn

import fxmse
from fxmse.ops import FAKE_QUANTIZE
from fxmse.passes.probe import find_probes


def make_mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8)).eval()


def make_batches(count=3):
    return [torch.randn(4 + i, 32, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def quantize(**kwargs):
    return fxmse.quantize(make_mlp(), make_config(**kwargs), make_batches(), progress=False)


def get_states(observed):
    return [(probe.name, [t.clone() for t in probe.state if t is not None]) for _, probe in find_probes(observed)]


def assert_equal_states(before, after):
    for (name, old), (_, new) in zip(before, after, strict=True):
        assert len(old) == len(new), name
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True)), name


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_every_front_end_gives_the_same_quantized_model(front_end):
    model, batches = Attention().eval(), [Attention.make_inputs(3, seed) for seed in range(3)]
    observed = fxmse.prepare(*_insert_config(make_front_ends(model, batches[0])[front_end]))
    assert torch.equal(copy.deepcopy(observed)(batches[0]), model(batches[0]))
    assert fxmse.calibrate(observed, batches, progress=False) is observed
    quantized = fxmse.convert(observed)
    reference = fxmse.quantize(torch.fx.symbolic_trace(Attention().eval()), W8A8, batches, progress=False)
    assert torch.equal(quantized(batches[1]), reference(batches[1]))
    scales = {n: t for n, t in reference.state_dict().items() if "scale" in n or "zero_point" in n}
    assert len(scales) == 7
    assert all(torch.equal(quantized.state_dict()[name], tensor) for name, tensor in scales.items())


def _insert_config(model_and_inputs):
    model, inputs = model_and_inputs
    return model, W8A8, inputs


def test_compressed_tensors_gives_the_same_outputs_with_the_same_qparams():
    batches = make_batches()
    config = make_config(inputs={"num_bits": 8, "symmetric": False})
    quantized = fxmse.quantize(make_mlp(), config, batches, progress=False)
    model = make_mlp()
    apply_quantization_config(model, config, show_progress=False)
    missing = model.load_state_dict(quantized.state_dict(), strict=False)
    assert not missing.unexpected_keys
    # compressed-tensors gives symmetric weights a zero point, too: it is 0.
    assert set(missing.missing_keys) == {"0.weight_zero_point", "2.weight_zero_point"}
    assert torch.equal(quantized(batches[0]), model(batches[0]))


def test_a_float_graph_is_left_as_it_was():
    graph_module = torch.fx.symbolic_trace(make_mlp())
    names, code = list(graph_module.state_dict()), graph_module.code
    fxmse.quantize(graph_module, W8A8, make_batches(), progress=False)
    assert (list(graph_module.state_dict()), graph_module.code) == (names, code)


def test_calibration_can_go_on_after_conversion():
    observed = fxmse.prepare(make_mlp(), W8A8, make_batches()[0])
    fxmse.calibrate(observed, make_batches(1), progress=False)
    first = fxmse.convert(observed).state_dict()["0.input_scale"]
    fxmse.calibrate(observed, [10 * batch for batch in make_batches()], progress=False)
    assert fxmse.convert(observed).state_dict()["0.input_scale"] > first


def test_weights_are_searched_once_and_again_only_when_changed(monkeypatch):
    calls = []
    observed = fxmse.prepare(make_mlp(), W8A8, make_batches()[0])
    for _, probe in find_probes(observed):
        if probe.is_weight:
            observe = probe.observer.observe
            monkeypatch.setattr(probe.observer, "observe", lambda v, n=probe.name, o=observe: (calls.append(n), o(v)))
    fxmse.calibrate(observed, make_batches(), progress=False)
    fxmse.calibrate(observed, make_batches(), progress=False)
    assert calls == ["0.weight", "2.weight"]
    with torch.no_grad():
        observed.get_parameter("2.weight").mul_(3)
    observed(make_batches()[0])
    assert calls == ["0.weight", "2.weight", "2.weight"]


def test_a_weight_that_is_not_finite_is_named_each_time():
    observed = fxmse.calibrate(fxmse.prepare(make_mlp(), W8A8, make_batches()[0]), make_batches(), progress=False)
    before = fxmse.convert(observed).state_dict()["2.weight_scale"]
    weight = observed.get_parameter("2.weight").detach()
    kept = weight[0, 0].clone()
    weight[0, 0] = torch.nan
    for _ in range(2):
        with pytest.raises(ValueError, match=r"NaN or Inf in the weights: 2.weight has 1 NaN"):
            fxmse.calibrate(observed, make_batches(), progress=False)
    weight[0, 0] = kept
    fxmse.calibrate(observed, make_batches(), progress=False)
    assert torch.equal(fxmse.convert(observed).state_dict()["2.weight_scale"], before)


def test_weights_only_schemes_need_no_data():
    model = make_mlp()
    observed = fxmse.prepare(torch.fx.symbolic_trace(model), make_config(weights={"num_bits": 4}))
    with_calibration = fxmse.convert(fxmse.calibrate(observed, progress=False))
    without = fxmse.convert(fxmse.prepare(torch.fx.symbolic_trace(model), make_config(weights={"num_bits": 4})))
    x = make_batches()[0]
    assert torch.equal(with_calibration(x), without(x))


@copies_pytree_specs
def test_a_folded_graph_copies_saves_exports_compiles_and_moves(tmp_path):
    quantized, (x, *_) = quantize(inputs={"num_bits": 8}), make_batches()
    expected = quantized(x)
    assert torch.equal(copy.deepcopy(quantized)(x), expected)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(quantized, (x,), dynamic_shapes=dynamic)
    assert sum(node.target is FAKE_QUANTIZE for node in program.graph.nodes) == 4
    torch.export.save(program, tmp_path / "quantized.pt2")
    loaded = torch.export.load(tmp_path / "quantized.pt2").module()
    assert torch.equal(loaded(x), expected)
    assert torch.equal(loaded(x[:2]), quantized(x[:2]))
    torch.testing.assert_close(torch.compile(quantized, fullgraph=True)(x), expected)
    state_dict = quantized.state_dict()
    other = fxmse.quantize(make_mlp(), make_config(inputs={"num_bits": 8}), [2 * x], progress=False)
    other.load_state_dict(state_dict)
    assert torch.equal(other(x), expected)
    moved = copy.deepcopy(quantized).to(torch.bfloat16)
    assert moved(x.bfloat16()).dtype == torch.bfloat16
    assert copy.deepcopy(quantized).to("meta")(x.to("meta")).shape == expected.shape
    # It can be quantized again no more, but trained: the gradient goes straight through.
    quantized(x).sum().backward()
    assert quantized.get_parameter("0.weight").grad.abs().sum() > 0


@copies_pytree_specs
def test_an_observed_graph_compiles_as_a_whole():
    observed = fxmse.prepare(make_mlp(), make_config(inputs={"num_bits": 8}), make_batches()[0])
    expected = copy.deepcopy(observed)
    with torch.no_grad():
        compiled = torch.compile(observed, fullgraph=True)
        for batch in make_batches():
            torch.testing.assert_close(compiled(batch), expected(batch))
    for (name, ours), (_, eager) in zip(get_states(observed), get_states(expected), strict=True):
        torch.testing.assert_close(ours, eager, msg=name)


@copies_pytree_specs
@pytest.mark.parametrize(
    "inputs",
    [
        {"num_bits": 4, "symmetric": False},
        {"num_bits": 8, "observer": "static_minmax"},
        {**NVFP4.model_dump(exclude_unset=True), "dynamic": "local", "group_size": 8},
    ],
    ids=["mse", "minmax", "local"],
)
def test_a_compiled_calibration_sees_what_an_uncompiled_one_does(inputs):
    batches = make_batches(5)
    observed = fxmse.prepare(make_mlp(), make_config(inputs=inputs), batches[0])
    expected = copy.deepcopy(observed)
    fxmse.calibrate(expected, batches, progress=False)
    fxmse.calibrate(observed, batches, compile=True, progress=False)
    for (name, ours), (_, eager) in zip(get_states(observed), get_states(expected), strict=True):
        torch.testing.assert_close(ours, eager, msg=name)


def test_a_compiled_calibration_is_one_graph_and_survives_a_bad_batch():
    observed = fxmse.prepare(make_mlp(), make_config(inputs={"num_bits": 6}), make_batches()[0])
    torch._dynamo.reset()
    batches = make_batches(6)
    bad = batches[3].clone()
    bad[1, 2] = float("nan")
    states = []

    def feed():
        yield from batches[:3]
        states.append(get_states(observed))
        with torch._dynamo.config.patch(error_on_recompile=True):
            yield batches[4]
            states.append(get_states(observed))
            yield bad

    with pytest.raises(ValueError, match=r"NaN or Inf in batch 5: 0.input has 1 NaN and 0 Inf among 224 elements"):
        fxmse.calibrate(observed, feed(), compile=True, progress=False)
    assert_equal_states(states[1], get_states(observed))
    assert not torch.equal(states[0][1][1][0], states[1][1][1][0])
    fxmse.calibrate(observed, batches[:1], compile=True, progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_stay_in_their_dtype(dtype):
    batches = [batch.to(dtype) for batch in make_batches()]
    quantized = fxmse.quantize(make_mlp().to(dtype), W8A8, batches, progress=False)
    assert quantized(batches[0]).dtype == dtype
    assert quantized.state_dict()["0.weight_scale"].dtype == dtype


def test_a_config_may_bring_a_global_scale():
    given = torch.tensor([50.0])
    weights = NVFP4.model_copy(
        update={"observer": "memoryless_mse", "observer_kwargs": {"global_scale": given}, "group_size": 8}
    )
    config = QuantizationConfig(config_groups={"a": QuantizationScheme(targets=["Linear"], weights=weights)})
    quantized = fxmse.quantize(torch.fx.symbolic_trace(make_mlp()), config, progress=False)
    assert torch.equal(quantized.state_dict()["0.weight_global_scale"], given)


def test_weights_on_the_meta_device_are_told_apart():
    observed = fxmse.prepare(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to("meta")), W8A8)
    assert len([probe for _, probe in find_probes(observed) if probe.is_weight]) == 2


def test_progress_is_shown_and_can_be_switched_off(capsys):
    fxmse.quantize(make_mlp(), W8A8, make_batches())
    assert re.search(r"calibrate: 100%.*3/3", capsys.readouterr().err)
    fxmse.quantize(make_mlp(), W8A8, make_batches(), progress=False)
    assert capsys.readouterr().err == ""


# Bad input: a named error, and nothing is lost.


@pytest.mark.parametrize(
    ("value", "described"), [(float("nan"), "2 NaN and 0 Inf"), (float("-inf"), "0 NaN and 2 Inf")]
)
@pytest.mark.parametrize("observer", ["mse", "memoryless_mse", "static_minmax", "minmax"])
def test_a_bad_batch_is_named_and_leaves_every_observer_alone(observer, value, described):
    config = make_config(inputs={"num_bits": 8, "observer": observer})
    observed = fxmse.prepare(make_mlp(), config, make_batches()[0])
    good, last, bad = make_batches()
    bad[1, 3] = bad[2, 5] = value
    fxmse.calibrate(observed, [good], progress=False)
    before = get_states(observed)
    with pytest.raises(ValueError, match=f"NaN or Inf in batch 1: 0.input has {described} among 192 elements"):
        fxmse.calibrate(observed, [bad], progress=False)
    assert_equal_states(before, get_states(observed))
    fxmse.calibrate(observed, [last], progress=False)
    expected = fxmse.prepare(make_mlp(), config, make_batches()[0])
    fxmse.calibrate(expected, [good, last], progress=False)
    assert_equal_states(get_states(expected), get_states(observed))


def test_a_bad_first_batch_leaves_nothing_behind():
    observed = fxmse.prepare(make_mlp(), make_config(inputs={"num_bits": 8}), make_batches()[0])
    with pytest.raises(ValueError, match=r"batch 1: 0.input has"):
        fxmse.calibrate(observed, [torch.full((2, 32), float("nan"))], progress=False)
    with pytest.raises(ValueError, match=r"seen by 0.input; 2.input"):
        fxmse.convert(observed)


NVFP4_8 = make_config(
    weights={**NVFP4.model_dump(), "group_size": 8}, inputs={"num_bits": 8, "strategy": "token", "dynamic": True}
)


@pytest.mark.parametrize("config", [W8A8, NVFP4_8])
def test_a_bad_weight_is_named(config):
    model = make_mlp()
    with torch.no_grad():
        model[2].weight[3, 1:4] = float("nan")
    observed = fxmse.prepare(model, config, make_batches()[0])
    with pytest.raises(ValueError, match=r"NaN or Inf in the weights: 2.weight has 3 NaN and 0 Inf among 192 elements"):
        fxmse.calibrate(observed, make_batches(), progress=False)
    assert not any(tensors for _, tensors in get_states(observed))
    with pytest.raises(ValueError, match=r"2.weight: the weight observer has seen NaN or Inf"):
        fxmse.convert(fxmse.prepare(torch.fx.symbolic_trace(model), config if config is NVFP4_8 else make_config()))


def test_a_failing_batch_leaves_every_observer_alone():
    observed = fxmse.prepare(torch.fx.symbolic_trace(make_mlp()), make_config(inputs={"num_bits": 8}))
    fxmse.calibrate(observed, make_batches(1), progress=False)
    before = get_states(observed)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        fxmse.calibrate(observed, [torch.randn(4, 31)], progress=False)
    assert_equal_states(before, get_states(observed))


def test_an_empty_batch_is_named():
    observed = fxmse.prepare(torch.fx.symbolic_trace(make_mlp()), W8A8)
    with pytest.raises(ValueError, match="batch 2 is empty"):
        fxmse.calibrate(observed, [make_batches()[0], torch.empty(0, 32)], progress=False)


def test_no_data_is_an_error_that_names_the_sites():
    observed = fxmse.prepare(torch.fx.symbolic_trace(make_mlp()), W8A8)
    with pytest.raises(ValueError, match=r"0 batches .* showed nothing to 0.input; 2.input"):
        fxmse.calibrate(observed, [], progress=False)
    with pytest.raises(ValueError, match=r"nothing was seen by 0.input; 2.input"):
        fxmse.convert(observed)


def test_graphs_that_cannot_be_gone_on_with_are_named():
    quantized = quantize()
    with pytest.raises(ValueError, match="folded already"):
        fxmse.convert(quantized)
    with pytest.raises(ValueError, match="folded already"):
        fxmse.calibrate(quantized, make_batches(), progress=False)
    with pytest.raises(ValueError, match="folded already"):
        fxmse.prepare(quantized, W8A8)
    with pytest.raises(ValueError, match=r"no observers: make it with fxmse.prepare"):
        fxmse.convert(torch.fx.symbolic_trace(make_mlp()))


def test_a_value_that_turns_out_not_to_fit_is_named():
    # symbolic_trace knows no shapes: it shows while data runs.
    config = make_config("0", inputs={"strategy": "group", "group_size": 5})
    observed = fxmse.prepare(torch.fx.symbolic_trace(make_mlp()), config)
    with pytest.raises(ValueError, match=r"0.input: group_size=5 does not divide .* \(4, 32\)"):
        fxmse.calibrate(observed, make_batches(), progress=False)


def test_nvfp4_weights_have_a_global_scale():
    weight = make_weight("heavy", rows=8, columns=32)
    model = nn.Sequential(nn.Linear(32, 8, bias=False))
    model[0].weight.data = weight
    config = QuantizationConfig(config_groups={"a": QuantizationScheme(targets=["Linear"], weights=NVFP4)})
    quantized = fxmse.quantize(torch.fx.symbolic_trace(model), config, progress=False)
    assert quantized.state_dict()["0.weight_global_scale"].shape == (1,)
    assert quantized.state_dict()["0.weight_scale"].shape == (8, 2)


@pytest.mark.parametrize(("batches", "kind"), [(torch.randn(6, 8), "tensor"), ({"x": torch.randn(6, 8)}, "dict")])
def test_one_batch_is_not_taken_for_several(batches, kind):
    model, config = nn.Sequential(nn.Linear(8, 4)), make_config(inputs={"num_bits": 8})
    observed = fxmse.prepare(torch.fx.symbolic_trace(model), config)
    for run in (lambda: fxmse.quantize(model, config, batches), lambda: fxmse.calibrate(observed, batches)):
        with pytest.raises(ValueError, match=f"batches is one {kind}: expected a list or another iterable of batches"):
            run()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_an_empty_layer_is_left_alone():
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.none, self.some = nn.Linear(8, 0), nn.Linear(8, 4)

        def forward(self, x):
            return torch.cat([self.none(x), self.some(x)], -1)

    x = torch.randn(2, 8)
    with pytest.warns(UserWarning, match=r"left in float: none \(its weight is empty\)"):
        quantized = fxmse.quantize(Empty(), make_config(inputs={"num_bits": 8}), [x], progress=False)
    assert quantized(x).shape == (2, 4)
    assert {name for name in quantized.state_dict() if "scale" in name} == {"some.weight_scale", "some.input_scale"}
