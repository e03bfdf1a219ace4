"""`effseg models`: what can be made by name, with which weights."""

import argparse
import json
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    models = commands.add_parser("models", help="all models by name, their weights and scores")
    models.add_argument("--json", action="store_true", help="print one JSON array")
    models.set_defaults(run=_models)


def _models(options: argparse.Namespace) -> None:
    from effseg.models.catalogue import catalogue

    entries = catalogue()
    if options.json:
        print(json.dumps(entries))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)  # within 80 columns
    for column in ("name", "weights", "params", "GMACs", "score", "MB", "here"):
        right = column in ("params", "GMACs", "MB")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    titles = {"ap": "AP", "ap50": "AP50", "miou": "mIoU"}
    for entry in entries:
        scores = ", ".join(f"{titles[key]} {value:.3f}" for key, value in entry["scores"].items())
        table.add_row(
            entry["name"],
            entry["weights"],
            f"{entry['params'] / 1e6:.1f} M",
            f"{entry['macs'] / 1e9:.1f}",
            scores or "trunk",
            f"{entry['megabytes']:.0f}",
            "yes" if entry["here"] else "no",
        )
    Console().print(table)
    box = next(entry for entry in entries if entry["weights"] == "voc")
    print(
        "effseg.create_model(NAME, weights=WEIGHTS). GMACs: effseg_* at 512 pixels, others at the\n"
        f"model's size.\nvoc: in the package; {box['scored_on']}.\n"
        "coco: effdet's detectors, fetched on the first use; on COCO val2017, as effdet states.\n"
        "coco-detection: encoder and BiFPN of those, to train from.\n"
        "Licence of all: Apache-2.0. --json has sources and files."
    )
