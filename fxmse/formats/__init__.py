"""What a format stores, and which elements of a value share a scale.

- ``grids``: the values of int2 to int16, fp8, fp6 and fp4, and the scales that put a range on them.
- ``layout``: strategies (tensor, channel, group, block, ...): a value becomes tiles of groups.
"""
