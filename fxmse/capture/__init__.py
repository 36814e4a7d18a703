"""Models of every kind become graphs of our own, whose weights are get_attr nodes.

- ``attributes``: how a graph's attributes are read, and where new ones are put.
- ``evaluation``: graphs that were made in training mode.
- ``exporting``: torch.export with dimensions that may vary.
- ``front_ends``: symbolic_trace, torch.export, plain modules.
- ``lifted``: Dynamo's graphs, whose parameters are inputs.
"""
