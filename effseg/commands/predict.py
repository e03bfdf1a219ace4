"""`effseg predict`: images, folders and videos to masks, boxes and pictures of them."""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from effseg.errors import InputError


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    predict = commands.add_parser("predict", help="images and videos to masks, boxes, pictures")
    add = predict.add_argument
    model = "name, run directory, saved model, hub id, checkpoint or exported file (voc)"
    add("--model", default="voc", help=model)
    add("--output", type=Path, default=Path("predictions"), help="folder (./predictions)")
    add("inputs", nargs="+", metavar="IMAGE|DIR|GLOB|VIDEO")
    protocols = "whole, sizeN, shortN, maxN, slideN, ms+flip (the model's)"
    add("--protocol", metavar="NAME", help=protocols)
    add("--score", type=float, metavar="S", help="least score of a box, 0 to 1 (0.3)")
    add("--batch-size", type=int, default=4, metavar="N", help="images (4)")
    add("--dtype", default="float32", help="float32, bfloat16 or float16 (float32)")
    add("--device", help="cpu, cuda, … (cuda if available)")
    add("--no-pictures", action="store_true", help="draw no overlays")
    add("--format", default="png", help="png, jsonl or coco (png)")
    add("--strict", action="store_true", help="stop at the first bad input")
    predict.set_defaults(run=_predict)


def _predict(options: argparse.Namespace) -> None:
    from effseg.inference.draw import SCORE
    from effseg.inference.files import name_inputs
    from effseg.inference.folder import ResultFolder, predict_files
    from effseg.inference.predictor import Predictor

    names = name_inputs(options.inputs, options.output)
    files = list(names)
    score = SCORE if options.score is None else options.score
    predictor = Predictor(
        options.model,
        options.protocol,
        score=score,
        batch_size=options.batch_size,
        device=options.device,
        dtype=options.dtype,
    )
    if options.score is not None and "detection" not in predictor.tasks:
        raise InputError(f"--score: {options.model} has no boxes, expected a detector")
    masks = "segmentation" in predictor.tasks
    protocol = predictor.protocol.name if masks else predictor.box_protocol
    settings = {
        "model": options.model,
        "changed": _changed(Path(options.model)),
        "protocol": protocol,
        "score": score,
        "dtype": options.dtype,
    }
    if options.protocol:  # the same one unchosen gives way on large images
        settings["chosen"] = options.protocol
    folder = ResultFolder(
        options.output, names, settings, masks, options.format, not options.no_pictures
    )
    if folder.done:
        print(f"{len(folder.done)} of {len(files)} are in {options.output} already: skipped")
    start = time.perf_counter()
    with _bar(f"predict ({protocol})", len(files), len(folder.done)) as (advance, say):
        count, failures = predict_files(predictor, files, folder, options.strict, advance, say)
    rate = count / max(time.perf_counter() - start, 1e-9)
    if count:
        by_protocol = ", ".join(f"{name} ({n})" for name, n in folder.protocols.most_common())
        protocol = by_protocol if len(folder.protocols) > 1 else next(iter(folder.protocols))
        print(f"{count} images to {options.output}, {rate:.1f} a second (protocol: {protocol})")
    for failure in failures:
        print(failure, file=sys.stderr)
    if failures:
        raise InputError(f"{len(failures)} of {len(files)} inputs: not predicted")


@contextmanager
def _bar(title: str, total: int, done: int) -> Iterator[tuple[Any, Any]]:
    """Show a bar with images a second on a terminal; yield what moves it and what prints above."""
    from rich import progress as rich
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True)
    columns = (
        *(rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn()),
        *(rich.TextColumn("{task.fields[rate]:.1f} images/s"), rich.TimeRemainingColumn()),
    )
    start, images = time.perf_counter(), 0
    with rich.Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total, completed=done, rate=0.0)

        def advance(count: int, whole: bool) -> None:
            nonlocal images
            images += count
            speed = images / max(time.perf_counter() - start, 1e-9)
            progress.update(task, advance=int(whole), rate=speed)

        yield advance, lambda text: console.print(text, highlight=False, markup=False)


def _changed(model: Path) -> float | None:
    """Return when a model on this disk was written last."""
    files = [f for f in (model, *model.rglob("model.safetensors")) if f.is_file()]
    return max((file.stat().st_mtime for file in files), default=None)
