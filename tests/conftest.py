"""Searches run uncompiled in tests, but where a test says that compiling is its subject.

tests/test_compiling.py and tests/test_optimum.py hold the compiled searches to the uncompiled ones. Workers of
pytest-xdist share the cores, and all of them Inductor's cache on disk. Each test has its own random numbers, whatever
ran before it.
"""

import os

import pytest
import torch

from fxmse.search.compiling import compilation

if num_workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    num_threads = max(1, torch.get_num_threads() // num_workers)
    torch.set_num_threads(num_threads)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # of the processes that tests start


# Their tests take longest, and come first: pytest-xdist would have files of few tests last, with one worker at the end.
LONGEST = [
    *("test_example", "test_compiling", "test_branches", "test_optimum", "test_exporting", "test_reporting"),
    *("test_onnx", "test_streaming", "test_decompose_attention", "test_architectures", "test_warming", "test_cli"),
    *("test_arrangements", "test_output_mse", "test_distributed", "test_calibration", "test_choose_schemes"),
    *("test_readme", "test_ops", "test_checkpoint", "test_pipeline", "test_patience", "test_lower_to_qdq"),
]


def pytest_configure(config):
    config.option.loadscopereorder = False


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tests that are marked 'device' run what they test")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("device")
    if "nightly" not in config.option.markexpr:  # they run where they are asked for
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if item not in nightly]
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def device(request):
    """Where values are searched, counted and quantized; what is expected of them is calculated on the CPU."""
    return torch.device(request.config.getoption("device"))


@pytest.fixture(autouse=True, scope="session")
def uncompiled_searches():
    with compilation("never"):
        yield


@pytest.fixture
def compiled_searches():
    """Compiles whatever has at least 4096 elements."""
    with compilation("always"):
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
