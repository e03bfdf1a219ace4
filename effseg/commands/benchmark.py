"""`effseg benchmark`: speed and memory of a model on this machine, by every engine."""

import argparse
import contextlib
import json
import sys
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    benchmark = commands.add_parser("benchmark", help="speed and memory of a model on this machine")
    benchmark.add_argument(
        "model", help="a model's name, run directory, saved model, hub id or exported file"
    )
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
    with contextlib.redirect_stdout(sys.stderr):  # the libraries talk
        report = benchmark(options.model, **{key: getattr(options, key) for key in keys})
    if options.json:
        print(json.dumps(report))
        return
    from rich.console import Console
    from rich.table import Table

    title = "{model}, {batch} × {size}², {device}, {threads} threads, torch {torch}"
    table = Table(title=title.format(**report), title_justify="left")
    columns = ("", "ms, median", "ms, range", "images per second", "peak MiB", "MiB", "agreement")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    form = "{name}|{ms:.2f}|{least:.2f} to {most:.2f}|{images_per_second:.1f}|{peak}|{size_mib:.1f}"
    for row in report["rows"]:
        peak = "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        cells = form.format(**row, peak=peak) + f"|{100 * row['agreement']:.3f} %"
        table.add_row(*cells.split("|"))
    Console().print(table)
    for note in report["notes"]:
        print(note)
