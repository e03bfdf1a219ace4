"""The command line: `effseg fit`, `effseg validate`, and the commands of `effseg.commands`."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from effseg.allocator import keep_freed_memory
from effseg.commands import (
    benchmark,
    convert,
    data,
    demo,
    export,
    info,
    models,
    predict,
    report,
    score,
)
from effseg.errors import InputError, is_out_of_memory, needs

COMMANDS = (predict, score, models, info, convert, export, benchmark, report, demo, data)

# albumentations asks a package index for its newest version at import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code.

    0; 2 for bad input (one line on stderr); 130 and 143 where SIGINT and SIGTERM ended it.
    """
    keep_freed_memory()
    # A file of another encoding, as on Windows.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in ("fit", "validate"):
            with needs("train"):
                from effseg.training.cli import run_lightning

            code, run = run_lightning(arguments)
            if run is not None:
                _write_report(run)
            return code
        options = _parser().parse_args(arguments)
        options.run(options)
    except InputError as error:
        print(f"error: {_last_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print("error: out of memory, expected smaller images or fewer at a time", file=sys.stderr)
        return 2
    return 0


def _write_report(run: Path) -> None:
    """Write a run's report; an error there does not spoil the run."""
    try:
        from effseg.report.page import write_report

        write_report([run], run / "report.html")
        print(f"report: {run / 'report.html'}")
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        print(f"no report: {reason[-1] or type(error).__name__}", file=sys.stderr)


def _last_line(error: InputError) -> str:
    """Return the message without the traceback that a loader's worker adds to it."""
    line = str(error).strip().splitlines()[-1]
    return line.removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    from effseg import __version__

    parser = _Parser(prog="effseg", description="Semantic segmentation with EfficientDet.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, text in (
        ("fit", "train by a recipe: --config FILE or the name of a shipped one"),
        ("validate", "evaluate a checkpoint: --config FILE --ckpt_path FILE"),
    ):
        commands.add_parser(name, help=text, add_help=False)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
