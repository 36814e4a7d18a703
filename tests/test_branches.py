"""Branches and loops are quantized as what stands around them, by plain arithmetic on the same layers in Python."""

import copy

import pytest
import torch
from models import make_config
from plain import quantize_by_hand, quantize_weight
from torch import nn
from torch._higher_order_ops.map import map as run_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.fx import GraphModule
from torch.nn.functional import linear

import fxmse
from fxmse.capture.attributes import list_graphs
from fxmse.config import AllLeftInFloatError
from fxmse.outputs.inductor import FakeQuantizePass
from fxmse.passes import CloseRegions, InsertObservers, LowerToQDQ, OpenRegions

WEIGHTS = {"num_bits": 8, "strategy": "channel", "observer": "memoryless_minmax"}
MINMAX = make_config(weights=WEIGHTS, inputs={"num_bits": 8, "symmetric": False, "observer": "static_minmax"})
BATCHES = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]


class Layers(nn.Module):
    """``is_plain``: whether Python branches and loops, in place of torch's operators."""

    is_plain = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.run(x))

    def branch(self, condition, true, false, x):
        if self.is_plain:
            return true(x) if condition else false(x)
        return torch.cond(condition, true, false, (x,))


class Branches(Layers):
    def run(self, x):
        return self.branch(x.sum() > 0, self.a, lambda v: self.b(v.relu()), x)


class SharedByBranches(Layers):
    """Both branches read ``a``, and so does what is around them."""

    def run(self, x):
        return self.branch(x.sum() > 0, self.a, lambda v: self.a(self.b(v)), self.a(x))


class ReadAfterwards(Layers):
    def run(self, x):
        return self.a(self.branch(x.sum() > 0, self.a, self.b, x))


class NestedBranches(Layers):
    def run(self, x):
        return self.branch(x.sum() > 0, self.inner, lambda v: v + 1, x)

    def inner(self, x):
        with torch.no_grad():
            x = self.b(x)
        return self.branch(x.sum() > 0, self.a, lambda v: self.b(v).relu(), x)


class Loop(Layers):
    def run(self, x):
        if self.is_plain:
            for _ in range(3):
                x = torch.relu(self.a(x))
            return self.b(x)
        body = lambda i, v: (i + 1, torch.relu(self.a(v)))  # noqa: E731
        return self.b(while_loop(lambda i, v: i < 3, body, (torch.tensor(0), x))[1])


class LoopOfBranches(Layers):
    def run(self, x):
        body = lambda v: torch.relu(self.branch(v.sum() > 0, self.a, self.b, v))  # noqa: E731
        if self.is_plain:
            for _ in range(3):
                x = body(x)
            return x
        return while_loop(lambda i, v: i < 3, lambda i, v: (i + 1, body(v)), (torch.tensor(0), x))[1]


class Scan(Layers):
    def run(self, x):
        combine = lambda carry, row: (torch.tanh(self.a(carry + row)), self.b(row))  # noqa: E731
        if not self.is_plain:
            carry, rows = scan(combine, x[0], x)
            return carry + rows
        carry, rows = x[0], []
        for row in x:
            carry, out = combine(carry, row)
            rows.append(out)
        return carry + torch.stack(rows)


class Map(Layers):
    def run(self, x):
        function = lambda row, last: self.b(self.a(row)) + last  # noqa: E731
        return (
            torch.stack([function(row, 2 * x[-1]) for row in x]) if self.is_plain else run_map(function, x, 2 * x[-1])
        )


class Tied(Branches):
    def __init__(self):
        super().__init__()
        self.b.weight = self.a.weight


class Transposed(Layers):
    """The branch gets what is computed of a parameter: its rows are the columns of ``a.weight``."""

    def run(self, x):
        turned = self.a.weight.t()
        return torch.cond(x.sum() > 0, lambda v: linear(v, turned), self.b, (x,))


ALL = [Branches, SharedByBranches, ReadAfterwards, NestedBranches, Loop, LoopOfBranches, Scan, Map]


def quantize_plainly(model, x, inputs=True):
    plain = copy.deepcopy(model).eval()
    plain.is_plain = True
    return quantize_by_hand(plain, BATCHES, x, inputs=inputs)


def list_sites(quantized):
    nodes = [node for graph in list_graphs(quantized) for node in graph.graph.nodes]
    return {site for node in nodes for site in node.meta.get("fxmse_sites", ())}


def list_code(graph_module):
    return [graph.code for graph in list_graphs(graph_module)]


@pytest.mark.parametrize("model_class", ALL)
@pytest.mark.parametrize("front_end", ["module", "export"])
@torch.no_grad()
def test_branches_and_loops_are_quantized(model_class, front_end):
    model = model_class().eval()
    traced = torch.export.export(model, (BATCHES[0],)) if front_end == "export" else model
    observed = fxmse.prepare(traced, MINMAX, BATCHES[0])
    quantized = fxmse.convert(fxmse.calibrate(observed, BATCHES, progress=False))
    assert list_sites(quantized) == {f"{layer}.{role}" for layer in ("a", "b", "head") for role in ("weight", "input")}
    for batch in BATCHES:
        torch.testing.assert_close(quantized(batch), quantize_plainly(model, batch), rtol=1e-5, atol=1e-6)
    for batch in BATCHES:
        assert torch.equal(observed(batch), torch.export.export(model, (BATCHES[0],)).module()(batch))


