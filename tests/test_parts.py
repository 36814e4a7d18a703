"""Graphs that are cut into parts compute and calibrate what they do in one piece."""

import pytest
import torch
from architectures import ARCHITECTURES
from models import Attention, make_config
from torch import nn

import fxmse
from fxmse.calibration.observing import observe_batches
from fxmse.capture.front_ends import split_inputs
from fxmse.passes.parts import cut, make_entry
from fxmse.passes.probe import find_probes
from fxmse.passes.trimming import find_sources_of_activations, trim

SCALES = ("_scale", "_zero_point")


def run_parts(observed, batches, max_bytes, together=()):
    """Calibrates a graph part by part; the folded parts."""
    parts = cut(observed, max_bytes, together)
    entry = make_entry(observed)
    names = [node.name for node in observed.graph.find_nodes(op="placeholder")]
    passing = []
    for batch in batches:
        args, kwargs = split_inputs(batch)
        passing.append(dict(zip(names, entry(*args, **kwargs), strict=True)))
    folded = []
    for part in parts:
        returned = []
        inputs = [tuple(values.get(name) for name in part.inputs) for values in passing]
        if any(find_probes(part.graph_module)):
            fxmse.calibrate(part.graph_module, inputs, progress=False, on_outputs=returned.append)
            folded.append(fxmse.convert(part.graph_module))
        else:
            observe_batches(part.graph_module, inputs, False, returned.append)
        for values, outputs in zip(passing, returned, strict=True):
            values |= dict(zip(part.outputs, outputs, strict=True))
        passing = [{name: values[name] for name in part.carried} for values in passing]
    return parts, folded


def find_scales(graph_modules):
    return {
        name: tensor
        for graph_module in graph_modules
        for name, tensor in graph_module.state_dict().items()
        if name.endswith(SCALES)
    }


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("name", "scheme", "max_bytes"),
    [
        ("Llama", "NVFP4", 1),
        ("Llama", "FP8", 1 << 40),
        ("BERT", "FP8", 1),
        ("Mixtral", make_config(inputs={"num_bits": 8}), 1),
    ],
)
@pytest.mark.filterwarnings("ignore:left in float")
def test_parts_calibrate_as_the_whole(name, scheme, max_bytes):
    architecture = ARCHITECTURES[name]
    model, batches = architecture.make_model(), [architecture.make_inputs(2, seed) for seed in range(2)]
    expected = find_scales([fxmse.quantize(model, scheme, batches, progress=False)])
    parts, folded = run_parts(fxmse.prepare(model, scheme, batches[0]), batches, max_bytes)
    check_equal(find_scales(folded), expected)
    assert (len(parts) > 4) is (max_bytes == 1)
    assert parts[-1].carried == ()


