"""The command line: ``fxmse quantize``, ``plan``, ``analyze``, ``inspect`` and ``schemes``."""

import argparse
import dataclasses
import json
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from tabulate import tabulate
from torch import Tensor
from torch.export.passes import move_to_device_pass
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only

from fxmse.analysis.choosing import choose_schemes
from fxmse.analysis.sensitivity import analyze
from fxmse.config import CONFIG_KEY, Config, name_weight_observer, resolve_config
from fxmse.inputs.data import Choice, check_batches, find_batch_size, order_inputs, read_batches, take_inputs
from fxmse.inputs.models import Source, load_source
from fxmse.inputs.onnx import read_metadata
from fxmse.inputs.programs import load_program
from fxmse.inputs.weights import load_skeleton
from fxmse.outputs.analyses import format_analysis, is_analysis, parse_analysis, summarise_analysis
from fxmse.outputs.checkpoint import check_replaceable, find_tied, save_pretrained
from fxmse.outputs.documents import make_document
from fxmse.outputs.exporting import export, save_program
from fxmse.outputs.files import check_apart, check_place, replace_file
from fxmse.outputs.onnx import check_onnx, export_onnx
from fxmse.outputs.report_html import PAGE_SUFFIXES, check_page, read_document, render_json, render_page
from fxmse.outputs.reporting import SiteReport, describe_format, report
from fxmse.outputs.shards import Shards
from fxmse.outputs.space import check_space, estimate_onnx, estimate_program
from fxmse.outputs.summaries import COLUMNS, as_json, format_sites
from fxmse.passes.probe import find_probes
from fxmse.pipeline import calibrate, convert, prepare, quantize
from fxmse.reading import check_link, read_text
from fxmse.streaming.quantizing import StreamOptions, Workers, plan_job, run_job
from fxmse.streaming.work import Work

__all__ = ["main"]

REPORT_FILE = "fxmse_report.json"
"""The report's name inside of a .pt2 and of a checkpoint's folder."""
PAGE_FILE = "fxmse_report.html"
"""The page's name in a checkpoint's folder; a .pt2's is beside it, under the same name but for the ending."""

