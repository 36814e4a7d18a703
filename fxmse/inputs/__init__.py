"""Ways in: what the command line and others read from files.

- ``data``: calibration data.
"""
