"""The whole calibration of all-MiniLM-L6-v2 (W8A8 static), in units of its float passes.

    python benchmarks/calibrate.py [--batches 32] [--runs 3]

Float passes and calibrations run in turn over the same batches; medians. Needs the examples extra.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate

import fxmse

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import quantize_minilm as example

# The inputs' observer and its arguments; the weights' is memoryless_mse.
OBSERVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mse, norm 2, averaging .1 (the example)": ("mse", {"norm": 2.0, "averaging_constant": 0.1}),
    "mse (defaults: norm 2.4, averaging .01)": ("mse", {}),
    "static_minmax": ("static_minmax", {}),
}


@torch.no_grad()
def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    folder = example.find_model_folder()
    batches = example.load_batches(folder, options.batches * 3 // 2)
    calibration, held_out = batches[: options.batches], batches[options.batches :]
    program = example.export(example.AutoModel.from_pretrained(folder).eval(), calibration[0])
    float_graph = program.module()
    expected = [example.embed(float_graph, batch) for batch in held_out]
    rows = []
    for name, (observer, kwargs) in OBSERVERS.items():
        config = example.CONFIG.model_copy(deep=True)
        scheme = config.config_groups["w8a8_static"]
        scheme.input_activations.observer, scheme.input_activations.observer_kwargs = observer, kwargs
        fxmse.calibrate(fxmse.prepare(program, config), calibration[:1], progress=False)
        float_seconds, seconds = [], []
        for _ in range(options.runs):
            observed = fxmse.prepare(program, config)
            float_seconds.append(example.measure_seconds(lambda: [float_graph(**batch) for batch in calibration]))
            calibrate = lambda observed=observed: fxmse.calibrate(observed, calibration, progress=False)  # noqa: E731
            seconds.append(example.measure_seconds(calibrate))
        quantized = fxmse.convert(observed)
        cosines = torch.cat(
            [F.cosine_similarity(e, example.embed(quantized, b)) for e, b in zip(expected, held_out, strict=True)]
        )
        ratio = statistics.median(s / f for s, f in zip(seconds, float_seconds, strict=True))
        medians = statistics.median(float_seconds), statistics.median(seconds)
        rows.append((name, *medians, ratio, cosines.mean().item(), cosines.min().item()))
    headers = ("inputs' observer", "float s", "calibrate s", "ratio", "cosine mean", "least")
    print(f"{len(calibration)} batches, {torch.get_num_threads()} threads, {options.runs} runs, medians")
    print(tabulate(rows, headers, floatfmt=("", ".2f", ".2f", ".2f", ".4f", ".4f"), tablefmt="github"))


if __name__ == "__main__":
    main()
