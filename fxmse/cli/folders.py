"""``fxmse quantize`` from folder to folder, part by part, and ``fxmse plan``."""

import argparse
import json
import os
from collections import Counter
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig
from tabulate import tabulate

from fxmse.cli.reports import REPORT_FILE, format_report, list_facts, print_text
from fxmse.cli.sources import ignore_tied, load_batches, make_config, name_data
from fxmse.inputs.models import Source
from fxmse.inputs.weights import load_skeleton
from fxmse.outputs.report_html import render_json
from fxmse.outputs.reporting import SiteReport, describe_format
from fxmse.outputs.space import format_size
from fxmse.outputs.summaries import as_json
from fxmse.streaming.quantizing import StreamOptions, Workers, plan_job, run_job
from fxmse.streaming.warming import compiling_meanwhile

__all__ = ["run_plan", "stream"]


def stream(options: argparse.Namespace, config: QuantizationConfig, start: float) -> None:
    """``fxmse quantize`` of what need not be in memory as a whole; ``start`` is when the command began."""
    dtype = getattr(torch, options.dtype) if options.dtype else None
    skeleton = load_skeleton(options.model, dtype, trust_remote_code=options.trust_remote_code)
    config = ignore_tied(config, skeleton.model)
    batches = load_batches(options, Source(options.model, model=skeleton.model))
    stream_options = StreamOptions(
        propagate=options.propagate, bias_correction=options.bias_correction, reports=options.report == "summary"
    )
    summary: dict[str, Any] = {}
    workers, rank, num_ranks = _find_workers(options.device)

    def make_files(sites: list[SiteReport]) -> dict[str, str]:
        summary.update(list_facts(options, len(batches), start), sites=[as_json(site) for site in sites])
        return {REPORT_FILE: render_json(summary)}

    with name_data(options), compiling_meanwhile(config, skeleton.model, workers.own_device):
        run_job(
            plan_job(skeleton, config, *batches[:1], options=stream_options),
            batches[rank::num_ranks],
            options.out,
            resume=options.resume,
            progress=True,
            make_files=make_files,
            workers=workers,
        )
    if summary:
        print_text(format_report(summary, options.json))


def _find_workers(device: str | None) -> tuple[Workers, int, int]:
    """The processes that torchrun started, the number of this one and how many there are."""
    if not torch.distributed.is_torchelastic_launched():
        return Workers(device=device), 0, 1
    torch.distributed.init_process_group("gloo")  # what passes between processes is small
    group = torch.distributed.group.WORLD
    assert group is not None
    own = device if device in (None, "cpu") or ":" in device else f"{device}:{os.environ['LOCAL_RANK']}"
    return Workers(device=own, group=group), group.rank(), group.size()


def run_plan(options: argparse.Namespace) -> None:
    """Runs the command."""
    if not options.model.is_dir():
        raise ValueError(f"{options.model}: expected a Hugging Face folder")
    config = make_config(options)
    skeleton = load_skeleton(options.model, trust_remote_code=options.trust_remote_code)
    job = plan_job(skeleton, ignore_tied(config, skeleton.model), options=StreamOptions())
    formats = Counter(f"{site.role}: {describe_format(site.args)}" for site in job.sites)
    facts: dict[str, Any] = {
        "model": str(options.model),
        "scheme": options.scheme,
        "sites": dict(formats),
        "needs data": job.is_observed,
        "bytes of the model": sum(skeleton.weights.sizes.values()),
        "bytes of the checkpoint": job.num_bytes,
        "parts": len(job.parts),
        "bytes of the largest part": max((part.num_bytes for part in job.parts), default=0),
        "bytes between parts, a batch": max((part.carried_bytes for part in job.parts), default=0),
    }
    if options.json:
        print_text(json.dumps(facts, indent=1))
        return
    rows = [(name, format_size(value) if name.startswith("bytes") else value) for name, value in facts.items()]
    rows[2:3] = [(f"sites: {name}", count) for name, count in formats.items()]
    print_text(tabulate(rows, tablefmt="plain"))
