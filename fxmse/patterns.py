"""Regular expressions of configs (``re:...``), which may take longer than anybody waits."""

import math
import re
from collections.abc import Iterable
from re import _parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

__all__ = ["check_patterns"]

_PREFIX = "re:"
_MAX_LENGTH = 1000
_MAX_WAYS = 10**7
"""A tenth of a second for a name that does not match in the end."""

_MANY = 64
"""A repetition that may be as long as a name, for all that is known of it."""


class _Ways(NamedTuple):
    """In how many ways a part of an expression can match: ``number``, times those to share a name among ``stars``."""

    number: int = 1
    stars: int = 0

    def bound(self, length: int) -> int:
        return self.number * math.comb(length + self.stars, self.stars)


def check_patterns(targets: Iterable[str], names: Iterable[str] = ()) -> None:
    """Raises ValueError for an expression that is none, or that may take too long for one of the names.

    Python's ``re``, which compressed-tensors, transformers and vLLM match by, goes through all ways in which parts of
    an expression can share a name. They are counted here; neither a signal nor a thread can bound them once it runs,
    and matching otherwise would leave those others with the expression. A name of 100 characters may meet four
    ``.*``, and a repetition must not be of something that itself matches in several ways.

    Args:
        targets: of a config; those without ``re:`` are not looked at.
        names: which they will be matched with.
    """
    length = max((len(name) for name in names), default=_MANY)
    for target in targets:
        if not target.startswith(_PREFIX):
            continue
        pattern = target.removeprefix(_PREFIX)
        try:
            if len(pattern) > _MAX_LENGTH:
                raise ValueError(f"{len(pattern)} characters, expected at most {_MAX_LENGTH}")
            parsed = _parser.parse(pattern)
            if parsed.data and _is_star(*parsed.data[-1]):
                del parsed[-1]  # takes what is left, in one way
            ways = _count_ways(parsed)
        except (re.error, RecursionError, OverflowError, ValueError) as error:
            raise ValueError(f"{target[:100]!r} is no regular expression: {error}") from None
        if ways.bound(length) > _MAX_WAYS:
            raise ValueError(
                f"{target!r} can match a name of {length} characters in more than {_MAX_WAYS} ways, and may never end: "
                "name the modules, or use fewer and no nested repetitions"
            )


def _count_ways(items: Any) -> _Ways:
    """Of a sequence, whose parts match independently."""
    found = [_count_of(operator, argument) for operator, argument in items]
    return _Ways(math.prod(ways.number for ways in found), sum(ways.stars for ways in found))


def _count_of(operator: Any, argument: Any) -> _Ways:
    match str(operator):
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
            low, high, body = argument
            return _count_repetitions(int(low), int(high), _count_ways(body))
        case "BRANCH":
            return _count_branches([_count_ways(branch) for branch in argument[1]])
        case "GROUPREF_EXISTS":
            return _count_branches([_count_ways(branch) for branch in argument[1:] if branch])
        case "SUBPATTERN" | "ASSERT" | "ASSERT_NOT":
            return _count_ways(argument[-1])
        case "ATOMIC_GROUP":
            return _count_ways(argument)
    return _Ways()


def _count_branches(branches: list[_Ways]) -> _Ways:
    return _Ways(sum(ways.number for ways in branches), max(ways.stars for ways in branches))


def _count_repetitions(low: int, high: int, body: _Ways) -> _Ways:
    most = min(high, _MANY)
    if body == _Ways():
        return _Ways(1, 1) if high > _MANY and low < high else _Ways(high - low + 1)
    return _Ways(body.number**most + high - low if high <= _MANY else 2**_MANY, body.stars * most)


def _is_star(operator: Any, argument: Any) -> bool:
    return str(operator) in ("MAX_REPEAT", "MIN_REPEAT") and str(argument[2]) == "[(ANY, None)]"
