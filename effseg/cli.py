"""The command line: ``effseg fit | validate | predict | score | info | benchmark | data``."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from effseg.allocator import keep_freed_memory
from effseg.errors import InputError

# albumentations asks a package index for its newest version at import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, or 2 for bad input (one line on stderr)."""
    keep_freed_memory()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in ("fit", "validate"):
            from effseg.training.cli import run_lightning

            run_lightning(arguments)
            return 0
        options = _parser().parse_args(arguments)
        options.run(options)
    except InputError as error:
        print(f"error: {_last_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _last_line(error: InputError) -> str:
    """Return the message alone: a loader's worker sends its whole traceback along."""
    line = str(error).strip().splitlines()[-1]
    return line.removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    from effseg import __version__

    parser = _Parser(prog="effseg", description="Semantic segmentation with EfficientDet.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, text in (
        ("fit", "train by a recipe: --config FILE or the name of a shipped one"),
        ("validate", "evaluate a checkpoint: --config FILE --ckpt_path FILE"),
    ):
        commands.add_parser(name, help=text, add_help=False)

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

    score = commands.add_parser("score", help="mIoU of two folders of PNG masks")
    score.add_argument("--pred", required=True, type=Path, help="folder of predicted masks")
    score.add_argument("--gt", required=True, type=Path, help="folder of true masks")
    score.add_argument("--split", type=Path, help="text file of ids, one a line")
    score.add_argument("--num-classes", type=int, default=21, help="background included (21)")
    score.add_argument("--ignore-index", type=int, default=255, help="value left out (255)")
    score.add_argument("--json", action="store_true", help="print one JSON object")
    score.set_defaults(run=_score)

    info = commands.add_parser("info", help="parameters and multiply-adds of a model")
    info.add_argument("name", nargs="?", help="a model's name; all names without it")
    info.add_argument("--size", type=int, default=512, help="side of the photo in pixels (512)")
    info.add_argument("--classes", type=int, help="21 with the background, 90 for a detector")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=_info)

    benchmark = commands.add_parser("benchmark", help="speed and memory of a model on this machine")
    benchmark.add_argument("model", help="a model's name, run directory, saved model, or hub id")
    benchmark.add_argument("--size", type=int, help="side of the images, pixels")
    benchmark.add_argument("--batch", type=int, default=1, help="images at a time (1)")
    benchmark.add_argument("--rounds", type=int, default=9, help="alternating rounds (9)")
    benchmark.add_argument("--compile", action="store_true", help="measure torch.compile, too")
    benchmark.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu, cuda")
    benchmark.add_argument("--json", action="store_true", help="print one JSON object")
    benchmark.set_defaults(run=_benchmark)

    data = commands.add_parser("data", help="check or download a data set")
    actions = data.add_subparsers(title="actions", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="read every image and label, list what is wrong")
    check.add_argument("--config", help="recipe: check all sources that it trains and scores on")
    check.add_argument("--root", help="folder of the data; EFFSEG_DATA or ./datasets without it")
    check.add_argument("--split", action="append", help="train, val, … (repeat for several)")
    check.add_argument("--classes", help="file of class names: the data are images/ and masks/")
    check.add_argument("--coco", action="store_true", help="the data are COCO's: JSON and photos")
    check.add_argument("--boxes", action="store_true", help="check boxes in place of masks")
    check.set_defaults(run=_data_check)
    download = actions.add_parser("download", help="fetch VOC 2012 and SBD")
    download.add_argument("--root", type=Path, default=Path("datasets"), help="folder (./datasets)")
    download.set_defaults(run=_data_download)
    return parser


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


def _score(options: argparse.Namespace) -> None:
    from effseg.metrics.folders import score_folders

    scores = score_folders(
        options.pred,
        options.gt,
        num_classes=options.num_classes,
        ignore_index=options.ignore_index,
        split=options.split,
        progress=not options.json,
    )
    if options.json:
        plain = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in scores.items()}
        print(json.dumps(_without_nan(plain)))
        return
    from effseg.data.classes import Classes
    from effseg.training.tables import print_scores

    voc = options.num_classes == 21
    print_scores(scores, Classes.from_card("voc2012") if voc else None)


def _without_nan(value: Any) -> Any:
    """Return the value with null for nan, which JSON has not."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def _info(options: argparse.Namespace) -> None:
    from effseg.models.registry import list_models, summary

    if options.name is None:
        print("\n".join(list_models()))
        return
    cost = summary(options.name, options.size, classes=options.classes)
    if options.json:
        print(json.dumps(cost))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{cost['name']} at {cost['size']} × {cost['size']}", title_justify="left")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("GMACs", justify="right")
    for part, row in cost["parts"].items():
        table.add_row(part, f"{row['params']:,}", f"{row['macs'] / 1e9:.3f}")
    table.add_section()
    table.add_row("total", f"{cost['params']:,}", f"{cost['macs'] / 1e9:.3f}")
    Console().print(table)


def _benchmark(options: argparse.Namespace) -> None:
    from effseg.benchmark import benchmark

    keys = ("size", "batch", "rounds", "compile", "device")
    with contextlib.redirect_stdout(sys.stderr):  # the hub's library says that it loads weights
        report = benchmark(options.model, **{key: getattr(options, key) for key in keys})
    if options.json:
        print(json.dumps(report))
        return
    from rich.console import Console
    from rich.table import Table

    title = "{model}, {batch} × {size}², {device}, {threads} threads, torch {torch}"
    table = Table(title=title.format(**report), title_justify="left")
    for column in ("", "ms, median", "ms, range", "images per second", "peak MiB"):
        table.add_column(column, justify="right" if column else "left")
    for row in report["rows"]:
        cells = "{name}|{ms:.2f}|{least:.2f} to {most:.2f}|{images_per_second:.1f}|{peak_mib:.0f}"
        table.add_row(*cells.format(**row).split("|"))
    Console().print(table)


def _data_check(options: argparse.Namespace) -> None:
    from effseg.data.check import check
    from effseg.training.tables import print_data

    problems = 0
    for name, source in _sources(options):
        report = check(source, progress=True)
        print_data(name, report)
        problems += len(report.problems)
    if problems:
        raise InputError(f"{problems} problems, listed above; expected none")


def _sources(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield the name and the source of what is to be checked."""
    from effseg.data import COCO, VOC, Folder, Shapes
    from effseg.data.sources.shapes import is_shapes

    if options.config is not None:
        from effseg.training.cli import read_data

        yield from read_data(options.config, options.root, options.classes).sources()
        return
    masks, boxes = not options.boxes, options.boxes
    for split in options.split or (["train2017", "val2017"] if options.coco else ["train", "val"]):
        if options.coco:
            source: Any = COCO(
                options.root, split, "auto" if masks else None, "auto" if boxes else None
            )
        elif options.classes is not None:
            source = Folder(options.root or ".", options.classes, split)
        elif is_shapes(options.root):
            every = (0.0, 1.0)
            source = Shapes(options.root, split, every if masks else None, every if boxes else None)
        else:
            source = VOC(options.root, split if masks else None, split if boxes else None)
        yield split, source


def _data_download(options: argparse.Namespace) -> None:
    from effseg.data.download import download_voc2012

    print(f"VOC 2012 is in {download_voc2012(options.root)}")


if __name__ == "__main__":
    sys.exit(main())
