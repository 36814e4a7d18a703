"""Which format where: the least error of the model that a budget allows, as a config."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from torch import nn
from torch.export import ExportedProgram

from fxmse.analysis.candidates import FLOAT, name_candidates
from fxmse.analysis.program import Solution, find_least_cost, solve
from fxmse.analysis.results import Analysis, LayerGroup, to_plain
from fxmse.analysis.sensitivity import AnalysisOptions, analyze_candidates
from fxmse.config import resolve_config

__all__ = ["Candidate", "SchemeChoice", "choose_schemes"]

Candidate: TypeAlias = QuantizationScheme | Mapping[str, Any] | str | None
"""A preset's name, a scheme or a mapping of its fields, whose targets do not count; None leaves a module in float."""

_UNITS = {"bits": 1.0, "bytes": 8.0}


@dataclass(frozen=True)
class SchemeChoice:
    """Which modules get which format.

    Attributes:
        config: that says so: a group for each candidate that was chosen, whose targets are modules' names.
        chosen: the candidate's name by the module's, "float" where it stays so.
        unit: "bits" (a weight), "bytes", or "cost" where a table was given.
        budget: in that unit, as is ``size``.
        size: of the choice.
        error: the sum of the model's errors, in the analysis' unit.
        gap: by what part of it that may be above the least; 0 where it is proven to be the least.
        curve: sizes and the least errors that they allow, smallest first.
        analysis: what it was chosen by.
    """

    config: QuantizationConfig
    chosen: dict[str, str]
    unit: str
    budget: float
    size: float
    error: float
    gap: float
    curve: tuple[tuple[float, float], ...]
    analysis: Analysis

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        config = self.config.model_dump(mode="json", exclude_none=True)
        fields = {name: value for name, value in vars(self).items() if name != "config"}
        return {"config": config, **to_plain(fields)}


def choose_schemes(
    model: nn.Module | ExportedProgram,
    candidates: Sequence[Candidate] | Mapping[str, Candidate],
    budget: float,
    batches: Iterable[Any] = (),
    *,
    unit: str = "bits",
    costs: Mapping[str, Mapping[str, float]] | None = None,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = (),
    analysis: Analysis | None = None,
    num_points: int = 16,
    seconds: float = 60.0,
    **options: Any,
) -> SchemeChoice:
    """A format for each module, so that the model's error is least among all choices within a budget.

    Errors are those of :func:`fxmse.analyze`, added up; the choice is an integer program's optimum. Modules that a
    runtime runs as one (linears that read the same value, as q/k/v and gate/up, and a layer's experts) get one format,
    and so do those that share a weight.

    Args:
        model: as for :func:`fxmse.analyze`.
        candidates: presets' names, schemes, and None for modules that may stay in float; or these by names of your own.
        budget: in ``unit``, for all modules that are targeted and that a candidate fits.
        batches: as for :func:`fxmse.analyze`; not needed with an ``analysis``.
        unit: "bits" a weight, with their scales and zero points, or "bytes" of all weights, both as a checkpoint has
            them; of ``costs``, theirs.
        costs: what is added up in place of sizes, as seconds that were measured: by module, then by candidate's name
            ("float" for None).
        targets: which modules are meant, as a config's targets.
        ignore: which are not.
        analysis: from an earlier call, or of :func:`fxmse.analyze` with the same candidates, targets and ignores.
        num_points: of the curve.
        seconds: that the integer program has; the best choice until then is taken, and its ``gap`` said.
        options: of :func:`fxmse.analyze`.

    Raises:
        ValueError: as :func:`fxmse.analyze`; a budget below the least possible, which is said; candidates that are the
            same, or that one checkpoint cannot mix; an analysis without them; a table that lacks a module or candidate.
        ImportError: scipy is not installed: it comes with the extra ``mixed``.
    """
    _check_scipy()
    schemes = _make_schemes(candidates, targets)
    _check_numbers(budget, unit, num_points, costs is not None)
    configs = {
        name: QuantizationConfig(config_groups={name: scheme}, ignore=[*ignore])
        for name, scheme in schemes.items()
        if scheme
    }
    if analysis is None:
        analysis = analyze_candidates(model, configs, batches, AnalysisOptions(**options))
    _check_analysis(analysis, list(configs))
    table = _Table.of(analysis, list(schemes), unit, costs)
    found = table.solve(budget, seconds)
    chosen = {
        module: own[place]
        for group, own, place in zip(table.groups, table.names, found.choice, strict=True)
        for module in group.modules
    }
    return SchemeChoice(
        _make_config(schemes, chosen, ignore),
        chosen,
        "cost" if costs is not None else unit,
        budget,
        found.cost,
        found.error,
        found.gap,
        table.draw_curve(num_points, seconds),
        analysis,
    )


