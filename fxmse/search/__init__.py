"""The searches: tensors in, ranges out. They know no graph and no module.

- ``power``: |e| ** norm, the arithmetic that a search consists of.
- ``compiling``: when and how a search is compiled; the only place that calls torch.compile for it.
- ``error_sums``: the errors of many scales at once.
- ``shrinking``: the reference's search, which shrinks a group's range step by step.
- ``optimum``: the search for the optimum, of all ranges that a format can store.
- ``global_scale``: the global scale that weights of NVFP4 are best with.
"""
