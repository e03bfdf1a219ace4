"""`effseg export`: a model as a file for ONNX Runtime, OpenVINO or torch.export."""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    export = commands.add_parser("export", help="a model as an ONNX, OpenVINO or pt2 file")
    model = "a model's name, run directory, saved model, hub id or checkpoint"
    export.add_argument("--model", required=True, help=model)
    export.add_argument("--format", required=True, choices=("onnx", "openvino", "pt2"))
    export.add_argument("--output", required=True, type=Path, help="FILE.onnx, .xml or .pt2")
    number = "a number, or dynamic (default)"
    export.add_argument("--size", type=_number, default="dynamic", help=f"side, pixels: {number}")
    export.add_argument("--batch", type=_number, default="dynamic", help=f"images: {number}")
    export.add_argument("--argmax", action="store_true", help="labels (uint8), not logits")
    export.add_argument("--raw", action="store_true", help="boxes of all anchors, without NMS")
    export.add_argument("--opset", type=int, help="of ONNX, 18 to 23 (the exporter's default)")
    export.set_defaults(run=_export)


def _number(text: str) -> int | str:
    if text != "dynamic" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number or dynamic")
    return text if text == "dynamic" else int(text)


def _export(options: argparse.Namespace) -> None:
    from effseg.export.files import export_model
    from effseg.inference.backends import file_size
    from effseg.models.pretrained import from_pretrained
    from effseg.models.registry import create_model, list_models
    from effseg.models.zoo import weights_of

    name, output = options.model, options.output
    settings = {key: getattr(options, key) for key in ("size", "batch", "argmax", "raw", "opset")}
    with contextlib.redirect_stdout(sys.stderr):  # the libraries print
        if name in list_models() and weights_of(name) == ["coco-detection"]:
            print(f"{name}: there are no trained weights of that name, these are random ones")
            model = create_model(name)
        else:
            model = from_pretrained(name)
        parity = export_model(model.eval(), output, options.format, **settings)
    print(f"{output}: {options.format}, {file_size(output) / 2**20:.1f} MiB")
    print(f"compared with the model, {parity}")
