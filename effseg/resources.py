"""Read text and YAML; find what ships with the package: recipes in configs/, cards in datasets/."""

import os
from pathlib import Path
from typing import Any

import yaml

from effseg.errors import InputError, flat

_PACKAGE = Path(__file__).parent


def folder(kind: str) -> Path:
    """Return the folder of the shipped `configs` or `datasets`.

    In a checkout (editable install) they lie beside the package; in a wheel, inside it.
    """
    inside = _PACKAGE / kind
    return inside if inside.is_dir() else _PACKAGE.parent / kind


def find(kind: str, name: str) -> Path:
    """Return the path of a shipped YAML file, by its name with or without `.yaml`."""
    base = folder(kind)
    path = base / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        available = ", ".join(sorted(p.stem for p in base.rglob("*.yaml"))) or "none"
        raise InputError(f"{kind}/{name}: no such file; available: {available}")
    return path


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte-order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read: not a text file in UTF-8") from error


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; InputError for any other file."""
    text = read_text(path)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2026-02-30 is no date
        raise InputError(f"{path}: not valid YAML: {flat(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping, found {type(content).__name__}")
    return content


def data_root(root: str | Path | None) -> Path:
    """Return the data folder: `root`, else $EFFSEG_DATA, else ./datasets."""
    if root is None:
        root = os.environ.get("EFFSEG_DATA") or "datasets"
    return Path(root).expanduser()
