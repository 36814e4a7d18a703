"""What a run of ``fxmse.quantize_checkpoint`` that was killed leaves for the next one: bytes, and work done twice.

    python benchmarks/kills.py [--kills 20] [--schemes W4A16 FP8]

A small random Llama is quantized in small parts, in a process that gets SIGKILL at a random moment between the first
thing that it writes and when an uninterrupted run ends; then once more, to the end. "Equal" counts the checkpoints that
have the same files as that of the uninterrupted run, byte for byte. "Twice" is the most parts that any second run did
though the first had done them: those that it had written, but not noted.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from tabulate import tabulate

_CONFIG = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
_RUN = """
import sys, torch, fxmse
folder, out, scheme = sys.argv[1:]
batches = [{"input_ids": torch.arange(32).reshape(2, 16) * (7 + i) % 1000} for i in range(4)]
config = {"config_groups": {scheme: ["Linear"]}, "ignore": ["lm_head"]}
fxmse.quantize_checkpoint(folder, config, batches, out=out, part_size=1, progress=False)
"""


def start(folder: Path, out: Path, scheme: str) -> "subprocess.Popen[bytes]":
    """A run in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", _RUN, str(folder), str(out), scheme]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def hash_files(folder: Path) -> dict[str, str]:
    """What each file of a checkpoint holds."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def find_work(out: Path) -> Path:
    """The folder of an unfinished run."""
    return out.with_name(f".{out.name}.fxmse")


def list_parts(out: Path) -> tuple[int, int]:
    """Of how many parts an unfinished run has written files, and how many it has noted."""
    base = find_work(out)
    record = base / "run.json"
    noted = json.loads(record.read_text())["parts"] if record.exists() else []
    return len(list((base / "checkpoint").glob("*.safetensors"))), sum(bool(part["files"]) for part in noted)


def measure(folder: Path, scheme: str, num_kills: int, generator: random.Random) -> list[object]:
    """A row of the table."""
    whole = folder.with_name("whole")
    begin = time.perf_counter()
    process = start(folder, whole, scheme)
    while not find_work(whole).exists() and process.poll() is None:
        time.sleep(0.01)
    work_begins = time.perf_counter() - begin
    assert process.wait() == 0
    seconds = time.perf_counter() - begin
    expected = hash_files(whole)
    num_equal = most_twice = num_resumed = 0
    for number in range(num_kills):
        out = folder.with_name(f"{scheme}-{number}")
        process = start(folder, out, scheme)
        try:
            process.wait(generator.uniform(work_begins, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        written, noted = list_parts(out)
        num_resumed += noted > 0
        most_twice = max(most_twice, written - noted)
        assert start(folder, out, scheme).wait() == 0
        num_equal += hash_files(out) == expected
        print(f"{scheme} {number}: {written} written, {noted} noted, {num_equal} equal", file=sys.stderr)
    return [scheme, f"{seconds:.1f}", num_kills, num_resumed, num_equal, most_twice]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--schemes", nargs="+", default=["W4A16", "FP8"])
    options = parser.parse_args()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_hidden_layers=4, vocab_size=1000, **_CONFIG)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "float"
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        for scheme in options.schemes:
            rows.append(measure(folder, scheme, options.kills, random.Random(0)))
    headers = ["scheme", "s of a run", "kills", "with parts to go on from", "equal", "most parts done twice"]
    print(tabulate(rows, headers, tablefmt="github"))


if __name__ == "__main__":
    main()
