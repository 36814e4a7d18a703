"""How often which value was seen: the whole distribution in a table of fixed size.

A bfloat16 or float16 value has 65,536 possible bit patterns, so that a table of counts per pattern loses nothing. Of a
float32 the first 18 bits are counted, its sign, its exponent and 9 bits of its mantissa: the value is then known to
2 ** -10 of itself, half of what such patterns are apart; next to the largest value that is an eighth of a step of int8.
Tables of one dtype are added up, whatever the order and the split of the values.
"""

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxmse.formats.layout import Layout
from fxmse.search.compiling import attempt, pays_to_compile

__all__ = ["convert_counts", "count", "count_non_finite", "count_patterns", "find_patterns", "list_values"]

_MAX_ENTRIES = 1 << 26  # of a table: half a gigabyte
_AT_A_TIME = 1 << 22  # elements whose indices are held at a time
_MIN_PARALLEL = 1 << 17  # elements; a second thread has a table of its own to add
# A thread counts groups of its own; of one group each counts a part, all but the first in a table of their own.
_SOURCE = """
#include <cstdint>
#include <vector>
#include <omp.h>

template <typename T, int shift, int num_bits>
static void count(const T* values, int64_t outer, int64_t groups, int64_t inner, int64_t* counts, int threads) {
  const int64_t size = outer * inner;
  if (groups > 1) {  // each thread counts groups of its own
#pragma omp parallel for num_threads(threads)
    for (int64_t g = 0; g < groups; g++)
      for (int64_t o = 0; o < outer; o++) {
        const T* row = values + (o * groups + g) * inner;
        for (int64_t i = 0; i < inner; i++) counts[(g << num_bits) + (row[i] >> shift)]++;
      }
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int id = omp_get_thread_num(), n = omp_get_num_threads();
    const int64_t begin = size * id / n, end = size * (id + 1) / n;
    std::vector<uint32_t> own(id ? 1 << num_bits : 0);  // the first thread writes to the result
    if (id == 0)
      for (int64_t i = begin; i < end; i++) counts[values[i] >> shift]++;
    else
      for (int64_t i = begin; i < end; i++) own[values[i] >> shift]++;
#pragma omp barrier
#pragma omp critical
    for (int64_t b = 0; b < (int64_t)own.size(); b++) counts[b] += own[b];
  }
}

extern "C" void count_16(const uint16_t* v, int64_t o, int64_t g, int64_t i, int64_t* c, int t) {
  count<uint16_t, 0, 16>(v, o, g, i, c, t);
}
extern "C" void count_32(const uint32_t* v, int64_t o, int64_t g, int64_t i, int64_t* c, int t) {
  count<uint32_t, 14, 18>(v, o, g, i, c, t);
}
"""


class _Patterns(NamedTuple):
    """The bits of a dtype that are counted."""

    dtype: torch.dtype  # that is read
    integer: torch.dtype  # of the same size
    num_bits: int  # of a pattern, from the sign on
    num_exponent_bits: int

    @classmethod
    def of(cls, dtype: torch.dtype) -> "_Patterns":
        """What is counted of values of ``dtype``; float64 counts as float32."""
        if dtype == torch.bfloat16:
            return cls(torch.bfloat16, torch.int16, 16, 8)
        if dtype == torch.float16:
            return cls(torch.float16, torch.int16, 16, 5)
        return cls(torch.float32, torch.int32, 18, 8)

    @property
    def size(self) -> int:
        """How many patterns there are."""
        return 1 << self.num_bits

    @property
    def shift(self) -> int:
        """How many of the value's bits are left out."""
        return torch.iinfo(self.integer).bits - self.num_bits


