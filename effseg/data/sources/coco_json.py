"""A large JSON file of lists, read piece by piece."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from effseg.errors import InputError

_CHUNK = 1 << 20  # characters
_NO_LIST = object()


def entries(path: Path, keys: Collection[str], seen: set[str]) -> Iterator[tuple[str, Any]]:
    """Yield (key, entry) of the lists in a JSON object, with a piece of the file in memory.

    Args:
        path: the file; a byte order mark is read over.
        keys: the lists to read; other values are read over.
        seen: gets those of the keys that are there, with an empty list too.

    Raises:
        InputError: the file is no JSON object, or one of the keys holds something else than a list.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for key, entry in _Text(file).entries(keys, seen):
                if entry is _NO_LIST:
                    raise InputError(f"{path}: {key} is no list, expected COCO's instance format")
                yield key, entry
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not valid JSON (cut off?): {error}") from error


class _Text:
    """A JSON text of which only a window is in memory."""

    def __init__(self, file: Any) -> None:
        self.file, self.text, self.at = file, "", 0
        self.decoder = json.JSONDecoder()

    def _more(self) -> bool:
        """Read on; the window at least doubles, so that a large value is not scanned too often."""
        remaining = self.text[self.at :]
        added = self.file.read(max(_CHUNK, len(remaining)))
        self.text, self.at = remaining + added, 0
        return bool(added)

    def _peek(self) -> str:
        """Go to the next character that is no space, and return it; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def _take(self, expected: str) -> str:
        character = self._peek()
        if not character or character not in expected:
            raise json.JSONDecodeError(f"expected {' or '.join(expected)}", self.text, self.at)
        self.at += 1
        return character

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            if end == len(self.text) and isinstance(value, int | float) and self._more():
                continue  # the number may go on
            self.at = end if end < len(self.text) else len(self.text)
            return value

    def entries(self, keys: Collection[str], seen: set[str]) -> Iterator[tuple[str, Any]]:
        """Yield (key, entry) of the lists; `_NO_LIST` for a key with another value."""
        self._take("{")
        if self._peek() == "}":
            return
        while True:
            key = self._value()
            self._take(":")
            if key not in keys:
                self._value()
            elif self._peek() != "[":
                yield key, _NO_LIST
            else:
                seen.add(key)
                self._take("[")
                if self._peek() == "]":
                    self._take("]")
                else:
                    yield key, self._value()
                    while self._take(",]") == ",":
                        yield key, self._value()
            if self._take(",}") == "}":
                return
