"""Searches that another process compiles are not compiled again, and do not wait for it."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from models import make_config
from torch import nn

from fxmse.observers import Observer
from fxmse.search import compiling
from fxmse.search.compiling import MIN_COMPILED, compilation, compiled_elsewhere, pays_to_compile
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
    with compilation("always"), warming.compiling_meanwhile(CONFIG, model, CPU):
        assert pays_to_compile("what waits", torch.ones(MIN_COMPILED), 1)
    # In a process of its own: others of this one's tests have compiled, and count.
    args = CONFIG.config_groups["group_0"].weights.model_dump_json()
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", SEARCH, args], capture_output=True, text=True)
    counted = json.loads(found.stdout)
    assert counted["aot_autograd"].get("autograd_cache_hit", 0) + counted["inductor"].get("fxgraph_cache_hit", 0) > 0
    assert not counted["aot_autograd"].get("autograd_cache_miss")
    assert not counted["inductor"].get("fxgraph_cache_miss")


@pytest.mark.parametrize("fault", ["small", "one processor", "nothing to search", "never"])
def test_where_it_does_not_pay_there_is_no_process(fault, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a process was started"))
    monkeypatch.setattr("os.cpu_count", lambda: 1 if fault == "one processor" else 2)
    monkeypatch.setattr(warming, "_MIN_PARAMETERS", 1 << 40 if fault == "small" else 1)
    config = QuantizationConfig(config_groups={}) if fault == "nothing to search" else CONFIG
    with (
        compilation("never" if fault == "never" else "auto"),
        warming.compiling_meanwhile(config, nn.Sequential(nn.Linear(96, 8)), CPU),
    ):
        pass


@pytest.mark.parametrize("command", ["raise SystemExit(1)", "import time; time.sleep(600)"])
def test_what_goes_wrong_is_left_to_the_search(command, monkeypatch):
    monkeypatch.setattr(warming, "_COMMAND", command)
    monkeypatch.setattr(warming, "_MIN_PARAMETERS", 1)
    with (
        pytest.raises(KeyboardInterrupt),
        compilation("auto"),
        warming.compiling_meanwhile(CONFIG, nn.Linear(96, 8), CPU),
    ):
        raise KeyboardInterrupt


def test_nothing_is_imported_from_where_the_command_was_started(tmp_path, monkeypatch):
    (tmp_path / "fxmse_planted.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warming, "_COMMAND", "import fxmse_planted")
    monkeypatch.setattr(warming, "_MIN_PARAMETERS", 1)
    with compilation("always"), warming.compiling_meanwhile(CONFIG, nn.Linear(96, 8), CPU):
        assert pays_to_compile("what waits", torch.ones(MIN_COMPILED), 1)
    assert not (tmp_path / "ran").exists()


class Compiler:
    """A process that compiles until it is waited for."""

    def __init__(self):
        self.code = None

    def poll(self):
        return self.code

    def wait(self):
        self.code = 0
        return self.code


def search(**kwargs):
    args = QuantizationArgs(**{"num_bits": 4, "strategy": "channel", "observer": "exact_mse", **kwargs})
    Observer.load_from_registry(args.observer, base_name="weight", args=args)(torch.randn(64, 100))


@pytest.mark.parametrize(
    ("args", "waits"),
    [
        ({"observer": "memoryless_mse"}, False),
        ({"strategy": "group", "group_size": 50}, False),
        ({"strategy": "tensor_group", "group_size": 10, "type": "float", "scale_dtype": torch.float8_e4m3fn}, False),
        ({}, True),  # no vector's length divides 100
        ({"strategy": "group", "group_size": 50, "observer_kwargs": {"norm": 2.4}}, True),
    ],
)
def test_what_would_find_something_else_waits(args, waits):
    compiler = Compiler()
    with torch.no_grad(), compilation("always"), compiled_elsewhere(compiler):
        search(**args)
    assert (compiler.code is not None) == waits


def test_searches_that_take_as_long_as_compiling_wait(monkeypatch):
    monkeypatch.setattr(compiling, "_COMPILATION_WORK", MIN_COMPILED * 10)
    compiler, value = Compiler(), torch.ones(MIN_COMPILED)
    with compilation("always"), compiled_elsewhere(compiler):
        assert not pays_to_compile("small", value, 9, finds_same=True)
        assert compiler.code is None
        assert pays_to_compile("large", value, 10, finds_same=True)
        assert compiler.code == 0
    compiler = Compiler()
    with compilation("always"), compiled_elsewhere(compiler):
        monkeypatch.setattr(compiling, "_PATIENCE", 0)  # it has passed
        assert pays_to_compile("small", value, 9, finds_same=True)
        assert compiler.code == 0
    # Nobody waits for what would not be compiled.
    compiler = Compiler()
    for mode in ("never", "auto"):
        with compilation(mode), compiled_elsewhere(compiler):
            assert not pays_to_compile(("small", mode), value, 1)
    assert compiler.code is None


def test_a_processor_is_left_to_the_process_and_taken_back(monkeypatch):
    compiler, threads, num_threads = Compiler(), [], torch.get_num_threads()

    def measure(observer, value, global_scale):
        threads.append(torch.get_num_threads())
        pays_to_compile("what waits", value, 1)
        threads.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(Observer.get_value_from_registry("exact_mse"), "measure", measure)
    torch.set_num_threads(3)
    try:
        with torch.no_grad(), compilation("always"), compiled_elsewhere(compiler):
            for expected in ([2, 3], [3, 3]):  # the second time it has ended
                with pytest.raises(KeyboardInterrupt):
                    search()
                assert threads == expected
                assert torch.get_num_threads() == 3
                threads.clear()
    finally:
        torch.set_num_threads(num_threads)


def test_a_process_that_is_not_needed_any_more_is_ended_with_all_it_started(tmp_path, monkeypatch):
    command = f"""
import pathlib, subprocess, time
started = subprocess.Popen(["sleep", "600"])
pathlib.Path({str(tmp_path)!r}, f"{{started.pid}}.pid").touch()
time.sleep(600)
"""
    monkeypatch.setattr(warming, "_COMMAND", command)
    monkeypatch.setattr(warming, "_MIN_PARAMETERS", 1)
    with compilation("auto"), warming.compiling_meanwhile(CONFIG, nn.Linear(96, 8), CPU):
        for _ in range(300):
            if found := list(tmp_path.iterdir()):
                break
            time.sleep(0.1)
    for _ in range(300):  # a signal takes a moment
        if not is_running(int(found[0].stem)):
            break
        time.sleep(0.1)
    else:
        pytest.fail("it is still running")


def is_running(pid):
    """Whether a process is there and not a zombie that nobody has waited for."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_the_largest_weight_of_each_scheme_is_asked_for():
    model = nn.Sequential(nn.Linear(96, 8), nn.Linear(96, 1 << 14), nn.Conv2d(3, 999, 9))
    (request,) = warming._list_requests(CONFIG, model, CPU)
    assert (request["shape"], request["dtype"]) == ([4096, 96], "float32")
    assert json.loads(json.dumps(request)) == request
