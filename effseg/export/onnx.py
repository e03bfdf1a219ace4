"""An exported graph as an ONNX file, or as OpenVINO's two files, FILE.xml and FILE.bin."""

# B batch, P candidates, K classes, n boxes that NMS keeps.

import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import batched_nms

from effseg.errors import InputError, needs
from effseg.export.graph import IOU_THRESHOLD, MAX_DETECTIONS, ExportGraph

OPSETS = (18, 23)
"""Least and greatest: torch.onnx writes 18 and later, engines lag behind the newest."""


@torch.library.custom_op("effseg::keep", mutates_args=())
def keep(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, classes: int
) -> torch.Tensor:
    """Mark what NMS keeps, (B, P) bool: one node, for which ONNX has an operator.

    torchvision's operator would need boxes shifted by image and class, at which float32 loses
    fractions of a pixel.
    """
    kept = torch.zeros_like(labels, dtype=torch.bool)
    for row, b, s, c in zip(kept, boxes, scores, labels, strict=True):
        row[batched_nms(b, s, c, IOU_THRESHOLD)] = True
    return kept


@keep.register_fake
def _keep_shape(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, classes: int
) -> torch.Tensor:
    return torch.empty_like(labels, dtype=torch.bool)


def _translate() -> Any:
    """Return `keep` in ONNX's operators."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper
    from onnxscript import opset18

    op: Any = opset18  # its annotations omit lists, which it accepts

    def constant(value: Any, dtype: Any) -> Any:
        return op.Constant(value=numpy_helper.from_array(np.asarray(value, dtype)))

    def translate(boxes: Any, scores: Any, labels: Any, classes: int) -> Any:
        numbers = constant(np.arange(classes).reshape(1, classes, 1), np.int64)
        of_class = op.Equal(op.Unsqueeze(labels, [1]), numbers)  # (B, K, P)
        by_class = op.Where(of_class, op.Unsqueeze(scores, [1]), constant(0, np.float32))
        picks = op.NonMaxSuppression(  # (n, 3): image, class, candidate
            boxes,
            by_class,
            constant([MAX_DETECTIONS], np.int64),
            constant([IOU_THRESHOLD], np.float32),
            constant([0], np.float32),
        )
        cells = op.Gather(picks, constant([0, 2], np.int64), axis=1)
        ones = op.ConstantOfShape(
            op.Slice(op.Shape(picks), [0], [1]),
            value=helper.make_tensor("one", TensorProto.FLOAT, [1], [1]),
        )
        none = op.Mul(scores, constant(0, np.float32))
        return op.Cast(op.ScatterND(none, cells, ones), to=TensorProto.BOOL)

    return translate


def write_onnx(
    graph: ExportGraph,
    program: torch.export.ExportedProgram,
    path: Path,
    metadata: Mapping[str, Any],
    opset: int | None = None,
) -> None:
    """Write an exported program, weights and metadata (as JSON) inside one file."""
    least, most = OPSETS
    if opset is not None and not least <= opset <= most:
        raise InputError(f"--opset {opset}: expected {least} to {most}")
    with needs("export"):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            external_data=False,
            opset_version=opset,
            input_names=graph.inputs,
            output_names=graph.outputs,
            custom_translation_table={torch.ops.effseg.keep.default: _translate()},
        )
    assert written is not None
    written.model.metadata_props.update({k: json.dumps(value) for k, value in metadata.items()})
    written.save(path, external_data=False)


def write_openvino(
    graph: ExportGraph,
    program: torch.export.ExportedProgram,
    path: Path,
    metadata: Mapping[str, Any],
    opset: int | None = None,
) -> None:
    """Write a program by way of ONNX, in float32; metadata (as JSON) under `effseg` in rt_info."""
    with needs("export"):
        import openvino

    with tempfile.TemporaryDirectory(prefix=".export-") as folder:
        onnx_file = Path(folder) / "model.onnx"
        write_onnx(graph, program, onnx_file, {}, opset)
        model = openvino.convert_model(onnx_file)
    for key, value in metadata.items():
        model.set_rt_info(json.dumps(value), ["effseg", key])
    openvino.save_model(model, path, compress_to_fp16=False)
