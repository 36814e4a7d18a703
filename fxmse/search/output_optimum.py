"""The search for the least error of outputs: the scales with which y = x wᵀ changes least, not w.

The mean of |x eᵀ| ** 2 over all inputs x is e H eᵀ for each row e = q - w of errors, with H = E[xᵀ x]. Weights are
rounded to the nearest, as everywhere; only scales and zero points are chosen, but such that the errors of one group
make up for those of others.

That is coordinate descent. Each group has a table of candidates around what is best for it alone by the diagonal of H,
and of each the error by the group's own block of H: the only part that needs a product of matrices for each candidate.
Given the errors of all other groups, a candidate's error is that of the table and a dot product more. So each group
first gets the best of its table (the block form), and then all are gone through, one after the other, in sweeps, until
none finds anything better. The error never rises, but by rounding. A row for which that is better begins with what is
best for each group alone, by the diagonal of H or by the error of the weight: it ends above none of the three.

Where what comes before is quantized, too, and x is not r, what it would be in float, the mean of |x qᵀ - r wᵀ| ** 2 is
e H eᵀ + 2 e C wᵀ and a constant, with C = E[xᵀ (x - r)]: the groups' errors make up for that as well.

What decides how far this comes is how many different roundings a group can choose from, more than how good each is by
itself: candidates are spread evenly, and many.

Shape suffixes as in :mod:`fxmse.search.error_sums`; N groups of a row, M blocks of H of B channels. Everything of Q is
of one group of each row, N times.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxmse.formats.grids import Format
from fxmse.formats.layout import Layout, enlarge
from fxmse.formats.scales import calculate_exact_scale, calculate_range_of_scale, store_mx_scale
from fxmse.formats.stored_scales import list_stored_scales
from fxmse.search.candidates import Candidates, OptimumProblem, Places, cross, make_candidates
from fxmse.search.compiling import pays_to_compile, run
from fxmse.search.descent import Column, descend, find_channels
from fxmse.search.optimum import find_optimum
from fxmse.search.power import AbsolutePower
from fxmse.search.product_sums import sum_crosses, sum_products
from fxmse.search.tiles import Range, measure

__all__ = ["find_output_optimum", "list_diagonal"]

# Strategies whose groups lie in one row, so that the diagonal of H weighs their elements.
_WEIGHED = ("channel", "group", "tensor_group")

# How far the best scale may be from that which is best for the group alone: so many times 1 / sqrt(G).
_WIDTH, _MIN_WIDTH, _MAX_WIDTH = 2.2, 0.05, 0.3
# How many candidates a group has, and one of so many elements, of which the products with H cost the most.
_NUM, _LONG, _NUM_OF_LONG = 41, 512, 15
# An asymmetric format has fewer scales, and zero points beside the best.
_NUM_ASYMMETRIC, _ZERO_POINTS = 21, (0.0, -1.0, 1.0)
_MAX_ELEMENTS = 1 << 23  # of a weight that is searched at a time
_MAX_ERRORS = 1 << 20  # that are multiplied by H at a time


def find_output_optimum(
    value: Tensor,
    format: Format,
    layout: Layout,
    products: Tensor,
    *,
    crosses: Tensor | None = None,
    global_scale: Tensor | None = None,
    negative_scale: bool = False,
    max_sweeps: int,
) -> Range:
    """Finds ranges of a weight's groups with which what is computed of it changes little.

    NaN and Inf are not looked for: a group that has one gets a range that is not finite.

    Args:
        value: float, shape (..., in), not empty.
        format: the format.
        layout: the groups; of a weight.
        products: H, float32, shape (M, B, B): blocks of channels one after the other, the last filled up with zeros.
            What lies beside the blocks counts as 0. B is a multiple of the groups' size or less than that.
        crosses: C, in units of H and of its shape; None where x is what it is in float.
        global_scale: float32, one element; scales are stored times it.
        negative_scale: of symmetric integers whose scales are not e4m3, take scales below 0, too.
        max_sweeps: how often all groups are gone through, after the first choice.

    Returns:
        Ranges as :func:`fxmse.search.optimum.find_optimum` gives them.
    """
    shape = layout.qparam_shape(value.shape)
    # Beside a global scale, which is float32, all arithmetic is.
    dtype = value.dtype if global_scale is None else torch.float32
    problem = OptimumProblem(format, AbsolutePower.of(2.0), False, dtype)
    value = value.detach()
    with torch.no_grad():
        diagonal = list_diagonal(products, value.shape[-1])
        alone = [
            find_optimum(
                value,
                format,
                layout,
                problem.power,
                global_scale=global_scale,
                importance=importance,
                negative_scale=negative_scale,
            )
            for importance in ([diagonal, None] if layout.strategy in _WEIGHED else [None])
        ]
        values_NOQG = _cut(value, layout)
        linear_NOQG = None if crosses is None else _cut(_multiply_rows(value, crosses), layout)
        num_columns, height, num_rows, size = values_NOQG.shape
        ranges_NSQ = [
            torch.stack([e.reshape(num_rows, num_columns).T for e in ends], 1) for ends in zip(*alone, strict=True)
        ]
        at_a_time = max(1, enlarge(_MAX_ELEMENTS, value.device) // (num_columns * height * size))
        is_compiled = pays_to_compile(problem, value, _NUM)
        found = []
        for start in range(0, num_rows, at_a_time):
            some = slice(start, start + at_a_time)
            linear = None if linear_NOQG is None else linear_NOQG[:, :, some]
            rows = _Rows.of(problem, values_NOQG[:, :, some], linear, products, is_compiled)
            found.append(rows.search(Range(*(part[:, :, some] for part in ranges_NSQ)), global_scale, max_sweeps))
    return Range(*(torch.cat(part, 1).T.contiguous().view(shape) for part in zip(*found, strict=True)))


def list_diagonal(products_MBB: Tensor, num_channels: int) -> Tensor:
    """The diagonal of H, (num_channels,)."""
    return products_MBB.diagonal(dim1=1, dim2=2).flatten()[:num_channels]


def _multiply_rows(value: Tensor, crosses_MBB: Tensor) -> Tensor:
    """C wᵀ of each row w, float32, in the value's shape."""
    num_blocks, block = crosses_MBB.shape[:2]
    rows = value.float().flatten(0, -2)
    padded = torch.nn.functional.pad(rows, (0, num_blocks * block - rows.shape[1]))
    by_block = padded.unflatten(1, (num_blocks, block)).transpose(0, 1) @ crosses_MBB.transpose(1, 2)
    return by_block.transpose(0, 1).flatten(1)[:, : rows.shape[1]].reshape(value.shape)


