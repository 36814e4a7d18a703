"""Searches are compiled in tests, as they are for models of real size."""

import pytest

from fxmse.compiling import compilation


@pytest.fixture(autouse=True, scope="session")
def compiled_searches():
    with compilation("always"):
        yield
