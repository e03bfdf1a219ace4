"""Check and time effseg on a machine with a GPU (``make gpu-check``).

It needs no network and no virtual environment: it runs with the machine's own Python. It runs the
tests marked ``gpu``, then measures images per second and peak memory of inference and of a training
step, for EffSeg and for smp's DeepLabV3Plus on the same encoder, taking turns in one process. The
result goes to ``docs/benchmarks/gpu-DEVICE.json`` and ``.md``, rewritten after every row.

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
}
MODELS = ("effseg_lite0", "effseg_d0", "effseg_d4")
PEER = "smp.DeepLabV3Plus"
CLASSES = 21
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
    for model, mode, precision, compiled in plan(options):
        rows = measure_pair(model, mode, precision, compiled, options)
        report["rows"] += rows
        for row in rows:
            print("  ".join(cells(row)), flush=True)
        paths = write(report, options.output)
    print(f"written: {', '.join(map(str, paths))}")
    return 1 if report["tests"] and report["tests"]["exit_code"] not in (0, 5) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; ``--quick`` sets tiny sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--models", nargs="+", default=MODELS, help=", ".join(MODELS))
    parser.add_argument("--size", type=int, default=512, help="side of the photo, pixels")
    parser.add_argument("--batch", type=int, default=8, help="halved where memory ends")
    parser.add_argument("--rounds", type=int, default=7, help="rounds a row")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.no_compile = MODELS[:1], True
        options.size, options.batch, options.rounds = 64, 2, 2
    return options


def plan(options: argparse.Namespace) -> list[tuple[str, str, str, bool]]:
    """List the rows: model, mode, precision, compiled."""
    kinds = [
        ("inference", "fp32", False),
        ("inference", "bf16", False),
        ("training", "bf16", False),
    ]
    if not options.no_compile:  # last, as each takes a minute to compile
        kinds += [("inference", "fp32", True), ("inference", "bf16", True)]
    return [(model, *kind) for kind in kinds for model in options.models]


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


def build(name: str, encoder: str) -> Any:
    """Make EffSeg or its peer with random weights: time does not depend on their values."""
    import segmentation_models_pytorch as smp

    import effseg

    if name != PEER:
        return effseg.create_model(name, classes=CLASSES)
    return smp.DeepLabV3Plus(encoder_name=encoder, encoder_weights=None, classes=CLASSES)


def measure_pair(
    name: str, mode: str, precision: str, compiled: bool, options: argparse.Namespace
) -> list[Row]:
    """Measure a model and its peer in turns; where memory ends, both with half the batch."""
    import torch

    from effseg.models.scaling import SCALING

    batch = options.batch
    while True:
        rows: list[Row] = []
        steps: dict[str, Callable[[], None]] = {}
        try:
            for model_name in (name, PEER):
                row: Row = {"model": model_name, "mode": mode, "precision": precision}
                row |= {"compiled": compiled, "batch": batch, "size": options.size}
                if model_name == PEER:
                    row["model"] += f" ({name.removeprefix('effseg_')}'s encoder)"
                rows.append(row)
                try:
                    encoder = SCALING[name.removeprefix("effseg_")].encoder
                    model = build(model_name, encoder)
                    steps[row["model"]] = prepare(model, row, options.device)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # recorded; the other rows are still worth having
                    row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            compare([row for row in rows if row["model"] in steps], steps, options)
            return rows
        except torch.OutOfMemoryError:
            if batch == 1:
                return [{**row, "error": "out of memory with one photo"} for row in rows]
            batch //= 2
        finally:
            steps.clear()
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()


def prepare(model: Any, row: Row, device: str) -> Callable[[], None]:
    """Put the model on the device, warm it up, note its peak memory; return its step."""
    import torch
    import torch.nn.functional as F

    training = row["mode"] == "training"
    model = model.to(device, memory_format=torch.channels_last).train(training)
    run = torch.compile(model) if row["compiled"] else model
    shape = (row["batch"], 3, row["size"], row["size"])
    photos = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
    truth = torch.randint(CLASSES, (shape[0], *shape[2:]), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9) if training else None
    half = row["precision"] == "bf16"

    def step() -> None:
        autocast = torch.autocast(device, dtype=torch.bfloat16) if half else nullcontext()
        if optimizer is None:
            with torch.inference_mode(), autocast:
                run(photos)
            return
        optimizer.zero_grad()
        with autocast:
            logits = run(photos)
        F.cross_entropy(logits.float(), truth).backward()
        optimizer.step()

    for _ in range(3):
        step()
    row["peak_mib"] = None
    if device == "cuda":
        # Both models of a pair lie on the device: count the other's share out.
        tensors = [*model.parameters(), *model.buffers()]
        tensors += [p.grad for p in model.parameters() if p.grad is not None]
        if optimizer is not None:
            tensors += [s["momentum_buffer"] for s in optimizer.state.values()]
        own = sum(t.numel() * t.element_size() for t in [*tensors, photos, truth])
        others = torch.cuda.memory_allocated() - own
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        row["peak_mib"] = round((torch.cuda.max_memory_allocated() - others) / 2**20)
    return step


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
    run = f"{row['precision']}{', compiled' if row['compiled'] else ''}"
    if "error" in row:
        return [row["model"], row["mode"], run, str(row["batch"]), f"failed: {row['error']}", ""]
    speed = f"{row['images_per_second']} ({row['least']} to {row['most']})"
    memory = "" if row["peak_mib"] is None else f"{row['peak_mib']}"
    return [row["model"], row["mode"], run, str(row["batch"]), speed, memory]


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
    size = report["rows"][0]["size"] if report["rows"] else 0
    lines += [
        "",
        f"Random weights, {CLASSES} classes, photos of {size} × {size} pixels, channels_last. "
        "Images per second: median (least to most) of rounds in which model and peer take turns.",
        "",
        "| model | mode | precision | batch | images per second | peak memory, MiB |",
        "| --- | --- | --- | ---: | ---: | ---: |",
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
