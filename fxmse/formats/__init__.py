"""What a format stores, and which elements of a value share a scale.

- ``tables``: whether a graph is being made, and small tables that it looks things up in.
- ``grids``: the values of int2 to int16, fp8, fp6 and fp4.
- ``scales``: the scale and zero point that put a range on a grid, and the way back.
- ``stored_scales``: the few scales of NVFP4 and MX.
- ``layout``: strategies (tensor, channel, group, block, ...): a value becomes tiles of groups.
- ``linear``: linear quantization as ONNX has it: types of codes, and scales along one axis.
"""
