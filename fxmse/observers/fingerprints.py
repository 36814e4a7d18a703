"""Numbers that tell tensors apart by what they hold."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fxmse.formats.tables import is_traced

__all__ = ["find_fingerprint", "has_values"]

_AT_A_TIME = 1 << 18  # words of 8 bytes, which a cache holds
_MODULUS = 1 << 64
_MULTIPLIER = 0xBF58_476D_1CE4_E5B9  # splitmix64's, odd


def has_values(value: Tensor) -> bool:
    """Whether there are bits to read: none on the meta device, and none while a graph is being made."""
    return not (value.is_meta or is_traced(value))


def find_fingerprint(value: Tensor) -> int | None:
    """A number of 64 bits that follows from a tensor's bits alone, on every device; None where it has none to read.

    It is sum(weight[i] * word[i]) modulo 2 ** 64 over words of 8 bytes and fixed odd weights, so that no order of
    adding up changes it, and elements that change their places do. -0.0 is not 0.0, and a NaN is what its bits are.
    Its shape and dtype have no part in it. A tensor that is changed has the fingerprint that it had before with a
    probability of about 2 ** -32; one that is built to collide does, for it is no cryptographic hash.
    """
    if not has_values(value):
        return None
    weights = _make_weights(_AT_A_TIME, value.device)
    size = 8 * _AT_A_TIME // value.element_size()
    # Allocated at once: numbers that are kept between parts that are not would leave holes in memory.
    sums = weights.new_empty(max(1, -(-value.numel() // size)))
    for place, part in enumerate(map(_view_as_words, _cut(value.detach(), size))):
        # The upper half goes into the lower one first: a product modulo 2 ** 64 shifts the topmost bits out.
        mixed = (part >> 32).bitwise_xor_(part)
        sums[place] = mixed.mul_(weights[: len(part)]).sum()
    found = value.numel()
    for total in sums.tolist():
        found = (found * _MULTIPLIER + total) % _MODULUS
    return found


def _cut(value: Tensor, size: int) -> Iterator[Tensor]:
    """The elements of ``value`` in order, ``size`` at a time; of experts no more than one is copied at once."""
    if value.is_contiguous() or value.dim() < 3:
        # Of one element a stride may be anything.
        yield from value.contiguous().as_strided((value.numel(),), (1,)).split(size)
        return
    rest = value.new_empty(0)
    for piece in value:
        *whole, rest = torch.cat([rest, piece.flatten()]).split(size)
        yield from whole
    yield rest


def _view_as_words(value: Tensor) -> Tensor:
    """The bits of a vector in order, int64; the last word is filled up with zeros."""
    bits = value.view(torch.uint8)
    if len(bits) % 8:
        bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8))
    elif bits.storage_offset() % 8:
        bits = bits.clone()
    return bits.view(torch.int64)


@functools.cache
def _make_weights(count: int, device: torch.device) -> Tensor:
    """Odd int64 numbers that look random, the same on every device; int64 wraps around.

    Source: splitmix64 (Steele, Lea, Flood 2014), but for shifts that keep the sign.
    """
    with torch.inference_mode(False):
        bits = torch.arange(1, count + 1, device=device) * _to_signed(0x9E37_79B9_7F4A_7C15)
        bits = (bits ^ (bits >> 30)) * _to_signed(_MULTIPLIER)
        bits = (bits ^ (bits >> 27)) * _to_signed(0x94D0_49BB_1331_11EB)
        return (bits ^ (bits >> 31)) | 1


def _to_signed(number: int) -> int:
    return number - _MODULUS if number >> 63 else number
