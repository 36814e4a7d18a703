"""MiniLM as a compressed-tensors checkpoint, which transformers and vLLM load, and as a graph again."""

import quantize_minilm as example
import torch

import fxmse

folder, out = example.find_model_folder(), "minilm-w8a8"
model = example.AutoModel.from_pretrained(folder).eval()
batches = example.load_batches(folder, 4)
program = example.export(model, batches[0])
fxmse.save_pretrained(fxmse.quantize(program, example.CONFIG, batches), model, out)
loaded = example.AutoModel.from_pretrained(out)
graph = fxmse.convert(fxmse.load_qparams(fxmse.prepare(program, f"{out}/config.json"), out))
found, expected = (example.embed(run, batches[0]) for run in (loaded, graph))
print("cosine to the graph:", torch.cosine_similarity(found, expected).mean().item())