def _check_scipy() -> None:
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise ImportError("choose_schemes needs scipy, which solves its program: pip install 'fxmse[mixed]'") from None


def _make_schemes(
    candidates: Sequence[Candidate] | Mapping[str, Candidate], targets: Sequence[str]
) -> dict[str, QuantizationScheme | None]:
    """The schemes by their names, with the targets; raises ValueError for what is none, or for two that are one."""
    if isinstance(candidates, str | QuantizationScheme):
        raise ValueError(f"candidates is one {type(candidates).__name__}: expected a list of candidates")
    given = candidates if isinstance(candidates, Mapping) else {}
    values = list(given.values() if given else candidates)
    names: list[str | None] = list(given) or [own if isinstance(own, str) else None for own in values]
    quantized = [(name, own) for name, own in zip(names, values, strict=True) if own is not None]
    if not quantized:
        raise ValueError("candidates have no format: expected a preset or a scheme beside None, which is float")
    if len(values) - len(quantized) > 1:
        raise ValueError("candidates have None twice")
    resolved = [_retarget(own, targets) for _, own in quantized]
    schemes: dict[str, QuantizationScheme | None] = {}
    for name, config in name_candidates(resolved, [name for name, _ in quantized]).items():
        (scheme,) = config.config_groups.values()
        _check_storable(name, scheme)
        schemes[name] = scheme
    return schemes | ({FLOAT: None} if len(values) > len(quantized) else {})


def _retarget(candidate: Candidate, targets: Sequence[str]) -> QuantizationConfig:
    if isinstance(candidate, QuantizationConfig) or (isinstance(candidate, Mapping) and "config_groups" in candidate):
        raise ValueError("a candidate is a whole config: expected a scheme, one format for any module")
    fields = {"targets": list(targets), **candidate} if isinstance(candidate, Mapping) else candidate
    config = resolve_config(fields)
    if len(config.config_groups) != 1 or config.kv_cache_scheme:
        raise ValueError(f"candidate {candidate!r} is not one scheme: expected one format for any module")
    ((_, scheme),) = config.config_groups.items()
    retargeted = scheme.model_copy(update={"targets": list(targets)}, deep=True)
    return QuantizationConfig(config_groups={"group_0": retargeted})


def _check_storable(name: str, scheme: QuantizationScheme) -> None:
    """Raises ValueError for what cannot stand beside others in one checkpoint."""
    if scheme.weights is None:
        raise ValueError(f"candidate {name} quantizes no weights: there is no size to choose by")
    own = infer_module_format(nn.Linear, scheme)
    if scheme.format is not None and scheme.format != own:
        raise ValueError(
            f"candidate {name} has format={scheme.format}, and compressed-tensors stores it as {own.value}: leave "
            "format out, it is found for each module of a mix"
        )


def _check_numbers(budget: float, unit: str, num_points: int, has_costs: bool) -> None:
    if unit not in _UNITS:
        raise ValueError(f"unit={unit!r}: expected one of {', '.join(_UNITS)}")
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not math.isfinite(budget):
        raise ValueError(f"budget={budget!r}: expected a number of {'the costs' if has_costs else unit}")
    if not isinstance(num_points, int) or num_points < 0:
        raise ValueError(f"num_points={num_points!r}: expected a number of at least 0")