_REPORTED_BATCHES = 4
_PICTURED = ("json", "html", "full")
"""What of ``--report`` measures all values, and what is drawn of them."""
_BATCH_SIZE = 8
_MASK = "attention_mask"
_ANALYSIS_LIMIT = 2**28
"""Bytes of a report that is read."""
_BYTES = {"bytes": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BUDGET = re.compile(rf"(\d+(?:\.\d+)?) ?(bits|{'|'.join(_BYTES)})")
_CONFIGS = (".yaml", ".yml", ".json")
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    options = _make_parser().parse_args(arguments)
    try:
        with _quiet_logs(options):
            options.run(options)
    except KeyboardInterrupt:
        print(f"fxmse: interrupted; {_tell_written(options)}", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        print(f"fxmse: error: {_describe(error)} (--debug shows where)", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _quiet_logs(options: argparse.Namespace) -> Iterator[None]:
    """Has libraries log no errors of their own within a ``with`` block: each is raised, too, and said in one line."""
    before = logging.root.manager.disable
    if not options.debug:
        logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _describe(error: Exception) -> str:
    """An error in one line."""
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split()) or type(error).__name__}"


def _tell_written(options: argparse.Namespace) -> str:
    """What an interrupted command left at ``--out``: nothing new, or all of it."""
    if "before" in options and _identify(options.out) != options.before:
        return f"{options.out} was written"
    is_begun = "before" in options and Work.is_begun(options.out)
    return "nothing was written" + ("; run the same command again to go on" if is_begun else "")


def _identify(path: Path) -> tuple[int, int] | None:
    """What is at a path, told apart from what takes its place."""
    if not path.exists():
        return None
    status = path.stat()
    return status.st_dev, status.st_ino


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
        choices=("none", "summary", *_PICTURED),
        default="summary",
        help="what is measured afterwards: the weights (summary, the default), or the other values, too, for which "
        f"{_REPORTED_BATCHES} batches are run, with what a page draws of them: as JSON beside the result (json), as a "
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
    command = add("plan", _plan, "say what fxmse quantize would do, and what it takes, without reading a weight")
    command.add_argument("model", type=Path, metavar="MODEL", help="a local Hugging Face folder")
    command.add_argument("--scheme", required=True, help="a preset, or a JSON or YAML config file")
    command.add_argument("--ignore", nargs="+", default=[], metavar="NAME", help="modules that a preset leaves alone")
    command.set_defaults(observer=None, observer_kwargs=None)
    _add_trust(command)
    command = add("analyze", _analyze, "say what formats cost a model, and with --budget which to use where")
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
    command = add("inspect", _inspect, "print what was quantized how, and how well, in what fxmse quantize wrote")
    command.add_argument("out", type=Path, metavar="OUT", help="a .pt2, a .onnx, a checkpoint's folder, or a report")
    command.add_argument("--all", action="store_true", help="every value; otherwise the worst ones")
    add("schemes", _list_schemes, "list the presets")
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


def _quantize(options: argparse.Namespace) -> None:
    _check_paths(options)
    start = time.perf_counter()
    config = _make_config(options)
    if _is_streamed(options):
        _stream(options, config, start)
        return
    source = load_source(
        options.model,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
    if not _is_file(options.out):
        config = _ignore_tied(config, source.model)
    batches = [_move(batch, options.device) for batch in _read_batches(options, source)]
    example = batches[0] if batches else _move(source.make_example(), options.device)
    with _name_data(options):
        observed = prepare(source.module, config, example, bias_correction=options.bias_correction)
        _check_output(options, observed, source)
        quantized = convert(calibrate(observed, batches))
        document = _report(options, quantized, (batches or [example])[:_REPORTED_BATCHES])
    document |= _list_facts(options, len(batches), start)
    summary = document if options.report != "html" else _leave_pictures_out(document)
    extra_files = {REPORT_FILE: render_json(summary)}
    page = render_page(document) if options.report in ("html", "full") else None
    if _is_onnx(options.out):
        opset = export_onnx(quantized, example, options.out, metadata=extra_files)
        print(f"fxmse: {options.out} is in opset {opset}", file=sys.stderr)
    elif _is_program(options.out):
        program = export(quantized, example, decompose=options.decompose)
        program = move_to_device_pass(program, "cpu") if options.device else program
        save_program(program, options.out, extra_files)
        if page is not None:
            with replace_file(_find_page(options.out)) as new:
                new.write_text(page, encoding="utf-8")
    else:
        extra_files |= {} if page is None else {PAGE_FILE: page}
        save_pretrained(quantized, source.model, options.out, extra_files=extra_files)
    is_told = page is not None and not options.json
    _print(_format(summary, options.json) + (f"\nto look at: {_find_page(options.out)}" if is_told else ""))


def _list_facts(options: argparse.Namespace, num_batches: int, start: float) -> dict[str, Any]:
    return {
        "model": str(options.model),
        "scheme": options.scheme,
        "out": str(options.out),
        "batches": num_batches,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _leave_pictures_out(document: dict[str, Any]) -> dict[str, Any]:
    """What a report says of each value in numbers."""
    fields = [field.name for field in dataclasses.fields(SiteReport)]
    sites = [{name: site[name] for name in fields} for site in document["sites"]]
    return {**{name: document[name] for name in ("model", "scheme", "out", "batches", "seconds")}, "sites": sites}


def _find_page(out: Path) -> Path:
    """Where the page of what is written there is."""
    return out.with_suffix(PAGE_SUFFIXES[0]) if _is_program(out) else out / PAGE_FILE


def _is_streamed(options: argparse.Namespace) -> bool:
    """Whether a model goes from folder to folder part by part: but for what needs all of it in memory."""
    return not _is_file(options.out) and options.report not in _PICTURED


def _stream(options: argparse.Namespace, config: QuantizationConfig, start: float) -> None:
    dtype = getattr(torch, options.dtype) if options.dtype else None
    skeleton = load_skeleton(options.model, dtype, trust_remote_code=options.trust_remote_code)
    config = _ignore_tied(config, skeleton.model)
    batches = _read_batches(options, Source(options.model, model=skeleton.model))
    stream_options = StreamOptions(
        propagate=options.propagate, bias_correction=options.bias_correction, reports=options.report == "summary"
    )
    summary: dict[str, Any] = {}
    workers, rank, num_ranks = _find_workers(options.device)

    def make_files(sites: list[SiteReport]) -> dict[str, str]:
        summary.update(_list_facts(options, len(batches), start), sites=[as_json(site) for site in sites])
        return {REPORT_FILE: render_json(summary)}

    with _name_data(options):
        job = plan_job(skeleton, config, *batches[:1], options=stream_options, device=workers.own_device)
        run_job(
            job,
            batches[rank::num_ranks],
            options.out,
            resume=options.resume,
            progress=True,
            make_files=make_files,
            workers=workers,
        )
    if summary:
        _print(_format(summary, options.json))


def _find_workers(device: str | None) -> tuple[Workers, int, int]:
    """The processes that torchrun started, the number of this one and how many there are."""
    if not torch.distributed.is_torchelastic_launched():
        return Workers(device=device), 0, 1
    torch.distributed.init_process_group("gloo")  # what passes between processes is small
    group = torch.distributed.group.WORLD
    assert group is not None
    own = device if device in (None, "cpu") or ":" in device else f"{device}:{os.environ['LOCAL_RANK']}"
    return Workers(device=own, group=group), group.rank(), group.size()


def _plan(options: argparse.Namespace) -> None:
    config = _make_config(options)
    skeleton = load_skeleton(options.model, trust_remote_code=options.trust_remote_code)
    job = plan_job(skeleton, _ignore_tied(config, skeleton.model), options=StreamOptions())
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
        _print(json.dumps(facts, indent=1))
        return
    rows = [(name, f"{value / 1e9:.3f} GB" if name.startswith("bytes") else value) for name, value in facts.items()]
    rows[2:3] = [(f"sites: {name}", count) for name, count in formats.items()]
    _print(tabulate(rows, tablefmt="plain"))


@contextmanager
def _name_data(options: argparse.Namespace) -> Iterator[None]:
    """Raises ValueError for what a model, or torch, says of data that does not fit: of which, they do not know."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        what = f"{options.model} with {options.data or 'its example inputs'}"
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{what}: {type(error).__name__}: {reason}") from error


def _report(options: argparse.Namespace, quantized: GraphModule, batches: list[Any]) -> dict[str, Any]:
    facts = _list_facts(options, len(batches), time.perf_counter())  # they come first
    if options.report in _PICTURED:
        return make_document(quantized, batches, facts)
    return {**facts, "sites": [as_json(site) for site in report(quantized)] if options.report != "none" else []}


def _check_output(options: argparse.Namespace, observed: GraphModule, source: Source) -> None:
    """Raises ValueError for what would fail when all is done."""
    if _is_program(options.out):
        check_space(options.out, estimate_program(observed))
    elif _is_onnx(options.out):
        check_space(options.out, estimate_onnx(observed))
    else:
        sites = [site for _, probe in find_probes(observed) for site in probe.sites]
        check_space(options.out, Shards(source.model, observed.meta[CONFIG_KEY], sites).measure())


def _ignore_tied(config: Config, model: Any) -> QuantizationConfig:
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


def _move(batch: Any, device: str | None) -> Any:
    return batch if device is None else tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def _is_program(path: Path) -> bool:
    return path.suffix == ".pt2"


def _is_onnx(path: Path) -> bool:
    return path.suffix == ".onnx"


def _is_file(path: Path) -> bool:
    return _is_program(path) or _is_onnx(path)


def _check_paths(options: argparse.Namespace) -> None:
    """Raises ValueError for what would fail only after the calibration."""
    is_file = _is_file(options.out)
    if not is_file and options.model.suffix == ".pt2":
        raise ValueError(
            f"--out {options.out}: a checkpoint needs a Hugging Face folder as MODEL; give a .pt2 or .onnx"
        )
    if options.decompose and not _is_program(options.out):
        raise ValueError(
            f"--decompose is for a .pt2, and --out {options.out} is {'no such' if is_file else 'a folder'}"
        )
    if _is_onnx(options.out):
        check_onnx(options.out)
    if is_file:
        check_place(options.out, is_folder=False)
        check_apart(options.out, options.model)
        if options.report in ("html", "full"):
            check_page(_find_page(options.out))
    else:
        check_replaceable(options.out, options.model)
    if options.propagate != "float" and not _is_streamed(options):
        raise ValueError(
            "--propagate is for a folder that is written part by part: no .pt2 or .onnx, and a --report of none or "
            "summary"
        )
    if options.bias_correction and options.data is None:
        raise ValueError("--bias-correction needs the means of inputs: give --data")
    options.before = _identify(options.out)


def _read_batches(options: argparse.Namespace, source: Source) -> list[Any]:
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


def _make_config(options: argparse.Namespace) -> QuantizationConfig:
    """The scheme, checked before anything is done."""
    config: Config = options.scheme
    if options.ignore:
        if options.scheme not in PRESET_SCHEMES:
            raise ValueError("--ignore goes with a preset; a config file has an ignore list of its own")
        config = {"config_groups": {options.scheme: ["Linear"]}, "ignore": options.ignore}
    name = options.observer
    if name is None and options.observer_kwargs is None:
        return resolve_config(config)
    if name == "auto":
        name = "exact_mse" if options.data is None else "output_mse"
    return name_weight_observer(config, name, options.observer_kwargs)


def _analyze(options: argparse.Namespace) -> None:
    _check_analysis_paths(options)
    source = load_source(
        options.model, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code
    )
    candidates = [None if name == "none" else name for name in options.candidates]
    ignore = list(options.ignore)
    if source.model is not None:
        ignore = _ignore_tied({"config_groups": {"W8A16": ["Linear"]}, "ignore": ignore}, source.model).ignore or []
    batches = _read_batches(options, source)
    settings = {
        "exact": options.exact,
        "divergence": options.divergence,
        "output": options.output,
        "mask": _MASK if isinstance(batches[0], Mapping) and _MASK in batches[0] else None,
    }
    with _name_data(options):
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
            page = render_page(
                make_document(quantized, batches[:_REPORTED_BATCHES], facts, analysis=choice or analysis)
            )
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
    _print(json.dumps(summary, indent=1) if options.json else format_analysis(summary))


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


def _inspect(options: argparse.Namespace) -> None:
    content: str | bytes | None
    if _is_program(options.out):
        content = load_program(options.out)[1].get(REPORT_FILE)
    elif options.out.suffix in PAGE_SUFFIXES:
        content = read_document(read_text(options.out), options.out)
    elif options.out.suffix == ".json":
        content = read_text(options.out, _ANALYSIS_LIMIT)
        if is_analysis(content):
            summary = parse_analysis(content, options.out)
            _print(json.dumps(summary, indent=1) if options.json else format_analysis(summary, show_all=options.all))
            return
    elif _is_onnx(options.out):
        content = read_metadata(options.out).get(REPORT_FILE)
    else:
        file = options.out / REPORT_FILE
        check_link(file, options.out)
        content = read_text(file) if file.exists() else None
    if content is None:
        raise ValueError(f"{options.out} has no report: expected a .pt2, a .onnx or a folder that fxmse quantize wrote")
    _print(_format(_parse_report(content, options.out), options.json, show_all=options.all))


def _parse_report(content: str, path: Path) -> dict[str, Any]:
    """Raises ValueError for what ``_quantize`` does not write."""
    try:
        summary = json.loads(content)
        sites = [[site[column] for column in COLUMNS] for site in summary["sites"]]
        facts = [summary[key] for key in ("model", "out", "scheme", "batches")]
    except (TypeError, KeyError, RecursionError, ValueError) as error:
        raise ValueError(
            f"{path} has a {REPORT_FILE} that cannot be read ({type(error).__name__}: {error}): quantize it again"
        ) from None
    if not all(isinstance(value, str | int | float | None) for row in (*sites, facts) for value in row):
        raise ValueError(f"{path} has a {REPORT_FILE} that fxmse did not write: quantize it again")
    return summary


def _format(summary: dict[str, Any], as_json: bool, *, show_all: bool = False) -> str:
    if as_json:
        return json.dumps(summary, indent=1)
    what = f"{summary['model']} to {summary['out']}: {summary['scheme']}, {summary['batches']} batches"
    return f"{format_sites(summary['sites'], show_all=show_all)}\n\n{what}"


def _print(text: str) -> None:
    """Prints to stdout, whose reader may go when it has seen enough."""
    try:
        print(text, flush=True)
    except OSError as error:
        # What is still in the buffer would be tried again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise OSError(error.errno, f"stdout: {error.strerror}") from None


def _list_schemes(options: argparse.Namespace) -> None:
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
    _print(json.dumps(rows, indent=1) if options.json else tabulate(rows, headers="keys"))


def _describe_args(args: QuantizationArgs | None) -> str | None:
    return None if args is None else describe_format(args)


if __name__ == "__main__":
    sys.exit(main())
