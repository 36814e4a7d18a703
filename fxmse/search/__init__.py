"""The searches: tensors in, ranges out. They know no graph and no module.

What both searches are made of:

- ``compiling``: when and how a stage is compiled; the only place that calls torch.compile for it.
- ``power``: |e| ** norm, the arithmetic that a search consists of.
- ``tiles``: a value's groups in tiles that fit a cache and a graph.
- ``error_sums``: the errors of many scales at once.

The reference's search, which shrinks a group's range step by step:

- ``options``: which ranges are tried, and what they are judged by.
- ``shrunk_ranges``: the candidates and their errors.
- ``patience``: which candidate the reference's loop ends with.
- ``near_ties``: which of nearly equal errors is less.
- ``shrinking``: the search.

The search for the optimum, of all ranges that a format can store:

- ``plan``: which scales are evaluated, from coarse to fine.
- ``candidates``: scales and zero points as they can be stored.
- ``narrowing``: the best of more and more scales around the best ones so far.
- ``small_groups``: the best of few elements' scales, by bounds that leave most of them out.
- ``tile_optimum``: the optimum of one tile's groups.
- ``optimum``: the search, and how it works.
- ``counted_optimum``: the search of values that are given by how often each was seen.
- ``global_scale``: the global scale that weights of NVFP4 are best with.

The search for the least error of what is computed of a weight:

- ``product_sums``: the errors of outputs of many scales at once.
- ``descent``: groups of a row that take turns in choosing.
- ``output_optimum``: the search, and how it works.
"""
