"""The command's way in, outside of the package: an interrupt while that is imported, too, is one line."""

import os
import signal
import sys
from typing import NoReturn


def main() -> int:
    """Runs ``fxmse.cli.main``; returns the exit code."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler:  # ignored, as of a job in the background
        from fxmse.cli import main as run

        return run()
    # What torch's modules would make of an exception is theirs; nothing has begun that would have to end.
    signal.signal(signal.SIGINT, _leave)
    from fxmse.cli import main as run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return run()
    except KeyboardInterrupt:  # before or after the work
        _leave()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave(*_: object) -> NoReturn:
    """Ends the process as an interrupted one."""
    os.write(sys.stderr.fileno(), b"fxmse: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
