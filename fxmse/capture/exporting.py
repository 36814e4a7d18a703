"""torch.export of modules whose dimensions may vary as far as they can."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["export_module", "warn_if_fixed", "without_cache"]

_IMAGE_DIMS = 4  # from so many dimensions on a float tensor is taken for images, of one size


def export_module(model: nn.Module, args: tuple, kwargs: dict[str, Any], dynamic_shapes: Any = None) -> ExportedProgram:
    """A program of ``model``, as it is called with these arguments.

    Args:
        model: the module, in evaluation mode.
        args: positional arguments.
        kwargs: keyword arguments.
        dynamic_shapes: as torch.export takes it. By default all dimensions may vary, of images (float tensors of four
            or more dimensions) the first; a batch of one stands for batches of any size; and what torch.export cannot
            vary is fixed, which a warning says.

    Raises:
        ValueError: arguments that ``model`` does not take.
    """
    if dynamic_shapes is not None:
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    _check_arguments(model, args, kwargs)
    attempts = [((args, kwargs), shape, fixed) for shape, fixed in _ATTEMPTS]
    if any(map(_is_single, tree_leaves((args, kwargs)))):
        # A dimension of size 1 is taken for a constant.
        attempts.insert(0, (tree_map(_double_batch, (args, kwargs)), _vary_all, ""))
        attempts[1] = ((args, kwargs), _vary_all, "batches of one, as the example is,")
    errors = []
    for (some_args, some_kwargs), vary, fixed in attempts:
        shapes = _let_vary(some_args, some_kwargs, vary)
        try:
            with _named_keywords(model, some_kwargs):
                program = torch.export.export(model, some_args, some_kwargs, dynamic_shapes=shapes)  # type: ignore[arg-type]
        except Exception as error:
            errors.append(error)
            continue
        if fixed:
            _warn(model, fixed, f"otherwise torch.export says: {' '.join(str(errors[0]).split())[:200]}")
        return program
    raise errors[0]


def _warn(model: nn.Module, fixed: str, reason: str) -> None:
    warnings.warn(
        f"{type(model).__name__} was exported with {fixed} fixed to the example's size: {reason}. Pass dynamic_shapes, "
        "or batches of that size",
        UserWarning,
        stacklevel=4,
    )


def warn_if_fixed(model: nn.Module, program: ExportedProgram) -> None:
    """Warns where the first dimension of no input may vary, though it was asked to."""
    inputs = [node for node in program.graph.find_nodes(op="placeholder") if node.name in _list_inputs(program)]
    values = [value for node in inputs if isinstance(value := node.meta.get("val"), Tensor) and value.dim()]
    if values and all(is_concrete_int(value.shape[0]) for value in values):
        _warn(model, "the first dimension", "the model's code depends on it")


def _list_inputs(program: ExportedProgram) -> set[str]:
    return {str(name) for name in program.graph_signature.user_inputs}


@contextmanager
def _named_keywords(model: nn.Module, kwargs: dict[str, Any]) -> Iterator[None]:
    """Has ``forward(**kwargs)`` take these by name within a ``with`` block: torch.export cannot vary others."""
    forward, signature = model.forward, inspect.signature(model.forward)
    parameters = list(signature.parameters.values())
    if not parameters or parameters[-1].kind != inspect.Parameter.VAR_KEYWORD:
        yield
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    others = [name for name in kwargs if name not in signature.parameters]
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in others]
    call.__signature__ = signature.replace(parameters=[*parameters[:-1], *named])  # type: ignore[attr-defined]
    own = vars(model).get("forward")
    model.forward = call
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _check_arguments(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises ValueError for arguments that a module's ``forward`` does not take."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = [*(type(value).__name__ for value in args), *kwargs]
        raise ValueError(
            f"{type(model).__name__}.forward{signature} cannot be called with the inputs {', '.join(given)}: {error}. "
            "A batch is a dict of keyword arguments, a tuple of positional ones or a tensor, without labels"
        ) from None


def _let_vary(args: tuple, kwargs: dict[str, Any], vary: Callable[[Tensor], dict[int, Any]]) -> ShapesCollection:
    """``dynamic_shapes`` for torch.export, by what ``vary`` says of each tensor."""
    shapes = ShapesCollection()
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, Tensor):
            shapes[value] = vary(value)
    return shapes


def _vary_all(value: Tensor) -> dict[int, Any]:
    """All dimensions; of images the first."""
    if value.is_floating_point() and value.dim() >= _IMAGE_DIMS:
        return _vary_first(value)
    return dict.fromkeys(range(value.dim()), Dim.AUTO)


def _vary_first(value: Tensor) -> dict[int, Any]:
    return {0: Dim.AUTO} if value.dim() else {}


def _vary_none(value: Tensor) -> dict[int, Any]:
    return {}


# What may vary, and what is then fixed beyond that.
_ATTEMPTS: tuple[tuple[Callable[[Tensor], dict[int, Any]], str], ...] = (
    (_vary_all, ""),
    (_vary_first, "all dimensions but the first"),
    (_vary_none, "all dimensions"),
)


def _is_single(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == 1


def _double_batch(value: Any) -> Any:
    return torch.cat([value, value]) if _is_single(value) else value


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Switches a language model's cache off within a ``with`` block: it is no part of what is quantized."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    caching = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True
