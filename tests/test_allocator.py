"""Freed memory is kept: the pages of a block are there when the next one is asked for."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="sets the malloc of glibc"
)
COUNT = """
import resource

def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        bytearray(100 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

faults()
print(faults())
"""


def run(code, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", code]
    return subprocess.check_output(command, env=environment | variables, text=True).split()


def test_kept_memory_is_not_faulted_in_again():
    told, count = run(
        "from effseg.allocator import keep_freed_memory\nprint(keep_freed_memory())" + COUNT
    )
    assert told == "True"
    assert int(count) * 10 < int(run(COUNT)[0])


def test_the_command_line_keeps_it():
    *_, count = run("from effseg.cli import main\nmain(['info'])" + COUNT)  # behind the names
    assert int(count) * 10 < int(run(COUNT)[0])


@pytest.mark.parametrize("name", ["MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"])
def test_a_users_choice_stays(name):
    code = "from effseg.allocator import keep_freed_memory\nprint(keep_freed_memory())"
    assert run(code, **{name: "65536"}) == ["False"]
