"""Kill runs at random moments, let them go on, and compare with unbroken ones, bit for bit.

    python tests/training/survive.py [--kill 20] [--term 10] [--seed 0] [--epochs 3]

One run at a time. Runs are forked from this process, which never computes: they start within a
moment. Checkpoints are written at every step, so that many of the moments lie within the writing of
one.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import effseg.training.cli  # noqa: F401  (the runs shall not load it each)
from effseg.cli import main
from effseg.data.sources.shapes import write_shapes

CONF = Path(__file__).parents[1] / "conf"
KINDS = ("tiny", "tiny_detection", "tiny_joint")


def start(kind: str, folder: Path, epochs: int) -> int:
    """Start a run in a process of its own; return the process's id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    code = 1
    try:
        torch.set_num_threads(1)
        code = main(
            [
                "fit",
                f"--config={CONF / kind}.yaml",
                f"--data.root={folder.parent / 'shapes'}",
                f"--trainer.default_root_dir={folder}",
                f"--trainer.max_epochs={epochs}",
                "--data.batch_size=2",
                "--data.num_workers=1",
                "--checkpoint_minutes=0",
            ]
        )
    finally:
        sys.stdout.flush()
        os._exit(code)


def end(process: int) -> int:
    """Wait for a run; return its exit code, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of the last checkpoint: weights, average, optimiser."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    tensors = dict(checkpoint["state_dict"])
    for key, value in checkpoint["optimizer_states"][0]["state"].items():
        tensors |= {f"{key}.{name}": tensor for name, tensor in value.items()}
    return tensors


def survives(
    kind: str, number: signal.Signals, folder: Path, whole: Path, moment: float, epochs: int
) -> str:
    """Kill a run `moment` seconds after its start and let it go on; return what is wrong."""
    process = start(kind, folder, epochs)
    time.sleep(moment)
    os.kill(process, number)
    code = end(process)
    # -15 before the run begins and while its report is written, which a shell calls 143, too.
    expected = {signal.SIGKILL: (-9, 0), signal.SIGTERM: (143, -15, 0)}[number]
    if code not in expected:
        return f"exit code {code}, expected {expected[0]}"
    if code:
        code = end(start(kind, folder, epochs))
        log = (folder.parent / f"{folder.name}.log").read_text()
        ended = code == 2 and "holds a finished run already" in log.splitlines()[-1]
        if code and not ended:  # it may have been killed between its last step and its exit
            return f"exit code {code} of the run that goes on"
    ours, theirs = state(folder), state(whole)
    different = [key for key, value in theirs.items() if not torch.equal(value, ours[key])]
    return f"{len(different)} tensors differ, first {different[0]}" if different else ""


def run(kill: int, term: int, seed: int, epochs: int, folder: Path) -> int:
    """Kill so many runs of all kinds; return the number of those that did not survive."""
    write_shapes(folder / "shapes", 8, 3, (64, 96), 0)
    seconds = {}
    for kind in KINDS[: kill + term]:
        begin, name = time.monotonic(), f"{kind}-whole"
        assert end(start(kind, folder / name, epochs)) == 0, (folder / f"{name}.log").read_text()
        seconds[kind] = time.monotonic() - begin
    draw, failed = random.Random(seed), 0
    for i in range(kill + term):
        kind, number = KINDS[i % 3], signal.SIGKILL if i < kill else signal.SIGTERM
        moment = draw.uniform(0.1, 1.0) * seconds[kind]
        whole = folder / f"{kind}-whole"
        wrong = survives(kind, number, folder / str(i), whole, moment, epochs)
        print(f"{number.name} {kind} after {moment:.2f} s: {wrong or 'the same'}", flush=True)
        failed += bool(wrong)
        if wrong:
            print((folder / f"{i}.log").read_text(), flush=True)
    print(f"{kill + term - failed} of {kill + term} survived")
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kill", type=int, default=20, help="runs that kill -9 ends")
    parser.add_argument("--term", type=int, default=10, help="runs that SIGTERM ends")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--epochs", type=int, default=3, help="of each run, of four steps")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        arguments = (options.kill, options.term, options.seed, options.epochs)
        sys.exit(min(1, run(*arguments, Path(temporary))))
