"""`effseg export`: write a model as a file, after running and comparing it."""

# B batch, C channels, H W pixels.

import copy
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import torch

from effseg.data.classes import Classes
from effseg.errors import InputError, flat
from effseg.export import pt2
from effseg.export.graph import IOU_THRESHOLD, MAX_DETECTIONS, ExportGraph
from effseg.export.onnx import write_onnx, write_openvino
from effseg.export.parity import Parity, check
from effseg.export.pt2 import write_pt2
from effseg.inference import backends
from effseg.models.fold import optimize_for_inference
from effseg.models.network import Network

Format = Literal["onnx", "openvino", "pt2"]
Number = int | Literal["dynamic"]


def export_model(
    model: Network,
    path: str | Path,
    format: Format,
    *,
    size: Number = "dynamic",
    batch: Number = "dynamic",
    argmax: bool = False,
    raw: bool = False,
    opset: int | None = None,
    compare: bool = True,
) -> Parity | None:
    """Write a model as a file for another engine.

    The file holds the weights, the last upsampling, the decoding of boxes and NMS, and metadata
    (docs/export.md). It is written under a temporary name, run, compared with the model on
    generated images, then renamed: an error leaves no file.

    Args:
        model: of `effseg.from_pretrained` or `effseg.create_model`.
        path: the file, with the format's suffix (.onnx, .xml, .pt2).
        format: `onnx`, `openvino` or `pt2`.
        size: side of the square images, a multiple of the encoder's stride; `dynamic`: any size.
        batch: number of images; `dynamic`: any.
        argmax: output labels (uint8) instead of logits.
        raw: output decoded boxes and scores of all anchors, without NMS.
        opset: of ONNX; None: the exporter's default.
        compare: run the file and compare.

    Returns:
        The result of the comparison, or None.

    Raises:
        InputError: arguments that do not fit the model or the format, a missing package of the
            extra `export`, an engine that cannot read the file, or outputs that differ.
    """
    path = Path(path)
    _check(model, path, format, size, batch, argmax, raw, opset)
    model = copy.deepcopy(model).float().cpu().eval()
    optimised = optimize_for_inference(model)
    keep = pt2.keep if format == "pt2" else torch.ops.effseg.keep.default
    graph = ExportGraph(optimised, argmax=argmax, suppress=None if raw else keep).eval()
    metadata = _metadata(model, graph, size, batch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".export-",
            dir=path.parent,
            ignore_cleanup_errors=True,  # else Windows, whose files are in use, hides the reason
        ) as folder:
            written = Path(folder) / path.name
            try:
                program = _trace(graph, size, batch)
                match format:
                    case "onnx":
                        write_onnx(graph, program, written, metadata, opset)
                    case "openvino":
                        write_openvino(graph, program, written, metadata, opset)
                    case "pt2":
                        write_pt2(program, written, metadata)
            except InputError:
                raise
            except Exception as error:  # what torch's exporter or the format does not support
                raise InputError(
                    f"--format {format} --size {size} --batch {batch}: {model.name} cannot be "
                    "exported, expected another format, or numbers for size and batch: "
                    f"{flat(error)}"
                ) from error
            result = check(model, backends.open(written)) if compare else None
            # OpenVINO's weights first: the .xml names them.
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.suffix == ".xml"):
                os.replace(file, path.parent / file.name)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    return result


def _check(
    model: Any,
    path: Path,
    format: str,
    size: Number,
    batch: Number,
    argmax: bool,
    raw: bool,
    opset: int | None,
) -> None:
    if format not in backends.SUFFIXES:
        raise InputError(f"--format {format}: expected one of {', '.join(backends.SUFFIXES)}")
    if path.suffix != backends.SUFFIXES[format]:
        raise InputError(
            f"--output {path}: expected a name that ends in {backends.SUFFIXES[format]}"
        )
    if not isinstance(model, Network):
        raise InputError(f"{type(model).__name__}: expected EffSeg, EfficientDet or EffSegDet")
    for name, number in (("size", size), ("batch", batch)):
        if not isinstance(number, int) and number != "dynamic":
            raise InputError(f"--{name} {number!r}: expected a number, or dynamic")
    stride = int(model.encoder.output_stride)
    if isinstance(size, int) and (size < stride or size % stride):
        raise InputError(f"--size {size}: expected a multiple of {stride}, or dynamic")
    if isinstance(batch, int) and batch < 1:
        raise InputError(f"--batch {batch}: expected at least 1, or dynamic")
    for name, value, task in (("--argmax", argmax, "segmentation"), ("--raw", raw, "detection")):
        if value and task not in model.tasks:
            raise InputError(f"{name}: the model has no head for {task}")
    if opset is not None and format == "pt2":
        raise InputError("--opset: expected --format onnx or openvino")
    activation = model.arguments.get("activation")
    if activation not in (None, "identity"):
        raise InputError(f"model with activation={activation!r}: expected None, that is logits")


def _metadata(model: Network, graph: ExportGraph, size: Number, batch: Number) -> dict[str, Any]:
    """Return the file's metadata, see docs/export.md."""
    counts = (model.seg_classes, model.det_classes)
    seg, det = (None if count is None else int(count) for count in counts)  # NumPy's are no JSON
    classes = Classes.from_config(model.config, max(2, seg) if seg else (det or 0) + 1)
    nms = {"iou_threshold": IOU_THRESHOLD, "max_detections": MAX_DETECTIONS}
    fixed = isinstance(size, int)
    side = size if fixed else model.config.get("_detection_size", model.size)
    default = "whole" if det is None else f"size{side}"  # as in effseg.inference.predictor
    return {
        "model": model.name,
        "tasks": list(model.tasks),
        "inputs": graph.inputs,
        "outputs": graph.outputs,
        "seg_classes": seg,
        "det_classes": det,
        "classes": list(classes.names),
        "palette": [list(colour) for colour in classes.palette],
        "mean": model.mean.float().flatten().tolist(),
        "std": model.std.float().flatten().tolist(),
        "protocol": f"size{size}" if fixed else model.config.get("_protocol", default),
        "size": size,
        "batch": batch,
        "detector_size": side,
        "argmax": graph.argmax,
        "nms": None if graph.suppress is None or det is None else nms,
    }


def _trace(graph: ExportGraph, size: Number, batch: Number) -> torch.export.ExportedProgram:
    free = torch.export.Dim.DYNAMIC
    # A dynamic batch needs an example of at least 2, and dynamic sizes one that is no multiple of
    # the stride: torch.export takes what is special about the example for a property of all.
    count, shape = (batch, {}) if isinstance(batch, int) else (2, {0: free})
    height, width, sides = 250, 312, {2: free, 3: free}
    if isinstance(size, int):
        height, width, sides = size, size, {}
    images = torch.zeros(count, len(graph.model.preprocess_cfg["mean"]), height, width)
    sizes = torch.tensor([[height, width]] * count)
    inputs = len(graph.inputs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(
            graph, (images, sizes)[:inputs], dynamic_shapes=(shape | sides, shape)[:inputs]
        )
