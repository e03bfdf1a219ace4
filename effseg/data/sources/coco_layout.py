"""Where the annotation file and the images of COCO's format are."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from effseg import resources
from effseg.errors import InputError

_ANNOTATIONS = ("annotations/instances_{split}.json", "{split}/_annotations.coco.json")
"""COCO's and CVAT's; Roboflow's."""
_IMAGES = ("{split}", "images/{split}", "images", "")
"""COCO's and Roboflow's; CVAT's; one folder for all splits; names that begin with the folder."""


def find_annotations(
    root: str | Path | None, split: str, template: str | None = None
) -> tuple[Path, Path]:
    """Return the data's folder, and its annotation file, which may be missing.

    `root` is that folder, or its parent if it is named `coco2017` or `coco`; None: the variable
    `EFFSEG_DATA`, or `./datasets` if it is not set. `template` is the path of the file in the
    folder, with `{split}`; None: COCO's, CVAT's, Roboflow's. InputError: no such folder.
    """
    base = resources.data_root(root)
    folders = (base / "coco2017", base / "coco", base)
    templates = _ANNOTATIONS if template is None else (template,)
    files = [(f, f / each.replace("{split}", split)) for f in folders for each in templates]
    present = [pair for pair in files if pair[1].is_file()]
    possible = [pair for pair in files[:: len(templates)] if pair[1].parent.is_dir()]
    if present or possible:
        return (present or possible)[0]
    raise InputError(
        f"{base}: no COCO here; expected annotations/instances_SPLIT.json beside the folders of "
        f"images, or SPLIT/_annotations.coco.json; looked at {', '.join(map(str, folders))} "
        "(set the root, or the variable EFFSEG_DATA)"
    )


def find_images(
    folder: Path, annotations: Path, split: str, names: Sequence[str], template: str | None = None
) -> list[Path]:
    """Return the files of the images, in the first folder that has any of the first ten.

    If a name contains folders that do not exist (of another machine, or above the data), its last
    part alone is used, unless another image has the same. `template` is the folder of the images
    in `folder`, with `{split}`; None: COCO's, CVAT's, Roboflow's, or that of the annotations.
    """
    templates = _IMAGES if template is None else (template,)
    folders = [folder / each.replace("{split}", split) for each in templates]
    if template is None:
        folders.append(annotations.parent)
    last_parts = [name.rpartition("/")[2] for name in names]
    candidates = [(base, form[:10]) for form in (names, last_parts) for base in folders]
    present = (base for base, form in candidates if any((base / n).is_file() for n in form))
    base = next(present, folders[0])
    count = Counter(last_parts)
    files = [base / name for name in names]
    for i, (name, last) in enumerate(zip(names, last_parts, strict=True)):
        if last != name and count[last] == 1 and not files[i].is_file():
            files[i] = base / last
    return files
