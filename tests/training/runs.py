"""Runs by the tiny recipes, and what they log; shared by the tests of this folder."""

import csv
from pathlib import Path

CONF = Path(__file__).parents[1] / "conf"


def fit(effseg, root, run, *more, config="tiny"):
    """Train through the command line; return exit code, stdout and stderr."""
    return effseg(
        "fit",
        f"--config={CONF / config}.yaml",
        f"--data.root={root}",
        f"--trainer.default_root_dir={run}",
        *more,
    )


def rows(run):
    """Return the rows of metrics.csv."""
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def logged(run, key):
    """Return a column of metrics.csv without its empty cells."""
    return [float(row[key]) for row in rows(run) if row.get(key)]