def count(value: Tensor, layout: Layout, counts: Tensor | None = None) -> Tensor:
    """Adds a value to what was counted before.

    Args:
        value: float, any shape that ``layout`` takes; of its groups each has a table.
        layout: that of an activation.
        counts: of values of the same dtype; None for nothing.

    Returns:
        int64, (groups, patterns): a new table.

    Raises:
        ValueError: so many groups that their tables do not fit in memory.
    """
    patterns = _Patterns.of(value.dtype)
    values_OQG = next(layout.tiles(value.detach().to(patterns.dtype), 1)).contiguous()
    num_groups = values_OQG.shape[1]
    if num_groups * patterns.size > _MAX_ENTRIES:
        raise ValueError(
            f"{num_groups} groups need tables of {num_groups * patterns.size >> 17} MB to be counted in: expected at "
            f"most {_MAX_ENTRIES >> 17} MB. Use observer='mse', or strategy=tensor"
        )
    if counts is None:
        counts = torch.zeros(num_groups, patterns.size, dtype=torch.int64, device=value.device)
    else:
        counts = counts.clone()
    plain = functools.partial(_count_by_index, values_OQG, patterns, counts)
    if value.device.type == "cpu" and pays_to_compile(patterns, value, 1):
        attempt(functools.partial(_count_by_kernel, values_OQG, patterns, counts), plain)
    else:
        plain()
    return counts


def _count_by_kernel(values_OQG: Tensor, patterns: _Patterns, counts: Tensor) -> None:
    kernel = _load_kernels()[torch.iinfo(patterns.integer).bits]
    num_threads = torch.get_num_threads() if values_OQG.numel() >= _MIN_PARALLEL else 1
    kernel(values_OQG.data_ptr(), *values_OQG.shape, counts.data_ptr(), num_threads)


@functools.cache
def _load_kernels() -> dict[int, Any]:
    """By the bits of an element. Inductor has the compiler, its flags and a cache on disk."""
    from torch._inductor.codecache import CppCodeCache

    library = CppCodeCache.load(_SOURCE)
    kernels = {16: library.count_16, 32: library.count_32}
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for kernel in kernels.values():
        kernel.argtypes = (pointer, number, number, number, pointer, ctypes.c_int)
        kernel.restype = None
    return kernels


def _count_by_index(values_OQG: Tensor, patterns: _Patterns, counts: Tensor) -> None:
    one = torch.ones(1, dtype=counts.dtype, device=counts.device)
    for group, values_OG in enumerate(values_OQG.unbind(1)):
        for part in values_OG.flatten().split(_AT_A_TIME):
            index = find_patterns(part)
            if index.device.type == "cpu":
                counts[group] += torch.bincount(index, minlength=patterns.size)
            else:  # where bincount waits for the device
                counts[group].index_add_(0, index, one.expand(len(index)))


def find_patterns(value: Tensor) -> Tensor:
    """The place of each element's pattern in a table, int32, the value's shape."""
    patterns = _Patterns.of(value.dtype)
    return (value.to(patterns.dtype).view(patterns.integer).int() >> patterns.shift) & (patterns.size - 1)


def count_patterns(dtype: torch.dtype) -> int:
    """How many entries a table of values of ``dtype`` has."""
    return _Patterns.of(dtype).size


def count_non_finite(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """How many values of ``dtype`` were NaN or Inf, no dimension."""
    by_exponent = counts.unflatten(1, (2, 1 << _Patterns.of(dtype).num_exponent_bits, -1))
    return by_exponent[:, :, -1].sum()


def list_values(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The value of each pattern, float32: its own, or of several the middle one. Zeros are zeros."""
    patterns = _Patterns.of(dtype)
    index = torch.arange(patterns.size, device=device, dtype=torch.int32)
    bits = index << patterns.shift
    if patterns.shift:
        is_zero = (bits & 0x7FFF_FFFF) == 0
        bits = torch.where(is_zero, 0, bits + (1 << (patterns.shift - 1)))
    return bits.to(patterns.integer).view(patterns.dtype).float()


def convert_counts(counts: Tensor, old: torch.dtype, new: torch.dtype) -> Tensor:
    """The counts of values of another dtype, which is wider."""
    if _Patterns.of(old) == _Patterns.of(new):
        return counts
    patterns = _Patterns.of(new)
    bits = list_values(old, counts.device).to(patterns.dtype).view(patterns.integer).int()
    index = (bits >> patterns.shift) & (patterns.size - 1)
    wide = counts.new_zeros(len(counts), patterns.size)
    return wide.index_add_(1, index, counts)
