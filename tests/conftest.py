"""Fixtures of the tests that drive the command line."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from effseg.cli import main
from effseg.data.sources.shapes import write_shapes

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network

TINY = Path(__file__).parent / "conf" / "tiny.yaml"


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature of 8 training and 3 evaluation images."""
    root = tmp_path_factory.mktemp("miniature") / "shapes"
    write_shapes(root, 8, 3, (64, 96), 0)
    return root


@pytest.fixture
def effseg(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, shapes_root: Path) -> Path:
    """The run directory of a training of two epochs."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    code = main(
        [
            "fit",
            f"--config={TINY}",
            f"--data.root={shapes_root}",
            f"--trainer.default_root_dir={run}",
        ]
    )
    assert code == 0
    return run
