"""``fxmse inspect`` and ``fxmse schemes``."""

import argparse
import json

from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from tabulate import tabulate

from fxmse.cli.paths import is_onnx, is_program
from fxmse.cli.reports import REPORT_FILE, format_report, parse_report, print_text
from fxmse.inputs.onnx import read_metadata
from fxmse.inputs.programs import load_program
from fxmse.outputs.analyses import format_analysis, is_analysis, parse_analysis
from fxmse.outputs.report_html import PAGE_SUFFIXES, read_document
from fxmse.outputs.reporting import describe_format
from fxmse.reading import check_link, read_text

__all__ = ["run_inspect", "run_schemes"]

_ANALYSIS_LIMIT = 2**28
"""Bytes of a report that is read."""


def run_inspect(options: argparse.Namespace) -> None:
    """Runs the command."""
    content: str | bytes | None
    if is_program(options.out):
        content = load_program(options.out)[1].get(REPORT_FILE)
    elif options.out.suffix in PAGE_SUFFIXES:
        content = read_document(read_text(options.out), options.out)
    elif options.out.suffix == ".json":
        content = read_text(options.out, _ANALYSIS_LIMIT)
        if is_analysis(content):
            summary = parse_analysis(content, options.out)
            print_text(
                json.dumps(summary, indent=1) if options.json else format_analysis(summary, show_all=options.all)
            )
            return
    elif is_onnx(options.out):
        content = read_metadata(options.out).get(REPORT_FILE)
    else:
        file = options.out / REPORT_FILE
        check_link(file, options.out)
        content = read_text(file) if file.exists() else None
    if content is None:
        raise ValueError(f"{options.out} has no report: expected a .pt2, a .onnx or a folder that fxmse quantize wrote")
    print_text(format_report(parse_report(content, options.out), options.json, show_all=options.all))


def run_schemes(options: argparse.Namespace) -> None:
    """Runs the command."""
    rows = []
    for name in PRESET_SCHEMES:
        scheme = preset_name_to_scheme(name, ["Linear"])
        rows.append(
            {
                "scheme": name,
                "weights": _describe_args(scheme.weights),
                "inputs": _describe_args(scheme.input_activations),
            }
        )
    print_text(json.dumps(rows, indent=1) if options.json else tabulate(rows, headers="keys"))


def _describe_args(args: QuantizationArgs | None) -> str | None:
    return None if args is None else describe_format(args)
