"""Check and time effseg on a machine with a GPU (``make gpu-check``).

It needs no network and no virtual environment: it runs with the machine's own Python. It runs the
tests marked ``gpu``, then measures images per second and peak memory of inference (eager, compiled
and as a CUDA graph; several sizes, batches and precisions) and of training steps, for our models
and, taking turns in one process, a peer: smp's DeepLabV3Plus on the same encoder, effdet's network
of the same name. The result goes to ``docs/benchmarks/gpu-DEVICE.json`` and ``.md``, rewritten
after every row; the rows that say most come first, so that it can be stopped at any time.

Exit code: 0, 1 if a gpu test failed, 2 if it cannot run here.
"""

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

NEEDED = ("torch", "timm", "segmentation_models_pytorch", "torchmetrics", "safetensors")
OPTIONAL = {
    "pytest": "the tests marked gpu are not run",
    "albumentations": "tests that need its transforms are skipped",
    "jsonargparse": "tests of the command line are skipped",
    "lightning": "tests of training are skipped",
    "effdet": "detectors are timed alone",
}
MODELS = ("effseg_d4", "effseg_lite0", "effseg_d0", "efficientdet_d0", "efficientdet_d4")
PEERS = ("DeepLabV3Plus",)
EXECUTIONS = {"eager": None, "compiled": "default", "graph": "reduce-overhead"}
"""How a network runs, and torch.compile's mode for it."""
ROUND_SECONDS = 0.5
"""A round repeats the step for about this long."""

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; return the exit code."""
    options = parse(arguments)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"gpu-check: cannot run, not installed: {', '.join(missing)}", file=sys.stderr)
        return 2
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu-check: torch {torch.__version__} sees no CUDA device; "
            "try the script itself by --device cpu --quick",
            file=sys.stderr,
        )
        return 2
    torch.backends.cudnn.benchmark = True
    report: dict[str, Any] = {"about": describe(options.device), "skipped": {}, "rows": []}
    for name, consequence in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            report["skipped"][name] = consequence
            print(f"not installed: {name}; {consequence}")
    report["tests"] = run_gpu_tests() if "pytest" not in report["skipped"] else None
    paths = write(report, options.output)
    for case in plan(options):
        rows = measure_pair(case, options)
        report["rows"] += rows
        for row in rows:
            print("  ".join(cells(row)), flush=True)
        paths = write(report, options.output)
    print(f"written: {', '.join(map(str, paths))}")
    return 1 if report["tests"] and report["tests"]["exit_code"] not in (0, 5) else 0


@dataclass(frozen=True)
class Case:
    """What a pair of rows measures."""

    model: str
    mode: str
    precision: str
    execution: str
    size: int
    batch: int


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; ``--quick`` sets tiny sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--models", nargs="+", default=MODELS, help=", ".join(MODELS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 640, 1024], help="pixels")
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[8, 1, 32], help="halved where memory ends"
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds a row")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.no_compile = ("effseg_lite0", "efficientdet_lite0"), True
        options.sizes, options.batches, options.rounds = [128], [2], 2
    return options


def plan(options: argparse.Namespace) -> list[Case]:
    """List what to measure: the first size and batch of all first, what has to compile last."""
    executions = ["eager"] if options.no_compile else list(EXECUTIONS)
    size, batch = options.sizes[0], options.batches[0]
    first = [
        Case(model, mode, precision, "eager", size, batch)
        for mode, precision in (("inference", "bf16"), ("training", "bf16"), ("inference", "fp32"))
        for model in options.models
    ]
    rest = [
        Case(model, "inference", precision, execution, size, batch)
        for execution in executions
        for size in options.sizes
        for batch in options.batches
        for precision in ("bf16", "fp32")
        for model in options.models
    ]
    return list(dict.fromkeys([*first, *rest]))


def describe(device: str) -> Row:
    """Name the machine, the versions and the command."""
    import torch

    about: Row = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "driver": driver() if device == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python3", *sys.argv]),
    }
    for name in ("timm", "segmentation_models_pytorch"):
        about[name] = importlib.metadata.version(name)
    return about


def driver() -> str:
    """Return the driver's version, as nvidia-smi says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.splitlines()[0].strip() if found.stdout.strip() else "unknown"


def run_gpu_tests() -> Row:
    """Run the test files that have tests marked ``gpu``, and those tests only."""
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, flush=True)
    lines = done.stdout.strip().splitlines() or ["no output"]
    return {
        "exit_code": done.returncode,
        "summary": lines[-1].strip("= "),
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
    }


def networks(name: str, size: int) -> dict[str, Callable[[], Any]]:
    """Return what makes our network and its peer for photos of a size, by name."""
    from effseg.deploy.peers import detection_peer, same_encoder
    from effseg.models.fold import optimize_for_inference
    from effseg.models.registry import create_model

    makers: dict[str, Callable[[], Any]] = {
        f"effseg {name}": lambda: optimize_for_inference(create_model(name).eval())
    }
    if name.startswith("effseg_"):
        makers |= {key: lambda peer=peer: peer for key, peer in same_encoder(name, PEERS).items()}
    elif importlib.util.find_spec("effdet") is not None:
        makers[f"effdet {name}"] = lambda: detection_peer(name, size=size)
    return makers


