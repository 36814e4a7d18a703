"""Which rows of a weight meet which tokens: those of a convolution meet patches, those of an expert its own tokens."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Arrangement", "Experts", "Patches"]


@dataclass(frozen=True)
class Patches:
    """A convolution's rows meet the patches under its kernel; those of a group meet that of their channels.

    Attributes:
        kernel_size: of each spatial dimension, as all but ``groups``.
        stride: see above.
        padding: zeros to either side; a string as torch's convolutions take it.
        dilation: see above.
        groups: of channels.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int

    @property
    def num_matrices(self) -> int:
        """How many parts of the rows meet tokens of their own."""
        return self.groups

    def arrange(self, x: Tensor) -> Tensor:
        """The patches of ``x``, shape ([batch,] channels, *spatial): (groups, patches, elements of a row)."""
        num_dims = len(self.kernel_size)
        x = torch.nn.functional.pad(x if x.dim() > num_dims + 1 else x[None], self._list_padding())
        for dim, (size, stride, dilation) in enumerate(
            zip(self.kernel_size, self.stride, self.dilation, strict=True), 2
        ):
            x = x.unfold(dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
        # (batch, channels, *places, *kernel) to (groups, batch, *places, channels of a group, *kernel).
        x = x.unflatten(1, (self.groups, -1)).movedim(1, 0).movedim(2, 2 + num_dims)
        return x.flatten(1, 1 + num_dims).flatten(2)

    def _list_padding(self) -> list[int]:
        """As ``F.pad`` has it, the last dimension first."""
        if self.padding == "valid":
            return [0] * (2 * len(self.kernel_size))
        if self.padding == "same":
            totals = [(size - 1) * dilation for size, dilation in zip(self.kernel_size, self.dilation, strict=True)]
            return [side for total in totals[::-1] for side in (total // 2, total - total // 2)]
        assert not isinstance(self.padding, str)
        return [side for amount in self.padding[::-1] for side in (amount, amount)]


@dataclass(frozen=True)
class Experts:
    """Each of several matrices meets tokens of its own.

    Attributes:
        num_matrices: the experts.
        kind: where a token's expert is known from. "batch": it is the place in x's first dimension. "offsets": experts'
            tokens follow each other, up to their offset. "index": there is a number of an expert for each entry of x's
            first dimension, or one for all.
    """

    num_matrices: int
    kind: str

    def number(self, x: Tensor, choice: Tensor | int) -> Tensor:
        """The number of each token's expert, shape (tokens,), of x, shape (..., channels)."""
        num_tokens = math.prod(x.shape[:-1])
        if not isinstance(choice, Tensor) or choice.dim() == 0:
            return torch.zeros(num_tokens, dtype=torch.int64, device=x.device) + choice
        if self.kind == "offsets":
            return torch.searchsorted(choice, torch.arange(num_tokens, device=choice.device), right=True)
        shape = (len(choice), *([1] * (x.dim() - 2)))
        return choice.reshape(shape).expand(x.shape[:-1]).flatten()

    def count(self, choice: Tensor) -> Tensor:
        """How many entries of x each expert has, int64, shape (experts,)."""
        if self.kind == "offsets":
            return choice.long().diff(prepend=choice.new_zeros(1).long())
        return torch.bincount(choice.flatten(), minlength=self.num_matrices)


Arrangement = Patches | Experts
