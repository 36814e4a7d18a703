"""Ways in: models, data and qparams from files.

- ``archive``: zip archives, read once.
- ``expressions``: sizes and guards, which are arithmetic.
- ``program_json``: what a program may say.
- ``tensors``: files of torch.save.
- ``programs``: .pt2 files, of which no code is run.
- ``folders``: checkpoints' folders, from which nothing leads elsewhere.
- ``models``: Hugging Face folders and .pt2 files.
- ``weights``: Hugging Face models without their weights, which are read when they are asked for.
- ``onnx``: what ONNX models say of themselves.
- ``data``: calibration data: tensors, texts, images.
- ``qparams``: the qparams of a compressed-tensors checkpoint.
"""
