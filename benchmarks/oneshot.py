"""llm-compressor's observers in ``oneshot``, by their own search and by fxmse's (``fxmse.llmcompressor.accelerated``).

    python benchmarks/oneshot.py [--layers 2] [--hidden 1024] [--dtype float32]

A random Llama; the time of all searches of a run, in turn. fxmse's are compiled whatever they cost, and shown twice:
the first run compiles.
"""

import argparse
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.observers import mse
from tabulate import tabulate

import fxmse
from fxmse.llmcompressor import accelerated

SCHEMES = {"W4A16": "memoryless_mse", "W8A16": "memoryless_mse", "NVFP4A16": "nvfp4_expanded_mse"}


def make_recipe(scheme: str) -> QuantizationModifier:
    """The preset with an MSE observer of weights."""
    from compressed_tensors.quantization import preset_name_to_scheme

    preset = preset_name_to_scheme(scheme, ["Linear"])
    preset.weights.observer = SCHEMES[scheme]  # type: ignore[union-attr]
    return QuantizationModifier(config_groups={"group_0": preset}, ignore=["lm_head"])


def measure(folder: str, scheme: str, context: AbstractContextManager[None]) -> float:
    """The seconds of all searches in a run of ``oneshot``."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    seconds = 0.0
    with context:
        search = mse._grid_search_mse

        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal seconds
            start = time.perf_counter()
            found = search(*args, **kwargs)
            seconds += time.perf_counter() - start
            return found

        mse._grid_search_mse = timed
        try:
            oneshot(model=model, recipe=make_recipe(scheme))
        finally:
            mse._grid_search_mse = search
    return seconds


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    config = transformers.LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 4,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1024,
        dtype=options.dtype,
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).to(getattr(torch, options.dtype)).save_pretrained(folder)
        for scheme, observer in SCHEMES.items():
            own = measure(folder, scheme, nullcontext())
            with fxmse.compilation("always"):
                first, second = (measure(folder, scheme, accelerated()) for _ in range(2))
            rows.append((scheme, observer, own, first, second, own / second))
    headers = ("scheme", "observer", "llm-compressor, s", "fxmse, first, s", "fxmse, s", "times as fast")
    print(tabulate(rows, headers=headers, floatfmt=".2f", tablefmt="github"))


if __name__ == "__main__":
    main()
