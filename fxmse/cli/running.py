"""Runs a command, and says in one line what went wrong."""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fxmse.cli.parser import make_parser
from fxmse.cli.paths import identify
from fxmse.streaming.work import Work

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    options = make_parser().parse_args(arguments)
    try:
        with _quiet_logs(options):
            options.run(options)
    except KeyboardInterrupt:
        print(f"fxmse: interrupted; {_tell_written(options)}", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        print(f"fxmse: error: {_describe(error)} (--debug shows where)", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _quiet_logs(options: argparse.Namespace) -> Iterator[None]:
    """Has libraries log no errors of their own within a ``with`` block: each is raised, too, and said in one line."""
    before = logging.root.manager.disable
    if not options.debug:
        logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _describe(error: Exception) -> str:
    """An error in one line."""
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split()) or type(error).__name__}"


def _tell_written(options: argparse.Namespace) -> str:
    """What an interrupted command left at ``--out``: nothing new, or all of it."""
    if "before" in options and identify(options.out) != options.before:
        return f"{options.out} was written"
    is_begun = "before" in options and Work.is_begun(options.out)
    return "nothing was written" + ("; run the same command again to go on" if is_begun else "")
