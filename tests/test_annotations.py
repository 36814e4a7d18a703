"""Sites from a quantizer's annotations, beside what PT2E makes of the same ones."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from torch import nn

pytest.importorskip("torchao", reason="pip install 'fxmse[int8]'")

from torchao.quantization.pt2e import (
    MinMaxObserver,
    ObserverBase,
    PerChannelMinMaxObserver,
    quantize_pt2e,
)
from torchao.quantization.pt2e.quantizer import (
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

import fxmse
from fxmse.capture.front_ends import copy_graph_module
from fxmse.passes import LowerToQDQ
from fxmse.passes.probe import find_probes
from fxmse.pt2e import use_observer

pytestmark = pytest.mark.filterwarnings("ignore")
aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Specs:
    activation: QuantizationSpec
    weight: QuantizationSpec


_ACTIVATION = QuantizationSpec(torch.uint8, MinMaxObserver, 0, 255, torch.per_tensor_affine)
_WEIGHT = QuantizationSpec(torch.int8, PerChannelMinMaxObserver, -128, 127, torch.per_channel_symmetric, ch_axis=0)
# By ranges that fxmse has, too.
SPECS = {
    "joining": Specs(_ACTIVATION, _WEIGHT),
    "x86": dataclasses.replace(
        x86.get_default_x86_inductor_quantization_config(), input_activation=_ACTIVATION, weight=_WEIGHT
    ),
}


class Net(nn.Module):
    """A norm to fold, a shortcut, joined values, a layer that is called twice, a weight that is read by two."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.norm.running_mean.normal_()
        self.second, self.pool = nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2)
        self.fc, self.last = nn.Linear(16, 8), nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.last.weight

    def forward(self, x):
        y = self.norm(self.conv(x)).relu()
        z = (self.second(y) + y).relu()
        z = torch.cat([self.pool(z), self.pool(y)], 1)
        return self.tied(self.last(self.last(self.fc(z.mean((2, 3))).relu())))


class JoiningQuantizer(Quantizer):
    """Products, and cats whose inputs and output have one scale."""

    def __init__(self, specs=None):
        specs = specs or SPECS["joining"]
        self.activation, self.weight = specs.activation, specs.weight

    def annotate(self, model):
        for node in model.graph.nodes:
            if node.target in (aten.conv2d.default, aten.linear.default):
                specs = {node.args[0]: self.activation, node.args[1]: self.weight}
                node.meta["quantization_annotation"] = QuantizationAnnotation(specs, _annotated=True)
            elif node.target is aten.cat.default:
                first, *others = node.args[0]
                shared = SharedQuantizationSpec((first, node))
                specs = {first: self.activation, **dict.fromkeys(others, shared)}
                node.meta["quantization_annotation"] = QuantizationAnnotation(specs, shared, _annotated=True)
        return model

    def validate(self, model):
        pass


def make_x86(config=None):
    return x86.X86InductorQuantizer().set_global(config or x86.get_default_x86_inductor_quantization_config())


QUANTIZERS = {"x86": make_x86, "joining": JoiningQuantizer}


@pytest.fixture(scope="module")
def program():
    return torch.export.export(Net().eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},))


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(3)]


def find_observed_by_pt2e(prepared):
    """The observers by the values that they see."""
    modules = dict(prepared.named_modules(remove_duplicate=False))
    by_observer = {}
    for node in prepared.graph.find_nodes(op="call_module"):
        if isinstance(modules[node.target], ObserverBase):
            by_observer.setdefault(modules[node.target], set()).add(node.args[0].name)
    return {tuple(sorted(names)): observer for observer, names in by_observer.items()}


