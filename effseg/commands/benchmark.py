"""``effseg benchmark``: speed and memory of a model on this machine."""

import argparse
import contextlib
import json
import sys
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    benchmark = commands.add_parser("benchmark", help="speed and memory of a model on this machine")
    benchmark.add_argument("model", help="a model's name, run directory, saved model, or hub id")
    benchmark.add_argument("--size", type=int, help="side of the images, pixels")
    benchmark.add_argument("--batch", type=int, default=1, help="images at a time (1)")
    benchmark.add_argument("--rounds", type=int, default=9, help="alternating rounds (9)")
    benchmark.add_argument("--compile", action="store_true", help="measure torch.compile, too")
    benchmark.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu, cuda")
    benchmark.add_argument("--json", action="store_true", help="print one JSON object")
    benchmark.set_defaults(run=_benchmark)


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
