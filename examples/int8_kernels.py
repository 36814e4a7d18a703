"""MiniLM on Inductor's int8 kernels: the quantized graph lowered to quantize/dequantize pairs and compiled."""

import quantize_minilm as example
import torch

import fxmse
from fxmse.passes import LowerToQDQ

with torch.no_grad(), torch._inductor.config.patch(freezing=True):
    model = example.AutoModel.from_pretrained(example.find_model_folder()).eval()
    batches = example.load_batches(example.find_model_folder(), 4)
    quantized = fxmse.quantize(example.export(model, batches[0]), example.CONFIG, batches)
    LowerToQDQ()(quantized)
    fast = torch.compile(quantized)
    found, expected = (example.embed(run, batches[0]) for run in (fast, model))
    print("cosine to the float model:", torch.cosine_similarity(found, expected).mean().item())
