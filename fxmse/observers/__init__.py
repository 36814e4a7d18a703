"""Observers by name: what is kept of the values seen, and the qparams that come of it.

- ``counting``: how often which value was seen.
- ``states``: what observers keep: named tensors, saved and loaded.
- ``base``: the contract, init, update, merge and finish; min-max and MSE observers.
- ``importance``: observers that weigh errors by the activations that meet them.
- ``exact``: the observer that finds the optimum.
"""

from fxmse.observers.base import Observer
from fxmse.observers.exact import ExactMSEObserver, ExactMSEOptions

__all__ = ["ExactMSEObserver", "ExactMSEOptions", "Observer"]
