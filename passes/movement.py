"""Ops that move a parameter's values without changing them, and the way back through them."""

import operator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxmse.capture.attributes import get_attribute
from fxmse.passes.probe import find_probe

__all__ = ["FoundParameter", "find_parameter", "skip_transposes"]

aten = torch.ops.aten

# Casts change values, but a parameter is quantized in its own dtype whatever it is cast to behind.
_SAME = {
    *(aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default, aten.to.dtype),
    *(aten.to.dtype_layout, aten._to_copy.default, torch.clone, torch.detach),
    *("clone", "contiguous", "detach", "to", "float", "half", "bfloat16"),
}
_ALWAYS_SWAP = (torch.t, aten.t.default, aten.numpy_T.default, aten.mT.default, aten.matrix_H.default, "t")
_TRANSPOSES = (torch.transpose, torch.swapaxes, aten.transpose.int, "transpose", "swapaxes")
_PERMUTES = (torch.permute, aten.permute.default, "permute")
_SELECTS = (torch.select, aten.select.int, "select")
_INDEX_SELECTS = (torch.index_select, aten.index_select.default, "index_select")
_SLICES = (aten.slice.Tensor, torch.narrow, aten.narrow.default, "narrow")
_PIECES = (
    *(torch.chunk, torch.split, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default),
    *("chunk", "split"),
)
_EXPANDS = (aten.expand.default, "expand")
_RESHAPES = (
    *(torch.reshape, aten.view.default, aten.reshape.default, aten._unsafe_view.default, "reshape", "view"),
    *_EXPANDS,
)
_UNSQUEEZES = (torch.unsqueeze, aten.unsqueeze.default, "unsqueeze")
_SQUEEZES = (torch.squeeze, aten.squeeze.dim, "squeeze")
_MOVES = {
    *(*_SAME, *_PERMUTES, *_SELECTS, *_INDEX_SELECTS, *_SLICES, *_PIECES, *_RESHAPES, *_UNSQUEEZES, *_SQUEEZES),
    *(operator.getitem, aten.index.Tensor, torch.flatten, torch.unflatten, aten.flatten.using_ints, aten.unflatten.int),
    *("flatten", "unflatten"),
}


@dataclass(frozen=True)
class FoundParameter:
    """A parameter behind an argument.

    Attributes:
        parameter: its get_attr node.
        reader: the first node that reads it, or the probe on it.
        is_transposed: whether its last two dimensions are swapped on the way; not found out of what is observed.
        is_observed: whether a probe is on the way.
        is_picked: whether some of its rows or matrices are picked on the way, in any order.
    """

    parameter: Node
    reader: Node
    is_transposed: bool
    is_observed: bool
    is_picked: bool = False


def find_parameter(
    graph_module: GraphModule, reader: Node, value: object, *, is_matrix: bool = True
) -> FoundParameter | None:
    """The parameter whose rows are those of the matrix that ``value``, an argument of ``reader``, is.

    Its last two dimensions may be swapped on the way, single matrices or rows may be picked, casts and copies made.
    Whatever else is done to it, other rows are read than it has, and the result is None.

    Args:
        graph_module: the graph.
        reader: the op.
        value: its weight.
        is_matrix: whether the weight's last two dimensions are a matrix's; those of a convolution's are not, and only
            casts and copies leave its rows as they are.
    """
    way: list[Node] = []
    while isinstance(value, Node) and value.op != "get_attr":
        way.append(value)
        value = value.args[0] if value.args else None
    if not isinstance(value, Node):
        return None
    tensor = get_attribute(graph_module, str(value.target))
    if not isinstance(tensor, Tensor):
        return None
    first = way[-1] if way else reader
    if _is_observed(graph_module, way):
        return FoundParameter(value, first, is_transposed=False, is_observed=True)
    if not is_matrix:
        is_same = all(node.target in _SAME for node in way)
        return FoundParameter(value, first, is_transposed=False, is_observed=False) if is_same else None
    matrix: _Matrix | None = _Matrix(tensor.dim(), tuple(tensor.shape[-2:]))
    for node in reversed(way):
        matrix = matrix and matrix.follow(node)
    if matrix is None or not matrix.is_last:
        return None
    return FoundParameter(value, first, matrix.is_swapped, is_observed=False, is_picked=matrix.is_picked)


