"""Ways in: models, data and qparams from files.

- ``programs``: .pt2 files, which hold no code.
- ``models``: Hugging Face folders and .pt2 files.
- ``weights``: Hugging Face models without their weights, which are read when they are asked for.
- ``data``: calibration data: tensors, texts, images.
- ``qparams``: the qparams of a compressed-tensors checkpoint.
"""
