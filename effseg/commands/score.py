"""`effseg score`: mIoU of two folders of masks."""

import argparse
import json
from pathlib import Path
from typing import Any

from effseg.errors import InputError


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    score = commands.add_parser("score", help="mIoU of two folders of PNG masks")
    add = score.add_argument
    add("--pred", required=True, type=Path, help="folder of predicted masks")
    add("--gt", required=True, type=Path, help="folder of true masks")
    add("--split", type=Path, help="text file of ids, one a line")
    add("--num-classes", type=int, help="background included (21)")
    add("--classes", type=Path, help="class list (docs/formats.md); masks are read by its colours")
    add("--ignore-index", type=_index, default=255, metavar="N|none", help="left out (255)")
    add("--boundary", action="store_true", help="Boundary IoU too")
    add("--workers", type=int, help="threads (as many as cores)")
    binary = "of two classes, 255 is the second one (auto: if no true mask holds a 1)"
    add("--binary", choices=("auto", "yes", "no"), default="auto", help=binary)
    add("--json", action="store_true", help="print one JSON object")
    score.set_defaults(run=_score)


def _index(text: str) -> int | None:
    try:
        return None if text == "none" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number or none") from None


def _score(options: argparse.Namespace) -> None:
    from effseg.data.classes import Classes, load_classes
    from effseg.metrics.folders import score_folders
    from effseg.metrics.tables import print_scores, to_json

    classes = None if options.classes is None else load_classes(options.classes)
    default = 21 if classes is None else len(classes)
    count = default if options.num_classes is None else options.num_classes
    if classes is not None and len(classes) != count:
        raise InputError(f"--num-classes {count}: {options.classes} has {len(classes)} classes")
    scores = score_folders(
        options.pred,
        options.gt,
        num_classes=count,
        ignore_index=options.ignore_index,
        split=options.split,
        workers=options.workers,
        progress=not options.json,
        boundary=options.boundary,
        binary=None if options.binary == "auto" else options.binary == "yes",
        classes=classes,
    )
    if options.json:
        plain = to_json(scores)
        plain["classes"] = sum(value is not None for value in plain["iou"])  # those in the mean
        print(json.dumps(plain))
        return
    title = "per class"
    if classes is None and count == 21:
        classes, title = Classes.from_card("voc2012"), "per class (VOC's names, without --classes)"
    print_scores(scores, classes, title)
