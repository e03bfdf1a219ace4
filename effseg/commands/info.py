"""`effseg info`: parameters and multiply-adds of a model."""

import argparse
import json
from typing import Any

from effseg.errors import InputError


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    info = commands.add_parser("info", help="parameters and multiply-adds of a model")
    name = "a model's name, run directory, saved model, hub id or checkpoint; all names without it"
    info.add_argument("name", nargs="?", help=name)
    info.add_argument("--size", type=int, default=512, help="side of the image in pixels (512)")
    classes = (
        "of a name: K with the background (21); without for a detector (90); of a model with "
        "both heads the masks' K, and K - 1 for the boxes"
    )
    info.add_argument("--classes", type=int, help=classes)
    parts = ("context", "pyramid", "refinement")
    head = "parts of the per-pixel head that a name's model has beyond the paper's"
    info.add_argument("--head", nargs="+", choices=parts, default=[], help=head)
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> None:
    from effseg.models.pretrained import from_pretrained
    from effseg.models.registry import class_counts, list_models, summary

    if options.name is None:
        print(json.dumps(list_models()) if options.json else "\n".join(list_models()))
        return
    arguments: dict[str, Any] = {f"head_{part}": True for part in options.head}
    if options.name not in list_models():
        if options.classes is not None or options.head:
            raise InputError(
                f"--{'head' if options.head else 'classes'}: {options.name} is a trained model, "
                "expected a name that `effseg info` lists"
            )
        cost = summary(from_pretrained(options.name), options.size)
    else:
        if options.head and options.name.startswith("efficientdet"):
            raise InputError(f"--head: {options.name} has no per-pixel head")
        if options.classes is not None:
            joint = options.name.startswith("effsegdet")
            counts = class_counts(options.name, options.classes)
            arguments |= counts if joint else {"classes": options.classes}
        cost = summary(options.name, options.size, **arguments)
    if options.json:
        print(json.dumps(cost))
        return
    from rich.console import Console

    from effseg.metrics.tables import as_table

    parts = cost["parts"] | {"total": cost}
    rows = [(name, f"{p['params']:,}", f"{p['macs'] / 1e9:.3f}") for name, p in parts.items()]
    title = f"{cost['name']} at {cost['size']} × {cost['size']}"
    table = as_table(title, ("part", "parameters", "GMACs"), rows)
    table.rows[-2].end_section = True
    Console().print(table)
