"""Tables of counts against Python's own counter."""

from collections import Counter
from unittest import mock

import pytest
import torch
from cases import make_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmse.formats.layout import Layout
from fxmse.observers.counting import convert_counts, count, count_non_finite, count_patterns, list_values
from fxmse.search.compiling import compilation

TENSOR, GROUP, HEAD = Layout("input", "tensor"), Layout("input", "group", 16), Layout("q", "attn_head")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def as_counter(counts, dtype):
    values = list_values(dtype, torch.device("cpu"))
    seen = counts.nonzero().flatten()
    return Counter(values[seen].repeat_interleave(counts[seen]).tolist())  # both zeros are one


@pytest.mark.parametrize("mode", ["always", "never"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 32), (8, 512, 64)])
def test_values_of_16_bits_are_counted_exactly(shape, dtype, mode, device):
    value = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 3).to(dtype)
    value.flatten()[:100] = 0
    with compilation(mode), mock.patch("torch.get_num_threads", return_value=2):
        counts = count(value.to(device), TENSOR).cpu()
    assert counts.shape == (1, count_patterns(dtype))
    assert as_counter(counts[0], dtype) == Counter(value.float().flatten().tolist())


@pytest.mark.parametrize("mode", ["always", "never"])
def test_values_of_32_bits_are_known_to_a_thousandth(mode, device):
    value = make_weight("heavy", rows=64, columns=128)
    value[0] = 0
    with compilation(mode):
        counts = count(value.to(device), TENSOR)[0].cpu()
    found = list_values(torch.float32, torch.device("cpu")).repeat_interleave(counts).sort().values
    expected = value.flatten().sort().values
    assert ((found - expected).abs() <= 2.0**-10 * expected.abs()).all()
    assert (found == 0).sum() == 128


@pytest.mark.parametrize("mode", ["always", "never"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_group_and_head_has_a_table(dtype, mode, device):
    value = torch.randn(8, 20, 64).to(device, dtype)
    states = torch.randn(4, 6, 20, 16).to(device, dtype)
    with compilation(mode):
        groups, heads = count(value, GROUP), count(states, HEAD)
        for group, part in enumerate(value.unflatten(-1, (4, 16)).unbind(2)):
            assert torch.equal(groups[group], count(part, TENSOR)[0])
        for head, part in enumerate(states.unbind(1)):
            assert torch.equal(heads[head], count(part, TENSOR)[0])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from(DTYPES), st.integers(0, 1000))
def test_parts_add_up_to_the_whole(sizes, dtype, seed):
    value = torch.randn(sum(sizes), 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    counts = None
    for part in value.split(sizes):
        counts = count(part, TENSOR, counts)
    assert torch.equal(counts, count(value, TENSOR))
    assert counts.sum() == value.numel()


def test_strides_do_not_matter():
    value = torch.randn(16, 48, 32).bfloat16()
    expected = count(value, TENSOR)
    for view in (value.transpose(0, 1), value.permute(2, 0, 1), value[:, ::2].repeat(1, 1, 1)):
        counts = count(view, TENSOR)
        assert torch.equal(counts, expected) == (view.numel() == value.numel())
        assert counts.sum() == view.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_found(dtype, device):
    value = torch.tensor([1.0, float("nan"), -2.0, float("inf"), float("-inf"), torch.finfo(dtype).max]).to(
        device, dtype
    )
    assert count_non_finite(count(value, TENSOR), dtype) == 3
    assert count_non_finite(count(value[:1], TENSOR), dtype) == 0
    assert count_non_finite(count(value[-1:], TENSOR), dtype) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counts_of_16_bits_become_those_of_32(dtype, device):
    value = (torch.randn(64, 32) ** 3).to(device, dtype)
    wide = convert_counts(count(value, TENSOR), dtype, torch.float32)
    assert torch.equal(wide, count(value.float(), TENSOR))
    assert torch.equal(convert_counts(wide, torch.float32, torch.float64), wide)


def test_too_many_groups_are_refused():
    with pytest.raises(ValueError, match="512 groups need tables of 1024 MB to be counted in: expected at most 512 MB"):
        count(torch.zeros(1, 512 * 16), GROUP)
