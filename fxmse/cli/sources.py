"""What commands are given: a config, a model and its data."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fxmse.config import Config, name_weight_observer, resolve_config
from fxmse.inputs.data import Choice, check_batches, find_batch_size, order_inputs, read_batches, take_inputs
from fxmse.inputs.models import Source
from fxmse.outputs.checkpoint import find_tied

__all__ = ["ignore_tied", "load_batches", "make_config", "move", "name_data"]

_BATCH_SIZE = 8


def make_config(options: argparse.Namespace) -> QuantizationConfig:
    """The scheme, checked before anything is done."""
    config: Config = options.scheme
    if options.ignore:
        if options.scheme.upper() not in PRESET_SCHEMES:
            raise ValueError("--ignore goes with a preset; a config file has an ignore list of its own")
        config = {"config_groups": {options.scheme: ["Linear"]}, "ignore": options.ignore}
    name = options.observer
    if name is None and options.observer_kwargs is None:
        return resolve_config(config)
    if name == "auto":
        name = "exact_mse" if options.data is None else "output_mse"
    return name_weight_observer(config, name, options.observer_kwargs)


def ignore_tied(config: Config, model: Any) -> QuantizationConfig:
    """The config without what a checkpoint cannot hold quantized; says what that is."""
    config = resolve_config(config)
    tied = find_tied(config, model)
    for module, names in tied.items():
        print(
            f"fxmse: {module} stays in float, as with --ignore {module}: {names} are one parameter, of which a "
            "checkpoint cannot hold a quantized weight",
            file=sys.stderr,
        )
    return config.model_copy(update={"ignore": [*(config.ignore or []), *tied]})


def load_batches(options: argparse.Namespace, source: Source) -> list[Any]:
    """The data, as the model takes it; none where none is given."""
    if options.data is None:
        return []
    fixed = find_batch_size(source.program) if source.program else None
    batches = read_batches(
        options.data,
        batch_size=options.batch_size or fixed or _BATCH_SIZE,
        max_length=options.max_length,
        model_folder=source.folder,
        choice=Choice(options.num_samples, options.seed),
        trust_remote_code=options.trust_remote_code,
    )
    batches = batches[: options.max_batches]
    if source.model is not None:
        batches = [take_inputs(batch, options.data, source.model) for batch in batches]
    if source.program is not None:
        batches = order_inputs(batches, source.program)
    return check_batches(batches, source.program)


def move(batch: Any, device: str | None) -> Any:
    """A batch on a device, if one is given."""
    return batch if device is None else tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


@contextmanager
def name_data(options: argparse.Namespace) -> Iterator[None]:
    """Raises ValueError for what a model, or torch, says of data that does not fit: of which, they do not know."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        what = f"{options.model} with {options.data or 'its example inputs'}"
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{what}: {type(error).__name__}: {reason}") from error
