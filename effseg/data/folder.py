"""Your own data: a folder of photos, a folder of masks, and a list of class names."""

# H W pixels, K classes

from collections.abc import Sequence
from pathlib import Path

from effseg import resources
from effseg.data.dataset import Transform
from effseg.data.files import PHOTO_SUFFIXES
from effseg.data.pairs import Pair, PairDataset
from effseg.data.samples import IGNORE_INDEX, Classes
from effseg.errors import InputError

_MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")


class FolderSegmentation(PairDataset):
    """Photos in ``images/`` and masks in ``masks/``, matched by file name without the suffix.

    With a split the folders are ``images/SPLIT`` and ``masks/SPLIT``. A mask holds class indices
    (palette or grey PNG) or the colours of the class list (RGB PNG); 255 is ignored.

    Samples: ``image`` (3, H, W) uint8 RGB, ``mask`` (H, W) uint8 with 0 … K-1 and 255.

    Args:
        root: the folder that holds ``images`` and ``masks``.
        classes: a class list, or what :func:`load_classes` takes.
        split: name of the sub-folders, or None where there are none.
        transform: a function from a sample to a sample.
        check_files: look for partners now. False leaves it to the reading, for
            :func:`effseg.data.check.check`, which lists every photo and mask left alone.

    Raises:
        InputError: a folder is missing or empty, a photo has no mask or a mask no photo, or two
            files share a name.
    """

    def __init__(
        self,
        root: str | Path,
        classes: Sequence[str] | str | Path | Classes,
        split: str | None = None,
        transform: Transform | None = None,
        check_files: bool = True,
    ) -> None:
        """Match photos and masks."""
        base = Path(root).expanduser()
        folders = [base / kind / (split or "") for kind in ("images", "masks")]
        for folder in folders:
            if not folder.is_dir():
                raise InputError(
                    f"{folder}: no such folder; expected photos in {folders[0]} "
                    f"and masks of the same names in {folders[1]}"
                )
        photos = _by_stem(folders[0], PHOTO_SUFFIXES, "photo")
        masks = _by_stem(folders[1], _MASK_SUFFIXES, "mask")
        if check_files:
            _check_partners(photos, masks, "mask", folders[1])
            _check_partners(masks, photos, "photo", folders[0])
        pairs = [
            Pair(
                stem,
                photos.get(stem, folders[0] / f"{stem}.jpg"),
                masks.get(stem, folders[1] / f"{stem}.png"),
            )
            for stem in sorted(photos.keys() | masks.keys())
        ]
        known = classes if isinstance(classes, Classes) else load_classes(classes)
        super().__init__(pairs, known, transform, folders[0], check_files)
        self.split = split


def load_classes(classes: Sequence[str] | str | Path) -> Classes:
    """Make a class list.

    Args:
        classes: the names, background first; or the path of a text file with one name a line; or
            of a YAML file whose key ``classes`` lists names or ``{name, colour: [r, g, b]}``, as
            the cards do. Without colours, VOC's are used.

    Raises:
        InputError: the file cannot be used, there are fewer than 2 or more than 255 classes, or a
            name comes twice.
    """
    source = "classes"
    colours: list[tuple[int, ...]] = []
    if isinstance(classes, str | Path):
        source = str(classes)
        path = Path(classes).expanduser()
        entries = _read_entries(path)
    else:
        entries = list(classes)
    names = []
    for entry in entries:
        if isinstance(entry, dict) and "name" in entry:
            names.append(str(entry["name"]))
            if "colour" in entry:
                colours.append(_colour(entry["colour"], source))
        elif isinstance(entry, str):
            names.append(entry)
        else:
            raise InputError(f"{source}: class {entry!r}, expected a name or {{name, colour}}")
    if not 2 <= len(names) <= IGNORE_INDEX:
        raise InputError(
            f"{source}: {len(names)} classes, expected 2 to {IGNORE_INDEX}, background first"
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"{source}: class {twice[0]!r} comes twice")
    if not colours:
        return Classes.from_names(names)
    if len(colours) != len(names):
        raise InputError(f"{source}: {len(colours)} colours for {len(names)} classes")
    return Classes(tuple(names), tuple((r, g, b) for r, g, b in colours))


def _read_entries(path: Path) -> list[object]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a list of class names or a file of them")
    if path.suffix not in (".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not a text file of class names") from error
        return [line.strip() for line in text.splitlines() if line.strip()]
    content = resources.load_yaml(path).get("classes")
    if not isinstance(content, list):
        raise InputError(f"{path}: expected the key classes with a list of names")
    return content


def _colour(value: object, source: str) -> tuple[int, ...]:
    match value:
        case [int(), int(), int()] if all(0 <= part <= 255 for part in value):
            return tuple(value)
    raise InputError(f"{source}: colour {value!r}, expected [r, g, b] from 0 to 255")


def _by_stem(folder: Path, suffixes: tuple[str, ...], kind: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix.lower() not in suffixes:
            raise InputError(f"{path}: no {kind}; expected one of {', '.join(suffixes)}")
        if path.stem in found:
            raise InputError(
                f"{path}: a second {kind} of this name, beside {found[path.stem].name}"
            )
        found[path.stem] = path
    if not found:
        raise InputError(f"{folder}: no {kind}s found, expected at least one")
    return found


def _check_partners(
    files: dict[str, Path], partners: dict[str, Path], kind: str, folder: Path
) -> None:
    alone = sorted(files.keys() - partners.keys())
    if alone:
        raise InputError(
            f"{files[alone[0]]}: its {kind} {alone[0]}.* is missing in {folder} "
            f"({len(alone)} of {len(files)} without one)"
        )
