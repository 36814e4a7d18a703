"""Models of any size: the memory and the time of ``fxmse.quantize_checkpoint``, on random weights of real shapes.

    python benchmarks/scale.py [--jobs ...] [--folder FOLDER]

Each job runs in a process of its own on a model that this writes first and removes afterwards, which takes twice the
model's size on FOLDER's disk. Memory is looked at 50 times a second: "anonymous" is what the process holds, files that
are mapped into it are not in it. "Search" is the CPU time of the searches alone, of the weights of the model's first
layer in memory, times the number of layers.
"llm-compressor" is the whole of ``oneshot`` with ``memoryless_mse``. "cold" is fxmse without what torch has compiled on
disk, and "warm" right after it the same with that: name these two in this order. Needs the benchmarks extra.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from tabulate import tabulate

import fxmse
from fxmse.passes.constants import find_weights
from fxmse.passes.probe import find_probes

_LLAMA = {"vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "dtype": "bfloat16"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "Llama",
        {**_LLAMA, "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
        | {"num_attention_heads": 8, "num_key_value_heads": 4},
    ),
    "Qwen2 0.5B": (
        "Qwen2",
        {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
        | {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True, "dtype": "bfloat16"},
    ),
    "Llama 1B": (
        "Llama",
        {**_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"num_attention_heads": 32, "num_key_value_heads": 8},
    ),
    "Llama 8B": (
        "Llama",
        {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8},
    ),
    "Llama 70B, 2 layers": (
        "Llama",
        {**_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 2}
        | {"num_attention_heads": 64, "num_key_value_heads": 8},
    ),
    "Qwen3-30B-A3B, 2 layers": (
        "Qwen3Moe",
        {"vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 2}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128}
        | {"num_experts_per_tok": 8, "intermediate_size": 6144, "dtype": "bfloat16"},
    ),
}
"""Of each model its family in transformers and its config."""
JOBS = (
    ("Qwen2 0.5B", "W4A16", 0),
    ("Llama 1B", "W4A16", 0),
    ("Llama 1B", "NVFP4A16", 0),
    ("Llama 8B", "W4A16", 0),
    ("Llama 8B", "NVFP4A16", 0),
    ("Llama 8B", "FP8", 4),
    ("Llama 70B, 2 layers", "W4A16", 0),
    ("Qwen3-30B-A3B, 2 layers", "W4A16", 0),
    ("Qwen3-30B-A3B, 2 layers", "NVFP4A16", 0),
)
"""The model, the scheme, and how many sequences of 256 tokens it is shown."""
METHODS = ("fxmse", "search", "llm-compressor", "cold", "warm")


def write_model(name: str, folder: Path) -> None:
    """A checkpoint of random weights, a tensor at a time."""
    from safetensors.torch import save_file

    family, options = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**options)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, (key, shape) in enumerate(_list_keys(model), 1):
        pending = {key: (torch.randn(shape, generator=generator) * 0.02).bfloat16()}
        file = f"model-{number:05}.safetensors"
        save_file(pending, folder / file, metadata={"format": "pt"})
        weight_map[key] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _list_keys(model: Any) -> list[tuple[str, tuple[int, ...]]]:
    """The names and shapes of the tensors of a model's checkpoint: of experts, one linear each."""
    keys = []
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        path, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            for expert in range(shape[0]):
                half = (shape[1] // 2, shape[2])
                keys += [(f"{path}.{expert}.{linear}.weight", half) for linear in ("gate_proj", "up_proj")]
        elif leaf == "down_proj" and len(shape) == 3:
            keys += [(f"{path}.{expert}.{leaf}.weight", shape[1:]) for expert in range(shape[0])]
        else:
            keys.append((name, shape))
    return keys


def make_config(scheme: str, observer: str = "memoryless_mse") -> QuantizationConfig:
    """All linears but the head and the routers, searched as llm-compressor does or by another observer."""
    made = preset_name_to_scheme(scheme, ["Linear"])
    assert made.weights
    made.weights.observer = observer
    return QuantizationConfig(config_groups={"group": made}, ignore=["lm_head", "re:.*mlp.gate$"])


def make_batches(count: int) -> list[dict[str, torch.Tensor]]:
    """Sequences of 256 tokens."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 4096, (1, 256), generator=generator)} for _ in range(count)]


def run_fxmse(folder: Path, config: QuantizationConfig, count: int) -> None:
    """The whole job."""
    fxmse.quantize_checkpoint(folder, config, make_batches(count), out=folder.with_name("out"), progress=False)


def run_search(folder: Path, quantization: QuantizationConfig, count: int) -> float:
    """The searches alone; their CPU seconds. All layers have equal shapes, so one stands for them."""
    config = transformers.AutoConfig.from_pretrained(folder)
    num_layers, config.num_hidden_layers = config.num_hidden_layers, 1
    transformers.logging.set_verbosity_error()  # of the other layers' weights
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config)
    seconds = 0.0
    for _ in range(2):  # the first compiles
        observed = fxmse.prepare(model, quantization, dict(model.dummy_inputs))
        before = time.process_time()
        for probe, rows in find_weights(observed).items():
            probe(rows)
        if any(probe.global_group for _, probe in find_probes(observed)):
            fxmse.convert(observed, progress=False)
        seconds = time.process_time() - before
    return seconds * num_layers


def run_llmcompressor(folder: Path, config: QuantizationConfig, count: int) -> None:
    """``oneshot``, from the folder to a folder."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    modifier = QuantizationModifier(config_groups=config.config_groups, ignore=config.ignore)
    data = {}
    if count:
        rows = [batch["input_ids"][0].tolist() for batch in make_batches(count)]
        data = {"dataset": Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 256] * count})}
        data["num_calibration_samples"] = count
    oneshot(model=model, recipe=modifier, **data)
    model.save_pretrained(folder.with_name("out"), save_compressed=True)


