"""What a path is by its ending, and what is there."""

from pathlib import Path

__all__ = ["identify", "is_file", "is_onnx", "is_program"]


def is_program(path: Path) -> bool:
    """Whether it is of an exported program."""
    return path.suffix == ".pt2"


def is_onnx(path: Path) -> bool:
    """Whether it is of an ONNX model."""
    return path.suffix == ".onnx"


def is_file(path: Path) -> bool:
    """Whether it is of either; all others are folders."""
    return is_program(path) or is_onnx(path)


def identify(path: Path) -> tuple[int, int] | None:
    """What is at a path, told apart from what takes its place."""
    if not path.exists():
        return None
    status = path.stat()
    return status.st_dev, status.st_ino
