"""Ways in: models, data and qparams from files.

- ``programs``: .pt2 files, which hold no code.
- ``shards``: the files of a checkpoint.
- ``models``: Hugging Face folders and .pt2 files.
- ``data``: calibration data: tensors, texts, images.
- ``qparams``: the qparams of a compressed-tensors checkpoint.
"""
