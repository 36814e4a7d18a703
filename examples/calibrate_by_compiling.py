"""MiniLM calibrated by torch.compile: the compiled model observes, and becomes the quantized model."""

import quantize_minilm as example
import torch

import fxmse

model = example.AutoModel.from_pretrained(example.find_model_folder()).eval()
calibration = fxmse.Calibration(example.CONFIG)
step = torch.compile(model, backend=calibration)
with torch.no_grad():
    for batch in example.load_batches(example.find_model_folder(), 4):
        expected = example.embed(step, batch)
    calibration.fold()
    found = example.embed(step, batch)
    print("cosine to the float model:", torch.cosine_similarity(found, expected).mean().item())
print(len(calibration.qparams), "scales and zero points")
