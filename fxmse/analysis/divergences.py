"""How far a model's outputs are off: what is measured of two, and random gradients that say it of small changes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["Divergence", "Drawn", "Sums", "check_divergence", "make_divergence"]

_LOGITS = "logits"


class Sums(NamedTuple):
    """A sum of errors, and what it is divided by, of one batch or several."""

    error: float = 0.0
    size: float = 0.0

    def plus(self, other: "Sums") -> "Sums":
        """That of both."""
        return Sums(self.error + other.error, self.size + other.size)

    @property
    def mean(self) -> float:
        """The error."""
        return self.error / self.size if self.size else 0.0


class Drawn(NamedTuple):
    """Tensors to go back from, and gradients of them: E[(gradient . change) ** 2] * factor is the change's error.

    Attributes:
        tensors: of the outputs.
        gradients: of the same shapes.
        size: what a sum over batches is divided by.
        factor: see above.
    """

    tensors: list[Tensor]
    gradients: list[Tensor] | None
    size: float
    factor: float = 1.0


@dataclass(frozen=True)
class Divergence(ABC):
    """What is measured.

    Attributes:
        output: the name of the model's output that counts; None takes the logits, or else all.
        mask: the name of the input that is 0 where a token is padding, whose output does not count.
    """

    output: str | None
    mask: str | None

    unit = ""

    @abstractmethod
    def draw(self, outputs: Any, batch: Mapping[str, Any], generator: torch.Generator) -> Drawn:
        """Random gradients for one batch's outputs, which need gradients."""

    @abstractmethod
    def measure(self, expected: Any, outputs: Any, batch: Mapping[str, Any]) -> Sums:
        """What ``outputs`` are off from ``expected``."""

    def _find_mask(self, tensor: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
        """1 where an output counts, with as many dimensions as the tensor; None where all do."""
        if self.mask is None:
            return None
        mask = batch.get(self.mask)
        if not isinstance(mask, Tensor):
            raise ValueError(f"mask={self.mask!r}: expected one of the batches' inputs, {', '.join(batch)}")
        if tensor.shape[: mask.dim()] != mask.shape:
            return None
        return mask.bool().reshape(*mask.shape, *[1] * (tensor.dim() - mask.dim()))


class _KL(Divergence):
    """The KL divergence of the distributions that logits stand for, from the float model's, in nats.

    Of a small change c of the logits z it is half of cᵀ (diag(p) - p pᵀ) c, p = softmax(z). The gradient of the
    log-probability of a label that is drawn from p has that matrix for its covariance, and so has what is drawn here:
    sqrt(p) e - p (sqrt(p) . e) of a normal e, which varies less. Draws of different tokens are independent, so that
    the square of a batch's sum has the sum of the tokens' squares for its mean.
    """

    unit = "nats"

    def draw(self, outputs: Any, batch: Mapping[str, Any], generator: torch.Generator) -> Drawn:
        logits = self._find_logits(outputs)
        probabilities = logits.detach().float().softmax(-1)
        noise = _draw_normal(probabilities, generator) * probabilities.sqrt()
        gradients = noise - probabilities * noise.sum(-1, keepdim=True)
        mask = self._find_mask(logits, batch)
        size = gradients.shape[:-1].numel() if mask is None else int(mask.sum())
        if mask is not None:
            gradients = torch.where(mask, gradients, 0.0)
        return Drawn([logits], [gradients.to(logits.dtype)], size, 0.5)

    def measure(self, expected: Any, outputs: Any, batch: Mapping[str, Any]) -> Sums:
        logs = self._find_logits(expected).float().log_softmax(-1)
        own = self._find_logits(outputs).float().log_softmax(-1)
        errors = (logs.exp() * (logs - own)).sum(-1, keepdim=True)
        mask = self._find_mask(logs, batch)
        errors = errors if mask is None else errors[mask]
        return Sums(errors.double().sum().item(), errors.numel())

    def _find_logits(self, outputs: Any) -> Tensor:
        return _list_outputs(outputs, self.output or (_LOGITS if _has_logits(outputs) else None))[0]


class _Squared(Divergence):
    """The squared error of all outputs over their squares."""

    unit = "relative"

    def draw(self, outputs: Any, batch: Mapping[str, Any], generator: torch.Generator) -> Drawn:
        tensors = _list_outputs(outputs, self.output)
        masks = [self._find_mask(tensor, batch) for tensor in tensors]
        gradients = [_draw_normal(tensor, generator) for tensor in tensors]
        kept = [g if mask is None else torch.where(mask, g, 0.0) for g, mask in zip(gradients, masks, strict=True)]
        return Drawn(tensors, kept, self._sum_squares(tensors, masks))

    def measure(self, expected: Any, outputs: Any, batch: Mapping[str, Any]) -> Sums:
        tensors = _list_outputs(expected, self.output)
        masks = [self._find_mask(tensor, batch) for tensor in tensors]
        pairs = zip(_list_outputs(outputs, self.output), tensors, strict=True)
        errors = [own.double() - tensor.double() for own, tensor in pairs]
        return Sums(self._sum_squares(errors, masks), self._sum_squares(tensors, masks))

    @staticmethod
    def _sum_squares(tensors: list[Tensor], masks: list[Tensor | None]) -> float:
        squares = [tensor.detach().double().square() for tensor in tensors]
        kept = [s if mask is None else torch.where(mask, s, 0.0) for s, mask in zip(squares, masks, strict=True)]
        return sum(s.sum().item() for s in kept)


@dataclass(frozen=True)
class _Loss(Divergence):
    """A loss of the user's: by how much it changes, and the square of that to first order."""

    loss: Callable[[Any, Any], Tensor]

    unit = "loss"

    def draw(self, outputs: Any, batch: Mapping[str, Any], generator: torch.Generator) -> Drawn:
        return Drawn([self._calculate(outputs, batch)], None, 1)

    def measure(self, expected: Any, outputs: Any, batch: Mapping[str, Any]) -> Sums:
        change = self._calculate(outputs, batch) - self._calculate(expected, batch)
        return Sums(change.item(), 1)

    def _calculate(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        loss = self.loss(outputs, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(f"loss gave {found}: expected a float tensor of one element")
        if not loss.isfinite():
            raise ValueError(f"loss gave {loss.item()}: expected a finite number")
        return loss.reshape(())


def make_divergence(
    outputs: Any, kind: str | None, loss: Callable[[Any, Any], Tensor] | None, output: str | None, mask: str | None
) -> Divergence:
    """What is measured of a model that gives ``outputs``.

    Args:
        outputs: of one batch.
        kind: "kl" or "squared"; None takes "kl" of what has logits.
        loss: takes its place.
        output: as of :class:`Divergence`, as is ``mask``.
        mask: see above.

    Raises:
        ValueError: another kind; both a kind and a loss; an output that is not there.
    """
    check_divergence(kind, loss, output)
    if loss is not None:
        return _Loss(None, mask, loss)
    _list_outputs(outputs, output)
    is_kl = kind == "kl" or (kind is None and output in (None, _LOGITS) and _has_logits(outputs))
    return _KL(output, mask) if is_kl else _Squared(output, mask)


def check_divergence(kind: str | None, loss: object, output: str | None) -> None:
    """Raises ValueError for another kind, or for both a kind and a loss."""
    if kind not in (None, "kl", "squared"):
        raise ValueError(f"divergence={kind!r}: expected 'kl', 'squared' or None")
    if loss is not None and (kind or output):
        raise ValueError("loss takes the place of divergence and output: give it alone")


def _draw_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def _has_logits(outputs: Any) -> bool:
    return isinstance(outputs, Mapping) and isinstance(outputs.get(_LOGITS), Tensor)


def _list_outputs(outputs: Any, name: str | None) -> list[Tensor]:
    """The float tensors that count."""
    if name is not None:
        if not isinstance(outputs, Mapping) or name not in outputs:
            found = ", ".join(outputs) if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"
            raise ValueError(f"output={name!r}: expected one of the model's outputs, {found}")
        outputs = outputs[name]
    found_tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not found_tensors:
        raise ValueError("the model returns no float tensor: give a loss")
    return found_tensors
