"""Sample data runs through an observed graph.

- ``buffers``: what a graph writes is written to copies meanwhile.
- ``progress``: bars over weights and batches.
- ``observing``: weights and batches are looked at, and what is refused leaves no trace.
- ``ranks``: processes that do one thing together: they meet, pass tensors on, and learn who failed.
- ``merging``: one calibration by several processes: what has to be alike, who searches what, merging.
- ``backend``: torch.compile as the calibration step.
"""
