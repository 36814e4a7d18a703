"""What an analysis finds: plain values, which JSON can hold."""

import dataclasses
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

__all__ = ["Analysis", "DepthError", "LayerGroup", "SiteError", "to_plain"]


@dataclass(frozen=True)
class SiteError:
    """What one format does to one value, and by it.

    Attributes:
        name: of the value's site, ``fc.weight``; the first one's, where several read it.
        names: of all sites that read it, with which it has one scale.
        module: the first one's module.
        role: "weight", "input", "output", "q", "k" or "v".
        candidate: whose format.
        format: in words.
        num_elements: of a weight; of other values 0.
        squared_error: the sum of squared errors of the value; of all batches, where it is no weight.
        value_error: that over the sum of its squares.
        output_error: the same of what its op computes, over the first batch; NaN where that cannot be run again.
        model_error: what the model's output changes by, in the analysis' unit, as its gradient has it.
        exact_error: the same, measured with this value alone quantized; None where that was not asked for.
    """

    name: str
    names: tuple[str, ...]
    module: str
    role: str
    candidate: str
    format: str
    num_elements: int
    squared_error: float
    value_error: float
    output_error: float
    model_error: float
    exact_error: float | None = None


@dataclass(frozen=True)
class DepthError:
    """How far an op's output is off once all of a candidate's values are quantized.

    Attributes:
        candidate: whose formats.
        module: that the op belongs to.
        op: its node's name.
        error: sum of squared errors over sum of squares, over the first batch.
    """

    candidate: str
    module: str
    op: str
    error: float


@dataclass(frozen=True)
class LayerGroup:
    """Modules that have to have one format: what a runtime fuses, as q/k/v, and what shares a weight or a scale.

    Attributes:
        modules: their dotted paths.
        num_weights: the elements of their weights, of those that are shared once.
        bits: of the weights, with their scales, as a checkpoint holds them, by candidate; "float" is there, too.
            A candidate that does not fit is not.
    """

    modules: tuple[str, ...]
    num_weights: int
    bits: dict[str, float]


@dataclass(frozen=True)
class Analysis:
    """What :func:`fxmse.analyze` finds.

    Attributes:
        unit: of the model's errors: "nats" (KL divergence, the mean over tokens), "relative" (squared error over
            squares) or "loss".
        candidates: their names.
        sites: an entry for each value and candidate, in the graph's order.
        depth: an entry for each op and candidate, in the graph's order: the error that has come together up to there.
        totals: the model's error with all of a candidate's values quantized, measured over the first batch.
        groups: what has to have one format.
        num_batches: that were run.
        seconds: by what they were spent on.
    """

    unit: str
    candidates: tuple[str, ...]
    sites: tuple[SiteError, ...]
    depth: tuple[DepthError, ...]
    totals: dict[str, float]
    groups: tuple[LayerGroup, ...]
    num_batches: int
    seconds: dict[str, float]

    def sum_errors(self) -> dict[str, dict[str, float]]:
        """The model's error by the quantization of each module alone, by module and candidate.

        That is the sum over its values: measured ones, where the analysis was exact. A value that several modules read
        counts for the first of them.
        """
        sums: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for site in self.sites:
            error = site.model_error if site.exact_error is None else site.exact_error
            sums[site.module][site.candidate] = sums[site.module].get(site.candidate, 0.0) + error
        return dict(sums)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them: lists and dicts; null where a number is not finite."""
        return to_plain(self)


def to_plain(value: Any) -> Any:
    """A dataclass as lists, dicts, strings and finite numbers; None where a number is not finite."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