@pytest.mark.parametrize("model_class", ALL)
@pytest.mark.parametrize("with_grad", [False, True])
def test_branches_and_loops_are_calibrated(model_class, with_grad):
    torch._dynamo.reset()
    model = model_class().eval()
    calibration = fxmse.Calibration(MINMAX)
    step = torch.compile(model, backend=calibration)
    if model_class in (Loop, LoopOfBranches) and with_grad:
        model.requires_grad_(False)  # a loop of unknown length has no gradient
    with torch.set_grad_enabled(with_grad):
        for batch in BATCHES:
            step(batch)
        calibration.fold()
        if model_class in (
            Scan,
            Map,
        ):  # which Inductor of torch 2.13 cannot compile as Dynamo has them, in float either
            quantized = fxmse.quantize(model, MINMAX, BATCHES, progress=False)
            expected = {name: buffer for name, buffer in quantized.named_buffers() if name in calibration.qparams}
            torch.testing.assert_close(calibration.qparams, expected)
            return
        found = step(BATCHES[0]).detach()
    torch.testing.assert_close(found, quantize_plainly(model, BATCHES[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_class", ALL)
@torch.no_grad()
def test_quantized_branches_are_exported_and_compiled(model_class):
    torch._dynamo.reset()
    quantized = fxmse.quantize(model_class(), MINMAX, BATCHES, progress=False)
    compiled = torch.compile(quantized, fullgraph=True)
    programs = [fxmse.export(quantized, BATCHES[0], decompose=decompose).module() for decompose in (False, True)]
    for batch in BATCHES:
        for other in (*programs, compiled):
            torch.testing.assert_close(other(batch), quantized(batch), rtol=1e-5, atol=1e-6)
    nodes = [node for graph in list_graphs(programs[1]) for node in graph.graph.nodes]
    assert not any("fxmse" in str(node.target) for node in nodes)


@pytest.mark.parametrize("model_class", [Branches, NestedBranches, Scan])
@torch.no_grad()
def test_a_calibration_of_branches_can_be_compiled(model_class):
    torch._dynamo.reset()
    model = model_class().eval()
    quantized = fxmse.quantize(model, MINMAX, BATCHES, compile=True, progress=False)
    torch.testing.assert_close(quantized(BATCHES[0]), quantize_plainly(model, BATCHES[0]), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_weights_are_quantized_once_around_a_branch():
    quantized = fxmse.quantize(SharedByBranches(), MINMAX, BATCHES, progress=False)
    names = [node.meta["fxmse_sites"] for node in quantized.graph.nodes if "fxmse_sites" in node.meta]
    assert [name for name in names if name[0].endswith("weight")] == [
        ("a.weight",),
        ("b.weight",),
        ("head.weight",),
    ]
    for region in list(list_graphs(quantized))[1:]:
        assert not list(region.parameters())
        assert not list(region.buffers())
    keys = {"a.weight_scale", "a.input_scale", "a.input_zero_point", "b.weight_scale", "b.input_scale"}
    assert keys < set(quantized.state_dict())


@torch.no_grad()
def test_weights_alone_and_dynamic_inputs():
    model = Branches().eval()
    quantized = fxmse.quantize(model, make_config(weights=WEIGHTS), BATCHES, progress=False)
    expected = quantize_plainly(model, BATCHES[0], inputs=False)
    torch.testing.assert_close(quantized(BATCHES[0]), expected, rtol=1e-5, atol=1e-6)

    dynamic = {"num_bits": 8, "dynamic": True, "strategy": "token"}
    quantized = fxmse.quantize(model, make_config(weights=WEIGHTS, inputs=dynamic), BATCHES, progress=False)
    for batch in BATCHES:
        x = quantize_weight(batch)  # a scale for each row, as for weights
        layer, x = (model.a, x) if batch.sum() > 0 else (model.b, quantize_weight(batch.relu()))
        x = linear(x, quantize_weight(layer.weight), layer.bias)
        expected = linear(quantize_weight(x), quantize_weight(model.head.weight), model.head.bias)
        torch.testing.assert_close(quantized(batch), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(fxmse.export(quantized, BATCHES[0]).module()(batch), quantized(batch))


@torch.no_grad()
def test_a_weight_computed_around_a_branch():
    model = Transposed().eval()
    config = make_config(weights=WEIGHTS)
    quantized = fxmse.quantize(model, config, BATCHES, progress=False)
    for batch in BATCHES:
        if batch.sum() > 0:
            # linear(v, W.t()) has the columns of W for rows.
            x = batch @ quantize_weight(model.a.weight.t()).t()
        else:
            x = linear(batch, quantize_weight(model.b.weight), model.b.bias)
        expected = linear(x, quantize_weight(model.head.weight), model.head.bias)
        torch.testing.assert_close(quantized(batch), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_tied_weights_of_two_branches_are_one():
    model = Tied().eval()
    quantized = fxmse.quantize(model, make_config(weights=WEIGHTS), BATCHES, progress=False)
    assert list_sites(quantized) == {"b.weight", "head.weight"}  # the name that torch.export leaves it
    for batch in BATCHES:
        expected = quantize_plainly(model, batch, inputs=False)
        torch.testing.assert_close(quantized(batch), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_branch_that_was_not_run_is_named():
    model = Branches().eval()
    positive = [batch for batch in BATCHES if batch.sum() > 0]
    with pytest.raises(ValueError, match=r"showed nothing to b\.input: pass batches that reach them"):
        fxmse.calibrate(fxmse.prepare(model, MINMAX, BATCHES[0]), positive, progress=False)
    quantized = fxmse.quantize(model, MINMAX, BATCHES, progress=False)
    reports = {(r.module, r.role): r for r in fxmse.report(quantized, positive)}
    assert reports["a", "input"].sqnr > 30
    assert reports["b", "weight"].sqnr > 30
    assert reports["b", "input"].sqnr != reports["b", "input"].sqnr  # NaN: it saw nothing


@torch.no_grad()
def test_the_state_of_observers_in_branches_is_saved():
    model = NestedBranches().eval()
    observed = fxmse.calibrate(fxmse.prepare(model, MINMAX, BATCHES[0]), BATCHES, progress=False)
    other = fxmse.prepare(model, MINMAX, BATCHES[0])
    other.load_state_dict(observed.state_dict())
    assert torch.equal(fxmse.convert(other)(BATCHES[0]), fxmse.convert(observed)(BATCHES[0]))


@torch.no_grad()
def test_what_is_not_quantized_stays_as_it_is():
    program = torch.export.export(NestedBranches(), (BATCHES[0],))
    config = make_config(weights=WEIGHTS, ignore=["a", "b"])
    observed, untouched = fxmse.prepare(program, config), fxmse.prepare(program, make_config("head", weights=WEIGHTS))
    assert list_code(observed)[1:] == list_code(untouched)[1:]
    plain = program.module()
    codes = list_code(plain)
    assert OpenRegions()(plain).modified
    assert not OpenRegions()(plain).modified
    assert all(region.graph.find_nodes(op="get_attr") for region in list(list_graphs(plain))[1:2])
    assert torch.equal(plain(BATCHES[0]), program.module()(BATCHES[0]))
    assert CloseRegions()(plain).modified
    assert not CloseRegions()(plain).modified
    assert list_code(plain) == codes
    observed = fxmse.prepare(program, MINMAX)
    assert not InsertObservers(MINMAX)(observed).modified
    assert isinstance(copy.deepcopy(observed), GraphModule)
    assert torch.equal(copy.deepcopy(observed)(BATCHES[0]), program.module()(BATCHES[0]))


class Hinted(Layers):
    def run(self, x):
        wrapper = torch.ops.higher_order.hints_wrapper
        return wrapper(lambda v: self.a(v), (x,), {}, hints={"kept": True})


@torch.no_grad()
def test_what_other_operators_run_is_named():
    torch._dynamo.reset()
    step = torch.compile(Hinted(), backend=fxmse.Calibration(MINMAX))
    with pytest.warns(
        UserWarning, match=r"left in float: a \(hints_wrapper runs it, whose graphs are not quantized\)$"
    ):
        step(BATCHES[0])


@torch.no_grad()
def test_if_everything_stays_in_float_that_is_an_error():
    torch._dynamo.reset()
    calibration = fxmse.Calibration(make_config("re:.*a$", weights=WEIGHTS))
    with pytest.warns(UserWarning, match="all that the config targets stays in float: a"):
        torch.compile(Hinted(), backend=calibration)(BATCHES[0])
    with pytest.raises(AllLeftInFloatError, match=r"stays in float: a \(hints_wrapper"):
        calibration.fold()


@torch.no_grad()
def test_known_qparams_reach_branches_in_inductor():
    torch._dynamo.reset()
    model = Branches().eval()
    quantized = fxmse.quantize(model, MINMAX, BATCHES, progress=False)
    fake_quantize = FakeQuantizePass(MINMAX, quantized.state_dict())
    with torch._inductor.config.patch(pre_grad_custom_pass=fake_quantize):
        found = torch.compile(model)(BATCHES[0])
    torch.testing.assert_close(found, quantized(BATCHES[0]), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_what_is_not_lowered_in_branches_is_listed():
    quantized = fxmse.quantize(Branches(), MINMAX, BATCHES, progress=False)
    with pytest.warns(UserWarning, match=r"a\.input \(in a branch or loop\); b\.input \(in a branch or loop\)$"):
        LowerToQDQ()(quantized)