def find_observed(observed):
    """The same of fxmse's probes."""
    by_probe = {}
    for node, probe in find_probes(observed):
        value = node.args[0]
        while probe.is_weight and value.op != "get_attr":
            value = value.args[0]
        by_probe.setdefault(probe, set()).add(value.name)
    return {tuple(sorted(names)): probe for probe, names in by_probe.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", QUANTIZERS)
def test_with_pt2es_own_ranges_qparams_are_pt2es(program, batches, name):
    prepared = quantize_pt2e.prepare_pt2e(program.module(), QUANTIZERS[name](SPECS[name]))
    observed = fxmse.prepare(program, quantizer=QUANTIZERS[name](use_observer(SPECS[name], "static_minmax")))
    for batch in batches:
        prepared(batch)
    fxmse.calibrate(observed, batches, progress=False)
    expected, found = find_observed_by_pt2e(prepared), find_observed(observed)
    assert found.keys() == expected.keys()
    assert name != "joining" or ("cat", "max_pool2d", "max_pool2d_1") in found
    for names, probe in found.items():
        scale, zero_point = expected[names].calculate_qparams()
        own = probe.observer.get_qparams()
        torch.testing.assert_close(own["scale"].flatten(), scale, rtol=1e-6, atol=0)
        shift = 0 if probe.is_weight else 128
        assert torch.equal(own["zero_point"].flatten() + shift, zero_point.to(own["zero_point"].dtype)), names


@torch.no_grad()
@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_is_annotated_is_calibrated_folded_and_lowered(program, batches, name):
    state = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    quantized = fxmse.quantize(program, None, batches, quantizer=QUANTIZERS[name](), progress=False)
    expected = program.module()(batches[0])
    assert 0 < (quantized(batches[0]) - expected).norm() < 0.05 * expected.norm()
    assert all(torch.equal(tensor, state[name]) for name, tensor in program.state_dict.items())
    assert not any(node.target is aten.batch_norm.default for node in quantized.graph.nodes)
    folded = quantized(batches[0])
    LowerToQDQ()(quantized)
    torch.testing.assert_close(quantized(batches[0]), folded, rtol=0, atol=0.02 * expected.abs().max().item())
    targets = [node.target for node in quantized.graph.nodes]
    assert targets.count(torch.ops.quantized_decomposed.dequantize_per_channel.default) == 4  # last and tied are one
    assert not any(fxmse.ops.is_fake_quantize(node) for node in quantized.graph.nodes)


def test_sites_are_called_after_who_reads_them(program):
    observed = fxmse.prepare(program, quantizer=JoiningQuantizer())
    assert sorted({probe.name for _, probe in find_probes(observed)}) == [
        "cat_input, cat_1_input, mean_input",
        "conv.input",
        "conv.weight",
        "fc.input",
        "fc.weight",
        "last.input",
        "last.linear_2_input",
        "last.weight, tied.weight",
        "second.input",
        "second.weight",
        "tied.input",
    ]


class FreeQuantizer(Quantizer):
    """Annotates by a function of a node: specs of its inputs, and of its output."""

    def __init__(self, annotate):
        self._annotate = annotate

    def annotate(self, model):
        for node in model.graph.nodes:
            if found := self._annotate(node):
                node.meta["quantization_annotation"] = QuantizationAnnotation(*found, _annotated=True)
        return model

    def validate(self, model):
        pass


def annotate_linear(activation=_ACTIVATION, weight=_WEIGHT, output=None):
    return FreeQuantizer(
        lambda node: (
            ({node.args[0]: activation, node.args[1]: weight}, output) if node.target is aten.linear.default else None
        )
    )


def prepare_linears(quantizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    return fxmse.prepare(model, None, torch.randn(4, 8), quantizer=quantizer)


def test_a_format_is_that_of_the_spec():
    spec = dataclasses.replace(_ACTIVATION, dtype=torch.int8, quant_min=-64, quant_max=63)
    weight = dataclasses.replace(_WEIGHT, quant_min=-127)
    observed = prepare_linears(annotate_linear(use_observer(Specs(spec, spec), "mse", grid=50.0).activation, weight))
    sites = {site.name: site.args for _, probe in find_probes(observed) for site in probe.sites}
    assert {name: (args.num_bits, args.symmetric, args.strategy) for name, args in sites.items()} == {
        "0.input": (7, False, "tensor"),
        "0.weight": (8, True, "channel"),
        "1.input": (7, False, "tensor"),
        "1.weight": (8, True, "channel"),
    }
    assert sites["0.input"].observer == "mse"
    assert sites["0.input"].observer_kwargs == {"grid": 50.0}
    assert sites["0.weight"].observer == "exact_mse"


def test_dynamic_specs_have_dynamic_sites():
    config = x86.get_default_x86_inductor_quantization_config(is_dynamic=True)
    observed = prepare_linears(make_x86(config))
    dynamic = [site.name for _, probe in find_probes(observed) for site in probe.sites if site.args.dynamic]
    assert sorted(dynamic) == ["0.input", "1.input"]
    quantized = fxmse.convert(fxmse.calibrate(observed, progress=False), progress=False)
    x = 100 * torch.randn(4, 8)  # nothing was calibrated
    expected = observed(x)
    assert 0 < (quantized(x) - expected).norm() < 0.02 * expected.norm()


def test_an_output_that_nothing_else_reads_is_a_site():
    observed = prepare_linears(annotate_linear(output=_ACTIVATION))
    names = sorted(site.name for _, probe in find_probes(observed) for site in probe.sites)
    assert names == ["0.input", "0.weight", "1.input", "1.linear_1_output", "1.weight"]


FIXED = FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 0, 0, 255, torch.per_tensor_affine)
LEFT = {
    "a fixed scale": (
        annotate_linear(FIXED),
        "FixedQParamsObserver of torch.uint8: expected int8 or uint8 with scales to be found",
    ),
    "another dtype": (
        annotate_linear(dataclasses.replace(_ACTIVATION, dtype=torch.int32, quant_min=None, quant_max=None)),
        "MinMaxObserver of torch.int32",
    ),
    "channels of an input": (annotate_linear(weight=dataclasses.replace(_WEIGHT, ch_axis=1)), "ch_axis=1: expected 0"),
    "two specs in a row": (
        annotate_linear(output=dataclasses.replace(_ACTIVATION, quant_max=127)),
        "quantized by another spec already",
    ),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", LEFT)
def test_what_stays_float_is_said(name):
    quantizer, reason = LEFT[name]
    with pytest.warns(UserWarning, match=f"left in float: .*{reason}"):
        observed = prepare_linears(quantizer)
    assert any(reason in found for _, found in observed.meta["fxmse_left_in_float"])


@pytest.mark.filterwarnings("default")
def test_branches_stay_float():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.yes, self.no = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return torch.cond(x.sum() > 0, self.yes, self.no, (self.first(x),))

    program = torch.export.export(Branch().eval(), (torch.randn(4, 8),))
    with pytest.warns(UserWarning, match="left in float: .*yes.*in a branch or loop"):
        observed = fxmse.prepare(program, quantizer=make_x86())
    assert sorted({probe.name for _, probe in find_probes(observed)}) == ["first.input", "first.weight"]


def test_errors_say_what_to_do(program):
    with pytest.raises(ValueError, match="expected one of them, to say what is quantized"):
        fxmse.prepare(program)
    with pytest.raises(ValueError, match=r"config='W8A8', quantizer=.*expected one of them"):
        fxmse.prepare(program, "W8A8", quantizer=make_x86())
    with pytest.raises(ValueError, match=r"X86InductorQuantizer annotates nothing: expected .*set_global"):
        fxmse.prepare(program, quantizer=x86.X86InductorQuantizer())

    class Copying(JoiningQuantizer):
        def transform_for_annotation(self, model):
            return copy_graph_module(model)

    with pytest.raises(ValueError, match=r"Copying.transform_for_annotation returns another graph"):
        fxmse.prepare(program, quantizer=Copying())

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**ARCHITECTURES["Llama"].options)).eval()
    batch = {"input_ids": torch.arange(8)[None]}
    quantized = fxmse.quantize(model, None, [batch], quantizer=make_x86(), progress=False)
    with pytest.raises(ValueError, match="annotations, which no checkpoint has: use a config"):
        fxmse.save_pretrained(quantized, model, "llama-int8")


@torch.no_grad()
def test_the_pages_of_pt2e_run():
    page = (Path(__file__).parents[1] / "docs" / "outputs.md").read_text()
    introduction, *sections = page.split("\n## ")
    found = {}
    for section in (introduction, *(section for section in sections if "PT2E" in section.partition("\n")[0])):
        for block in re.findall(r"^```py(?:thon)?\n(.*?)^```$", section, re.DOTALL | re.MULTILINE):
            exec(block, found)
    x = found["batches"][0]
    expected = found["model"](x)
    for name in ("converted", "quantized"):
        assert 0 < (found[name](x) - expected).norm() < 0.05 * expected.norm(), name
