"""`effseg data`: check, show or download a dataset."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effseg.errors import InputError, needs


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    data = commands.add_parser("data", help="check, show or download a dataset")
    actions = data.add_subparsers(title="actions", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="read every image and label, list what is wrong")
    _add_sources(check)
    check.set_defaults(run=_data_check)
    show = actions.add_parser("show", help="draw images with their labels, as HTML or PNG")
    _add_sources(show)
    show.add_argument("--batches", action="store_true", help="crops as training sees them, too")
    show.add_argument("--images", type=int, default=12, help="images of each source (12)")
    show.add_argument("--output", type=Path, required=True, help="file, .html or .png")
    show.set_defaults(run=_data_show)
    download = actions.add_parser("download", help="fetch VOC 2012 and SBD")
    add = download.add_argument
    add("name", nargs="?", default="voc2012", choices=("voc2012",), help="dataset (voc2012)")
    add("--root", type=Path, default=Path("datasets"), help="folder (./datasets)")
    download.set_defaults(run=_data_download)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="recipe: all sources that it trains and scores on")
    parser.add_argument(
        "--root", help="folder of the data; without it the recipe's, EFFSEG_DATA or ./datasets"
    )
    parser.add_argument("--split", action="append", help="train, val, … (repeat for several)")
    parser.add_argument("--classes", help="file of class names: the data are images/ and masks/")
    coco = (
        "the data are in COCO's format; with file the categories are taken as they are, with "
        "coco80 or voc21 they must be COCO's"
    )
    parser.add_argument("--coco", nargs="?", const="auto", help=coco)
    parser.add_argument("--boxes", action="store_true", help="boxes in place of masks")


def _data_show(options: argparse.Namespace) -> None:
    from effseg.report.show import images_of, training_crops, write_groups

    if options.images < 1:
        raise InputError(f"--images {options.images}: expected at least 1")
    if options.output.suffix.lower() not in (".html", ".png"):
        raise InputError(f"--output {options.output}: expected a name in .html or .png")
    sources, data = _sources(options)
    for name, source in sources:
        source.settle(_settled_by(name, sources))
    groups = [images_of(name, source, options.images) for name, source in sources]
    if options.batches:
        with needs("train"):
            from effseg.data.datamodule import ImageDataModule

        data = data or ImageDataModule(train={"data": sources[0][1]}, batch_size=1)
        groups.append(training_crops(data, options.images))
    write_groups(groups, options.output)
    print(f"{sum(len(group.pictures) for group in groups)} pictures: {options.output}")


def _data_check(options: argparse.Namespace) -> None:
    from effseg.data.check import check

    problems = 0
    sources, data = _sources(options)
    for name, source in sources:
        report = check(source, progress=True, train=_settled_by(name, sources))
        report.problems += [f"{name}: {line}" for line in report.nothing]
        _print_report(name, report)
        problems += len(report.problems)
    if problems:
        raise InputError(f"{problems} problems, listed above; expected none")
    if data is not None:
        data.setup("fit")  # what shows between sources only: images of both, the label space


def _print_report(name: str, report: Any) -> None:
    """Print one source's classes, sizes, and every problem on a line."""
    from rich.console import Console

    from effseg.metrics.tables import as_table, percent

    masks, boxes = bool(report.class_pixels.any()), bool(report.boxes)
    columns = ["class", "images", *(["pixels"] if masks else []), *(["boxes"] if boxes else [])]
    rows = []
    for i, label in enumerate(report.class_names):
        if i == 0 and not masks:
            continue  # boxes have no background
        row = [label, str(int(report.class_images[i]))]
        row += [percent(float(report.class_shares[i]))] if masks else []
        row += [str(int(report.class_boxes[i]))] if boxes else []
        rows.append(row)
    if masks:
        rows.append(["ignored", "", percent(report.ignored_share)])
    console = Console()
    console.print(as_table(f"{name}: {report.images} images", columns, rows))
    if report.sizes:
        ranges = [f"{min(sides)} … {max(sides)}" for sides in zip(*report.sizes, strict=True)]
        console.print("height {}, width {} pixels".format(*ranges), highlight=False)
    for unit, absent in report.absent.items():
        if absent:
            print(f"no {unit} of: {', '.join(absent)}")
    for problem in report.problems:
        print(problem)


def _sources(options: argparse.Namespace) -> tuple[list[tuple[str, Any]], Any]:
    """Return name and source of all to check or show, drawn if need be, and a recipe's data."""
    data = None
    for kind, others in (("config", ("split", "coco", "boxes")), ("classes", ("coco", "boxes"))):
        unused = [key for key in others if getattr(options, key)]
        if getattr(options, kind) is not None and unused:
            raise InputError(f"--{unused[0]} beside --{kind}, expected one of them")
    if options.config is not None:
        with needs("train"):
            from effseg.training.recipes import read_data

        data = read_data(options.config, options.root, options.classes)
    sources = list(_by_split(options)) if data is None else data.sources()
    for _, source in sources:
        source.prepare()
    return sources, data


def _settled_by(name: str, sources: list[tuple[str, Any]]) -> list[Any]:
    """Return the training sources if `name` is a source of evaluation, see `Source.settle`."""
    if name.startswith("train"):
        return []
    return [source for other, source in sources if other.startswith("train")]


def _by_split(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    from effseg.data import COCO, VOC, Folder, Shapes
    from effseg.data.sources.shapes import drawn_settings

    masks: Any
    boxes: Any
    drawn = drawn_settings(options.root)
    for split in options.split or (["train2017", "val2017"] if options.coco else ["train", "val"]):
        if options.coco:
            masks, boxes = (None, options.coco) if options.boxes else (options.coco, "auto")
            source: Any = COCO(options.root, split, masks, boxes)
        elif options.classes is not None:
            source = Folder(options.root or ".", options.classes, split)
        elif drawn is not None:
            masks, boxes = (None, (0.0, 1.0)) if options.boxes else ((0.0, 1.0), None)
            source = Shapes(options.root, split, masks, boxes, **drawn)
        else:
            masks, boxes = (None, split) if options.boxes else (split, None)
            source = VOC(options.root, masks, boxes)
        yield split, source


def _data_download(options: argparse.Namespace) -> None:
    from effseg.data.download import download_voc2012

    print(f"VOC 2012 is in {download_voc2012(options.root)}")
