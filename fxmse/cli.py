"""The command line: ``fxmse quantize``, ``fxmse inspect``, ``fxmse schemes``."""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from tabulate import tabulate

from fxmse.config import name_weight_observer
from fxmse.inputs.data import check_batches, find_batch_size, order_inputs, read_batches, take_inputs
from fxmse.inputs.models import Source, load_source
from fxmse.inputs.programs import load_program
from fxmse.outputs.checkpoint import check_replaceable, save_pretrained
from fxmse.outputs.exporting import export, save_program
from fxmse.outputs.reporting import describe_format, report
from fxmse.pipeline import calibrate, convert, prepare

__all__ = ["main"]

REPORT_FILE = "fxmse_report.json"
"""The report's name inside of a .pt2 and of a checkpoint's folder."""

_REPORTED_BATCHES = 4
_BATCH_SIZE = 8
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
        "--observer",
        metavar="NAME",
        help="of weights whose scheme names none (default: exact_mse); auto is output_mse with --data, which looks for "
        "the least error of outputs, and exact_mse without",
    )
    command.add_argument(
        "--data",
        type=Path,
        help=".safetensors or .pt of batches; for a folder's model also .txt or .jsonl of texts, or a folder of "
        "images. A scheme of weights alone needs none",
    )
    command.add_argument(
        "--bias-correction",
        action="store_true",
        help="have the biases of layers make up for what the quantization of weights moves the means of outputs by; "
        "needs --data",
    )
    command.add_argument("--out", type=Path, required=True, help="a .pt2, or a folder: a compressed-tensors checkpoint")
    command.add_argument(
        "--batch-size", type=_positive, metavar="N", help="samples a batch (default: 8, or what a .pt2 is for)"
    )
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
    _check_paths(options)
    start = time.perf_counter()
    source = load_source(options.model)
    batches = _read_batches(options, source)
    example = batches[0] if batches else source.make_example()
    observed = prepare(source.module, _make_config(options), example, bias_correction=options.bias_correction)
    quantized = convert(calibrate(observed, batches))
    sites = report(quantized, (batches or [example])[:_REPORTED_BATCHES])
    summary = {
        "model": str(options.model),
        "scheme": options.scheme,
        "out": str(options.out),
        "batches": len(batches),
        "seconds": round(time.perf_counter() - start, 3),
        "sites": [_as_json(site) for site in sites],
    }
    extra_files = {REPORT_FILE: json.dumps(summary, indent=1)}
    if _is_program(options.out):
        save_program(export(quantized, example, decompose=options.decompose), options.out, extra_files)
    else:
        save_pretrained(quantized, source.model, options.out, extra_files=extra_files)
    _print(summary, options.json)


def _is_program(path: Path) -> bool:
    return path.suffix == ".pt2"


def _check_paths(options: argparse.Namespace) -> None:
    """Raises ValueError for what would fail only after the calibration."""
    is_program = _is_program(options.out)
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
    if options.bias_correction and options.data is None:
        raise ValueError("--bias-correction needs the means of inputs: give --data")
    parent = options.out.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--out {options.out}: {parent} is no folder that can be written")


def _read_batches(options: argparse.Namespace, source: Source) -> list[Any]:
    if options.data is None:
        return []
    fixed = find_batch_size(source.program) if source.program else None
    size = options.batch_size or fixed or _BATCH_SIZE
    batches = read_batches(options.data, batch_size=size, max_length=options.max_length, model_folder=source.folder)
    batches = batches[: options.max_batches]
    if source.model is not None:
        batches = [take_inputs(batch, options.data, source.model) for batch in batches]
    if source.program is not None:
        batches = order_inputs(batches, source.program)
    return check_batches(batches, source.program)


def _make_config(options: argparse.Namespace) -> Any:
    """The scheme as ``fxmse.prepare`` takes it."""
    config = options.scheme
    if options.ignore:
        if options.scheme not in PRESET_SCHEMES:
            raise ValueError("--ignore goes with a preset; a config file has an ignore list of its own")
        config = {"config_groups": {options.scheme: ["Linear"]}, "ignore": options.ignore}
    if options.observer is None:
        return config
    if options.observer != "auto":
        return name_weight_observer(config, options.observer)
    return name_weight_observer(config, "exact_mse" if options.data is None else "output_mse")


def _as_json(site: Any) -> dict[str, Any]:
    """A site's report; an infinite ratio is null, as JSON has no infinity."""
    fields = dataclasses.asdict(site)
    return {key: None if value in (math.inf, -math.inf) else value for key, value in fields.items()}


def _inspect(options: argparse.Namespace) -> None:
    if _is_program(options.out):
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
