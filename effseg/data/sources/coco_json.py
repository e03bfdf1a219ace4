"""Read the lists of a large JSON file in pieces."""

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from effseg.errors import InputError

_CHUNK = 1 << 20  # characters
_SPACE = re.compile(r"[ \t\r\n]*")


def entries(path: Path, keys: Collection[str], seen: set[str]) -> Iterator[tuple[str, Any]]:
    """Yield (key, entry) of the lists `keys` of a JSON object, with a piece of it in memory.

    Other values and a byte order mark are skipped. `seen` receives the keys that the file has.
    InputError: the file is not a JSON object, or the value of one of the keys is not a list.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = _Text(file)
            for _ in text.items("{}"):
                key = text.value()
                text.take(":")
                if key not in keys:
                    text.value()
                    continue
                if text.peek() != "[":
                    raise InputError(f"{path}: {key} is no list, expected COCO's instance format")
                seen.add(key)
                for _ in text.items("[]"):
                    yield key, text.value()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not valid JSON (cut off?): {error}") from error


class _Text:
    """A JSON text, of which a window is in memory, and a position in it."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.at = file, "", 0
        self.decoder = json.JSONDecoder()

    def _more(self) -> bool:
        """Read on; the window at least doubles, so that a large value is not scanned too often."""
        added = self.file.read(max(_CHUNK, len(self.text) - self.at))
        if added:
            self.text, self.at = self.text[self.at :] + added, 0
        return bool(added)

    def peek(self) -> str:
        """Skip white space and return the next character, empty at the end."""
        while True:
            self.at += len(_SPACE.match(self.text, self.at)[0])  # type: ignore[index]
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def take(self, expected: str) -> str:
        """Return the next character, which must be one of those expected."""
        character = self.peek()
        if not character or character not in expected:
            raise json.JSONDecodeError(f"expected {' or '.join(expected)}", self.text, self.at)
        self.at += 1
        return character

    def items(self, brackets: str) -> Iterator[None]:
        """Stop before each item of a list or an object."""
        self.take(brackets[0])
        if self.peek() == brackets[1]:
            self.take(brackets[1])
            return
        yield
        while self.take("," + brackets[1]) == ",":
            yield

    def value(self) -> Any:
        """Decode the next value."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            if end == len(self.text) and isinstance(value, int | float) and self._more():
                continue  # the number may go on
            self.at = end
            return value
