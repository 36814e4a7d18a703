"""The command line: ``fxmse quantize``, ``fxmse inspect``, ``fxmse schemes``."""

import argparse
import dataclasses
import inspect
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from tabulate import tabulate
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxmse.capture.front_ends import split_inputs
from fxmse.inputs.data import read_batches
from fxmse.outputs.checkpoint import check_replaceable, save_pretrained
from fxmse.outputs.exporting import export, load_program, save_program
from fxmse.outputs.reporting import describe_format, report
from fxmse.pipeline import calibrate, convert, prepare

__all__ = ["main"]

REPORT_FILE = "fxmse_report.json"
"""The report's name inside of a .pt2 and of a checkpoint's folder."""

_REPORTED_BATCHES = 4
# Fields of a SiteReport, and what the table calls them.
_COLUMNS = {
    "module": "module",
    "role": "value",
    "format": "format",
    "num_scales": "scales",
    "scale_min": "least",
    "scale_max": "largest",
    "sqnr": "SQNR dB",
    "range_ratio": "range / min-max",
}
_TENSOR_FILES = (".safetensors", ".pt")
_EXAMPLES = """examples:
  fxmse quantize model.pt2 --scheme W8A8 --data batches.safetensors --out quantized.pt2
  fxmse quantize ./llama --scheme W4A16 --ignore lm_head --data texts.jsonl --out ./llama-w4a16
  fxmse quantize ./vit --scheme config.yaml --data ./images --out vit.pt2 --decompose
  fxmse inspect quantized.pt2
  fxmse schemes --json

exit codes: 0 done, 1 an error, named in one line, 2 wrong usage, 130 interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    options = _make_parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("fxmse: interrupted; nothing was written", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split())
        print(f"fxmse: error: {kind}{reason or type(error).__name__} (--debug shows where)", file=sys.stderr)
        return 1
    return 0


def _make_parser() -> argparse.ArgumentParser:
    texts: dict[str, Any] = {"epilog": _EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        prog="fxmse", description="Post-training quantization with MSE observers.", **texts
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help, **texts)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return command

    command = add("quantize", _quantize, "calibrate a model on sample data and write the quantized one")
    command.add_argument("model", type=Path, metavar="MODEL", help="a .pt2, or a local Hugging Face folder")
    command.add_argument("--scheme", required=True, help="a preset (see fxmse schemes), or a JSON or YAML config file")
    command.add_argument("--ignore", nargs="+", default=[], metavar="NAME", help="modules that a preset leaves alone")
    command.add_argument(
        "--data",
        type=Path,
        help=".safetensors or .pt of batches; for a folder's model also .txt or .jsonl of texts, or a folder of "
        "images. A scheme of weights alone needs none",
    )
    command.add_argument("--out", type=Path, required=True, help="a .pt2, or a folder: a compressed-tensors checkpoint")
    command.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="samples a batch (default 8)")
    command.add_argument("--max-length", type=_positive, default=512, metavar="N", help="tokens a text (default 512)")
    command.add_argument("--max-batches", type=_positive, metavar="N", help="use the first N batches")
    command.add_argument(
        "--decompose", action="store_true", help="write a .pt2 that loads where fxmse is not installed"
    )
    command = add("inspect", _inspect, "print what was quantized how, and how well, in what fxmse quantize wrote")
    command.add_argument("out", type=Path, metavar="OUT", help="a .pt2 or a checkpoint's folder")
    add("schemes", _list_schemes, "list the presets")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number of at least 1")
    return value


def _quantize(options: argparse.Namespace) -> None:
    is_program = options.out.suffix == ".pt2"
    _check_paths(options, is_program)
    start = time.perf_counter()
    model, program = _load_model(options.model)
    batches = _read_data(options, model)
    config = _read_scheme(options.scheme, options.ignore)
    example = batches[0] if batches else _make_example(program, model)
    use_cache = _set_use_cache(model, False)
    observed = prepare(program if program is not None else model, config, example)
    calibrate(observed, _check_batches(batches, program))
    quantized = convert(observed)
    sites = [_as_json(site) for site in report(quantized, (batches or [example])[:_REPORTED_BATCHES])]
    _set_use_cache(model, use_cache)
    summary = {
        "model": str(options.model),
        "scheme": options.scheme,
        "out": str(options.out),
        "batches": len(batches),
        "seconds": round(time.perf_counter() - start, 3),
        "sites": sites,
    }
    extra = {REPORT_FILE: json.dumps(summary, indent=1)}
    if is_program:
        save_program(export(quantized, example, decompose=options.decompose), options.out, extra)
    else:
        assert model is not None
        save_pretrained(quantized, model, options.out, extra_files=extra)
    _print(summary, options.json)


def _check_paths(options: argparse.Namespace, is_program: bool) -> None:
    """Raises ValueError for what would fail only after the calibration."""
    if not is_program and options.model.suffix == ".pt2":
        raise ValueError(f"--out {options.out}: a checkpoint needs a Hugging Face folder as MODEL; give a .pt2")
    if options.decompose and not is_program:
        raise ValueError(f"--decompose is for a .pt2, and --out {options.out} is a folder")
    if is_program and options.out.is_dir():
        raise ValueError(f"--out {options.out} is a folder: expected a file")
    if not is_program and options.out.is_file():
        raise ValueError(f"--out {options.out} is a file: expected a folder, or a name that ends in .pt2")
    if not is_program:
        check_replaceable(options.out)
    parent = options.out.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--out {options.out}: {parent} is no folder that can be written")


def _load_model(path: Path) -> tuple[Any, ExportedProgram | None]:
    """The model of a folder, or the program of a .pt2."""
    if path.suffix == ".pt2":
        return None, load_program(path)[0]
    if not (path / "config.json").is_file():
        raise ValueError(f"MODEL {path}: expected a .pt2, or a folder with a config.json")
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    names = getattr(config, "architectures", None) or []
    model_class = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    # Safetensors alone: a .bin is unpickled.
    arguments = {"local_files_only": True, "use_safetensors": True}
    return (model_class or transformers.AutoModel).from_pretrained(path, **arguments).eval(), None


def _read_data(options: argparse.Namespace, model: nn.Module | None) -> list[Any]:
    if options.data is None:
        return []
    if not options.data.exists():
        raise ValueError(f"--data {options.data} does not exist")
    folder = options.model if model is not None else None
    batches = read_batches(
        options.data, batch_size=options.batch_size, max_length=options.max_length, model_folder=folder
    )
    return [_take_known(batch, options.data, model) for batch in batches[: options.max_batches]]


def _take_known(batch: Any, data: Path, model: nn.Module | None) -> Any:
    """A batch for a folder's model, without what its tokenizer makes for others.

    Raises:
        ValueError: inputs that the model does not have.
    """
    if model is None or not isinstance(batch, Mapping):
        return batch
    parameters = inspect.signature(model.forward).parameters
    unknown = [name for name in batch if name not in parameters]
    if unknown and data.suffix in _TENSOR_FILES:
        raise ValueError(
            f"--data {data} has {', '.join(unknown)}: {type(model).__name__} takes {', '.join(parameters)}"
        )
    return {name: tensor for name, tensor in batch.items() if name in parameters}


def _read_scheme(scheme: str, ignore: list[str]) -> Any:
    if not ignore:
        return scheme
    if scheme not in PRESET_SCHEMES:
        raise ValueError("--ignore goes with a preset; a config file has an ignore list of its own")
    return {"config_groups": {scheme: ["Linear"]}, "ignore": ignore}


def _make_example(program: ExportedProgram | None, model: Any) -> Any:
    """Inputs to trace with, where a scheme of weights alone needs no data."""
    if program is None:
        return dict(model.dummy_inputs)
    if program.example_inputs is None:
        raise ValueError("the .pt2 has no example inputs: pass --data")
    args, kwargs = program.example_inputs
    return kwargs or args


def _set_use_cache(model: Any, use_cache: Any) -> Any:
    """Switches off a language model's cache, which is no part of what is quantized; returns what it was."""
    if model is None or not hasattr(model.config, "use_cache"):
        return None
    before, model.config.use_cache = model.config.use_cache, use_cache
    return before


