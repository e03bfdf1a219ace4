"""``effseg predict``: images to masks and overlays, or to boxes."""

import argparse
from pathlib import Path
from typing import Any

from effseg.errors import InputError


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    predict = commands.add_parser("predict", help="photos to masks and overlays, or to boxes")
    predict.add_argument(
        "--model", required=True, help="run directory, saved model, or hub id (OWNER/NAME)"
    )
    predict.add_argument("--output", required=True, type=Path, help="folder for the results")
    predict.add_argument("inputs", nargs="+", type=Path, metavar="IMAGE|DIR")
    predict.add_argument("--overlay", action="store_true", help="draw on the photos, with a legend")
    kind = predict.add_mutually_exclusive_group()
    kind.add_argument("--tta", action="store_true", help="six scales and their mirror images")
    kind.add_argument(
        "--slide", nargs="?", const=512, type=int, metavar="N", help="windows of N pixels (512)"
    )
    predict.add_argument(
        "--score", type=float, metavar="S", help="of a detector: least score of a box, 0 to 1 (0.3)"
    )
    predict.add_argument("--device", default=None, help="cpu, cuda, … (cuda where there is one)")
    predict.set_defaults(run=_predict)


def _predict(options: argparse.Namespace) -> None:
    import torch

    from effseg.models.faces import EfficientDet, EffSegDet
    from effseg.models.hub import from_pretrained

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = from_pretrained(options.model).eval().to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from error
    model = model.to(memory_format=torch.channels_last)
    if isinstance(model, EffSegDet):
        _predict_masks(model, options)
        _predict_boxes(model, options, options.output / "boxes")
    elif isinstance(model, EfficientDet):
        for name in ("tta", "slide", "overlay"):
            if getattr(options, name):
                raise InputError(
                    f"--{name}: {options.model} holds a detector, expected a segmentation model"
                )
        _predict_boxes(model, options, options.output)
    elif options.score is not None:
        raise InputError(
            f"--score: {options.model} holds a segmentation model, expected a detector"
        )
    else:
        _predict_masks(model, options)


def _predict_masks(model: Any, options: argparse.Namespace) -> None:
    from effseg.data.classes import Classes
    from effseg.inference.files import predict_files
    from effseg.inference.predictor import Predictor

    protocol = "ms+flip" if options.tta else f"slide{options.slide}" if options.slide else "whole"
    count = model.segmentation_head.classifier.out_channels
    classes = Classes.from_config(model.config, max(2, count))
    written = predict_files(
        Predictor(model, protocol), options.inputs, options.output, classes, options.overlay
    )
    overlays = f", overlays in {options.output / 'overlays'}" if options.overlay else ""
    print(f"{len(written)} masks in {options.output}{overlays} (protocol: {protocol})")


def _predict_boxes(model: Any, options: argparse.Namespace, output: Path) -> None:
    from effseg.data.classes import Classes
    from effseg.inference.detector import DetectionPredictor
    from effseg.inference.draw import SCORE
    from effseg.inference.files import detect_files

    classes = Classes.from_config(model.config, model.detection_head.classes + 1)
    predictor = DetectionPredictor(model)
    score = SCORE if options.score is None else options.score
    path = detect_files(predictor, options.inputs, output, classes, score)
    print(f"photos with boxes in {output}, listed in {path} (score {score:g} and more)")