def skip_transposes(reader: Node, value: Node, num_dims: int) -> tuple[Node, Node, bool]:
    """What ``value``, an argument of ``reader``, was before its last two dimensions were swapped.

    Returns:
        the first node that swaps them, or ``reader``; what that reads; and whether they are swapped between the two.
    """
    is_swapped = False
    while value.target in _PERMUTES or _find_swapped(value):
        matrix = _Matrix(num_dims, ()).follow(value)
        if matrix is None or not matrix.is_last or not isinstance(value.args[0], Node):
            break
        is_swapped ^= matrix.is_swapped
        reader, value = value, value.args[0]
    return reader, value, is_swapped


def _is_observed(graph_module: GraphModule, way: list[Node]) -> bool:
    """Whether the probe of a weight stands on the way, with nothing before it but moves."""
    for node in way:
        if probe := find_probe(graph_module, node):
            return probe.is_weight
        if node.target not in _MOVES and not _find_swapped(node):
            return False
    return False


@dataclass(frozen=True)
class _Matrix:
    """Where a parameter's last two dimensions are after it was moved.

    Attributes:
        num_dims: of the value; None where it is not known.
        sizes: of the two dimensions, in the parameter's order.
        rows: the place of the parameter's second to last dimension, counted from the end.
        columns: that of its last one.
        pieces: whether this is a list of values, as chunks are.
        is_picked: whether some of the rows or matrices were picked, in any order.
    """

    num_dims: int | None
    sizes: tuple[int, ...]
    rows: int = -2
    columns: int = -1
    pieces: bool = False
    is_picked: bool = False

    @property
    def is_last(self) -> bool:
        """Whether both are the last dimensions, in any order; a vector has but one."""
        return not self.pieces and {self.rows, self.columns} == {-1, -2}

    @property
    def is_swapped(self) -> bool:
        return self.rows == -1

    def follow(self, node: Node) -> "_Matrix | None":
        """After ``node``; None where it does something else."""
        if self.pieces:
            return replace(self, pieces=False) if node.target is operator.getitem else None
        if self.num_dims is not None and self.num_dims < 2:
            return self if node.target in _SAME else None
        if node.target in _SAME:
            return self
        if dims := _find_swapped(node):
            return self._swap(*dims)
        if node.target in _PERMUTES:
            return self._permute(node)
        if node.target is operator.getitem or node.target is aten.index.Tensor:
            return self._index(node)
        if node.target in _RESHAPES:
            return self._reshape(node)
        return self._follow_one_dimension(node)

    def _follow_one_dimension(self, node: Node) -> "_Matrix | None":
        """Ops that are about one dimension."""
        target = node.target
        if target in _PIECES:
            return self._pick(node, 2, 0, pieces=True)
        if target in _SLICES or target in _INDEX_SELECTS:
            return self._pick(node, 1, 0)
        dim = self._from_end(_get_argument(node, 1, "dim"), 1 if target in _UNSQUEEZES else 0)
        if dim is None or target not in (*_SELECTS, *_SQUEEZES, *_UNSQUEEZES):
            return None
        if target in _UNSQUEEZES:
            # It stands before the dimension that was at its place.
            moved = [place - 1 if place <= dim else place for place in (self.rows, self.columns)]
            return replace(self, num_dims=self.num_dims and self.num_dims + 1, rows=moved[0], columns=moved[1])
        if dim in (self.rows, self.columns):
            return None
        moved = [place + 1 if place < dim else place for place in (self.rows, self.columns)]
        is_picked = self.is_picked or target in _SELECTS
        num_dims = self.num_dims and self.num_dims - 1
        return replace(self, num_dims=num_dims, rows=moved[0], columns=moved[1], is_picked=is_picked)

    def _pick(self, node: Node, position: int, default: int, pieces: bool = False) -> "_Matrix | None":
        """Some of the entries of a dimension, in order or not: whole matrices, or rows."""
        dim = self._from_end(_get_argument(node, position, "dim", default))
        return None if dim is None or dim == self.columns else replace(self, pieces=pieces, is_picked=True)

    def _from_end(self, dim: object, extra: int = 0) -> int | None:
        """A dimension counted from the end."""
        if not isinstance(dim, int) or isinstance(dim, bool):
            return None
        if dim < 0:
            return dim
        return None if self.num_dims is None else dim - self.num_dims - extra

    def _swap(self, first: object, second: object) -> "_Matrix | None":
        one, other = self._from_end(first), self._from_end(second)
        if one is None or other is None:
            return None
        exchange = {one: other, other: one}
        return replace(self, rows=exchange.get(self.rows, self.rows), columns=exchange.get(self.columns, self.columns))

    def _permute(self, node: Node) -> "_Matrix | None":
        dims = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
        places = [dim if isinstance(dim, int) and dim < 0 else _subtract(dim, len(dims)) for dim in dims]
        if (self.num_dims is not None and len(dims) != self.num_dims) or None in places:
            return None
        moved = [places.index(place) - len(dims) for place in (self.rows, self.columns)]
        return replace(self, rows=moved[0], columns=moved[1])

    def _index(self, node: Node) -> "_Matrix | None":
        """Indices of leading dimensions, which pick matrices; slices of rows."""
        index = node.args[1]
        # Of Python's indexing a list is one index, of aten's it is one for each dimension.
        is_several = isinstance(index, tuple) or node.target is aten.index.Tensor
        entries = list(index) if is_several else [index]  # type: ignore[arg-type]
        if any(entry is Ellipsis or isinstance(entry, bool) for entry in entries):
            return None
        entries = [slice(None) if entry is None and node.target is aten.index.Tensor else entry for entry in entries]
        num_dims = self.num_dims
        if num_dims is None or None in entries:
            return None
        for place, entry in enumerate(entries):
            from_end = place - num_dims
            if from_end == self.columns and entry != slice(None):
                return None
            if from_end == self.rows and not isinstance(entry, slice):
                return None
        is_picked = self.is_picked or any(entry != slice(None) for entry in entries)
        num_dims -= sum(isinstance(entry, int) for entry in entries)
        indices = [entry for entry in entries if not isinstance(entry, int | slice)]
        if not indices:
            return replace(self, num_dims=num_dims, is_picked=is_picked)
        # An index's own dimensions take the place of those that it picks from, which are before the matrix.
        num_own = _count_dims(indices[0]) if len(indices) == 1 else None
        num_dims = None if num_own is None else num_dims - 1 + num_own
        is_last = max(self.rows, self.columns) == -1
        return replace(self, num_dims=num_dims, is_picked=is_picked) if is_last else None

    def _reshape(self, node: Node) -> "_Matrix | None":
        """New leading dimensions before a matrix that stays as it is."""
        sizes = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
        if {self.rows, self.columns} != {-1, -2} or len(sizes) < 2:
            return None
        own = self.sizes if self.rows < self.columns else self.sizes[::-1]
        # Of an expansion, -1 leaves a size as it is.
        new = [
            old if size == -1 and node.target in _EXPANDS else size for size, old in zip(sizes[-2:], own, strict=True)
        ]
        return replace(self, num_dims=len(sizes)) if tuple(new) == tuple(own) else None


def _count_dims(value: object) -> int | None:
    """Of a value; None where the graph does not know."""
    example = value.meta.get("val") if isinstance(value, Node) else None
    return example.dim() if isinstance(example, Tensor) else None


def _subtract(dim: object, number: int) -> int | None:
    return dim - number if isinstance(dim, int) else None


def _get_argument(node: Node, position: int, name: str, default: object = None) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _find_swapped(node: Node) -> tuple[object, object] | None:
    """The two dimensions that ``node`` swaps."""
    if node.target in _ALWAYS_SWAP or (node.target is getattr and node.args[1] in ("T", "mT")):
        return -1, -2
    if node.target in _TRANSPOSES:
        return _get_argument(node, 1, "dim0"), _get_argument(node, 2, "dim1")
    return None
