"""What observers know is of the weights, the formats and the batches that it says it is of."""

import copy
import sys
import threading

import pytest
import torch
from models import Products, make_config
from torch import nn

import fxmse
from fxmse.observers import Observer
from fxmse.passes.probe import find_probes

WEIGHTS = {"num_bits": 8, "strategy": "channel", "observer": "exact_mse"}
INPUTS = {"num_bits": 8, "observer": "exact_mse"}
OBSERVERS = ("exact_mse", "memoryless_mse", "imatrix_mse", "output_mse")


def prepare(model=None, weights=WEIGHTS, inputs=INPUTS):
    model = Products() if model is None else model
    return fxmse.prepare(torch.fx.symbolic_trace(model.eval()), make_config(weights=weights, inputs=inputs))


def calibrate(observed, batches=None):
    return fxmse.calibrate(observed, Products.make_batches(2) if batches is None else batches, progress=False)


def get_qparams(observed):
    return {k: t for k, t in fxmse.convert(observed).state_dict().items() if k.endswith(("_scale", "_zero_point"))}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def change_data(weight):
    weight.data[0, 0] = 77


def change_numpy(weight):
    weight.detach().numpy()[0, 0] = 77


def change_in_inference_mode(weight):
    with torch.inference_mode():
        weight[0, 0] = 77


def swap(weight):
    weight.data[[0, 1]] = weight.data[[1, 0]]


def make_inference_tensors(model):
    for module in model.modules():
        for name, parameter in module._parameters.items():
            with torch.inference_mode():
                module._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)


@pytest.mark.parametrize("change", [change_data, change_numpy, change_in_inference_mode, swap])
@pytest.mark.parametrize("is_saved", [False, True])
def test_a_weight_that_is_changed_unseen_is_searched_again(change, is_saved):
    model = Products()
    if change is change_in_inference_mode:
        make_inference_tensors(model)
    observed = calibrate(prepare(model))
    change(model.alpha.weight)
    if is_saved:  # the state brings the changed weight, and says what was searched
        saved, observed = observed.state_dict(), prepare()
        observed.load_state_dict(saved)
    expected = get_qparams(calibrate(prepare(copy.deepcopy(model))))
    found = get_qparams(observed)
    assert_equal(
        *({k: t for k, t in qparams.items() if "weight" in k or "alpha" in k} for qparams in (found, expected))
    )


def test_equal_weights_are_searched_once(monkeypatch):
    observed = calibrate(prepare())
    monkeypatch.setattr(Observer, "update", lambda *_: pytest.fail("a weight is searched"))
    with torch.no_grad():
        observed.get_parameter("alpha.weight").mul_(1)  # another version, of equal values
    fxmse.convert(observed)
    fxmse.convert(copy.deepcopy(observed))


def make_other_states():
    """Calibrations that are not that of :func:`prepare`, and what the error says."""
    yield {"weights": {**WEIGHTS, "num_bits": 4}}, "alpha.weight: num_bits is 8 in the state and 4 here; beta.weight"
    yield {"weights": {**WEIGHTS, "strategy": "tensor"}}, "omega.weight: strategy is channel in the state and tensor he"
    yield {"weights": {**WEIGHTS, "observer": "mse"}}, "alpha.weight: observer is exact_mse in the state and mse here;"
    yield {"weights": {**WEIGHTS, "observer_kwargs": {"norm": 3.0}}}, "alpha.weight: norm is 2.0 in the state and 3.0 h"
    yield (
        {"inputs": {**INPUTS, "observer": "minmax"}},
        "omega.input: observer is exact_mse in the state and minmax here",
    )
    yield {"inputs": {**INPUTS, "symmetric": False}}, "omega.input: symmetric is True in the state and False here"
    yield {"model": Products().bfloat16()}, "alpha.weight: dtype is torch.float32 in the state and torch.bfloat16 here"
    wide = Products()
    wide.omega = nn.Linear(8, 48)
    yield {"model": wide}, r"omega.weight: shape is \(32, 8\) in the state and \(48, 8\) here. Nothing was loaded"


@pytest.mark.parametrize(("other", "message"), list(make_other_states()))
def test_a_state_of_another_calibration_is_refused_whole(other, message):
    saved = calibrate(prepare()).state_dict()
    observed = prepare(**other)
    before = copy.deepcopy(observed.state_dict())
    with pytest.raises(ValueError, match=f"the state is of another calibration: .*{message}"):
        observed.load_state_dict(saved)
    assert_equal(observed.state_dict(), before)
    for own in (copy.deepcopy(observed), nn.Sequential(observed)):
        with pytest.raises(ValueError, match=message):
            own.load_state_dict({f"0.{k}": t for k, t in saved.items()} if isinstance(own, nn.Sequential) else saved)


def test_a_state_without_weights_is_refused_for_others():
    saved = {k: t for k, t in calibrate(prepare()).state_dict().items() if "observer" in k}
    same = prepare()
    same.load_state_dict(saved, strict=False)
    assert_equal(get_qparams(same), get_qparams(calibrate(prepare())))
    with pytest.raises(ValueError, match=r"alpha.weight: fingerprint is \d+ in the state and \d+ here; beta"):
        prepare(Products(seed=5)).load_state_dict(saved, strict=False)