def measure_pair(case: Case, options: argparse.Namespace) -> list[Row]:
    """Measure a model and its peer in turns; where memory ends, both with half the batch."""
    import torch

    batch = case.batch
    while True:
        row: Row = vars(case) | {"batch": batch}
        steps: dict[str, Callable[[], Any]] = {}
        try:
            rows = prepare(row, steps, options.device)
            compare([row for row in rows if row["model"] in steps], steps, options)
            return rows
        except torch.OutOfMemoryError:
            if batch == 1:
                return [{**row, "error": "out of memory with one photo"}]
            batch //= 2
        finally:
            steps.clear()
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()


def prepare(row: Row, steps: dict[str, Callable[[], Any]], device: str) -> list[Row]:
    """Fill ``steps`` with what is timed; return a row each, with peak memory or an error."""
    import torch

    from effseg.deploy.inference import make_photo
    from effseg.deploy.memory import own_memory, step_memory
    from effseg.deploy.training import losses, training_memory, training_step

    photos = make_photo(row["size"], row["batch"], device)
    rows: list[Row] = []

    def autocast() -> Any:
        half = row["precision"] == "bf16"
        return torch.autocast(device, dtype=torch.bfloat16) if half else nullcontext()

    def add(name: str, make: Callable[[], tuple[Callable[[], Any], Callable[[], int]]]) -> None:
        rows.append({**row, "model": name, "peak_mib": None})
        try:
            step, memory = make()
            for _ in range(3):
                step()
            if device == "cuda":
                rows[-1]["peak_mib"] = round(memory() / 2**20)
            steps[name] = step
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # recorded; the other rows are still worth having
            rows[-1]["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def forward(make: Callable[[], Any]) -> tuple[Callable[[], Any], Callable[[], int]]:
        model = make().to(device, memory_format=torch.channels_last)
        mode = EXECUTIONS[row["execution"]]
        run = model if mode is None else torch.compile(model, mode=mode)

        def step() -> None:
            with torch.inference_mode(), autocast():
                run(photos)

        return step, lambda: own_memory(model) + step_memory(step, device)

    def learn(model: Any, loss: Any) -> tuple[Callable[[], Any], Callable[[], int]]:
        def under_autocast() -> Any:
            with autocast():
                return loss()

        step, optimizer = training_step(model, under_autocast)
        return step, lambda: training_memory(model, step, optimizer, device)

    if row["mode"] == "inference":
        for name, make in networks(row["model"], row["size"]).items():
            add(name, lambda make=make: forward(make))
        return rows
    for name, (model, loss) in losses(row["model"], photos).items():
        add(name, lambda model=model, loss=loss: learn(model, loss))
    return rows


def compare(
    rows: list[Row], steps: dict[str, Callable[[], None]], options: argparse.Namespace
) -> None:
    """Time the models in turns; note median, least and most images per second."""
    from effseg.deploy.timing import take_turns

    seconds = 0.0 if options.quick else ROUND_SECONDS
    timings = take_turns(steps, options.rounds, seconds, options.device)
    for row in rows:
        timing = timings[row["model"]]
        row["images_per_second"] = round(row["batch"] / timing.median, 1)
        row["least"] = round(row["batch"] / timing.most, 1)
        row["most"] = round(row["batch"] / timing.least, 1)


def cells(row: Row) -> list[str]:
    """Return a row as it is printed."""
    keys = ("model", "mode", "precision", "execution", "size", "batch")
    start = [str(row[key]) for key in keys]
    if "error" in row:
        return [*start, f"failed: {row['error']}", ""]
    speed = f"{row['images_per_second']} ({row['least']} to {row['most']})"
    return [*start, speed, "" if row["peak_mib"] is None else str(row["peak_mib"])]


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write the JSON and the page, each to a temporary name first."""
    about = report["about"]
    slug = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    tests = report["tests"]
    lines = [f"# {about['device']}", "", f"```\n{about['command']}\n```", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if key != "command"]
    lines += [f"- not installed: {key}; {why}" for key, why in report["skipped"].items()]
    lines += [f"- tests marked gpu: {tests['summary'] if tests else 'not run'}"]
    lines += [f"    - {line}" for line in (tests["failed"] if tests else [])]
    lines += [
        "",
        "Random weights, photos and labels; channels_last. Ours run optimised in inference. "
        "Images per second: median (least to most) of rounds in which model and peer take turns.",
        "",
        "| model | mode | precision | run | size | batch | images per second | peak memory, MiB |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
        *[f"| {' | '.join(cells(row))} |" for row in report["rows"]],
    ]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, text in ((".json", json.dumps(report, indent=2)), (".md", "\n".join(lines))):
        path = folder / f"gpu-{slug}{suffix}"
        temporary = path.with_suffix(suffix + ".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
        paths.append(path)
    return paths


if __name__ == "__main__":
    sys.exit(main())
