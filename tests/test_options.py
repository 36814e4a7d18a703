"""Which candidates options name, and what is said of those that name none."""

import math

import pytest

from fxmse.search.options import SearchOptions


@pytest.mark.parametrize(
    ("maxshrink", "grid", "num_steps"),
    [(0.29, 100, 29), (0.2, 100.0, 20), (1.0, 7, 7), (0.07, 100, 7), (0.57, 100, 57)],
)
def test_steps_are_counted_in_decimal(maxshrink, grid, num_steps):
    # int(.29 * 100) is 28.
    assert len(SearchOptions(maxshrink=maxshrink, grid=grid).factors) == num_steps


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"maxshrink": 0}, "maxshrink=0: expected"),
        ({"maxshrink": 1.5}, "maxshrink=1.5"),
        ({"grid": 0}, "grid=0: expected"),
        ({"grid": math.inf}, "grid=inf"),
        ({"norm": -1}, "norm=-1: expected a number above 0"),
        ({"norm": "2"}, "norm='2'"),
        ({"norm": math.nan}, "norm=nan"),
        ({"patience": 0}, "patience=0: expected a whole number"),
        ({"patience": 1.5}, "patience=1.5"),
        ({"patience": True}, "patience=True"),
        ({"patience": math.inf}, "patience=inf"),
        ({"maxshrink": 0.005}, "make no search step"),
    ],
)
def test_options_out_of_range_are_named(kwargs, named):
    with pytest.raises(ValueError, match=named):
        SearchOptions(**kwargs)
