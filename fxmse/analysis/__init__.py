"""What formats cost a model, and which format where.

In the order of their imports:

- ``results``: what an analysis finds
- ``divergences``: how far a model's outputs are off
- ``candidates``: configs to compare, and their names
- ``meters``: modules in a graph that quantize a value on demand
- ``layers``: which modules have to have one format, and their sizes
- ``sensitivity``: ``analyze``
- ``program``: the integer program
- ``choosing``: ``choose_schemes``
"""
