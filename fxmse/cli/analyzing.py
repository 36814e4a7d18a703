"""``fxmse analyze``."""

import argparse
import json
from collections.abc import Mapping

import yaml

from fxmse.analysis.choosing import choose_schemes
from fxmse.analysis.sensitivity import analyze
from fxmse.cli.quantizing import REPORTED_BATCHES
from fxmse.cli.reports import print_text
from fxmse.cli.sources import ignore_tied, load_batches, name_data
from fxmse.inputs.models import load_source
from fxmse.outputs.analyses import format_analysis, summarise_analysis
from fxmse.outputs.documents import make_document
from fxmse.outputs.files import check_apart, check_place, replace_file
from fxmse.outputs.report_html import PAGE_SUFFIXES, check_page, render_page
from fxmse.pipeline import quantize

__all__ = ["run_analyze"]

_MASK = "attention_mask"
_CONFIGS = (".yaml", ".yml", ".json")


def run_analyze(options: argparse.Namespace) -> None:
    """Runs the command."""
    _check_analysis_paths(options)
    source = load_source(
        options.model, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code
    )
    candidates = [None if name == "none" else name for name in options.candidates]
    ignore = list(options.ignore)
    if source.model is not None:
        ignore = ignore_tied({"config_groups": {"W8A16": ["Linear"]}, "ignore": ignore}, source.model).ignore or []
    batches = load_batches(options, source)
    settings = {
        "exact": options.exact,
        "divergence": options.divergence,
        "output": options.output,
        "mask": _MASK if isinstance(batches[0], Mapping) and _MASK in batches[0] else None,
    }
    with name_data(options):
        if options.budget:
            budget, unit = options.budget
            choice = choose_schemes(source.module, candidates, budget, batches, unit=unit, ignore=ignore, **settings)
            analysis = choice.analysis
        else:
            configs = [
                {"config_groups": {name: ["Linear"]}, "ignore": ignore} for name in candidates if name is not None
            ]
            choice, analysis = None, analyze(source.module, configs, batches, **settings)
        page = None
        if options.report and options.report.suffix in PAGE_SUFFIXES:
            quantized = quantize(source.module, choice.config if choice else configs[0], batches)
            facts = {"model": str(options.model), "out": str(options.report)}
            page = render_page(make_document(quantized, batches[:REPORTED_BATCHES], facts, analysis=choice or analysis))
    summary = summarise_analysis(str(options.model), analysis, choice)
    if options.report:
        with replace_file(options.report) as new:
            new.write_text(page or json.dumps(summary, indent=1), encoding="utf-8")
    if choice is not None and options.out:
        fields = choice.config.model_dump(mode="json", exclude_none=True)
        text = (
            json.dumps(fields, indent=1) if options.out.suffix == ".json" else yaml.safe_dump(fields, sort_keys=False)
        )
        with replace_file(options.out) as new:
            new.write_text(text)
    print_text(json.dumps(summary, indent=1) if options.json else format_analysis(summary))


def _check_analysis_paths(options: argparse.Namespace) -> None:
    """Raises ValueError for what would fail only after the analysis."""
    if options.out and not options.budget:
        raise ValueError(f"--out {options.out}: give a --budget, by which there is something to choose")
    if options.out and options.out.suffix not in _CONFIGS:
        raise ValueError(f"--out {options.out}: expected a file that ends in {', '.join(_CONFIGS)}")
    if options.report and options.report.suffix not in (*PAGE_SUFFIXES, ".json"):
        raise ValueError(f"--report {options.report}: expected a file that ends in .json or .html")
    if options.report and options.report.suffix in PAGE_SUFFIXES:
        check_page(options.report)
    for path in filter(None, (options.out, options.report)):
        check_place(path, is_folder=False)
        check_apart(path, options.model)
