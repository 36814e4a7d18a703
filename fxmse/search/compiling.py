"""When and how stages of a search are compiled: the only place that calls torch.compile for them.

A stage is a function of a problem (a frozen value, of which a graph depends) and tensors.
"""

import functools
import itertools
import subprocess
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from fxmse.formats.tables import is_traced

__all__ = [
    "MIN_COMPILED",
    "STATIC_LENGTHS",
    "attempt",
    "beside_compiler",
    "compilation",
    "compiled_elsewhere",
    "never_compiles",
    "pays_to_compile",
    "reads_flags",
    "rounds_each",
    "run",
    "settled",
    "unrolls",
]

# Below this many elements the uncompiled search takes a few ms, whatever else is compiled.
MIN_COMPILED = 1 << 12
# Errors (elements times candidates) that take about as long to evaluate uncompiled, at 6 ns each, as a scheme's graphs
# take to be compiled where no cache has them.
_COMPILATION_WORK = 1 << 29
# Seconds after which searches wait for a process that compiles: about what that takes where no cache has anything.
_PATIENCE = 40.0
_INDUCTOR_OPTIONS: dict[str, Any] = {
    # Contraction (x * y + z rounded once) makes the errors more exact, and the power a third faster.
    "cpp.enable_floating_point_contract_flag": "fast",
    # Inductor writes what takes more than 30 operations to a buffer, if it is read twice: here one of the data's size
    # times the candidates.
    "realize_opcount_threshold": 1 << 10,
}
# The last dimensions that are constants of a graph: the innermost loop needs no check for its end then and is two to
# three times as fast.
STATIC_LENGTHS = {1024, 512, 128, 64, 32, 16, 8}
_Mode = Literal["auto", "always", "never"]
_Stage = TypeVar("_Stage", bound=Callable[..., Any])
_Result = TypeVar("_Result")

_unrolled: dict[Callable[..., Any], int] = {}
_rounding_each: set[Callable[..., Any]] = set()


def unrolls(place: int) -> Callable[[_Stage], _Stage]:
    """Marks a stage that looks at the entries of its ``place``-th tensor one after the other."""

    def mark(stage: _Stage) -> _Stage:
        _unrolled[stage] = place
        return stage

    return mark


def rounds_each(stage: _Stage) -> _Stage:
    """Marks a stage whose products are rounded before anything is added to them, as uncompiled ones are."""
    _rounding_each.add(stage)
    return stage


def pays_to_compile(problem: Hashable, value: Tensor, num_steps: int, *, finds_same: bool = False) -> bool:
    """The rule of :func:`compilation`; a graph that is being made takes the search as it is.

    Args:
        problem: what a graph depends on.
        value: what is searched.
        num_steps: candidates of each of its elements.
        finds_same: whether the uncompiled search of it finds the same, bit for bit, on a CPU.
    """
    if is_traced(value) or value.numel() < MIN_COMPILED or never_compiles():
        return False
    mode, work = _mode.get(), value.numel() * num_steps
    if mode == "auto" and _uncompiled_work[problem] < _COMPILATION_WORK:
        _uncompiled_work[problem] += work
        if _uncompiled_work[problem] < _COMPILATION_WORK:
            return False
    if elsewhere := _elsewhere.get():
        may_run = finds_same and value.device.type == "cpu" and work < _COMPILATION_WORK
        if may_run and elsewhere.is_worth_running_beside():
            return False
        elsewhere.wait()
    return True


@contextmanager
def compiled_elsewhere(compiler: "subprocess.Popen[str]") -> Iterator[None]:
    """Leaves compiling within a ``with`` block to another process, until that ends; torch keeps on disk what it made.

    Until then searches run uncompiled, if that finds the same and takes no longer than compiling does; others wait.
    """
    token = _elsewhere.set(_Elsewhere(compiler, torch.get_num_threads(), time.monotonic()))
    try:
        yield
    finally:
        _elsewhere.reset(token)


