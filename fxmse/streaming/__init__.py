"""Models of any size: the pipeline part by part, with weights read when they are needed and written when they are done.

- ``activations``: what passes from one part to the next, in files.
- ``fingerprints``: what a run is made of, so that another can tell whether it may go on.
- ``work``: the folder of a run that is not done, which the next one goes on with.
- ``memory``: what was worked on is given back.
- ``warming``: searches are compiled while a model is traced.
- ``quantizing``: from a folder to a compressed-tensors checkpoint.
"""
