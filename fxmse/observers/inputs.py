"""What is kept of the inputs that meet a weight: how much the errors of its channels count, alone and together."""

from collections import deque
from collections.abc import Hashable, Iterable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fxmse.formats.tables import is_traced
from fxmse.observers.arrangements import Arrangement, Experts, Patches
from fxmse.observers.states import Stateful, plain_modes, without_autocast

__all__ = [
    "Importance",
    "ImportanceState",
    "InputState",
    "Inputs",
    "Mean",
    "MeanState",
    "Products",
    "ProductsState",
]


class ImportanceState(NamedTuple):
    """What an :class:`Importance` keeps; None before the first value.

    Attributes:
        squares: the sum of each channel's, float64, shape (channels,).
        num_tokens: float64, no dimension.
    """

    squares: Tensor | None = None
    num_tokens: Tensor | None = None

    @property
    def witnesses(self) -> list[Tensor]:
        """Float tensors, one of which is not finite if a value was not."""
        return [tensor for tensor in self if tensor is not None]


class MeanState(NamedTuple):
    """What a :class:`Mean` keeps; None before the first value.

    Attributes:
        totals: of each channel, float64, shape (matrices, channels).
        num_tokens: float64, no dimension.
        references: those of what the values would be if nothing before them was quantized; None where that is not known
            of all.
    """

    totals: Tensor | None = None
    num_tokens: Tensor | None = None
    references: Tensor | None = None

    @property
    def witnesses(self) -> list[Tensor]:
        """Float tensors, one of which is not finite if a value was not."""
        return [] if self.totals is None else [self.totals]


class ProductsState(NamedTuple):
    """What :class:`Products` keep; None before the first value.

    Attributes:
        products: the sum of xᵀ x, float32, shape (matrices, blocks, block_size, block_size).
        num_tokens: float64, no dimension.
        crosses: the sum of xᵀ (x - r), of the same shape, r what x would be if nothing before it was quantized; None
            where that is not known of all values.
    """

    products: Tensor | None = None
    num_tokens: Tensor | None = None
    crosses: Tensor | None = None

    @property
    def witnesses(self) -> list[Tensor]:
        """Float tensors, one of which is not finite if a value was not."""
        if self.products is None:
            return []
        # Where a value is not finite, so is its square.
        return [self.products.diagonal(dim1=-2, dim2=-1)]


InputState: TypeAlias = ImportanceState | MeanState | ProductsState


