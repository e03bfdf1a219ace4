"""Check and time effseg on a machine with a GPU (`make gpu-check`).

It needs no network and no virtual environment: the machine's Python suffices. It runs the tests
marked `gpu` (half a minute), then measures images per second and peak memory of inference (eager,
compiled and as a CUDA graph; several sizes and batches; float32 and bfloat16 weights) and of
training steps (bfloat16 autocast), for our models and, alternating in one process, a peer. The
tests that compile come last: they can take minutes. The result goes to
`docs/benchmarks/gpu-DEVICE.json` and `.md`, rewritten after every case; the most important cases
come first, so that it can be stopped at any time.

Exit code: 0, 1 if a gpu test failed, 2 if it cannot run here.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (
    *("torch", "torchvision", "timm", "segmentation_models_pytorch", "torchmetrics"),
    *("safetensors", "huggingface_hub", "filelock", "cv2", "numpy", "PIL", "yaml", "rich"),
)
"""What models, losses and metrics import; checked by a test."""
OPTIONAL = {
    "pytest": "the tests marked gpu are not run",
    "effdet": "detectors are timed alone",
}
MODELS = ("effseg_d4", "effseg_lite0", "effseg_d0", "efficientdet_d0", "efficientdet_d4")
EXECUTIONS = {"eager": None, "compiled": "default", "graph": "reduce-overhead"}
"""How a network runs, and torch.compile's mode for it."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A measurement of a model and its peer."""

    model: str
    mode: str
    precision: str
    execution: str
    size: int
    batch: int


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
            "test the script with --device cpu --quick",
            file=sys.stderr,
        )
        return 2
    from benchmarks.report import about

    torch.backends.cudnn.benchmark = True
    report: dict[str, Any] = {"about": about(options.device), "rows": []}
    if options.device == "cuda":
        report["about"] |= {
            "driver": driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        }
    absent = {n: why for n, why in OPTIONAL.items() if importlib.util.find_spec(n) is None}
    report["about"] |= {f"not installed: {name}": why for name, why in absent.items()}
    report["tests"] = [] if "pytest" in absent else [run_gpu_tests("gpu and not slow")]
    paths = write(report, options.output)
    for case in plan(options):
        rows = measure_case(case, options)
        report["rows"] += rows
        for row in rows:
            print("  ".join(str(row.get(key, "")) for key in (*vars(case), "name", "per_second")))
        sys.stdout.flush()
        paths = write(report, options.output)
    if "pytest" not in absent and not options.no_compile:
        report["tests"].append(run_gpu_tests("gpu and slow"))
        paths = write(report, options.output)
    print(f"written: {', '.join(map(str, paths))}")
    return 1 if any(tests["exit_code"] not in (0, 5) for tests in report["tests"]) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; `--quick` sets tiny sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test the script")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--models", nargs="+", default=MODELS, help=", ".join(MODELS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 640, 1024], help="pixels")
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[8, 1, 32], help="halved if memory is short"
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds a row")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.no_compile = ("effseg_lite0", "efficientdet_lite0"), True
        options.sizes, options.batches, options.rounds = [128], [2], 2
    return options


def plan(options: argparse.Namespace) -> list[Case]:
    """List what to measure: the first size and batch of all models first, compiled models last."""
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


def measure_case(case: Case, options: argparse.Namespace) -> list[Row]:
    """Measure a model and its peer; if memory is short, both with half the batch."""
    from benchmarks import speed
    from benchmarks.timing import Settings, compare_halving, compare_models

    def measure(batch: int) -> list[Row]:
        settings = Settings(
            size=case.size,
            batch=batch,
            rounds=options.rounds,
            device=options.device,
            train=case.mode == "training",
            compile=EXECUTIONS[case.execution],
            bf16=case.precision == "bf16",
            seconds=0.0 if options.quick else 0.5,
        )
        makers = speed.training_makers if settings.train else speed.brief_makers
        return compare_models(makers(case.model, settings), settings, batch)

    batch, rows = compare_halving(measure, case.batch, options.device)
    return [{**vars(case), "batch": batch, **row} for row in rows]


def driver() -> str:
    """Return the driver's version, as nvidia-smi says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return next(iter(done.stdout.split()), "unknown")


def run_gpu_tests(marked: str) -> Row:
    """Run the tests that an expression of pytest's markers selects."""
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", marked, "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, flush=True)
    lines = done.stdout.strip().splitlines() or ["no output"]
    return {
        "marked": marked,
        "exit_code": done.returncode,
        "summary": lines[-1].strip("= "),
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
    }


def page(report: dict[str, Any]) -> Iterator[str]:
    """Yield the sections of the page."""
    from benchmarks.report import SPEED, table

    about = report["about"]
    yield f"# {about['device']}\n\n```\n{about['command']}\n```\n\n"
    yield from (f"- {key}: {value}\n" for key, value in about.items() if key != "command")
    for tests in report["tests"]:
        yield f"- tests marked {tests['marked']}: {tests['summary']}\n"
        yield from (f"    - {line}\n" for line in tests["failed"])
    yield (
        "\nRandom weights, images and labels; channels_last unless said. Ours run optimised in "
        "inference. Medians of rounds in which model and peer alternate.\n\n"
    )
    keys = [field.name for field in dataclasses.fields(Case) if field.name != "model"]
    case = {key: lambda row, key=key: row[key] for key in keys}
    speed = {title: text for title, text in SPEED.items() if title}
    yield table(report["rows"], {"network": SPEED[""], **case, **speed})


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write the JSON and the page by way of temporary files."""
    from effseg.data.files import write_text

    slug = re.sub(r"[^a-z0-9]+", "-", report["about"]["device"].lower()).strip("-")
    text = {".json": json.dumps(report, indent=1) + "\n", ".md": "".join(page(report))}
    paths = [folder / f"gpu-{slug}{suffix}" for suffix in text]
    for path in paths:
        write_text(path, text[path.suffix])
    return paths


if __name__ == "__main__":
    sys.exit(main())
