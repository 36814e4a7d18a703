"""MiniLM calibrated by several processes: torchrun --nproc-per-node 2 examples/distributed.py."""

import quantize_minilm as example
import torch
import torch.distributed as dist

import fxmse

dist.init_process_group("gloo")
rank, num_ranks = dist.get_rank(), dist.get_world_size()
with torch.no_grad():
    model = example.AutoModel.from_pretrained(example.find_model_folder()).eval()
    *batches, held_out = example.load_batches(example.find_model_folder(), 4)
    observed = fxmse.prepare(example.export(model, held_out), example.CONFIG)
    fxmse.calibrate(observed, batches[rank::num_ranks], group=dist.group.WORLD)
    quantized = fxmse.convert(observed)  # has the same scales on every rank
    if rank == 0:
        found, expected = (example.embed(run, held_out) for run in (quantized, model))
        print("cosine to the float model:", torch.cosine_similarity(found, expected).mean().item())
dist.destroy_process_group()
