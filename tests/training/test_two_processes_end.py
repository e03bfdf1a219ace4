"""Several processes end together: on a signal with a checkpoint, on a failure with its cause."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

TINY = Path(__file__).parents[1] / "conf" / "tiny.yaml"


def start(root, run, *more):
    command = [
        *(sys.executable, "-m", "effseg.cli", "fit", f"--config={TINY}", f"--data.root={root}"),
        *(f"--trainer.default_root_dir={run}", "--data.batch_size=2", "--model.raw_scores=false"),
        *("--trainer.devices=2", "--trainer.strategy=ddp"),
        *more,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_signal_to_the_first_process_saves_and_ends_all(shapes_root, tmp_path):
    run, length = tmp_path / "run", "--trainer.max_epochs=10"
    last = run / "checkpoints" / "last.ckpt"
    process = start(shapes_root, run, length)
    while process.poll() is None and not last.is_file():
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    before = torch.load(last, weights_only=True)
    assert 0 < before["global_step"] < 20
    process = start(shapes_root, run, length)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert out.count("resumes from") == 1
    assert torch.load(last, weights_only=True)["global_step"] == 20
    # One process is another run.
    process = start(
        shapes_root, run, "--trainer.max_epochs=11", "--ckpt_path=last", "--trainer.devices=1"
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "2 processes, this one has 1" in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_failure_of_one_process_ends_all_and_its_cause_is_the_last_line(
    shapes_root, tmp_path, number
):
    root = tmp_path / "shapes"
    shutil.copytree(shapes_root, root)
    (file,) = root.rglob(f"train_{number:05d}.jpg")  # which of the processes reads it is drawn
    file.write_bytes(file.read_bytes()[:100])
    process = start(root, tmp_path / "run")
    out, err = process.communicate(timeout=300)
    assert process.returncode in (2, -9), out + err  # Lightning's observer may come first
    assert f"train_{number:05d}" in err.strip().splitlines()[-1]
