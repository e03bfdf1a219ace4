"""`effseg report`: one run, or several side by side, as an HTML file."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    report = commands.add_parser("report", help="one run, or several side by side, as HTML")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    report.add_argument("--output", type=Path, help="HTML file (report.html in the first run)")
    report.add_argument("--device", help="cpu, cuda, … (cuda if available)")
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    from effseg.report.page import write_report

    output = options.output or options.runs[0] / "report.html"
    for line in write_report(options.runs, output, options.device):
        print(line)
    print(f"report: {output}")
