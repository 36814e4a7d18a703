"""Ways out of a folded graph, a file each.

- ``files``: files and folders that are there whole or not at all.
- ``exporting``: torch.export programs.
- ``checkpoint``: compressed-tensors checkpoints.
- ``shards``: compressed-tensors checkpoints that are written part by part.
- ``inductor``: fake-quantize nodes as a custom pass of Inductor.
- ``reporting``: what quantization did to each value.
"""