@contextmanager
def beside_compiler() -> Iterator[None]:
    """Leaves a processor to the process that compiles; threads that wait for others would keep it busy, too."""
    elsewhere = _elsewhere.get()
    if elsewhere is None or not elsewhere.is_running():
        yield
        return
    torch.set_num_threads(max(1, elsewhere.num_threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(elsewhere.num_threads)


@dataclass
class _Elsewhere:
    """A process that compiles, for so many threads."""

    process: "subprocess.Popen[str]"
    num_threads: int
    start: float

    def is_running(self) -> bool:
        """Whether it compiles."""
        return self.process.poll() is None

    def is_worth_running_beside(self) -> bool:
        """Whether searches run uncompiled meanwhile: after a while nothing is gained."""
        return self.is_running() and time.monotonic() < self.start + _PATIENCE

    def wait(self) -> None:
        """Until it ends; what is compiled is for all threads, whichever of them :func:`beside_compiler` left."""
        self.process.wait()
        torch.set_num_threads(self.num_threads)


def never_compiles() -> bool:
    """Whether nothing is compiled, however large."""
    return _mode.get() == "never"


@contextmanager
def compilation(mode: _Mode) -> Iterator[None]:
    """Sets within a ``with`` block whether searches are compiled.

    Args:
        mode: "auto", the default: a scheme's searches run uncompiled until they would have taken as long as compiling
            does, and compiled from then on. So a small model never waits for a compiler, a large one compiles at its
            first weight, and neither takes more than twice the time of the better choice. "always" compiles from the
            first value of 4096 elements on, "never" not at all. What is compiled finds the same
            ranges; only ``exact_mse`` at other norms than 1 and 2, or of rows whose lengths no vector divides, may find
            others whose errors are as small.

    Raises:
        ValueError: another mode.
    """
    if mode not in get_args(_Mode):
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(get_args(_Mode))}")
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


@contextmanager
def settled(num_errors: int) -> Iterator[None]:
    """Decides "auto" once for all searches within a ``with`` block.

    So what one finds does not depend on which were done before it, as those of a run that is gone on with.

    Args:
        num_errors: elements times candidates that will be evaluated.
    """
    if _mode.get() != "auto":
        yield
        return
    with compilation("always" if num_errors >= _COMPILATION_WORK else "never"):
        yield


_mode: ContextVar[_Mode] = ContextVar("compilation", default="auto")
_elsewhere: "ContextVar[_Elsewhere | None]" = ContextVar("elsewhere", default=None)
_uncompiled_work: Counter[Hashable] = Counter()


def run(is_compiled: bool, stage: Callable[..., Any], problem: Hashable, *tensors: Tensor | None) -> Any:
    """Runs a stage of the search, compiled where that is wanted and can be done."""
    plain = functools.partial(stage, problem, *tensors)
    if not is_compiled or any(t is not None and is_traced(t) for t in tensors):
        return plain()
    # Of a view Dynamo would look at what it is a view of, and it at who asks for the graph.
    bare = [None if tensor is None else tensor.data for tensor in tensors]
    unrolled = bare[_unrolled[stage]] if stage in _unrolled else None
    num_steps = None if unrolled is None else len(unrolled)
    return attempt(lambda: _compile(stage, problem, num_steps, tuple(map(_sign, bare)))(*bare), plain)


def attempt(compiled: Callable[[], _Result], plain: Callable[[], _Result]) -> _Result:
    """The result of ``compiled``; on a machine without a compiler that of ``plain``, with one warning."""
    if not _Compiler.is_usable:
        return plain()
    try:
        return compiled()
    except Exception as error:
        if not _is_missing_compiler(error):
            raise
        _Compiler.is_usable = False
        warnings.warn(
            f"the MSE search runs uncompiled, several times slower: {_first_line(error)}. "
            "Install a C++ compiler (g++ or clang), or set CXX to one that works.",
            RuntimeWarning,
            stacklevel=2,
        )
        return plain()


_serial = itertools.count()


class _Compiler:
    """Whether the machine has one; found out by the first use."""

    is_usable = True


def _sign(tensor: Tensor | None) -> tuple[object, ...] | None:
    """What a graph is made for: of each dimension whether it is 1, and the length of parts."""
    if tensor is None:
        return None
    sizes: list[int | None] = [1 if size == 1 else None for size in tensor.shape]
    if tensor.dim() > 3 and tensor.shape[-1] in STATIC_LENGTHS:
        sizes[-1] = tensor.shape[-1]
    return tensor.is_contiguous(), tensor.dtype, tensor.device, *sizes


@functools.cache
def _compile(
    stage: Callable[..., Any], problem: Hashable, num_steps: int | None, signature: tuple[Any, ...]
) -> Callable[..., Any]:
    """One graph per problem, signature and, where it looks at steps one after the other, their number.

    A code object of its own keeps Dynamo's limit of recompilations away from it.
    """
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list as list_entries

    def run(*tensors: Tensor | None) -> Any:
        return stage(problem, *tensors)

    code = run.__code__.replace(co_name=f"{stage.__name__.strip('_')}_{next(_serial)}")
    run = types.FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)
    options = {**_INDUCTOR_OPTIONS, "guard_filter_fn": functools.partial(_keep_guards, signature)}
    if stage in _rounding_each:
        options["cpp.enable_floating_point_contract_flag"] = "off"
    compiled = torch.compile(run, fullgraph=True, options=options)
    varying = [
        (place, dim)
        for place, signed in enumerate(signature)
        for dim, size in enumerate(signed[3:] if signed else ())
        if size is None
    ]

    def call(*tensors: Tensor | None) -> Any:
        # Which dimensions vary from layer to layer and from batch to batch: naming them spares the recompilation that
        # would find it out. Dynamo may look at any call: its caches are reset, or the mode is another.
        for place, dim in varying:
            torch._dynamo.maybe_mark_dynamic(tensors[place], dim)
        if list_entries(code):
            return compiled(*tensors)
        # Sizes that happen to be equal now need not be so later.
        with torch.fx.experimental._config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return compiled(*tensors)

    return call


def _keep_guards(signature: tuple[Any, ...], guards: Sequence[Any]) -> list[bool]:
    """Which guards are looked at: those of the mode, the sizes, and the strides that the signature leaves open.

    Looking at all of them takes longer than the search of a small value, and some hold nothing that the graph depends
    on: whether an operator of torch.library or inference mode is at work.
    """
    open_tensors = {f"L['tensors'][{i}]" for i, signed in enumerate(signature) if signed and not signed[0]}
    return [guard.name in ("", *open_tensors) or guard.guard_type == "DUPLICATE_INPUT" for guard in guards]


def _is_missing_compiler(error: BaseException | None) -> bool:
    from torch._inductor import exc

    missing = (exc.InvalidCxxCompiler, exc.CppCompileError)
    while error is not None:
        if isinstance(error, missing) or "TritonMissing" in type(error).__name__:
            return True
        error = getattr(error, "inner_exception", None) or error.__cause__
    return False


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def reads_flags(tensor: Tensor) -> bool:
    """Whether a flag's value can be looked at without waiting for a device."""
    return tensor.device.type == "cpu" and not is_traced(tensor)
