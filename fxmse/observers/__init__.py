"""Observers by name: what is kept of the values seen, and the qparams that come of it.

- ``counting``: how often which value was seen.
- ``fingerprints``: numbers that tell tensors apart by what they hold.
- ``states``: what observers keep: named tensors, saved and loaded.
- ``base``: the contract: init, update, merge, finish, qparams.
- ``searches``: what they search by, as nodes of a graph.
- ``averages``: moving averages of ranges.
- ``min_max``: ``memoryless_minmax``, ``static_minmax``, ``minmax``.
- ``mse``: ``memoryless_mse``, ``mse``, ``nvfp4_expanded_mse``.
- ``arrangements``: which rows of a weight meet which tokens.
- ``inputs``: what is kept of the activations that meet a weight.
- ``input_aware``: observers of weights that make use of it.
- ``imatrix``: ``imatrix_mse``, ``nvfp4_expanded_imatrix``.
- ``exact``: ``exact_mse``, which finds the optimum.
- ``output``: ``output_mse``, which finds the least error of outputs.

Importing this package has all of them registered.
"""

from fxmse.observers.base import Observer
from fxmse.observers.exact import ExactMSEObserver, ExactMSEOptions
from fxmse.observers.imatrix import (
    ExpandedImportanceMSEOptions,
    IMatrixMSEObserver,
    ImportanceMSEOptions,
    NVFP4ExpandedIMatrixObserver,
)
from fxmse.observers.min_max import MemorylessMinMaxObserver, MinMaxObserver, StaticMinMaxObserver
from fxmse.observers.mse import (
    ExpandedMSEOptions,
    FourOverSixObserver,
    MemorylessMSEObserver,
    MovingAverageMSEObserver,
    MovingAverageMSEOptions,
    MSEObserver,
    MSEOptions,
    NVFP4ExpandedMSEObserver,
)
from fxmse.observers.output import OutputMSEObserver, OutputMSEOptions

__all__ = [
    "ExactMSEObserver",
    "ExactMSEOptions",
    "ExpandedImportanceMSEOptions",
    "ExpandedMSEOptions",
    "FourOverSixObserver",
    "IMatrixMSEObserver",
    "ImportanceMSEOptions",
    "MSEObserver",
    "MSEOptions",
    "MemorylessMSEObserver",
    "MemorylessMinMaxObserver",
    "MinMaxObserver",
    "MovingAverageMSEObserver",
    "MovingAverageMSEOptions",
    "NVFP4ExpandedIMatrixObserver",
    "NVFP4ExpandedMSEObserver",
    "Observer",
    "OutputMSEObserver",
    "OutputMSEOptions",
    "StaticMinMaxObserver",
]
