"""Where the annotation file and the images of COCO's format lie."""

from collections.abc import Sequence
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
        root: that folder, or one that holds it as ``coco2017`` or ``coco``; None looks at the
            variable ``EFFSEG_DATA``, and without it at ``./datasets``.
        split: name of the split.
        template: path of the file in the folder, ``{split}`` stands for the split; None looks for
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
) -> Path:
    """Return the folder that the file names are in: the first that has one of the first images.

    Args:
        folder: the data's folder.
        annotations: the annotation file; its own folder is looked at as well.
        split: name of the split.
        names: file names of the images.
        template: the folder in ``folder``, ``{split}`` stands for the split; None looks for it.
    """
    if template is not None:
        return folder / template.replace("{split}", split)
    folders = [folder / each.replace("{split}", split) for each in _IMAGES]
    for each in [*folders, annotations.parent]:
        if any((each / name).is_file() for name in names[:10]):
            return each
    return folders[0]