RUNNERS: dict[str, Callable[[Path, QuantizationConfig, int], float | None]] = {
    "fxmse": run_fxmse,
    "search": run_search,
    "llm-compressor": run_llmcompressor,
    "cold": run_fxmse,
    "warm": run_fxmse,
}


class Memory(threading.Thread):
    """Looks at how much memory the process has, and keeps the most."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.mapped = 0

    def run(self) -> None:
        """Until the process ends."""
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            found = {line.partition(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
            self.anonymous = max(self.anonymous, found["RssAnon"])
            self.mapped = max(self.mapped, found["RssFile"])
            time.sleep(0.02)


def measure(job: dict[str, Any]) -> None:
    """Runs one job and prints what it took, as JSON."""
    start, memory = time.perf_counter(), Memory()
    memory.start()
    search = RUNNERS[job["method"]](Path(job["folder"]), make_config(job["scheme"], job["observer"]), job["count"])
    usage = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {
        "seconds": time.perf_counter() - start,
        "cpu": search or usage.ru_utime + usage.ru_stime + children.ru_utime + children.ru_stime,
        "anonymous": memory.anonymous / 1024,
        "mapped": memory.mapped / 1024,
    }
    print("\n" + json.dumps(found))


def main() -> None:
    """Runs the jobs and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=[], metavar="MODEL", help="models, by default those of JOBS")
    parser.add_argument("--schemes", nargs="+", default=[])
    parser.add_argument("--methods", nargs="+", default=["fxmse", "search"], choices=METHODS)
    parser.add_argument("--observer", default="memoryless_mse", help="of weights (default memoryless_mse)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(json.loads(options.measure))
        return
    jobs = [job for job in JOBS if not options.jobs or job[0] in options.jobs]
    jobs += [(name, scheme, 0) for name in options.jobs if name == "tiny" for scheme in options.schemes or ["W4A16"]]
    rows = []
    for name in dict.fromkeys(job[0] for job in jobs):
        with tempfile.TemporaryDirectory(dir=options.folder) as made:
            folder = Path(made) / "model"
            write_model(name, folder)
            for _, scheme, count in (job for job in jobs if job[0] == name):
                if options.schemes and scheme not in options.schemes:
                    continue
                for method in options.methods:
                    job = {"method": method, "folder": str(folder), "scheme": scheme, "count": count}
                    job["observer"] = options.observer
                    command = [sys.executable, "-W", "ignore", __file__, "--measure", json.dumps(job)]
                    environment = dict(os.environ)
                    if method in ("cold", "warm"):
                        environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache := folder.with_name("cache"))
                        if method == "cold":
                            shutil.rmtree(cache, ignore_errors=True)
                    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
                    output = finished.stdout
                    found = json.loads(output.splitlines()[-1])
                    rows.append([name, scheme, count, method, *(round(value) for value in found.values())])
                    print(rows[-1], file=sys.stderr)
                    shutil.rmtree(folder.with_name("out"), ignore_errors=True)
    headers = ["model", "scheme", "sequences", "method", "s", "CPU s", "anonymous MiB", "mapped MiB"]
    print(tabulate(rows, headers, tablefmt="github"))


if __name__ == "__main__":
    main()
