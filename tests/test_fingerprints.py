"""Tensors are told apart by their bits, and by nothing else."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fxmse.observers.fingerprints import _AT_A_TIME, find_fingerprint

_WORD = (1 << 64) - 1


def compute_plainly(value):
    """The same sum in Python's whole numbers, with shifts that keep the sign."""
    data = value.contiguous().flatten().view(torch.uint8).tolist()
    data += [0] * (-len(data) % 8)

    def to_signed(number):
        number &= _WORD
        return number - (1 << 64) if number >> 63 else number

    def weigh(place):
        bits = to_signed((place + 1) * 0x9E3779B97F4A7C15)
        bits = to_signed((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9)
        bits = to_signed((bits ^ (bits >> 27)) * 0x94D049BB133111EB)
        return (bits ^ (bits >> 31)) | 1

    words = [int.from_bytes(bytes(data[i : i + 8]), "little", signed=True) for i in range(0, len(data), 8)]
    total = sum(weigh(place) * (word ^ (word >> 32)) for place, word in enumerate(words))
    return (value.numel() * 0xBF58476D1CE4E5B9 + total) & _WORD if words else value.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(8, 16), (3, 5), (1,), (0, 4), (7, 2, 3)])
def test_it_is_a_weighted_sum_of_words(dtype, shape):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert find_fingerprint(value) == compute_plainly(value)
    # A view is what it shows.
    every_other = torch.stack([value.float(), value.float()], -1).to(dtype)[..., 0]
    assert find_fingerprint(every_other) == find_fingerprint(value)
    wide = torch.cat([value.float(), value.float()]).to(dtype)
    assert find_fingerprint(wide[len(value) :]) == find_fingerprint(value)
    assert find_fingerprint(value.mT.contiguous().mT if value.dim() > 1 else value) == find_fingerprint(value)


def list_changes():
    """What changes a weight in ways that sums may not see."""

    def swap(weight, first, second):
        weight[first], weight[second] = weight[second].clone(), weight[first].clone()

    yield "swapped", lambda w: swap(w, (0, 0), (5, 3))
    yield "neighbours", lambda w: swap(w, (0, 0), (0, 1))
    yield "rows", lambda w: swap(w, 2, 9)
    yield "negated", torch.Tensor.neg_
    yield "two signs", lambda w: w[0, 1:4:2].neg_()
    yield "two signs of even places", lambda w: w[0, 0:4:2].neg_()
    yield "four signs of a rectangle", lambda w: w[0:4:2, 1:4:2].neg_()
    yield "zeros", lambda w: w[3].neg_()
    yield "an ulp", lambda w: w[1, 2].copy_(torch.nextafter(w[1, 2], torch.tensor(9.0)))
    yield "a NaN", lambda w: w[7, 7].fill_(torch.nan)


CHANGES = dict(list_changes())


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change):
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    weight[3] = 0.0
    before = find_fingerprint(weight)
    CHANGES[change](weight)
    assert find_fingerprint(weight) != before


def test_every_bit_counts():
    bits = torch.randint(-(2**62), 2**62, (3,), generator=torch.Generator().manual_seed(0))
    changed = [bits ^ torch.tensor([0, 1 << place if place < 63 else -(2**63), 0]) for place in range(64)]
    assert len({find_fingerprint(b.view(torch.float32)) for b in [bits, *changed]}) == 65


def test_parts_that_change_places_are_noticed():
    weight = torch.randn(2, 2 * _AT_A_TIME)  # a part is a row
    assert find_fingerprint(weight) != find_fingerprint(weight.flip(0))


@pytest.mark.parametrize("shape", [(5, 30, 70), (64, 128), (1, 16, 64)])
def test_a_transposed_weight_is_what_its_copy_is(shape, monkeypatch):
    monkeypatch.setattr("fxmse.observers.fingerprints._AT_A_TIME", 64)  # of words: less than a matrix, no whole rows
    transposed = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16().mT
    assert find_fingerprint(transposed) == find_fingerprint(transposed.contiguous())
    assert find_fingerprint(transposed) != find_fingerprint(transposed.mT)


def test_there_is_none_without_values():
    assert find_fingerprint(torch.empty(4, device="meta")) is None
    with FakeTensorMode():
        assert find_fingerprint(torch.empty(4)) is None
    with torch.inference_mode():
        value = torch.ones(5)
        assert find_fingerprint(value) == compute_plainly(value)
