"""The command line: ``fxmse quantize``, ``plan``, ``analyze``, ``inspect`` and ``schemes``.

- ``paths``: what a path is, and what is there.
- ``reports``: what commands print, and the reports that they write and read.
- ``sources``: what commands are given.
- ``folders``: a model that goes from folder to folder part by part.
- ``quantizing``: ``fxmse quantize``.
- ``analyzing``: ``fxmse analyze``.
- ``inspecting``: ``fxmse inspect`` and ``fxmse schemes``.
- ``parser``: the arguments of all commands.
- ``running``: runs a command, and says in one line what went wrong.
- ``__main__``: ``python -m fxmse.cli``.
"""

from fxmse.cli.running import main

__all__ = ["main"]
