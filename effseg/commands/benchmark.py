"""`effseg benchmark`: speed and memory of a model on this machine, by every engine."""

import argparse
import contextlib
import json
import sys
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    benchmark = commands.add_parser("benchmark", help="speed and memory of a model on this machine")
    model = "a model's name, run directory, saved model, hub id or exported file"
    benchmark.add_argument("model", help=model)
    side = "side of the images, pixels (a detector's or a file's own, else 512)"
    benchmark.add_argument("--size", type=int, help=side)
    benchmark.add_argument("--batch", type=int, default=1, help="images at a time (1)")
    benchmark.add_argument("--rounds", type=int, default=9, help="alternating rounds (9)")
    benchmark.add_argument("--compile", action="store_true", help="measure torch.compile, too")
    benchmark.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu, cuda")
    benchmark.add_argument("--json", action="store_true", help="print one JSON object")
    benchmark.set_defaults(run=_benchmark)


def _benchmark(options: argparse.Namespace) -> None:
    from effseg.benchmark import benchmark

    keys = ("size", "batch", "rounds", "compile", "device")
    with contextlib.redirect_stdout(sys.stderr):  # the libraries print
        report = benchmark(options.model, **{key: getattr(options, key) for key in keys})
    if options.json:
        print(json.dumps(report))
        return
    from rich.console import Console

    from effseg.metrics.tables import as_table

    title = "{model}, {batch} × {size}², {device}, {threads} threads, torch {torch}"
    columns = ("", "ms, median", "ms, range", "images per second", "peak MiB", "MiB", "agreement")
    rows = [
        (
            row["name"],
            f"{row['ms']:.2f}",
            f"{row['least']:.2f} to {row['most']:.2f}",
            f"{row['images_per_second']:.1f}",
            "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            f"{row['size_mib']:.1f}",
            f"{100 * row['agreement']:.3f} %",
        )
        for row in report["rows"]
    ]
    Console().print(as_table(title.format(**report), columns, rows))
    for note in report["notes"]:
        print(note)
