"""What ONNX models that fxmse wrote say of themselves."""

from pathlib import Path

from fxmse.reading import check_file

__all__ = ["read_metadata"]


def read_metadata(path: Path) -> dict[str, str]:
    """An ONNX model's metadata; its tensors' file is not opened.

    Raises:
        ImportError: onnx is missing.
        ValueError: a file that is none.
    """
    try:
        import onnx
    except ImportError:
        raise ImportError(f"{path} is read with onnx: pip install 'fxmse[onnx]'") from None
    from google.protobuf.message import DecodeError

    check_file(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ValueError(f"{path} cannot be read as an ONNX model: {error}") from None
    return {entry.key: entry.value for entry in model.metadata_props}
