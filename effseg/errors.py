"""The exception for bad input, and notes to the user."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SAID = set[str]()


class InputError(ValueError):
    """Bad input: a file, a key or a value that cannot be used.

    The message is one line that names the file, the key or the value and says what was expected.
    The command line prints it and exits with code 2; everything else is a bug and keeps its
    traceback.
    """


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Wrap imports of an optional dependency: if it is missing, an InputError names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "effseg").split(".")[0] == "effseg":
            raise
        raise InputError(
            f"{error.name} is not installed, expected: pip install 'effseg[{extra}]'"
        ) from error


def flat(error: BaseException | str) -> str:
    """Return an error's message as one line of at most 400 characters, for the end of another."""
    return " ".join(str(error).split())[:400]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, torch or another engine says that memory is short."""
    if isinstance(error, MemoryError):
        return True
    text = "out of memory|can't allocate memory|failed to allocate memory|bad allocation"
    text += "|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
    return not isinstance(error, InputError) and bool(re.search(text, str(error), re.IGNORECASE))


def note(line: str, once: bool = False) -> None:
    """Print one line on stderr, from the first process only.

    With `once` the same line only one time, as one about a dataset that is read repeatedly.
    """
    if once:
        if line in _SAID:
            return
        _SAID.add(line)
    if not any(int(os.environ.get(key) or 0) for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID")):
        print(line, file=sys.stderr, flush=True)
