"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES

from fxmse.config import resolve_config
from fxmse.observers import Observer

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # torch's own, of freezing
def test_the_examples_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ARCHITECTURES["Llama"].make_model().save_pretrained("llama")
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, namespace)
    assert "0.weight: int8 symmetric channel" in capsys.readouterr().out
    assert (tmp_path / "quantized.pt2").exists()
    assert resolve_config(namespace["mixed"]).config_groups["FP8_DYNAMIC"].input_activations.dynamic is True
    x = namespace["batches"][0]
    with torch.no_grad():
        expected = namespace["model"](x)
        for quantized in (namespace["quantized"], namespace["graph_module"]):
            assert (quantized(x) - expected).norm() < 0.05 * expected.norm()


def test_the_table_of_architectures_is_what_is_tested():
    rows = re.findall(r"^\| (.*) \| (\w+) \| (yes|fails: .*) \|$", README, re.MULTILINE)
    reasons = {name: a.reason and f"fails: {a.reason.replace('.*', ' ... ')}" for name, a in ARCHITECTURES.items()}
    assert rows == [(name, a.model, reasons[name] or "yes") for name, a in ARCHITECTURES.items()]


def test_the_table_of_observers_names_them_all():
    for name in Observer.registered_names():
        assert f"`{name.replace('-', '_')}`" in README
