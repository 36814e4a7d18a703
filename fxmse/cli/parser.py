"""The arguments of all commands."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxmse.cli.analyzing import run_analyze
from fxmse.cli.folders import run_plan
from fxmse.cli.inspecting import run_inspect, run_schemes
from fxmse.cli.quantizing import PICTURED, REPORTED_BATCHES, run_quantize

__all__ = ["make_parser"]

_BYTES = {"bytes": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BUDGET = re.compile(rf"(\d+(?:\.\d+)?) ?(bits|{'|'.join(_BYTES)})")
_DTYPES = ("float32", "bfloat16", "float16")
_EXAMPLES = """examples:
  fxmse quantize model.pt2 --scheme W8A8 --data batches.safetensors --out quantized.pt2
  fxmse quantize ./llama --scheme W4A16 --ignore lm_head --data texts.jsonl --out ./llama-w4a16
  fxmse quantize ./vit --scheme config.yaml --data ./images --out vit.pt2 --decompose
  fxmse quantize ./llama --scheme W4A16 --ignore lm_head --out llama.onnx
  fxmse plan ./llama --scheme NVFP4
  fxmse analyze ./llama --candidates W4A16 FP8 none --budget 5bits --data texts.jsonl --out mixed.yaml
  fxmse inspect quantized.pt2
  fxmse schemes --json

exit codes: 0 done, 1 an error, named in one line, 2 wrong usage, 130 interrupted"""


def make_parser() -> argparse.ArgumentParser:
    """What it parses has the command to run as ``run``."""
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

    command = add("quantize", run_quantize, "calibrate a model on sample data and write the quantized one")
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
        "--observer-kwargs",
        type=_read_mapping,
        metavar="JSON",
        help="arguments of that observer, as '{\"norm\": 2.0}'",
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
    command.add_argument(
        "--out", type=Path, required=True, help="a .pt2, a .onnx, or a folder: a compressed-tensors checkpoint"
    )
    _add_data_options(command)
    command.add_argument(
        "--report",
        choices=("none", "summary", *PICTURED),
        default="summary",
        help="what is measured afterwards: the weights (summary, the default), or the other values, too, for which "
        f"{REPORTED_BATCHES} batches are run, with what a page draws of them: as JSON beside the result (json), as a "
        "page to look at (html), or both (full)",
    )
    command.add_argument(
        "--decompose", action="store_true", help="write a .pt2 that loads where fxmse is not installed"
    )
    _add_trust(command)
    command.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with what an interrupted command has done of a folder (default), or remove it",
    )
    command.add_argument(
        "--propagate",
        choices=("float", "quantized"),
        default="float",
        help="what the parts of a folder's model are calibrated on: float values, or those that the quantized parts "
        "before them compute",
    )
    command = add("plan", run_plan, "say what fxmse quantize would do, and what it takes, without reading a weight")
    command.add_argument("model", type=Path, metavar="MODEL", help="a local Hugging Face folder")
    command.add_argument("--scheme", required=True, help="a preset, or a JSON or YAML config file")
    command.add_argument("--ignore", nargs="+", default=[], metavar="NAME", help="modules that a preset leaves alone")
    command.set_defaults(observer=None, observer_kwargs=None)
    _add_trust(command)
    command = add("analyze", run_analyze, "say what formats cost a model, and with --budget which to use where")
    command.add_argument("model", type=Path, metavar="MODEL", help="a .pt2, or a local Hugging Face folder")
    command.add_argument("--candidates", nargs="+", required=True, metavar="SCHEME", help="presets, or none for float")
    command.add_argument("--ignore", nargs="+", default=[], metavar="NAME", help="modules that are left alone")
    command.add_argument("--data", type=Path, required=True, help="as for fxmse quantize")
    command.add_argument(
        "--budget",
        type=_read_budget,
        metavar="SIZE",
        help="choose a scheme for each module within so much: bits a weight, as 4.8bits, or bytes of all weights, as "
        "70MB; scales count, too",
    )
    command.add_argument("--out", type=Path, metavar="CONFIG", help="a .yaml or .json file for what was chosen")
    command.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="a .json file for all that was found, or a .html: a page of it and of the model quantized as was chosen, "
        "or by the first of the candidates",
    )
    command.add_argument("--exact", action="store_true", help="measure each value with it alone quantized, too; slow")
    command.add_argument(
        "--divergence",
        choices=("kl", "squared"),
        help="what is compared: distributions, or outputs (default: kl for a model with logits)",
    )
    command.add_argument("--output", metavar="NAME", help="the output that counts (default: logits, or all)")
    _add_data_options(command)
    _add_trust(command)
    command = add("inspect", run_inspect, "print what was quantized how, and how well, in what fxmse quantize wrote")
    command.add_argument("out", type=Path, metavar="OUT", help="a .pt2, a .onnx, a checkpoint's folder, or a report")
    command.add_argument("--all", action="store_true", help="every value; otherwise the worst ones")
    add("schemes", run_schemes, "list the presets")
    return parser


def _add_data_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--batch-size", type=_positive, metavar="N", help="samples a batch (default: 8, or what a .pt2 is for)"
    )
    command.add_argument("--max-length", type=_positive, default=512, metavar="N", help="tokens a text (default 512)")
    command.add_argument("--max-batches", type=_positive, metavar="N", help="use the first N batches")
    command.add_argument("--num-samples", type=_positive, metavar="N", help="use N samples of the data (default: all)")
    command.add_argument("--seed", type=int, metavar="N", help="shuffle the samples (default: in the data's order)")
    command.add_argument(
        "--dtype", choices=_DTYPES, help="what a folder's weights are loaded in (default: as they are stored)"
    )
    command.add_argument(
        "--device",
        metavar="NAME",
        help="where to work, as cuda (default: the CPU); under torchrun each process has one of its own",
    )


def _add_trust(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that MODEL has for what transformers lacks"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number of at least 1")
    return value


def _read_budget(text: str) -> tuple[float, str]:
    match = _BUDGET.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text}: expected bits a weight, as 4.8bits, or bytes, as 70MB or 1.5GiB")
    number, unit = match.groups()
    return (float(number), "bits") if unit == "bits" else (float(number) * _BYTES[unit], "bytes")


def _read_mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text}: expected an object, as {{"norm": 2.0}}')
    return value