def test_a_state_that_does_not_say_is_taken_with_a_warning():
    observed = calibrate(prepare())
    saved = {k: t for k, t in observed.state_dict().items() if not k.endswith("_extra_state")}
    resumed = prepare()
    with pytest.warns(UserWarning, match="the state does not say which formats, observers and weights it is of"):
        resumed.load_state_dict(saved)
    assert_equal(get_qparams(resumed), get_qparams(observed))


@pytest.mark.parametrize("junk", [torch.tensor([1, 2], dtype=torch.uint8), torch.ones(2), 7])
def test_a_description_that_is_none_is_refused(junk):
    saved = calibrate(prepare()).state_dict()
    saved["omega.input_observer.observer._extra_state"] = junk
    with pytest.raises(ValueError, match=r"omega.input: omega.input_observer.observer._extra_state of the state is no"):
        prepare().load_state_dict(saved)


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "enable_grad": torch.enable_grad,
}


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_changes_no_search(mode, name):
    weights = {"num_bits": 4, "strategy": "group", "group_size": 8, "observer": name}
    expected = get_qparams(calibrate(prepare(weights=weights)))
    with MODES[mode]():
        within = prepare(weights=weights)
        found = [get_qparams(calibrate(within))]
    bare = prepare(weights=weights)
    with MODES[mode]():
        for batch in Products.make_batches(2):
            bare(batch)
    found.append(get_qparams(bare))
    for observed in (within, bare):
        states = [tensor for _, probe in find_probes(observed) for tensor in probe.state if tensor is not None]
        assert not any(tensor.requires_grad or tensor.is_inference() for tensor in states)
    # What omega reads is computed in bfloat16 under autocast.
    is_known = {k for k in expected if mode != "autocast" or not k.startswith("omega")}
    for qparams in found:
        assert_equal({k: t for k, t in qparams.items() if k in is_known}, {k: expected[k] for k in is_known})
        assert not any(tensor.is_inference() for tensor in qparams.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_another_default_dtype_is_refused(dtype):
    observed = prepare()
    torch.set_default_dtype(dtype)
    try:
        with pytest.raises(ValueError, match=f"alpha.weight: the default dtype is {dtype}, in which ranges would be"):
            calibrate(observed)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(get_qparams(calibrate(observed)), get_qparams(calibrate(prepare())))


@pytest.mark.parametrize("name", ["exact_mse", "memoryless_mse"])
def test_another_thread_may_export(monkeypatch, name):
    weights = {"num_bits": 4, "strategy": "group", "group_size": 8, "observer": name}
    expected = get_qparams(calibrate(prepare(weights=weights)))
    # What torch.export and torch.compile set, for all threads.
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    assert_equal(get_qparams(calibrate(prepare(weights=weights))), expected)


def run_in_threads(run, num_threads=4):
    errors = []

    def attempt():
        try:
            run()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=attempt) for _ in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []


@pytest.mark.parametrize("through", ["calls", "calibrate", "Calibration"])
def test_threads_lose_nothing(through, monkeypatch):
    searched = []
    update = Observer.update
    monkeypatch.setattr(Observer, "update", lambda o, s, v: (searched.append(o.name), update(o, s, v))[1])
    batch = torch.randn(6, 16)
    if through == "Calibration":
        torch._dynamo.reset()
        calibration = fxmse.Calibration(make_config(weights=WEIGHTS, inputs=INPUTS))
        step = torch.compile(Products().eval(), backend=calibration)
        with torch.no_grad():
            step(batch)
        observed = calibration._graphs[0]._observed
        runs = {"Calibration": lambda: [step(batch) for _ in range(8)]}
    else:
        observed = prepare()
        runs = {
            "calls": lambda: [observed(batch) for _ in range(8)],
            "calibrate": lambda: calibrate(observed, [batch] * 8),
        }
    run_in_threads(runs[through])
    num_batches = 32 + (through == "Calibration")
    probes = {probe.name: probe for _, probe in find_probes(observed)}
    assert int(probes["alpha.input, beta.input, gamma.input"].state.counts.sum()) == num_batches * batch.numel()
    assert int(probes["omega.input"].state.counts.sum()) == num_batches * 6 * 8
    assert [searched.count(name) for name in probes if name.endswith("weight")] == [1, 1, 1, 1]


def test_a_copy_has_a_lock_of_its_own():
    observed = prepare()
    copied = copy.deepcopy(observed)
    locks = [{probe.lock for _, probe in find_probes(graph)} for graph in (observed, copied)]
    assert len(locks[0]) == len(locks[1]) == 6
    assert not locks[0] & locks[1]
    assert all(probe.lock is probe.observer.lock for _, probe in find_probes(copied))


def test_a_compiled_graph_observes_plainly_under_autocast():
    torch._dynamo.reset()
    weights = {"num_bits": 8, "strategy": "channel", "observer": "memoryless_mse"}
    observed, batches = [prepare(weights=weights) for _ in range(2)], Products.make_batches(3)
    compiled = torch.compile(observed[0], fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for batch in batches:
            compiled(batch)
            observed[1](batch)
    assert_equal(*map(get_qparams, observed))
