"""Ways out of a folded graph, a file each.

- ``files``: files and folders that are there whole or not at all.
- ``exporting``: torch.export programs.
- ``experts``: experts' parameters as a linear each.
- ``checkpoint``: compressed-tensors checkpoints.
- ``inductor``: fake-quantize nodes as a custom pass of Inductor.
- ``reporting``: what quantization did to each value.
"""
