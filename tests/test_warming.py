"""Searches that another process has compiled are not compiled again."""

import json
import subprocess
import sys

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from models import make_config
from torch import nn

from fxmse.streaming import warming

CPU = torch.device("cpu")
CONFIG = make_config(
    weights={"num_bits": 5, "strategy": "group", "group_size": 48, "observer": "memoryless_mse"}, inputs=None
)


SEARCH = """
import json, sys
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch._dynamo.utils import counters
from fxmse.observers import Observer
from fxmse.search.compiling import compilation

args = QuantizationArgs.model_validate_json(sys.argv[1])
with compilation("always"), torch.no_grad():
    Observer.load_from_registry("memoryless_mse", base_name="weight", args=args)(torch.randn(256, 96))
print(json.dumps({name: dict(counters[name]) for name in ("aot_autograd", "inductor")}))
"""


def test_what_was_compiled_meanwhile_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(warming, "_MIN_PARAMETERS", 1)
    model = nn.Sequential(nn.Linear(96, 256, bias=False))
    with warming.compiling_meanwhile(CONFIG, model, CPU):
        pass
    # In a process of its own: others of this one's tests have compiled, and count.
    args = CONFIG.config_groups["group_0"].weights.model_dump_json()
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", SEARCH, args], capture_output=True, text=True)
    counted = json.loads(found.stdout)
    assert counted["aot_autograd"].get("autograd_cache_hit", 0) + counted["inductor"].get("fxgraph_cache_hit", 0) > 0
    assert not counted["aot_autograd"].get("autograd_cache_miss")
    assert not counted["inductor"].get("fxgraph_cache_miss")


@pytest.mark.parametrize("fault", ["small", "one processor", "nothing to search"])
def test_where_it_does_not_pay_there_is_no_process(fault, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a process was started"))
    monkeypatch.setattr("os.cpu_count", lambda: 1 if fault == "one processor" else 2)
    monkeypatch.setattr(warming, "_MIN_PARAMETERS", 1 << 40 if fault == "small" else 1)
    config = QuantizationConfig(config_groups={}) if fault == "nothing to search" else CONFIG
    with warming.compiling_meanwhile(config, nn.Sequential(nn.Linear(96, 8)), CPU):
        pass


@pytest.mark.parametrize("command", ["raise SystemExit(1)", "import time; time.sleep(600)"])
def test_what_goes_wrong_is_left_to_the_search(command, monkeypatch):
    monkeypatch.setattr(warming, "_COMMAND", command)
    monkeypatch.setattr(warming, "_MIN_PARAMETERS", 1)
    with pytest.raises(KeyboardInterrupt), warming.compiling_meanwhile(CONFIG, nn.Linear(96, 8), CPU):
        raise KeyboardInterrupt


def test_nothing_is_imported_from_where_the_command_was_started(tmp_path, monkeypatch):
    (tmp_path / "fxmse_planted.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warming, "_COMMAND", "import fxmse_planted")
    monkeypatch.setattr(warming, "_MIN_PARAMETERS", 1)
    with warming.compiling_meanwhile(CONFIG, nn.Linear(96, 8), CPU):
        pass
    assert not (tmp_path / "ran").exists()


def test_the_largest_weight_of_each_scheme_is_asked_for():
    model = nn.Sequential(nn.Linear(96, 8), nn.Linear(96, 1 << 14), nn.Conv2d(3, 999, 9))
    (request,) = warming._list_requests(CONFIG, model, CPU)
    assert (request["shape"], request["dtype"]) == ([4096, 96], "float32")
    assert json.loads(json.dumps(request)) == request
