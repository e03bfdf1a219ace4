"""The files of a folder by name."""

from pathlib import Path

from effseg.data.files import missing_or_link, walk
from effseg.errors import InputError

# Files beside images that are obviously not images
_NOTES = (".txt", ".csv", ".json", ".xml", ".yaml", ".yml", ".md", ".html")


def by_name(
    folder: Path,
    suffixes: tuple[str, ...],
    kind: str,
    ending: str = "",
    beside: str | None = None,
    nested: bool = True,
    without: Path | None = None,
) -> dict[str, Path]:
    """Return files by their path in the folder, without suffix and ending.

    Args:
        folder: the folder.
        suffixes: the files' suffixes in lower case; any other file but notes is an error.
        kind: what to call a file in an error.
        ending: what the names end with.
        beside: the ending of another kind of files in the same folder, which are left out; "": they
            have other suffixes; None: there is no other kind.
        nested: see `walk`.
        without: see `walk`.

    Raises:
        InputError: a file of another suffix or ending, a broken link, two files of one name, or no
            file at all.
    """
    files: dict[str, Path] = {}
    for path in walk(folder, nested, without):
        if path.suffix.lower() not in suffixes:
            if beside is None and path.suffix.lower() not in _NOTES:
                raise InputError(f"{path}: no {kind}; expected one of {', '.join(suffixes)}")
            continue
        if beside and path.stem.endswith(beside):
            continue
        if not path.stem.endswith(ending):
            if beside is not None:
                continue
            raise InputError(f"{path}: expected a name that ends with {ending!r}")
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path}: {kind} is {missing_or_link(path)}")
        name = path.relative_to(folder).with_suffix("").as_posix().removesuffix(ending)
        if name in files:
            raise InputError(f"{path}: a second {kind} of this name, beside {files[name].name}")
        files[name] = path
    if not files:
        raise InputError(f"{folder}: no {kind}s found, expected at least one")
    return files
