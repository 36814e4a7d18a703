"""Progress bars, and what is not run or searched because nothing would come of it."""

import re

import pytest
import torch
from cases import DYNAMIC_ARGS
from compressed_tensors.quantization import QuantizationScheme
from models import W8A8, make_config
from torch import nn

import fxmse
from fxmse.passes.probe import find_probes

BATCHES = [torch.randn(4, 32) for _ in range(3)]


def make_model():
    return torch.fx.symbolic_trace(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval())


def make_batches(num_batches):
    """So many batches, and an error where one more is asked for."""
    yield from BATCHES[:num_batches]
    raise AssertionError("one more batch was asked for")


def list_bars(capsys):
    """The last state of each bar, in the order in which they began."""
    bars = {}
    for line in re.split(r"[\r\n]+", capsys.readouterr().err):
        if match := re.match(r"(\w+):.*?([\d.k]+/[\d.k]+) \[", line):
            bars[match[1]] = match[2]
    return list(bars.items())


@pytest.mark.parametrize("run", ["calibrate", "quantize"])
def test_weights_have_a_bar_of_elements_before_that_of_batches(run, capsys):
    model = make_model()
    if run == "calibrate":
        fxmse.calibrate(fxmse.prepare(model, W8A8), BATCHES)
    else:
        fxmse.quantize(model, W8A8, BATCHES)
    assert list_bars(capsys) == [("search", "2.56k/2.56k"), ("calibrate", "3/3")]


def test_weights_that_wait_for_their_inputs_have_a_bar_when_they_are_searched(capsys):
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, "observer": "imatrix_mse"}
    observed = fxmse.calibrate(fxmse.prepare(make_model(), make_config(weights=weights)), BATCHES)
    assert list_bars(capsys) == [("calibrate", "3/3")]
    fxmse.convert(observed)
    assert list_bars(capsys) == [("search", "2.56k/2.56k")]


def test_no_bar_is_shown_where_none_is_wanted(capsys):
    fxmse.quantize(make_model(), W8A8, BATCHES, progress=False)
    assert not capsys.readouterr().err


def test_batches_of_unknown_number_are_read_once():
    fxmse.quantize(make_model(), W8A8, iter(BATCHES), progress=False)


def test_batches_are_not_run_where_nothing_is_observed():
    fxmse.calibrate(fxmse.prepare(make_model(), make_config()), make_batches(0), progress=False)


def test_one_batch_is_run_where_all_values_are_dynamic():
    scheme = QuantizationScheme(targets=["Linear"], input_activations=DYNAMIC_ARGS["fp8_dynamic_g32"])
    fxmse.calibrate(fxmse.prepare(make_model(), scheme), make_batches(1), progress=False)


def test_missing_data_is_named_before_weights_are_searched():
    observed = fxmse.prepare(make_model(), W8A8)
    with pytest.raises(ValueError, match=r"0 batches of calibration data showed nothing to 0.input; 2.input"):
        fxmse.calibrate(observed, progress=False)
    assert not any(probe.has_statistics for _, probe in find_probes(observed))
