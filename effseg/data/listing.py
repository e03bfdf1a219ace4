"""The files of a folder: listed, by name, looked for."""

import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from effseg.errors import InputError

# Files beside images that are obviously not images
_NOTES = (".txt", ".csv", ".json", ".xml", ".yaml", ".yml", ".md", ".html")
_SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir"}


def missing_or_link(path: Path) -> str:
    """Describe a file that does not exist."""
    return f"a broken link to {os.readlink(path)}" if path.is_symlink() else "missing"


def look_for(paths: Sequence[Path], kind: str, source: str) -> None:
    """Check that files, and the files that links point to, exist.

    InputError: some do not; the first is named, all are counted.
    """
    # One listing per folder: ten thousand single look-ups take minutes on a network drive.
    present = {
        folder: {e.name for e in _entries(folder) if not e.is_symlink() or e.is_file()}
        for folder in {path.parent for path in paths}
    }
    missing = [path for path in paths if path.name not in present[path.parent]]
    if missing:
        count = f"{len(missing)} of {len(paths)} {kind}s missing"
        link = missing[0].is_symlink()
        problem = f"is {missing_or_link(missing[0])}" if link else "not found"
        raise InputError(f"{missing[0]}: {kind} {problem} ({count}, listed by {source})")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """List a folder; one that does not exist has no entries."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror}") from error


def is_left_behind(name: str) -> bool:
    """Return whether a file or folder is hidden or a system file (Thumbs.db)."""
    return name.startswith(".") or name.lower() in _SYSTEM_FILES


def walk(folder: Path, nested: bool = True, without: Path | None = None) -> Iterator[Path]:
    """Yield the files of a folder sorted by path, without hidden and system files.

    `nested` includes its sub-folders, but for the one `without`.
    """
    for _, path in walk_named(folder, nested, without):
        yield path


def walk_named(
    folder: Path, nested: bool = True, without: Path | None = None, inside: str = ""
) -> Iterator[tuple[str, Path]]:
    """Yield the files of `walk`, each with its path in the folder, without suffix, in NFC.

    macOS writes names in NFD, where an umlaut is two characters, beside names of other systems.
    pathlib's `relative_to` and `with_suffix` would take half of the time. `inside` is the start of
    the names.
    """
    for entry in sorted(_entries(folder), key=lambda entry: entry.name):
        path = folder / entry.name
        if is_left_behind(entry.name) or path == without:
            continue
        if not entry.is_dir():
            yield nfc(f"{inside}{path.stem}"), path
        elif nested:
            yield from walk_named(path, nested, without, f"{inside}{entry.name}/")


def nfc(name: str) -> str:
    """Return a name in NFC, by which names are compared."""
    return unicodedata.normalize("NFC", name)


def resolve(paths: Sequence[Path]) -> list[Path]:
    """Resolve links; folders are read once each, which is faster than `Path.resolve`."""
    folders = {folder: folder.resolve() for folder in {path.parent for path in paths}}
    links = {folder / e.name for folder in folders for e in _entries(folder) if e.is_symlink()}
    return [p.resolve() if p in links else folders[p.parent] / p.name for p in paths]


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

    `suffixes` are in lower case; any other file but notes is an error, which calls it no `kind`.
    All names end with `ending`. `beside` is the ending of another kind of files in the same folder,
    which are left out; "": they have other suffixes; None: there is no other kind. The rest is as
    in `walk`.
    """
    files: dict[str, Path] = {}
    ending, beside = nfc(ending), beside and nfc(beside)
    for name, path in walk_named(folder, nested, without):
        if path.suffix.lower() not in suffixes:
            if beside is None and path.suffix.lower() not in _NOTES:
                raise InputError(f"{path}: no {kind}; expected one of {', '.join(suffixes)}")
            continue
        if beside and name.endswith(beside):
            continue
        if not name.endswith(ending):
            if beside is not None:
                continue
            raise InputError(f"{path}: expected a name that ends with {ending!r}")
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path}: {kind} is {missing_or_link(path)}")
        name = name.removesuffix(ending)
        if name in files:
            raise InputError(f"{path}: a second {kind} of this name, beside {files[name].name}")
        files[name] = path
    if not files:
        raise InputError(f"{folder}: no {kind}s found, expected at least one")
    return files
