"""`effseg demo`: a page on this machine that shows what a model sees in an image."""

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    demo = commands.add_parser("demo", help="a page to drop images on, at 127.0.0.1")
    demo.add_argument("--model", default="voc", help="as of effseg predict (voc)")
    demo.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    demo.add_argument("--port", type=int, help="port (the first free one from 7860 on)")
    demo.add_argument("--device", help="cpu, cuda, … (cuda if available)")
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    from effseg.report.demo import serve

    serve(options.model, options.model, options.host, options.port, options.device)
