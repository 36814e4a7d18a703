"""A calibration that is saved, killed and gone on with ends where it would have ended."""

import copy
import os
import signal

import pytest
import safetensors.torch
import torch
from cases import NVFP4, make_args, make_weight
from models import Products, make_config
from processes import Processes

import fxmse
from fxmse.observers import MemorylessMSEObserver, Observer
from fxmse.observers.states import State
from fxmse.passes.probe import find_probes

CONFIGS = {
    **{n: make_config(inputs={"num_bits": 8, "observer": n}) for n in ("mse", "static_minmax", "minmax", "exact_mse")},
    "imatrix_mse": make_config(
        weights={"num_bits": 4, "strategy": "group", "group_size": 8, "observer": "imatrix_mse"}
    ),
}


def prepare(name, dtype=torch.float32):
    return fxmse.prepare(torch.fx.symbolic_trace(Products().to(dtype).eval()), CONFIGS[name])


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def calibrate_in_steps(name, path, killed_in=None):
    """Saves after each batch, and goes on after the last one saved; returns the qparams and the weights searched."""
    observed, done, searched = prepare(name), 0, []
    if path.exists():
        saved = torch.load(path)
        observed.load_state_dict(saved["state"])
        done = saved["done"]
    for _, probe in find_probes(observed):
        if probe.is_weight and not probe.waits_for_inputs:
            observe = probe.observer.observe
            probe.observer.observe = lambda value, p=probe, o=observe: (searched.append(p.name), o(value))
    for number, batch in enumerate(Products.make_batches()[done:], done + 1):
        if number == killed_in:  # half of the observers have seen the batch then
            last = observed.get_submodule(f"omega.{'weight_importance' if name == 'imatrix_mse' else 'input_observer'}")
            last.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        fxmse.calibrate(observed, [batch], progress=False)
        torch.save({"state": observed.state_dict(), "done": number}, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
    return fxmse.convert(observed).state_dict(), searched


def calibrate_at_once(name):
    return fxmse.convert(fxmse.calibrate(prepare(name), Products.make_batches(), progress=False)).state_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_killed_calibration_can_be_gone_on_with(name, tmp_path):
    path = tmp_path / "calibration.pt"
    with Processes(1) as processes:
        assert processes(calibrate_in_steps, name=name, path=path, killed_in=4) == [None]
    assert torch.load(path)["done"] == 3
    with Processes(1) as processes:
        ((qparams, searched),) = processes(calibrate_in_steps, name=name, path=path)
        (expected,) = processes(calibrate_at_once, name=name)
    assert searched == []
    assert_equal(qparams, expected)


def observe(observer, values):
    """Shows an observer values, whatever it waits for."""
    for value in values:
        if observer.needs_inputs:
            observer.inputs(value)
        observer(value)
    return observer


OBSERVERS = [
    ("mse", "input", make_args(8)),
    ("mse", "input", NVFP4),
    ("minmax", "weight", make_args(8, strategy="channel", symmetric=False)),
    ("static_minmax", "input", make_args(8, strategy="group", group_size=32)),
    ("memoryless_mse", "weight", make_args(4, strategy="group", group_size=32)),
    ("imatrix_mse", "weight", make_args(4, strategy="channel")),
    ("exact_mse", "input", make_args(8)),
]


@pytest.mark.parametrize(("name", "base_name", "args"), OBSERVERS)
def test_an_observer_takes_the_state_of_another(name, base_name, args):
    def make():
        return Observer.load_from_registry(name, base_name=base_name, args=args)

    values = [make_weight("heavy", seed=seed) for seed in range(3)]
    at_once = observe(make(), values)
    saved = copy.deepcopy(observe(make(), values[:2]).state_dict())
    resumed, used = make(), observe(make(), values[2:])
    for observer in (resumed, used):  # what had been seen before makes no difference
        observer.load_state_dict(saved)
        assert_equal(observer.state_dict(), saved)
        observe(observer, values[2:])
        assert_equal(observer.state_dict(), at_once.state_dict())
    for tensor_name, tensor in at_once.get_qparams().items():
        found = resumed.get_qparams()[tensor_name]
        assert (found is None and tensor is None) or torch.equal(found, tensor)


@pytest.mark.parametrize(("name", "base_name", "args"), OBSERVERS)
def test_an_observer_can_be_set_back(name, base_name, args):
    used = observe(Observer.load_from_registry(name, base_name=base_name, args=args), [make_weight("normal")])
    fresh = Observer.load_from_registry(name, base_name=base_name, args=args)
    used.load_state_dict(fresh.state_dict())
    assert used.state == State()
    assert list(used.state_dict()) == []
    assert not used.has_statistics


def test_loading_is_strict():
    observer = Observer.load_from_registry("mse", base_name="input", args=make_args(8))
    with pytest.raises(RuntimeError, match=r'Unexpected key.* "min_values"'):
        observer.load_state_dict({"min_values": torch.zeros(1)})
    observed = fxmse.calibrate(prepare("mse"), Products.make_batches(1), progress=False)
    state = observed.state_dict()
    state["omega.input_observer.observer.min_value"] = state.pop("omega.input_observer.observer.min_vals")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*omega.input_observer.observer.min_value"):
        prepare("mse").load_state_dict(state)


@pytest.mark.parametrize("name", CONFIGS)
def test_safetensors_keep_a_calibration(name, tmp_path):
    first, *others = Products.make_batches(3)
    observed = fxmse.calibrate(prepare(name), [first], progress=False)
    # It refuses a tensor that has two names.
    safetensors.torch.save_file(observed.state_dict(), tmp_path / "calibration.safetensors")
    resumed = prepare(name)
    resumed.load_state_dict(safetensors.torch.load_file(tmp_path / "calibration.safetensors"))
    qparams = [fxmse.convert(fxmse.calibrate(o, others, progress=False)).state_dict() for o in (resumed, observed)]
    assert_equal(*qparams)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_keep_the_dtype_of_the_values(dtype, tmp_path):
    observed = prepare("mse", dtype)
    fxmse.calibrate(observed, [batch.to(dtype) for batch in Products.make_batches(2)], progress=False)
    torch.save(observed.state_dict(), tmp_path / "calibration.pt")
    resumed = prepare("mse", dtype)
    resumed.load_state_dict(torch.load(tmp_path / "calibration.pt"))
    state = fxmse.convert(resumed).state_dict()
    assert {tensor.dtype for key, tensor in state.items() if key.endswith("scale")} == {dtype}
    assert_equal(state, fxmse.convert(observed).state_dict())


def test_loading_into_a_graph_in_use_searches_nothing(monkeypatch):
    observed = fxmse.calibrate(prepare("mse"), Products.make_batches(1), progress=False)
    used = fxmse.calibrate(prepare("mse"), Products.make_batches(3), progress=False)
    used.load_state_dict(observed.state_dict())
    monkeypatch.setattr(MemorylessMSEObserver, "update", lambda *_: pytest.fail("a weight is searched"))
    fxmse.calibrate(used, Products.make_batches(1), progress=False)
    assert_equal(
        fxmse.convert(used).state_dict(),
        fxmse.convert(fxmse.calibrate(observed, Products.make_batches(1), progress=False)).state_dict(),
    )


def test_loaded_weights_are_searched_again_once_they_are_changed():
    observed = fxmse.calibrate(prepare("mse"), Products.make_batches(1), progress=False)
    resumed = prepare("mse")
    resumed.load_state_dict(observed.state_dict())
    fxmse.calibrate(resumed, Products.make_batches(1), progress=False)
    with torch.no_grad():
        resumed.get_parameter("beta.weight").mul_(3)
    before, after = (fxmse.convert(graph).state_dict() for graph in (observed, resumed))
    torch.testing.assert_close(after["beta.weight_scale"], 3 * before["beta.weight_scale"])
    assert torch.equal(after["alpha.weight_scale"], before["alpha.weight_scale"])