def test_parts_are_cut_where_least_passes():
    class Bottleneck(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in [(32, 64), (64, 4), (4, 64), (64, 32)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).relu()
            return x

    observed = fxmse.prepare(Bottleneck().eval(), make_config(inputs={"num_bits": 8}), torch.randn(3, 32))
    sizes = [sum(p.nbytes for p in observed.get_submodule(f"layers.{layer}").parameters()) for layer in range(4)]
    first, second = cut(observed, sum(sizes[2:]))
    assert (first.num_bytes, second.num_bytes) == (sum(sizes[:2]), sum(sizes[2:]))
    assert len(first.outputs) == 1
    assert next(node for node in observed.graph.nodes if node.name == first.outputs[0]).meta["val"].shape[-1] == 4
    # With room for three layers nothing passes: what the last one computes is not observed.
    assert [part.outputs for part in cut(observed, sum(sizes[:3]))] == [(), ()]


def test_what_shares_an_observer_is_not_cut():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.between = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.shared(self.between(self.shared(x)))

    batches = [torch.randn(4, 8) for _ in range(2)]
    config = make_config(inputs={"num_bits": 8, "symmetric": False})
    model = Twice().eval()
    expected = find_scales([fxmse.quantize(model, config, batches, progress=False)])
    parts, folded = run_parts(fxmse.prepare(model, config, batches[0]), batches, 1)
    check_equal(find_scales(folded), expected)
    probes = [probe for part in parts for _, probe in find_probes(part.graph_module) if not probe.is_weight]
    assert len(probes) == 3  # two of the shared layer, called twice, in one part
    assert len({part for part in parts for _, p in find_probes(part.graph_module) if p.name == "shared.input"}) == 1


@pytest.mark.parametrize("observer", ["output_mse", "imatrix_mse"])
def test_weights_and_what_looks_at_their_inputs_are_not_cut(observer):
    model, batches = (
        nn.Sequential(*(nn.Linear(16, 16) for _ in range(4))).eval(),
        [torch.randn(8, 16) for _ in range(2)],
    )
    config = make_config(weights={"num_bits": 4, "strategy": "channel", "observer": observer})
    expected = find_scales([fxmse.quantize(model, config, batches, progress=False)])
    _, folded = run_parts(fxmse.prepare(model, config, batches[0]), batches, 1)
    check_equal(find_scales(folded), expected)
    assert len(folded) == 4


def test_a_tied_weight_belongs_to_each_part_that_reads_it():
    model, batches = Attention().eval(), [Attention.make_inputs(seed=seed) for seed in range(2)]
    config = make_config("Linear", "Embedding")
    expected = find_scales([fxmse.quantize(model, config, batches, progress=False)])
    _, folded = run_parts(fxmse.prepare(model, config, batches[0]), batches, 1)
    check_equal(find_scales(folded), expected)


def test_what_is_written_in_place_is_not_cut_off_from_its_readers():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            y = self.one(x)
            view = y[:, :4]
            z = self.two(y)
            view.mul_(2)
            return self.three(y + z)

    model, batches = Writes().eval(), [torch.randn(4, 8) for _ in range(2)]
    config = make_config(inputs={"num_bits": 8})
    expected = find_scales([fxmse.quantize(model, config, batches, progress=False)])
    _, folded = run_parts(fxmse.prepare(model, config, batches[0]), batches, 1)
    check_equal(find_scales(folded), expected)


def test_parameters_that_belong_together_stay_together():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).eval()
    observed = fxmse.prepare(model, make_config(), torch.randn(2, 8))
    assert len(cut(observed, 1)) == 4
    parts = cut(observed, 1, [[model[1].weight, model[2].weight]])
    names = [sorted(name for name, _ in part.graph_module.named_parameters() if "weight" in name) for part in parts]
    assert names == [["0.weight"], ["1.weight", "2.weight"], ["3.weight"]]


def test_only_what_observers_need_is_run():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 100)).eval()
    observed = fxmse.prepare(model, make_config(inputs={"num_bits": 8}), torch.randn(2, 8))
    trimmed = trim(observed, keep_outputs=False)
    products = [node for node in trimmed.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert len(products) == 1  # the input of the second is observed, its product is not looked at
    assert trimmed(torch.randn(2, 8)) is None
    assert len([node for node in observed.graph.nodes if node.target is torch.ops.aten.linear.default]) == 2
    assert products[0].name in {node.name for node in find_sources_of_activations(observed)}
    torch.testing.assert_close(trim(observed, keep_outputs=True)(x := torch.randn(2, 8)), model(x), rtol=0, atol=0)


def test_autocast_and_vmap_are_kept_whole():
    class Layered(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.two(self.one(x))
            return self.three(torch.vmap(torch.tanh)(x.float()))

    model, batches = Layered().eval(), [torch.randn(4, 8) for _ in range(2)]
    config = make_config(inputs={"num_bits": 8, "observer": "static_minmax"})
    seen = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, x, n=n: seen.setdefault(n, []).append(x[0].float()))
        for n, m in model.named_children()
    ]
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    for folded in (
        [fxmse.quantize(model, config, batches, progress=False)],
        run_parts(fxmse.prepare(model, config, batches[0]), batches, 1)[1],
    ):
        scales = find_scales(folded)
        for name, values in seen.items():
            scale, expected = scales[f"{name}.input_scale"], torch.cat(values).abs().max() / 127.5
            assert torch.equal(scale, expected.reshape(1).to(scale.dtype)), name
