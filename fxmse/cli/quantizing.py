"""``fxmse quantize``."""

import argparse
import sys
import time
from typing import Any

from torch.export.passes import move_to_device_pass
from torch.fx import GraphModule

from fxmse.cli.folders import stream
from fxmse.cli.paths import identify, is_file, is_onnx, is_program
from fxmse.cli.reports import (
    PAGE_FILE,
    REPORT_FILE,
    find_page,
    format_report,
    leave_pictures_out,
    list_facts,
    print_text,
)
from fxmse.cli.sources import ignore_tied, load_batches, make_config, move, name_data
from fxmse.config import CONFIG_KEY
from fxmse.inputs.models import Source, load_source
from fxmse.outputs.checkpoint import check_replaceable, save_pretrained
from fxmse.outputs.documents import make_document
from fxmse.outputs.exporting import export, save_program
from fxmse.outputs.files import check_apart, check_place, replace_file
from fxmse.outputs.onnx import check_onnx, export_onnx
from fxmse.outputs.report_html import check_page, render_json, render_page
from fxmse.outputs.reporting import report
from fxmse.outputs.shards import Shards
from fxmse.outputs.space import check_space, estimate_onnx, estimate_program
from fxmse.outputs.summaries import as_json
from fxmse.passes.probe import list_sites
from fxmse.pipeline import calibrate, convert, prepare

__all__ = ["PICTURED", "REPORTED_BATCHES", "run_quantize"]

REPORTED_BATCHES = 4
PICTURED = ("json", "html", "full")
"""What of ``--report`` measures all values, and what is drawn of them."""


def run_quantize(options: argparse.Namespace) -> None:
    """Runs the command."""
    _check_paths(options)
    start = time.perf_counter()
    config = make_config(options)
    if _is_streamed(options):
        stream(options, config, start)
        return
    source = load_source(
        options.model,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
    if not is_file(options.out):
        config = ignore_tied(config, source.model)
    batches = [move(batch, options.device) for batch in load_batches(options, source)]
    example = batches[0] if batches else move(source.make_example(), options.device)
    with name_data(options):
        observed = prepare(source.module, config, example, bias_correction=options.bias_correction)
        _check_output(options, observed, source)
        quantized = convert(calibrate(observed, batches))
        document = _report(options, quantized, (batches or [example])[:REPORTED_BATCHES])
    document |= list_facts(options, len(batches), start)
    summary = document if options.report != "html" else leave_pictures_out(document)
    extra_files = {REPORT_FILE: render_json(summary)}
    page = render_page(document) if options.report in ("html", "full") else None
    if is_onnx(options.out):
        opset = export_onnx(quantized, example, options.out, metadata=extra_files)
        print(f"fxmse: {options.out} is in opset {opset}", file=sys.stderr)
    elif is_program(options.out):
        program = export(quantized, example, decompose=options.decompose)
        program = move_to_device_pass(program, "cpu") if options.device else program
        save_program(program, options.out, extra_files)
    else:
        extra_files |= {} if page is None else {PAGE_FILE: page}
        save_pretrained(quantized, source.model, options.out, extra_files=extra_files)
    if page is not None and is_file(options.out):
        with replace_file(find_page(options.out)) as new:
            new.write_text(page, encoding="utf-8")
    is_told = page is not None and not options.json
    print_text(format_report(summary, options.json) + (f"\nto look at: {find_page(options.out)}" if is_told else ""))


def _is_streamed(options: argparse.Namespace) -> bool:
    """Whether a model goes from folder to folder part by part: but for what needs all of it in memory."""
    return not is_file(options.out) and options.report not in PICTURED


def _check_paths(options: argparse.Namespace) -> None:
    """Raises ValueError for what would fail only after the calibration."""
    is_one_file = is_file(options.out)
    if not is_one_file and options.model.suffix == ".pt2":
        raise ValueError(
            f"--out {options.out}: a checkpoint needs a Hugging Face folder as MODEL; give a .pt2 or .onnx"
        )
    if options.decompose and not is_program(options.out):
        raise ValueError(
            f"--decompose is for a .pt2, and --out {options.out} is {'no such' if is_one_file else 'a folder'}"
        )
    if is_onnx(options.out):
        check_onnx(options.out)
    if is_one_file:
        check_place(options.out, is_folder=False)
        check_apart(options.out, options.model)
        if options.report in ("html", "full"):
            check_page(find_page(options.out))
    else:
        check_replaceable(options.out, options.model)
    if options.propagate != "float" and not _is_streamed(options):
        raise ValueError(
            "--propagate is for a folder that is written part by part: no .pt2 or .onnx, and a --report of none or "
            "summary"
        )
    if options.bias_correction and options.data is None:
        raise ValueError("--bias-correction needs the means of inputs: give --data")
    options.before = identify(options.out)


def _check_output(options: argparse.Namespace, observed: GraphModule, source: Source) -> None:
    """Raises ValueError for what would fail when all is done."""
    if is_program(options.out):
        check_space(options.out, estimate_program(observed))
    elif is_onnx(options.out):
        check_space(options.out, estimate_onnx(observed))
    else:
        shards = Shards(source.model, observed.meta[CONFIG_KEY], list_sites(observed))
        check_space(options.out, shards.measure())


def _report(options: argparse.Namespace, quantized: GraphModule, batches: list[Any]) -> dict[str, Any]:
    facts = list_facts(options, len(batches), time.perf_counter())  # they come first
    if options.report in PICTURED:
        return make_document(quantized, batches, facts)
    return {**facts, "sites": [as_json(site) for site in report(quantized)] if options.report != "none" else []}
