"""MiniLM as an ONNX model, which onnxruntime runs on int8 kernels."""

import onnxruntime
import quantize_minilm as example
import torch

import fxmse

model = example.AutoModel.from_pretrained(example.find_model_folder()).eval()
batches = example.load_batches(example.find_model_folder(), 4)
quantized = fxmse.quantize(example.export(model, batches[0]), example.CONFIG, batches)
opset = fxmse.export_onnx(quantized, batches[0], "minilm.onnx")
session = onnxruntime.InferenceSession("minilm.onnx", providers=["CPUExecutionProvider"])
inputs = {entry.name: batches[1][entry.name].numpy() for entry in session.get_inputs()}
outputs = [torch.from_numpy(session.run(None, inputs)[0])]
found, expected = (example.embed(run, batches[1]) for run in (lambda **_: outputs, quantized))
print(f"in opset {opset}, cosine to the graph:", torch.cosine_similarity(found, expected).mean().item())