def _check_batches(batches: list[Any], program: ExportedProgram | None) -> list[Any]:
    """The batches; raises ValueError where one is of other inputs, dtypes or ranks than the first or the program."""
    expected = None
    if program is not None and program.example_inputs is not None:
        expected = _describe_batch(program.example_inputs[1] or program.example_inputs[0])
    for number, batch in enumerate(batches, 1):
        found = _describe_batch(batch)
        expected = expected or found
        if found != expected:
            raise ValueError(
                f"batch {number} of the data has {_print_inputs(found)}: expected {_print_inputs(expected)}"
            )
    return batches


def _describe_batch(batch: Any) -> dict[str, str]:
    args, kwargs = split_inputs(batch)
    inputs = {**{f"input {place}": value for place, value in enumerate(args)}, **kwargs}
    return {
        name: f"{value.dtype} of {value.dim()} dimensions" if isinstance(value, Tensor) else type(value).__name__
        for name, value in sorted(inputs.items())
    }


def _print_inputs(inputs: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in inputs.items())


def _as_json(site: Any) -> dict[str, Any]:
    """A site's report; an infinite ratio is null, as JSON has no infinity."""
    fields = dataclasses.asdict(site)
    return {key: None if value in (math.inf, -math.inf) else value for key, value in fields.items()}


def _inspect(options: argparse.Namespace) -> None:
    if options.out.suffix == ".pt2":
        content = load_program(options.out)[1].get(REPORT_FILE)
    else:
        file = options.out / REPORT_FILE
        content = file.read_text() if file.is_file() else None
    if content is None:
        raise ValueError(f"{options.out} has no report: expected a .pt2 or a folder that fxmse quantize wrote")
    _print(json.loads(content), options.json)


def _print(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary, indent=1))
        return
    rows = [[site[column] for column in _COLUMNS] for site in summary["sites"]]
    print(tabulate(rows, list(_COLUMNS.values()), floatfmt=("", "", "", "", ".3g", ".3g", ".1f", ".3f")))
    print(f"\n{summary['model']} to {summary['out']}: {summary['scheme']}, {summary['batches']} batches")


def _list_schemes(options: argparse.Namespace) -> None:
    rows = []
    for name in PRESET_SCHEMES:
        scheme = preset_name_to_scheme(name, ["Linear"])
        rows.append(
            {"scheme": name, "weights": _describe(scheme.weights), "inputs": _describe(scheme.input_activations)}
        )
    print(json.dumps(rows, indent=1) if options.json else tabulate(rows, headers="keys"))


def _describe(args: QuantizationArgs | None) -> str | None:
    return None if args is None else describe_format(args)


if __name__ == "__main__":
    sys.exit(main())
