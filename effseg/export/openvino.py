"""An exported graph as OpenVINO's two files: FILE.xml with the metadata, FILE.bin with weights."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from effseg.errors import needs
from effseg.export.graph import ExportGraph
from effseg.export.onnx import write_onnx


def write_openvino(
    graph: ExportGraph,
    program: torch.export.ExportedProgram,
    path: Path,
    metadata: Mapping[str, str],
    opset: int | None = None,
) -> None:
    """Write an exported program by way of ONNX, in float32; metadata under `effseg` in rt_info.

    Raises:
        InputError: openvino or onnx is not installed, or the opset is out of range.
    """
    with needs("export"):
        import openvino

    with tempfile.TemporaryDirectory(prefix=".export-") as folder:
        onnx_file = Path(folder) / "model.onnx"
        write_onnx(graph, program, onnx_file, {}, opset)
        model = openvino.convert_model(onnx_file)
    for key, value in metadata.items():
        model.set_rt_info(value, ["effseg", key])
    openvino.save_model(model, path, compress_to_fp16=False)
