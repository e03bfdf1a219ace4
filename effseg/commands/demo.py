"""`effseg demo`: a page on this machine that shows what a model sees in an image."""

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    demo = commands.add_parser("demo", help="a page to drop images on, at 127.0.0.1")
    demo.add_argument("--model", default="voc", help="run directory, saved model, or hub id (voc)")
    demo.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    demo.add_argument("--port", type=int, help="port (the first free one from 7860 on)")
    demo.add_argument("--device", help="cpu, cuda, … (cuda if available)")
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    import torch

    from effseg.models.pretrained import from_pretrained
    from effseg.report.demo import serve

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = from_pretrained(options.model).eval().to(device)
    serve(model, options.model, options.host, options.port)
