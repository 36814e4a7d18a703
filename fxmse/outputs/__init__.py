"""Ways out of a folded graph, a file each.

- ``files``: files and folders that are there whole or not at all.
- ``exporting``: torch.export programs.
- ``checkpoint``: compressed-tensors checkpoints.
- ``inductor``: fake-quantize nodes as a custom pass of Inductor.
- ``noise``: how much quantization changes a value.
- ``reporting``: what quantization did to each value.
"""
