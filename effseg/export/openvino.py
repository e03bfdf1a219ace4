"""An exported graph as OpenVINO's two files: FILE.xml with the metadata, FILE.bin with weights."""

from collections.abc import Mapping
from pathlib import Path

from effseg.errors import needs


def write_openvino(onnx_file: Path, path: Path, metadata: Mapping[str, str]) -> None:
    """Convert an ONNX file, in float32, with the metadata under `effseg` in rt_info.

    Raises:
        InputError: openvino is not installed.
    """
    with needs("export"):
        import openvino

    model = openvino.convert_model(onnx_file)
    for key, value in metadata.items():
        model.set_rt_info(value, ["effseg", key])
    openvino.save_model(model, path, compress_to_fp16=False)
