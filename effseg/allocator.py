"""Freed memory stays with the process: a step on a CPU then meets pages that are there."""

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of mallopt(3), as glibc's malloc.h numbers them."""
_CHOICES = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "GLIBC_TUNABLES",
)
"""Variables by which a user sets glibc's malloc."""


def keep_freed_memory() -> bool:
    """Tell the C library to keep the memory that is freed; return whether it was told.

    glibc gives blocks of more than 32 MiB, and what is free at the end of its heap, back to the
    system at once. A network frees and asks for the same megabytes in every layer and every step,
    and each time the system maps and clears the pages anew. Afterwards the process keeps its peak
    until it ends. The command line calls this; a program that imports the library may.

    Nothing is done where the C library is not glibc, or where the user has set its malloc by a
    variable (`MALLOC_…_`, `GLIBC_TUNABLES`). Source: mallopt(3) of the Linux manual.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _CHOICES):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(
        mallopt(key, value) == 1 for key, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
    )