def _check_analysis(analysis: Analysis, names: Sequence[str]) -> None:
    """Raises ValueError for an analysis that cannot be chosen by."""
    missing = [name for name in names if name not in analysis.candidates]
    if missing:
        raise ValueError(f"the analysis is of {', '.join(analysis.candidates)}, without {', '.join(missing)}")
    if not analysis.groups:
        raise ValueError("the analysis has no module with a weight: there is nothing to choose")


@dataclass(frozen=True)
class _Table:
    """Errors and costs.

    Attributes:
        groups: of modules.
        names: of each group's candidates.
        errors: of each.
        costs: of each, in the unit.
    """

    groups: list[LayerGroup]
    names: list[list[str]]
    errors: list[list[float]]
    costs: list[list[float]]

    @classmethod
    def of(
        cls, analysis: Analysis, names: Sequence[str], unit: str, costs: Mapping[str, Mapping[str, float]] | None
    ) -> "_Table":
        groups: list[LayerGroup] = []
        left: list[LayerGroup] = []
        for group in analysis.groups:
            (groups if any(name in group.bits for name in names) else left).append(group)
        if left:
            modules = ", ".join(module for group in left for module in group.modules)
            warnings.warn(f"left in float, since no candidate fits: {modules}", UserWarning, stacklevel=3)
        if not groups:
            raise ValueError("no candidate fits any module")
        sums = analysis.sum_errors()
        own = [[name for name in names if name in group.bits] for group in groups]
        errors = [
            [sum(sums.get(module, {}).get(name, 0.0) for module in group.modules) for name in of_group]
            for group, of_group in zip(groups, own, strict=True)
        ]
        unknown = [
            m for g, row in zip(groups, errors, strict=True) if not all(map(math.isfinite, row)) for m in g.modules
        ]
        if unknown:
            raise ValueError(f"the errors of {', '.join(unknown)} are not finite: there is nothing to choose by")
        divisor = _UNITS["bytes"] if unit == "bytes" else float(sum(group.num_weights for group in groups))
        sizes = [
            [_look_up(costs, group, name) if costs is not None else group.bits[name] / divisor for name in of_group]
            for group, of_group in zip(groups, own, strict=True)
        ]
        return cls(groups, own, errors, sizes)

    def solve(self, budget: float, seconds: float) -> Solution:
        """The best choice; raises ValueError where there is none."""
        least = find_least_cost(self.costs)
        if least > budget * (1 + 1e-9):
            raise ValueError(f"budget={budget:g} cannot be met: the least that these candidates take is {least:g}")
        return solve(self.errors, self.costs, budget, seconds)

    def draw_curve(self, num_points: int, seconds: float) -> tuple[tuple[float, float], ...]:
        """The best choices of budgets from the least to that of the least error; of some, the program has one."""
        if num_points < 1:
            return ()
        least = find_least_cost(self.costs)
        most = solve(self.errors, self.costs, math.inf).cost
        budgets = [least + (most - least) * step / max(1, num_points - 1) for step in range(num_points)]
        found = [solve(self.errors, self.costs, budget, seconds) for budget in budgets]
        return tuple(sorted({(solution.cost, solution.error) for solution in found}))


def _look_up(costs: Mapping[str, Mapping[str, float]], group: LayerGroup, name: str) -> float:
    total = 0.0
    for module in group.modules:
        cost = costs.get(module, {}).get(name)
        if cost is None:
            raise ValueError(f"costs have no {name} for {module}")
        if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 <= cost < math.inf:
            raise ValueError(f"costs[{module!r}][{name!r}]={cost!r}: expected a number of at least 0")
        total += cost
    return total


def _make_config(
    schemes: Mapping[str, QuantizationScheme | None], chosen: Mapping[str, str], ignore: Sequence[str]
) -> QuantizationConfig:
    """Targets are modules' names; those that stay in float are among what is ignored, as runtimes want it."""
    modules = {name: [module for module, own in chosen.items() if own == name] for name in schemes}
    groups = {
        name: scheme.model_copy(update={"targets": modules[name]}, deep=True)
        for name, scheme in schemes.items()
        if scheme and modules[name]
    }
    return QuantizationConfig(config_groups=groups, ignore=[*ignore, *modules.get(FLOAT, [])])
