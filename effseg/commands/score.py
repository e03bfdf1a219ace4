"""``effseg score``: mIoU of two folders of masks."""

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    score = commands.add_parser("score", help="mIoU of two folders of PNG masks")
    score.add_argument("--pred", required=True, type=Path, help="folder of predicted masks")
    score.add_argument("--gt", required=True, type=Path, help="folder of true masks")
    score.add_argument("--split", type=Path, help="text file of ids, one a line")
    score.add_argument("--num-classes", type=int, default=21, help="background included (21)")
    score.add_argument("--ignore-index", type=int, default=255, help="value left out (255)")
    score.add_argument(
        "--binary",
        choices=("auto", "yes", "no"),
        default="auto",
        help="of two classes, 255 is the second one (auto: if no true mask holds a 1)",
    )
    score.add_argument("--json", action="store_true", help="print one JSON object")
    score.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> None:
    from effseg.metrics.folders import score_folders

    scores = score_folders(
        options.pred,
        options.gt,
        num_classes=options.num_classes,
        ignore_index=options.ignore_index,
        split=options.split,
        progress=not options.json,
        binary=None if options.binary == "auto" else options.binary == "yes",
    )
    if options.json:
        plain = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in scores.items()}
        plain["classes"] = sum(value == value for value in plain["iou"])  # those in the mean
        print(json.dumps(_without_nan(plain)))
        return
    from effseg.data.classes import Classes
    from effseg.metrics.tables import print_scores

    voc = options.num_classes == 21
    print_scores(scores, Classes.from_card("voc2012") if voc else None)


def _without_nan(value: Any) -> Any:
    """Return the value with null for nan, which JSON has not."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value
