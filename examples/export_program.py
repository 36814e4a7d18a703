"""MiniLM as a .pt2 for processes that have nothing but torch, and packaged by AOTInductor."""

import quantize_minilm as example
import torch

import fxmse

model = example.AutoModel.from_pretrained(example.find_model_folder()).eval()
batches = example.load_batches(example.find_model_folder(), 4)
quantized = fxmse.quantize(example.export(model, batches[0]), example.CONFIG, batches)
program = fxmse.export(quantized, batches[0], decompose=True)
torch.export.save(program, "minilm.pt2")
package = torch._inductor.aoti_compile_and_package(program, package_path="minilm_packaged.pt2")
run = torch._inductor.aoti_load_package(package)
found, expected = (example.embed(run, batches[1]) for run in (run, quantized))
print("cosine to the graph:", torch.cosine_similarity(found, expected).mean().item())
