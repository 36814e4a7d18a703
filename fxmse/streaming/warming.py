"""Searches are compiled by another process beside the work: torch keeps on disk what it has compiled."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.utils import match_named_modules
from torch import Tensor, nn

from fxmse.config import make_site
from fxmse.observers import Observer
from fxmse.observers.input_aware import InputAwareObserver
from fxmse.search.compiling import compilation, compiled_elsewhere, never_compiles

__all__ = ["compile_searches", "compiling_meanwhile"]

# What the model's own work leaves of the processors is enough.
_COMMAND = "import os; os.nice(10); from fxmse.streaming.warming import compile_searches; compile_searches()"
# Parameters of a model for which another process is worth starting: it takes as long as searching some of them does.
_MIN_PARAMETERS = 1 << 27
_MAX_ROWS = 4096
_NUM_TOKENS = 64


@contextmanager
def compiling_meanwhile(config: QuantizationConfig, model: nn.Module, device: torch.device) -> Iterator[None]:
    """Has the searches of a model's weights compiled by another process within a ``with`` block.

    Until that process is done they run uncompiled or, where that would find something else or take longer, wait.
    Whatever goes wrong there is found out by the search, which compiles what it does not find. A small model, and one
    processor, is not worth it.

    Args:
        config: what is quantized how.
        model: of whose parameters no value is read.
        device: of the searches.
    """
    is_wanted = (os.cpu_count() or 1) > 1 and not never_compiles()
    requests = _list_requests(config, model, device) if is_wanted else []
    if sum(parameter.numel() for parameter in model.parameters()) < _MIN_PARAMETERS or not requests:
        yield
        return
    # Kernels are compiled for a number of threads.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    with subprocess.Popen(
        # -P: the folder that the command was started in, perhaps a downloaded one, is none to import from.
        [sys.executable, "-P", "-W", "ignore", "-c", _COMMAND],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdin is not None
            with suppress(OSError):  # it has ended
                process.stdin.write(json.dumps(requests))
                process.stdin.close()
            with compiled_elsewhere(process):
                yield
        finally:
            # A compiler that it has started ends, too, and removes what it has not written to the end.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)


def _list_requests(config: QuantizationConfig, model: nn.Module, device: torch.device) -> list[dict[str, Any]]:
    """Of each scheme what its largest weight is searched by."""
    requests = []
    for scheme in config.config_groups.values():
        matched = (module for _, module in match_named_modules(model, scheme.targets, config.ignore or []))
        weights = [module.weight for module in matched if isinstance(module, nn.Linear)]
        if weights and scheme.weights is not None:
            largest = max(weights, key=torch.numel)
            requests.append(
                {
                    "args": make_site("", "", "weight", scheme.weights).args.model_dump(mode="json"),
                    "shape": [min(largest.shape[0], _MAX_ROWS), largest.shape[1]],
                    "dtype": str(largest.dtype).removeprefix("torch."),
                    "device": str(device),
                }
            )
    return requests


def compile_searches() -> None:
    """Searches random weights, as stdin has them in JSON."""
    with torch.no_grad(), compilation("always"):
        for request in json.load(sys.stdin):
            args = QuantizationArgs.model_validate(request["args"])
            observer = Observer.load_from_registry(str(args.observer), base_name="weight", args=args)
            weight = _make(request["shape"], request)
            if isinstance(observer, InputAwareObserver) and observer.inputs is not None:
                observer.inputs(_make([_NUM_TOKENS, weight.shape[1]], request))
            observer(weight)


def _make(shape: list[int], request: dict[str, Any]) -> Tensor:
    return torch.randn(shape, device=request["device"]).to(getattr(torch, request["dtype"]))
