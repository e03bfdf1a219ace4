"""Where the annotation file and the images of COCO's format lie."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from effseg import resources
from effseg.errors import InputError

_ANNOTATIONS = ("annotations/instances_{split}.json", "{split}/_annotations.coco.json")
"""COCO's and CVAT's; Roboflow's."""
_IMAGES = ("{split}", "images/{split}", "images", "")
"""COCO's and Roboflow's; CVAT's; of one file for all; the names begin with the folder."""


def find_annotations(
    root: str | Path | None, split: str, template: str | None = None
) -> tuple[Path, Path]:
    """Find the data's folder, and the annotation file in it, which may be missing.

    Args:
        root: that folder, or one that holds it as `coco2017` or `coco`; None looks at the
            variable `EFFSEG_DATA`, and without it at `./datasets`.
        split: name of the split.
        template: path of the file in the folder, `{split}` stands for the split; None looks for
            COCO's, CVAT's and Roboflow's.

    Raises:
        InputError: no such folder; the message names the layout and the folders looked at.
    """
    base = resources.data_root(root)
    folders = (base / "coco2017", base / "coco", base)
    templates = _ANNOTATIONS if template is None else (template,)
    for folder in folders:
        for each in templates:
            path = folder / each.replace("{split}", split)
            if path.is_file():
                return folder, path
    for folder in folders:
        path = folder / templates[0].replace("{split}", split)
        if path.parent.is_dir():
            return folder, path
    raise InputError(
        f"{base}: no COCO here; expected annotations/instances_SPLIT.json beside the folders of "
        f"images, or SPLIT/_annotations.coco.json; looked at {', '.join(map(str, folders))} "
        "(set the root, or the variable EFFSEG_DATA)"
    )


def find_images(
    folder: Path, annotations: Path, split: str, names: Sequence[str], template: str | None = None
) -> list[Path]:
    """Return the files of the images: all in the first folder that has one of the first of them.

    A name with folders that are not there, of another machine or above the data, stands for the
    file of that name in the folder, if no other image has it.

    Args:
        folder: the data's folder.
        annotations: the annotation file; its own folder is looked at as well.
        split: name of the split.
        names: file names of the images.
        template: the folder in `folder`, `{split}` stands for the split; None looks for it.
    """
    templates = _IMAGES if template is None else (template,)
    folders = [folder / each.replace("{split}", split) for each in templates]
    folders += [annotations.parent] if template is None else []
    bare = Counter(name.rpartition("/")[2] for name in names)
    forms: tuple[Callable[[str], str], ...] = (str, lambda name: name.rpartition("/")[2])
    for form in forms:
        for each in folders:
            if any((each / form(name)).is_file() for name in names[:10]):
                return [_file(each, name, bare) for name in names]
    return [folders[0] / name for name in names]


def _file(folder: Path, name: str, bare: Mapping[str, int]) -> Path:
    last = name.rpartition("/")[2]
    if last != name and bare[last] == 1 and not (folder / name).is_file():
        return folder / last
    return folder / name
