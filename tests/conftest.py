"""Searches are compiled in tests, as they are for models of real size. Workers of pytest-xdist share the cores.

Each test has its own random numbers, whatever ran before it.
"""

import os

import pytest
import torch

from fxmse.search.compiling import compilation

if num_workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    num_threads = max(1, torch.get_num_threads() // num_workers)
    torch.set_num_threads(num_threads)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # of the processes that tests start


@pytest.fixture(autouse=True, scope="session")
def compiled_searches():
    with compilation("always"):
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