def _cut(value: Tensor, layout: Layout) -> Tensor:
    """A weight's groups, [N, O, Q, G]: O rows share their scales."""
    if layout.strategy == "tensor":
        return value.reshape(1, -1, 1, value.shape[-1])
    if layout.strategy == "block":
        assert layout.block_structure is not None
        height, width = layout.block_structure
        # As those of Layout.tiles: each matrix has blocks of its own, and zeros fill the last ones up.
        padding = (0, -value.shape[-1] % width, 0, -value.shape[-2] % height)
        matrix = torch.nn.functional.pad(value, padding).flatten(0, -2)
        return matrix.unflatten(1, (-1, width)).unflatten(0, (-1, height)).permute(2, 1, 0, 3)
    groups = value.reshape(-1, value.shape[-1]).unflatten(1, (-1, layout.group_size or value.shape[-1]))
    return groups.transpose(0, 1)[:, None]


@dataclass(frozen=True)
class _Rows:
    """Rows of groups, [N, O, Q, P, G], float32, C times them, and H."""

    problem: OptimumProblem
    values_NOQPG: Tensor
    linear_NOQPG: Tensor | None
    products_MBB: Tensor
    is_compiled: bool

    @classmethod
    def of(
        cls,
        problem: OptimumProblem,
        values_NOQG: Tensor,
        linear_NOQG: Tensor | None,
        products_MBB: Tensor,
        is_compiled: bool,
    ) -> "_Rows":
        """A group that is longer than a block of H is cut into parts of its length."""
        num_columns, size = len(values_NOQG), values_NOQG.shape[-1]
        num_blocks, block = products_MBB.shape[:2]
        missing = max(0, num_columns * size - num_blocks * block)
        # Only one block may lack channels: of several the last is filled up.
        products_MBB = torch.nn.functional.pad(products_MBB, (0, missing, 0, missing)) if missing else products_MBB
        length = min(size, products_MBB.shape[1])

        def cut(part_NOQG: Tensor) -> Tensor:
            if size > block:
                part_NOQG = torch.nn.functional.pad(part_NOQG, (0, num_blocks * block - size))
            return part_NOQG.float().unflatten(-1, (-1, length)).contiguous()

        linear_NOQPG = None if linear_NOQG is None else cut(linear_NOQG)
        return cls(problem, cut(values_NOQG), linear_NOQPG, products_MBB, is_compiled)

    def search(self, alone: Range, global_scale: Tensor | None, max_sweeps: int) -> Range:
        """The ranges [N, Q] that are best together; ``alone``, [N, S, Q], are S that are best each by itself."""
        if global_scale is not None:
            global_scale = global_scale.expand(self.values_NOQPG.shape[2]).contiguous()
        columns = [
            self._tabulate(n, Range(low.contiguous(), high.contiguous()), global_scale)
            for n, (low, high) in enumerate(zip(*alone, strict=True))
        ]
        index_NQ = torch.stack([self._list_totals(n, column).argmin(0) for n, column in enumerate(columns)])
        # Those that are best alone are the last of each table.
        num_candidates = len(columns[0].errors_CQ)
        starts = [
            torch.full_like(index_NQ, place) for place in range(num_candidates - alone.min.shape[1], num_candidates)
        ]
        if len(columns) > 1 and max_sweeps:
            values_NOQG = self.values_NOQPG[:, :, :, 0]
            index_NQ = descend(
                self.problem,
                values_NOQG,
                None if self.linear_NOQPG is None else self.linear_NOQPG[:, :, :, 0],
                columns,
                [index_NQ, *starts],
                self.products_MBB,
                self.is_compiled,
                max_sweeps,
            )
        scale_NQ, zero_point_NQ = zip(
            *(c.candidates.take(i) for c, i in zip(columns, index_NQ, strict=True)), strict=True
        )
        low_NQ, high_NQ = calculate_range_of_scale(
            torch.cat(scale_NQ), None if zero_point_NQ[0] is None else torch.cat(zero_point_NQ), self.problem.format
        )
        # What is not finite stays so.
        nothing_NQ = self.values_NOQPG.sum((1, 3, 4)) * 0.0
        return Range(low_NQ + nothing_NQ, high_NQ + nothing_NQ)

    def _list_totals(self, n: int, column: Column) -> Tensor:
        """The errors of one column's candidates where no other group has any, [C, Q], but for a constant."""
        if self.linear_NOQPG is None:
            return column.errors_CQ
        tensors = (self.values_NOQPG[n], *column.candidates, self.linear_NOQPG[n])
        return column.errors_CQ + 2 * run(self.is_compiled, _sum_linear, self.problem, *tensors)

    def _tabulate(self, n: int, alone: Range, global_scale: Tensor | None) -> Column:
        """The candidates of one column of groups, and their errors where no other group has any."""
        values_OQPG = self.values_NOQPG[n]
        ratio_C = _list_ratios(self.problem, values_OQPG.shape[-2:].numel(), values_OQPG.device)
        tensors = (values_OQPG, *alone, global_scale, ratio_C)
        candidates = Candidates(*run(self.is_compiled, _list_candidates, self.problem, *tensors))
        num_errors = len(candidates.scale_CQ) * values_OQPG[:, :1].numel()
        num_parts = -(-num_errors * values_OQPG.shape[1] // enlarge(_MAX_ERRORS, values_OQPG.device))
        products_PGG = self._find_products(n)
        # Groups one after the other, or, of one group, rows.
        dim = 0 if values_OQPG.shape[1] == 1 else 1
        parts = []
        for values, *listed in _split(num_parts, dim, values_OQPG, *candidates):
            parts.append(run(self.is_compiled, _tabulate, self.problem, values, *listed, products_PGG))
        return Column(candidates, torch.stack(parts).sum(0) if dim == 0 else torch.cat(parts, 1))

    def _find_products(self, n: int) -> Tensor:
        """The blocks of H of one column's channels, [P, G, G]."""
        if self.values_NOQPG.shape[-2] > 1:
            return self.products_MBB
        block, channels = find_channels(n, self.values_NOQPG.shape[-1], self.products_MBB.shape[1])
        return self.products_MBB[block : block + 1, channels, channels].contiguous()


def _split(
    num_parts: int, dim: int, values_OQPG: Tensor, *tables_CQ: Tensor | None
) -> Iterable[tuple[Tensor | None, ...]]:
    """Values in parts, of rows (dim 0) or of groups (dim 1), and the tables of each part's groups."""
    values = values_OQPG.tensor_split(max(1, min(num_parts, values_OQPG.shape[dim])), dim)
    if dim == 0:
        return [(part, *tables_CQ) for part in values]
    tables = [[None] * len(values) if table is None else table.tensor_split(len(values), 1) for table in tables_CQ]
    return zip(values, *tables, strict=True)


def _list_ratios(problem: OptimumProblem, size: int, device: torch.device) -> Tensor:
    """Scales, in parts of that which is best for the group alone: itself, and as far in logarithms to both sides."""
    width = min(max(_MIN_WIDTH, _WIDTH / math.sqrt(size)), _MAX_WIDTH)
    num = _NUM_OF_LONG if size >= _LONG else _NUM if problem.format.symmetric else _NUM_ASYMMETRIC
    return torch.tensor([(1 + width) ** (2 * i / (num - 1) - 1) for i in range(num)], device=device)


def _list_candidates(
    problem: OptimumProblem,
    values_OQPG: Tensor,
    low_SQ: Tensor,
    high_SQ: Tensor,
    global_scale: Tensor | None,
    ratio_C: Tensor,
) -> Candidates:
    """What groups can be quantized with whose best ranges, each by itself, are given: around the first; then these."""
    if problem.format.is_mx:
        alone = Candidates(store_mx_scale(high_SQ, problem.format.grid.num_bits), None)
    else:
        places = Places(torch.ones_like(low_SQ), torch.full_like(low_SQ, 0.5))
        alone = make_candidates(problem, Range(low_SQ, high_SQ), global_scale, places)
    around = _list_around(problem, values_OQPG, low_SQ[0], high_SQ[0], global_scale, ratio_C)
    if alone.zero_point_CQ is None or around.zero_point_CQ is None:
        return Candidates(torch.cat([around.scale_CQ, alone.scale_CQ]), None)
    return Candidates(*(torch.cat(tables) for tables in zip(around, alone, strict=True)))  # type: ignore[arg-type]


def _list_around(
    problem: OptimumProblem,
    values_OQPG: Tensor,
    low_Q: Tensor,
    high_Q: Tensor,
    global_scale: Tensor | None,
    ratio_C: Tensor,
) -> Candidates:
    if problem.num_scales:
        own = measure(None, values_OQPG)
        exact_Q = calculate_exact_scale(own.min, own.max, problem.format, global_scale) * problem.top_ratio
        scale_KQ, _ = list_stored_scales(exact_Q, problem.format, problem.num_scales)
        return Candidates(scale_KQ if global_scale is None else scale_KQ / global_scale, None)
    ratio_CQ = ratio_C[:, None].expand(-1, len(low_Q))
    candidates = make_candidates(
        problem, Range(low_Q, high_Q), global_scale, Places(ratio_CQ, torch.full_like(ratio_CQ, 0.5))
    )
    if candidates.zero_point_CQ is None:
        return candidates
    grid = problem.format.grid
    steps = torch.tensor(_ZERO_POINTS if grid.type == "int" else (0.0,), device=low_Q.device)
    scale_CQ, steps_CQ = cross(candidates.scale_CQ, steps[:, None].expand(-1, len(low_Q)))
    zero_point_CQ = candidates.zero_point_CQ.repeat_interleave(len(steps), 0)
    return Candidates(scale_CQ, (zero_point_CQ + steps_CQ).clamp(grid.qmin, grid.qmax))


def _tabulate(
    problem: OptimumProblem, values_OQPG: Tensor, scale_CQ: Tensor, zero_point_CQ: Tensor | None, products_PGG: Tensor
) -> Tensor:
    return sum_products(problem, values_OQPG, Candidates(scale_CQ, zero_point_CQ), products_PGG)


def _sum_linear(
    problem: OptimumProblem, values_OQPG: Tensor, scale_CQ: Tensor, zero_point_CQ: Tensor | None, linear_OQPG: Tensor
) -> Tensor:
    return sum_crosses(problem, values_OQPG, Candidates(scale_CQ, zero_point_CQ), linear_OQPG)