class Inputs(Stateful[Any]):
    """Adds something up over the tokens of the values that it is shown, and passes them on.

    In a graph it is the node on the value that feeds a weight's op.

    Attributes:
        form: what is added up; weights that read the same values can share what is equal.
        suffix: what it is called, behind its weight's name.
        strategies: of the weights that it can be used for.
        takes_references: whether it has a use for what :meth:`expect` says.
    """

    state_class: ClassVar[type]
    suffix: ClassVar[str]
    strategies: ClassVar[tuple[str, ...]]
    takes_references: ClassVar[bool] = False
    num_tokens: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.name = self.suffix
        self._expected: deque[Tensor | None] = deque()

    @property
    def form(self) -> Hashable:
        """What is added up."""
        return self.suffix

    def describe(self) -> dict[str, str]:
        """What is added up."""
        return {"what is added up": repr(self.form)}

    @property
    def sums(self) -> Tensor | None:
        """What has been added up."""
        return self.state[0]

    def expect(self, references: Iterable[Tensor | None]) -> None:
        """Says what the values that will be shown next would be if nothing before them was quantized.

        None stands for what would be of other tokens, as where experts are chosen for them.
        """
        self._expected = deque(references)

    def _take_reference(self, x: Tensor) -> Tensor | None:
        """What is expected of ``x``, if that is known."""
        reference = self._expected.popleft() if self._expected else None
        return None if reference is None or reference.shape != x.shape else reference.to(x.device)

    def init(self) -> InputState:
        """The state before the first value."""
        return self.state_class()

    def merge(self, state: Any, other: Any) -> Any:
        """The state after all that two states have seen."""
        if state[0] is None:
            return other
        if other[0] is None:
            return state
        device = state[0].device
        return self.state_class(
            *(
                None if own is None or added is None else own + added.to(device)
                for own, added in zip(state, other, strict=True)
            )
        )

    @torch.no_grad()
    def forward(
        self, x: Tensor, mask: Tensor | None = None, shown: Tensor | None = None, numbers: Tensor | None = None
    ) -> Tensor:
        """Returns ``x`` as it is.

        Args:
            x: float, shape (..., channels).
            mask: bool or numbers, shape (...) or what broadcasts to it; where it is 0, x is padding and is left out.
            shown: what is looked at in x's place, where that is more, without a mask.
            numbers: of each token's expert, beside ``shown``; what looks at all alike has no use for it.
        """
        value = (x if shown is None else shown).detach()
        if is_traced(value):
            with without_autocast(value):
                self.state = self.merge(self._sum_up(value, mask, numbers), self.state)
            return x
        with plain_modes(value):
            added = self._sum_up(value, mask, numbers)
            with self.lock:
                # What was loaded may be on another device than x.
                self.state = self.merge(added, self.state)
        return x

    def _sum_up(self, x: Tensor, mask: Tensor | None, numbers: Tensor | None) -> InputState:
        """The state after ``x`` alone."""
        tokens = x
        if mask is None:
            # One element makes the count a tensor of x's device without waiting for it.
            num_tokens = tokens.new_ones((), dtype=torch.float64) * (tokens.numel() // x.shape[-1])
        else:
            is_kept = mask.bool().expand(x.shape[:-1])
            # Padding may be anything, NaN, too.
            tokens = torch.where(is_kept[..., None], tokens, 0.0)
            num_tokens = is_kept.sum().double()
        return self.state_class(self._add_up(tokens.reshape(-1, x.shape[-1])), num_tokens)

    def _add_up(self, tokens: Tensor) -> Tensor:
        """What is added for these tokens, shape (tokens, channels)."""
        raise NotImplementedError

    def find_fault(self, num_channels: int) -> str | None:
        """Why a weight of so many channels cannot be searched with what was seen."""
        raise NotImplementedError


class Importance(Inputs):
    """Adds up x ** 2 of each channel."""

    state_class = ImportanceState
    suffix = "importance"
    strategies = ("channel", "group", "tensor_group")
    squares: Tensor | None

    def _add_up(self, tokens: Tensor) -> Tensor:
        return tokens.double().square().sum(0)

    def mean(self) -> Tensor | None:
        """E[x ** 2] of each channel, float32, shape (channels,); None where nothing was seen."""
        if self.squares is None or self.num_tokens is None or not self.num_tokens:
            return None
        return (self.squares / self.num_tokens).float()

    def find_fault(self, num_channels: int) -> str | None:
        """Why a weight of so many channels cannot be searched with what was seen."""
        mean = self.mean()
        return _UNSEEN if mean is None else _find_fault(mean, len(mean), num_channels)


class Mean(Inputs):
    """Adds up x of each channel, by which a bias makes up for what quantization moves the mean of an output by.

    Args:
        bias: where the graph has the bias.
        weight: where it has the probe of the weight that the values meet.
        arrangement: of a convolution's rows, which meet patches.
    """

    state_class = MeanState
    suffix = "input_mean"
    takes_references = True
    totals: Tensor | None
    references: Tensor | None

    def __init__(self, bias: str, weight: str, arrangement: Patches | None) -> None:
        super().__init__()
        self.bias, self.weight, self.arrangement = bias, weight, arrangement

    def _sum_up(self, x: Tensor, mask: Tensor | None, numbers: Tensor | None) -> Any:
        """As :meth:`Inputs._sum_up`; what a convolution reads has no mask."""
        state, reference = self._sum_values(x, mask, numbers), self._take_reference(x)
        if reference is None:
            return state
        return state._replace(references=self._sum_values(reference, mask, numbers).totals)

    def _sum_values(self, x: Tensor, mask: Tensor | None, numbers: Tensor | None) -> Any:
        if self.arrangement is None:
            return super()._sum_up(x, mask, numbers)
        patches = self.arrangement.arrange(x)
        num_tokens = patches.new_ones((), dtype=torch.float64) * patches.shape[1]
        return MeanState(patches.double().sum(1), num_tokens)

    def _add_up(self, tokens: Tensor) -> Tensor:
        return tokens.double().sum(0)[None]

    @property
    def has_seen(self) -> bool:
        """Whether there were any tokens."""
        return self.totals is not None and bool(self.num_tokens)

    def correct(self, bias: Tensor, rows: Tensor, quantized: Tensor) -> Tensor:
        """The bias with which the mean of the output is what it was: b + E[r] w - E[x] q(w), computed in float64.

        r is what x would be if nothing before it was quantized; where that is not known, it is x.

        Args:
            bias: shape (out,).
            rows: the weight, shape (out, channels).
            quantized: what it becomes, of the same shape.
        """
        assert self.totals is not None
        assert self.num_tokens is not None
        references = self.totals if self.references is None else self.references
        before, after = (
            (values.double().unflatten(0, (len(sums), -1)) @ (sums / self.num_tokens).to(rows.device)[:, :, None])
            for values, sums in ((rows, references), (quantized, self.totals))
        )
        return (bias.double() + (before - after).flatten()).to(bias.dtype)


class Products(Inputs):
    """Adds up xᵀ x, of all channels, or in blocks of channels one after the other: what lies beside those is not kept.

    Args:
        block_size: of how many channels a block is; the last one is filled up with zeros.
        max_channels: up to so many are one block.

    Attributes:
        arrangement: which rows of the weight meet which tokens, where not all meet all.
    """

    state_class = ProductsState
    suffix = "products"
    strategies = ("tensor", "channel", "group", "tensor_group", "block")
    takes_references = True
    products: Tensor | None
    crosses: Tensor | None

    def __init__(self, block_size: int, max_channels: int) -> None:
        super().__init__()
        self.block_size, self.max_channels = block_size, max_channels
        self.arrangement: Arrangement | None = None

    @property
    def form(self) -> Hashable:
        """What is added up."""
        return self.suffix, self.block_size, self.max_channels, self.arrangement

    def _sum_up(self, x: Tensor, mask: Tensor | None, numbers: Tensor | None) -> InputState:
        """As :meth:`Inputs._sum_up`.

        Args:
            x: float, shape (..., channels), or what a convolution reads.
            mask: as of :meth:`Inputs.forward`; where ``arrangement`` is one of experts, what says whose each token is.
            numbers: of each token's expert, where ``x`` is what all experts are shown.
        """
        state = self._sum_products(x, mask, numbers)
        reference = self._take_reference(x)
        if reference is None:
            return state
        change = x.float() - reference.float()
        if numbers is not None:
            assert isinstance(self.arrangement, Experts)
            tokens, changes = x.flatten(0, -2), change.flatten(0, -2)
            crosses = self._multiply_by_expert(tokens, numbers, self.arrangement.num_matrices, changes)
            return state._replace(crosses=crosses)
        if isinstance(self.arrangement, Patches):
            values, change = self.arrangement.arrange(x), self.arrangement.arrange(change)
        else:
            is_kept = torch.ones((), dtype=torch.bool, device=x.device) if mask is None else mask.bool()[..., None]
            values, change = (torch.where(is_kept, part, 0.0).reshape(1, -1, x.shape[-1]) for part in (x, change))
        return state._replace(crosses=self._multiply(values, change))

    def _sum_products(self, x: Tensor, mask: Tensor | None, numbers: Tensor | None) -> ProductsState:
        if self.arrangement is None:
            state = super()._sum_up(x, mask, numbers)
            assert isinstance(state, ProductsState)
            return state
        values = x
        if isinstance(self.arrangement, Patches):
            values = self.arrangement.arrange(values)
        if mask is None:
            products = self._multiply(values)
        else:
            assert isinstance(self.arrangement, Experts)
            number = self.arrangement.number(values, mask) if numbers is None else numbers
            products = self._multiply_by_expert(values.flatten(0, -2), number, self.arrangement.num_matrices)
        num_tokens = values.new_ones((), dtype=torch.float64) * (values.numel() // values.shape[-1])
        return ProductsState(products, num_tokens)

    def _multiply_by_expert(
        self, tokens: Tensor, number: Tensor, num_experts: int, others: Tensor | None = None
    ) -> Tensor:
        """:meth:`_multiply` of each expert's own tokens."""
        parts = []
        for expert in range(num_experts):
            is_own = number == expert
            # In a graph nothing may depend on how many there are.
            own = [
                (torch.where(is_own[:, None], values, 0.0) if is_traced(values) else values[is_own])[None]
                for values in ([tokens] if others is None else [tokens, others])
            ]
            parts.append(self._multiply(*own))
        return torch.cat(parts)

    def _add_up(self, tokens: Tensor) -> Tensor:
        return self._multiply(tokens[None])

    def _multiply(self, tokens: Tensor, others: Tensor | None = None) -> Tensor:
        """xᵀ x of tokens, shape (matrices, tokens, channels), or xᵀ y, y ``others`` of the same shape."""
        blocks = self._cut(tokens)
        return blocks.transpose(2, 3) @ (blocks if others is None else self._cut(others))

    def _cut(self, tokens: Tensor) -> Tensor:
        """Blocks of channels, shape (matrices, blocks, tokens, block_size)."""
        size = self._find_block_size(tokens.shape[2])
        tokens = torch.nn.functional.pad(tokens.float(), (0, -tokens.shape[2] % size))
        return tokens.unflatten(2, (-1, size)).transpose(1, 2)

    def _find_block_size(self, num_channels: int) -> int:
        return num_channels if num_channels <= max(self.max_channels, self.block_size) else self.block_size

    def mean(self, damping: float) -> Tensor | None:
        """E[xᵀ x] by the mean of its diagonal, to which ``damping`` is added, float32; None where nothing was seen.

        An expert that has met no token counts as having met those of all.
        """
        if self.products is None or not self.num_tokens:
            return None
        products = self._fill_idle(self.products)
        mean = (products / self._average(products)).float()
        mean.diagonal(dim1=-2, dim2=-1).add_(damping)
        return mean

    def mean_crosses(self) -> Tensor | None:
        """E[xᵀ (x - r)] by the same mean as :meth:`mean`, float32; None where it is not known.

        It is less by the factor tokens / (tokens + 2 channels): the fewer tokens, the more of it is chance.
        """
        if self.products is None or self.crosses is None or not self.num_tokens:
            return None
        num_tokens = self.num_tokens / len(self.products)  # that meet a matrix
        known = num_tokens / (num_tokens + 2 * self.crosses.shape[-1])
        return (self.crosses * known / self._average(self._fill_idle(self.products))).float()

    @staticmethod
    def _fill_idle(products: Tensor) -> Tensor:
        is_idle = (products.diagonal(dim1=-2, dim2=-1) == 0).flatten(1).all(1)
        return torch.where(is_idle[:, None, None, None], products.sum(0), products)

    @staticmethod
    def _average(products: Tensor) -> Tensor:
        """The mean of each matrix's diagonal, float64, shape (matrices, 1, 1, 1)."""
        diagonal = products.diagonal(dim1=-2, dim2=-1)
        # The sum may leave float32 where none of its terms does. Channels that are always 0 count for nothing.
        average = diagonal.double().sum((1, 2)) / (diagonal != 0).sum((1, 2)).clamp(min=1)
        return average.clamp(min=torch.finfo(torch.float32).tiny)[:, None, None, None]

    def find_fault(self, num_channels: int) -> str | None:
        """Why a weight of so many channels cannot be searched with what was seen."""
        if self.products is None or not self.num_tokens:
            return _UNSEEN
        diagonal = self.products.diagonal(dim1=-2, dim2=-1).sum(0).flatten()
        size = self._find_block_size(num_channels)
        num_seen = len(diagonal) if len(diagonal) != num_channels + -num_channels % size else num_channels
        return _find_fault(diagonal, num_seen, num_channels)


_UNSEEN = "seen no activations: run calibration data through the graph first"


def _find_fault(squares: Tensor, num_seen: int, num_channels: int) -> str | None:
    if num_seen != num_channels:
        return f"seen activations of {num_seen} channels, where the weight has {num_channels}"
    faults: Iterable[tuple[Tensor, str]] = (
        (~squares.isfinite().all(), "seen activations that are not finite"),
        ((squares < 0).any(), "importance that is negative"),
        ((squares == 0).all(), "seen activations that are all 0"),
    )
    return next((fault for is_so, fault in faults if is_so), None)
