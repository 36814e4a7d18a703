"""What a page draws of a value: how its elements lie on the grid, and the error of other scales.

Shape suffixes: N elements, F factors, P elements at a time, Q scales.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from torch import Tensor

from fxmse.formats.grids import FLOAT_FORMATS, Grid
from fxmse.formats.layout import Layout
from fxmse.observers.base import QPARAMS, Observer
from fxmse.observers.counting import count, count_patterns, find_patterns, list_values
from fxmse.ops import find_dynamic_qparams
from fxmse.outputs.reporting import Recorder, SiteReport

__all__ = ["Elements", "Picture", "PictureRecorder", "PicturedReport", "list_levels", "make_picture"]

NUM_BINS = 64
"""Bars of a histogram."""
NUM_FACTORS = 25
"""Points of a curve."""
_FACTORS = (0.5, 1.5)  # at least these times the chosen scale are tried
_WIDEST = 16.0  # and at most this many, where min-max's scale is that much larger
_SAMPLED = 1 << 17  # elements of a value with several scales that are looked at
_SAMPLED_A_BATCH = 1 << 14
_MAX_LEVELS = 256  # of a grid that is drawn level by level


@dataclass(frozen=True)
class Elements:
    """Elements of a value, all or some, each with the scale that it has.

    Attributes:
        values_N: float32, in units of the value, or in steps of their scales.
        counts_N: how many elements each stands for, any dtype.
        weights_N: what its squared error counts: the same, of steps times the squared scale.
        signal: the sum of the squares of all of the value's elements.
        is_all: whether nothing was left out.
        is_in_steps: whether values are in steps; their scale is 1 then.
        scale_N: less the global one, or one for all of them (N = 1); below zero where the observer turned it.
        zero_point_N: whole numbers; likewise.
        minmax_scale_N: what min-max would have given; likewise.
        minmax_zero_point_N: likewise.
    """

    values_N: Tensor
    counts_N: Tensor
    weights_N: Tensor
    signal: float
    is_all: bool
    is_in_steps: bool
    scale_N: Tensor
    zero_point_N: Tensor
    minmax_scale_N: Tensor
    minmax_zero_point_N: Tensor


@dataclass(frozen=True)
class Picture:
    """What is drawn of a value.

    Attributes:
        grid: the name of its levels, as in :func:`list_levels`.
        num_elements: how many the value had.
        num_shown: how many of them were looked at.
        scale: where there is one: the picture is in units of the value. None: in steps of each element's own scale.
        zero_point: of that scale; 0 for steps, which count from the grid's own zero.
        edges: where the first bar begins and where the last one ends.
        counts: of each bar.
        chosen: the least and the largest value that the format holds.
        minmax: likewise, had min-max chosen; of steps the medians. None where they are dynamic.
        factors: the least and the largest factor of the curve, whose factors are evenly spaced by their logarithms.
        errors: of each factor, noise over signal in dB; None for no error at all.
        error: that of the scale as it is.
        minmax_factor: min-max's scale over the chosen one, the mean; None where they are dynamic.
        minmax_error: its error.
    """

    grid: str
    num_elements: int
    num_shown: int
    scale: float | None
    zero_point: float
    edges: tuple[float, float]
    counts: tuple[int, ...]
    chosen: tuple[float, float]
    minmax: tuple[float, float] | None
    factors: tuple[float, float]
    errors: tuple[float | None, ...]
    error: float | None
    minmax_factor: float | None
    minmax_error: float | None


@dataclass(frozen=True)
class PicturedReport(SiteReport):
    """A report and what is drawn of the value.

    Attributes:
        picture: None of a value that no batch reached.
        num_elements: of a weight.
        num_bytes: of a weight as a checkpoint holds it, with its scales.
        num_float_bytes: of a weight as it was.
    """

    picture: Picture | None = None
    num_elements: int = 0
    num_bytes: int = 0
    num_float_bytes: int = 0


def list_levels(name: str) -> list[float]:
    """The levels of a grid that a picture names, as "int4" or "float8", in order; none where they are too many."""
    type, num_bits = name.rstrip("0123456789"), int(name.lstrip("abcdefghijklmnopqrstuvwxyz"))
    grid = Grid(num_bits, type)
    if type == "int":
        levels = torch.arange(grid.qmin, grid.qmax + 1) if num_bits <= math.log2(_MAX_LEVELS) else torch.empty(0)
        return levels.tolist()
    mantissa, min_exponent, largest = FLOAT_FORMATS[num_bits]
    step = 2.0 ** (min_exponent - mantissa)
    # Every level is a multiple of the smallest step, and one of its own binade's.
    positive = grid.round(torch.arange(0, largest / step + 1, dtype=torch.float64) * step).unique()
    return torch.cat([-positive[1:].flip(0), positive]).tolist()


def make_picture(elements: Elements, args: QuantizationArgs, num_elements: int, *, is_dynamic: bool) -> Picture:
    """The picture of a value, of which ``elements`` are some."""
    grid = Grid(args.num_bits, QuantizationType(args.type).value)
    has_one = elements.scale_N.numel() == 1 and not elements.is_in_steps
    if has_one:
        scale, zero_point = elements.scale_N.item(), elements.zero_point_N.item()
        shown_N, counts_N = elements.values_N, elements.counts_N
    else:
        scale, zero_point = None, 0.0
        shown_N, counts_N = elements.values_N / elements.scale_N + elements.zero_point_N, elements.counts_N
    edges = (shown_N.min().item(), shown_N.max().item())
    if edges[0] == edges[1]:
        edges = (edges[0] - 1, edges[1] + 1)
    place_N = ((shown_N - edges[0]) / (edges[1] - edges[0]) * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    bars = torch.bincount(place_N, weights=counts_N.double(), minlength=NUM_BINS)
    minmax_scale_N, minmax_zero_N = elements.minmax_scale_N, elements.minmax_zero_point_N
    ratio_N = minmax_scale_N / elements.scale_N.abs()
    minmax_factor = ratio_N.double().mean().item()
    factors = (_FACTORS[0], min(_WIDEST, max(_FACTORS[1], 1.1 * minmax_factor)))
    if has_one:
        ends = [minmax_scale_N * (q - minmax_zero_N) for q in (grid.qmin, grid.qmax)]
    else:
        ends = [ratio_N * (q - minmax_zero_N) + elements.zero_point_N for q in (grid.qmin, grid.qmax)]
    return Picture(
        grid=f"{grid.type}{grid.num_bits}",
        num_elements=num_elements,
        num_shown=num_elements if elements.is_all else len(elements.values_N),
        scale=scale,
        zero_point=zero_point,
        edges=edges,
        counts=tuple(int(bar) for bar in bars.tolist()),
        chosen=_sort(grid.qmin, grid.qmax) if scale is None else _sort(*_dequantize(grid, scale, zero_point)),
        minmax=None if is_dynamic else _sort(*(end.median().item() for end in ends)),
        factors=factors,
        errors=_measure_errors(elements, grid, factors),
        error=_measure_error(elements, grid, elements.scale_N, elements.zero_point_N),
        minmax_factor=None if is_dynamic else minmax_factor,
        minmax_error=None if is_dynamic else _measure_error(elements, grid, minmax_scale_N, minmax_zero_N),
    )


def _sort(low: float, high: float) -> tuple[float, float]:
    return (low, high) if low <= high else (high, low)


def _dequantize(grid: Grid, scale: float, zero_point: float) -> tuple[float, float]:
    return scale * (grid.qmin - zero_point), scale * (grid.qmax - zero_point)


def _measure_errors(elements: Elements, grid: Grid, factors: tuple[float, float]) -> tuple[float | None, ...]:
    start, end = map(math.log10, factors)
    tried_F = torch.logspace(start, end, NUM_FACTORS, dtype=torch.float64)
    return tuple(
        _measure_error(elements, grid, elements.scale_N * factor, elements.zero_point_N) for factor in tried_F.tolist()
    )


def _measure_error(elements: Elements, grid: Grid, scale_N: Tensor, zero_point_N: Tensor) -> float | None:
    """Noise over signal in dB of elements with these scales."""
    values_N, weights_N = elements.values_N, elements.weights_N.double()
    quantized_N = grid.round((values_N / scale_N + zero_point_N).clamp(grid.qmin, grid.qmax))
    error_N = (quantized_N - zero_point_N) * scale_N - values_N
    noise = torch.dot(error_N.double().square(), weights_N).item()
    return 10 * math.log10(noise / elements.signal) if noise and elements.signal else None


class PictureRecorder(Recorder):
    """Keeps what a picture is drawn of, too.

    Rules:

    1. Of a value with one scale all elements are counted, so that no outlier is missed.
    2. Of a dynamic one with a zero point of 0 they are counted in steps of their scales, which tells what any factor on
       all scales does.
    3. Of others some rows are kept: half of them are those with the largest scales, as most of the error is theirs, and
       the others stand for all that is left, evenly spread.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.num_elements = self.num_bytes = self.num_float_bytes = 0
        self.counts: tuple[Tensor, ...] | None = None  # patterns that were seen, how often, and in steps their weights
        self.dtype = torch.float32  # of what was counted
        self.minmax: tuple[Tensor, Tensor | None] | None = None  # of a weight
        self.samples: list[tuple[Tensor, ...]] = []
        self.num_sampled = 0

    @property
    def is_dynamic(self) -> bool:
        """Whether each value brings its own scales."""
        return self.signed_scale is None

    def measure(self, weight: Tensor, *arguments: Any) -> None:
        """Looks at a weight, once; takes the arguments of its node."""
        super().measure(weight, *arguments)
        assert self.signed_scale is not None
        self.num_elements, self.num_float_bytes = weight.numel(), weight.nbytes
        self.num_bytes = _measure_bytes(weight, arguments[:3], self.args.num_bits)
        args = self.args.model_copy(update={"scale_dtype": torch.uint8}) if self._is_mx() else self.args
        observer = Observer.load_from_registry("static_minmax", base_name=self.role, args=args)
        observer.observe(weight)
        if self.signed_scale.numel() == 1:
            self._count(weight)
            self.minmax = _get_qparams(observer)
            return
        rows = _Rows.choose(self.signed_scale, weight.shape, _SAMPLED, self.args)
        own = rows.spread_both(self.signed_scale, self.zero_point)
        self.samples = [(*rows.take(weight), *own, *rows.spread_both(*_get_qparams(observer)))]

    def _is_mx(self) -> bool:
        """Whether scales are those of an MX format, which a node of a weight does not say: all powers of two."""
        if self.args.type != "float" or self.args.group_size != 32 or self.signed_scale is None:
            return False
        return bool((self.signed_scale.float().frexp().mantissa == 0.5).all())

    def forward(self, x: Tensor, quantized: Tensor) -> Tensor:
        """Looks at a value, and passes on what it was quantized to."""
        self.num_elements += x.numel()
        if x.numel():
            if self.signed_scale is not None and self.signed_scale.numel() == 1:
                self._count(x)
            elif self.is_dynamic and self.args.symmetric:
                self._count_steps(x)
            elif self.num_sampled < _SAMPLED:
                self._sample(x)
        return super().forward(x, quantized)

    def _count(self, x: Tensor) -> None:
        """Rule 1."""
        if self.counts is None:
            self.dtype = x.dtype
        self._add(count(x.to(self.dtype), Layout("input", "tensor"))[0])

    def _count_steps(self, x: Tensor) -> None:
        """Rule 2."""
        scale = self._find_scale(x)[0].float()
        groups = x.float()
        if self.args.group_size:
            groups, scale = groups.unflatten(-1, (-1, self.args.group_size)), scale.unsqueeze(-1)
        index = find_patterns(groups / scale).flatten()
        weights = scale.double().square().expand_as(groups).flatten()
        size = count_patterns(self.dtype)
        self._add(torch.bincount(index, minlength=size), torch.bincount(index, weights, minlength=size))

    def _add(self, *tables: Tensor) -> None:
        """Adds tables to what was counted; kept is what was seen, as most patterns never are."""
        if self.counts is not None:
            for table, kept in zip(tables, self.counts[1:], strict=True):
                table[self.counts[0]] += kept
        seen = tables[0].nonzero().flatten()
        self.counts = seen, *(table[seen] for table in tables)

    def _find_scale(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """A dynamic value's scale, less the global one, and its zero point."""
        args = self.args
        grid = (args.num_bits, QuantizationType(args.type).value, args.symmetric, args.strategy, args.group_size)
        scale, zero_point = find_dynamic_qparams(x, self.global_scale, *grid, args.scale_dtype)
        scale = scale if self.global_scale is None else scale / self.global_scale
        return scale, None if args.symmetric else zero_point

    def _sample(self, x: Tensor) -> None:
        """Rule 3."""
        x = x if x.dim() > 1 else x.reshape(1, -1)
        scale, zero_point = self._find_scale(x) if self.signed_scale is None else (self.signed_scale, self.zero_point)
        rows = _Rows.choose(scale, x.shape, _SAMPLED_A_BATCH, self.args)
        values, weights = rows.take(x)
        self.num_sampled += len(values)
        own = rows.spread_both(scale, zero_point)
        if self.signed_scale is None:
            self.samples.append((values, weights, *own, *own))
        else:
            places = torch.arange(scale.numel(), device=x.device).view(scale.shape)
            self.samples.append((values, weights, *own, rows.spread(places)))

    def summarise(self) -> PicturedReport:
        """The report and the picture."""
        fields = vars(super().summarise())
        elements = self._find_elements() if self.has_seen and self.num_elements else None
        picture = None
        if elements:
            picture = make_picture(elements, self.args, self.num_elements, is_dynamic=self.is_dynamic)
        return PicturedReport(
            **fields,
            picture=picture,
            num_elements=self.num_elements if self.num_bytes else 0,
            num_bytes=self.num_bytes,
            num_float_bytes=self.num_float_bytes,
        )

    def _find_elements(self) -> Elements:
        if self.counts is not None:
            seen_N, counts_N, *weights = self.counts
            values_N = list_values(self.dtype, seen_N.device)[seen_N]
            if self.signed_scale is None:
                one = _as_floats((values_N.new_ones(1), None))
                return Elements(values_N, counts_N, weights[0], self.noise.signal, True, True, *one, *one)
            own = _as_floats((self.signed_scale, self.zero_point))
            minmax = _as_floats(self.minmax or _get_qparams(self.observer))
            return Elements(values_N, counts_N, counts_N, self.noise.signal, True, False, *own, *minmax)
        values_N, weights_N, *qparams = (torch.cat(parts) for parts in zip(*self.samples, strict=True))
        if len(qparams) == 3:
            scale_Q, zero_point_Q = (part.flatten() for part in _as_floats(_get_qparams(self.observer)))
            places_N = qparams.pop()
            qparams += [scale_Q[places_N], zero_point_Q.expand_as(scale_Q)[places_N]]
        return Elements(values_N, weights_N, weights_N, self.noise.signal, False, False, *qparams)


def _measure_bytes(weight: Tensor, qparams: Sequence[Tensor | None], num_bits: int) -> int:
    """What a checkpoint needs for a weight: its bits, its scales, and zero points in as many bits."""
    scale, zero_point, global_scale = qparams
    packed = [tensor.numel() * num_bits for tensor in (weight, zero_point) if tensor is not None]
    return math.ceil(sum(packed) / 8) + sum(tensor.nbytes for tensor in (scale, global_scale) if tensor is not None)


def _get_qparams(observer: Observer | None) -> tuple[Tensor, Tensor | None]:
    """The scale less the global one, and the zero point."""
    assert observer
    scale, zero_point, global_scale = (observer.get_qparams()[name] for name in QPARAMS)
    assert scale is not None
    return scale if global_scale is None else scale / global_scale, None if observer.args.symmetric else zero_point


def _as_floats(qparams: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    scale, zero_point = qparams
    scale = scale.float()
    return scale, torch.zeros_like(scale) if zero_point is None else zero_point.float()


class _Rows(NamedTuple):
    """Rows of the last dimension of a value.

    Attributes:
        indices: of the value's other dimensions.
        weights_R: how many rows each stands for.
        shape: the value's.
        args: the format.
    """

    indices: tuple[Tensor, ...]
    weights_R: Tensor
    shape: torch.Size
    args: QuantizationArgs

    @classmethod
    def choose(cls, scale: Tensor, shape: torch.Size, limit: int, args: QuantizationArgs) -> "_Rows":
        """Rule 3 of :class:`PictureRecorder`: rows of ``limit`` elements, or one."""
        sizes_R = _list_groups(scale, shape, args).float().square().mean(-1).flatten()
        num_rows, wanted = len(sizes_R), max(1, limit // shape[-1])
        if wanted >= num_rows:
            rows, weights_R = torch.arange(num_rows, device=scale.device), torch.ones_like(sizes_R)
        else:
            largest = sizes_R.topk(wanted // 2).indices
            others = torch.ones_like(sizes_R, dtype=torch.bool).index_fill(0, largest, False).nonzero().flatten()
            places = torch.linspace(0, len(others) - 1, wanted - len(largest), dtype=torch.float64).long()
            others, share = others[places.to(others.device)], len(others) / len(places)
            rows = torch.cat([largest, others])
            weights_R = torch.cat([torch.ones_like(sizes_R[largest]), torch.full_like(sizes_R[others], share)])
        return cls(torch.unravel_index(rows, shape[:-1]), weights_R, shape, args)

    def take(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' elements, float32, and what each stands for."""
        weights_N = self.weights_R[:, None].expand(-1, self.shape[-1]).reshape(-1)
        return value[self.indices].float().flatten(), weights_N

    def spread(self, qparam: Tensor) -> Tensor:
        """The qparam of each element of the rows."""
        by_group = _list_groups(qparam, self.shape, self.args)[self.indices]
        size = self.args.block_structure[1] if self.args.block_structure else self.args.group_size
        if by_group.shape[-1] == 1:
            return by_group.expand(-1, self.shape[-1]).flatten()
        return by_group.repeat_interleave(size or 1, -1)[:, : self.shape[-1]].flatten()

    def spread_both(self, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each element, float32."""
        both = _as_floats((scale, zero_point))
        return self.spread(both[0]), self.spread(both[1])


def _list_groups(qparam: Tensor, shape: torch.Size, args: QuantizationArgs) -> Tensor:
    """The qparam of each group of each row of a value of ``shape``: shape (*shape[:-1], groups of a row), or 1."""
    if args.block_structure:
        qparam = qparam.repeat_interleave(args.block_structure[0], -2)[..., : shape[-2], :]
    return qparam.expand(*shape[:-1], -1)
