"""Strategies: how a value is cut into the groups that share a scale."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from fxmse.formats.grids import Format

__all__ = ["MAX_ELEMENTS", "Layout", "enlarge"]

_STRATEGIES = {
    "weight": ("tensor", "channel", "group", "tensor_group", "block"),
    "input": ("tensor", "group", "tensor_group"),
    "output": ("tensor", "group", "tensor_group"),
    "q": ("tensor", "attn_head"),
    "k": ("tensor", "attn_head"),
    "v": ("tensor", "attn_head"),
}
# Trailing dimensions of a per-tensor value are merged until rows are so long that their reduction fills the vector
# units; with the first dimension only where rows would be very short.
_LONG_ROW, _SHORT_ROW = 256, 32
MAX_ELEMENTS = 1 << 20
"""Elements that may be copied at a time, where no view will do; :func:`enlarge` it."""


def enlarge(limit: int, device: torch.device) -> int:
    """A limit of a tile's size that is made for a CPU's caches, as it is on ``device``.

    On a GPU it is 2 ** 26, 256 MiB of float32: a smaller tile is done before the CPU has called for the next one.
    """
    return limit if device.type == "cpu" else 1 << 26


@dataclass(frozen=True)
class Layout:
    """How a value of one role becomes tiles of shape [O, Q, G] and a scale of ``qparam_shape``.

    O counts observations, Q qparams, G the elements of a group; statistics reduce over O and G. The tiles of a
    value follow each other along Q, and together their Q is the number of elements of ``qparam_shape``.

    A weight of more than two dimensions is that many matrices (experts'): each is a tensor with a scale of its own.

    Attributes:
        base_name: "weight", "input", "output", "q", "k" or "v".
        strategy: a ``QuantizationStrategy`` value that makes sense for the role.
        group_size: for group and tensor_group.
        block_structure: (rows, columns), for block.
    """

    base_name: str
    strategy: str
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None

    @classmethod
    def of(cls, args: QuantizationArgs, base_name: str) -> "Layout":
        """The layout of a value whose scales, or whose global scale, are calibrated.

        Raises:
            ValueError: a role that is unknown, or a strategy or format that makes no sense for it.
        """
        if base_name not in _STRATEGIES:
            raise ValueError(f"base_name={base_name!r}: expected one of {', '.join(_STRATEGIES)}")
        strategy = QuantizationStrategy(args.strategy).value
        if strategy not in _STRATEGIES[base_name]:
            raise ValueError(
                f"strategy={strategy} makes no sense for a static {base_name}: "
                f"expected one of {', '.join(_STRATEGIES[base_name])}"
            )
        Format.of(args)
        group_size = args.group_size if strategy in ("group", "tensor_group") else None
        block = (args.block_structure[0], args.block_structure[1]) if args.block_structure else None
        return cls(base_name, strategy, group_size, block)

    def qparam_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of scale and zero point of a value of ``shape``; raises ValueError where it does not fit."""
        if self.strategy == "tensor":
            return (*shape[:-2], 1, 1) if self.is_by_matrix(shape) else (1,)
        if self.strategy == "attn_head":
            return (shape[1], 1, 1)
        if self.strategy == "channel":
            return (*shape[:-1], 1)
        if self.strategy == "block":
            assert self.block_structure is not None
            if len(shape) < 2:
                raise ValueError(f"strategy=block needs a value of 2 dimensions or more, found shape {tuple(shape)}")
            rows, columns = self.block_structure
            return (*shape[:-2], math.ceil(shape[-2] / rows), math.ceil(shape[-1] / columns))
        assert self.group_size is not None
        if shape[-1] % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} does not divide the last dimension of shape {tuple(shape)}: "
                "choose a divisor, or put the module on the ignore list"
            )
        groups = shape[-1] // self.group_size
        return (*shape[:-1], groups) if self.base_name == "weight" else (groups,)

    def is_by_matrix(self, shape: torch.Size) -> bool:
        """Whether a value of ``shape`` is several matrices, each of which has its own scale or global scale."""
        return self.base_name == "weight" and len(shape) > 2 and self.strategy in ("tensor", "tensor_group")

    def tiles(self, value: Tensor, max_groups: int) -> Iterator[Tensor]:
        """Cuts ``value`` into tiles [O, Q, G] of at most about ``max_groups`` groups and ``MAX_ELEMENTS`` each.

        Tiles are views; where blocks are filled up, copies, one at a time. A tile of blocks has two dimensions Q, and
        the rows of a block for O. Only weights are cut: each of an activation's groups is spread over all of its
        observations.
        """
        if self.strategy == "tensor":
            if self.is_by_matrix(value.shape):
                for matrix in value.flatten(0, -3):
                    yield _as_rows(matrix)
            else:
                yield _as_rows(value)
        elif self.strategy == "attn_head":
            # Attention states are often laid out as (batch, tokens, heads, head_dim): both orders are views.
            by_token = value.transpose(1, 2)
            yield by_token.flatten(0, 1) if by_token.is_contiguous() else value.flatten(2)
        elif self.strategy == "block":
            for matrix in value.reshape(-1, *value.shape[-2:]):
                yield from self._block_tiles(matrix, max_groups)
        elif self.base_name == "weight":
            groups = value.reshape(-1, self.group_size or value.shape[-1])
            max_elements = enlarge(MAX_ELEMENTS, value.device)
            for part in groups.split(max(1, min(max_groups, max_elements // groups.shape[1]))):
                yield part.unsqueeze(0)
        else:
            assert self.group_size is not None
            yield value.reshape(-1, value.shape[-1] // self.group_size, self.group_size)

    def channel_tiles(self, channels: Tensor, shape: torch.Size, max_groups: int) -> Iterator[Tensor]:
        """What each channel of a weight's last dimension is multiplied by, beside each of its :meth:`tiles`.

        Args:
            channels: shape (in,).
            shape: the weight's, (..., in); strategies channel, group and tensor_group.
            max_groups: as for :meth:`tiles`.

        Yields:
            [Q, G] beside tiles [1, Q, G], Q = 1 where all groups have the same.
        """
        size = self.group_size or shape[-1]
        by_group = channels.reshape(-1, size)
        num_groups = shape.numel() // size
        at_a_time = max(1, min(max_groups, enlarge(MAX_ELEMENTS, channels.device) // size))
        for start in range(0, num_groups, at_a_time):
            rows = torch.arange(start, min(start + at_a_time, num_groups), device=channels.device)
            yield by_group if len(by_group) == 1 else by_group[rows % len(by_group)]

    def as_one_group(self) -> "Layout":
        """The layout that puts all of a value, or of a matrix, in one group (where a global scale is searched)."""
        return Layout(self.base_name, "tensor")

    def _block_tiles(self, value: Tensor, max_groups: int) -> Iterator[Tensor]:
        assert self.block_structure is not None
        height, width = self.block_structure
        columns = math.ceil(value.shape[1] / width)
        max_rows = min(max_groups // columns, enlarge(MAX_ELEMENTS, value.device) // (height * value.shape[1]))
        num_columns = columns * width
        for rows in torch.split(value, height * max(1, max_rows)):
            if len(rows) % height or value.shape[1] != num_columns:
                # Zeros fill the last blocks up: they lie inside every range and are quantized without error.
                rows = torch.nn.functional.pad(rows, (0, num_columns - value.shape[1], 0, -len(rows) % height))
            yield rows.unflatten(1, (columns, width)).unflatten(0, (-1, height)).transpose(0, 1)


def _as_rows(value: Tensor) -> Tensor:
    """All elements as [O, 1, G], G long enough to vectorise; a view of any dense value, whatever its order."""
    strides = value.stride()
    order: list[int] = []
    for dim in range(value.dim()):  # sorted by hand: Dynamo sorts no sizes that vary
        place = 0
        while place < len(order) and strides[order[place]] >= strides[dim]:
            place += 1
        order.insert(place, dim)
    value = value.permute(order)
    length = 1
    for dim in range(value.dim() - 1, -1, -1):
        # A first dimension that varies from batch to batch had better stay one.
        if length >= (_LONG_ROW if dim else _SHORT_ROW):
            break
        length = length * value.shape[dim]
    rows = value.reshape(-1, 1, length)
    # A small copy (of a batch's first tokens, say) spares a second compiled graph for its strides.
    return rows.contiguous() if rows.numel() <= MAX_ELEMENTS else rows
