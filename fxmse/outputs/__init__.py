"""Ways out of a folded graph, a file each.

- ``workplaces``: where they are written, and what a killed run left there.
- ``files``: files and folders that are there whole or not at all.
- ``exporting``: torch.export programs.
- ``onnx``: ONNX models.
- ``experts``: experts' parameters as a linear each.
- ``space``: how large what is written will be, and whether there is room for it.
- ``checkpoint``: compressed-tensors checkpoints.
- ``shards``: compressed-tensors checkpoints that are written part by part.
- ``inductor``: fake-quantize nodes as a custom pass of Inductor.
- ``noise``: how much quantization changes a value.
- ``reporting``: what quantization did to each value.
- ``depth``: how the error grows through a model.
- ``pictures``: what is drawn of a value.
- ``summaries``: reports for people.
- ``documents``: all that a report says, as data.
- ``report_html``: that data as a page.
- ``analyses``: what formats cost a model, for people.
"""
