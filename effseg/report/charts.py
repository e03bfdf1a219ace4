"""The report's charts: SVG in the page itself, with text that the reader's browser sets."""

# K classes

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import Any

import numpy as np
import numpy.typing as npt

from effseg.errors import needs
from effseg.metrics.tables import TITLES
from effseg.report.collect import Run, Series

with needs("report"):
    from matplotlib import rc_context
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of the runs; Okabe and Ito's, which colour-blind people tell apart."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "effseg",  # the same ids, and so the same file, every time
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # a $ in a name is a $
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_NAMED_CLASSES = 32  # with more, names would be too small to read


@contextmanager
def _svg(width: float, height: float, out: list[str]) -> Iterator[Any]:
    with rc_context(_STYLE):
        figure = Figure((width, height), layout="constrained")
        yield figure.subplots()
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        svg = text.getvalue()
        out.append(svg[svg.index("<svg") :])


def curves(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return title and SVG of each chart that any of the runs has values for."""
    keys = list(dict.fromkeys(key for run in runs for key in run.curves))
    losses = sorted((key for key in keys if _is_loss(key)), key="train/loss".__ne__)
    if len(losses) == 2:  # the sum and its only term
        losses = ["train/loss"]
    charts: list[tuple[str, list[str]]] = [("loss", losses)]
    for key in keys:
        source, _, name = key.removeprefix("val/").rpartition("/")
        if key.startswith("val/") and name in TITLES:
            charts.append((f"{source} {TITLES[name]}".strip(), [key]))
    charts.append(("learning rate", [k for k in keys if k.startswith("lr-") and _shown(k)]))
    seconds = ["seconds/train", "seconds/evaluation"]
    charts.append(("seconds an epoch", [key for key in seconds if key in keys]))
    # The terms of one run can be told apart in one chart, those of several cannot.
    shown = 1 if len(runs) > 1 else None
    return [(title, _lines(runs, columns[:shown])) for title, columns in charts if columns]


def _is_loss(key: str) -> bool:
    # A source's losses are train/SOURCE/NAME; learned weights of the losses are no losses.
    return key.startswith("train/") and key.count("/") == 1 and "log_variance" not in key


def _shown(key: str) -> bool:
    return not key.endswith("_no_decay")  # the same rate as the group's other half


def _lines(runs: Sequence[Run], columns: Sequence[str]) -> str:
    """Draw columns over steps: a colour a run, or a column where there is one run."""
    out: list[str] = []
    evaluated = columns[0].startswith("val/")
    with _svg(5, 2.9, out) as axes:
        drawn = 0
        for i, run in enumerate(runs):
            for j, column in enumerate(columns):
                series = run.curves.get(column, [])
                raw = run.curves.get(f"{column}_raw", [])
                colour = COLOURS[max(i, j) % len(COLOURS)]
                label = run.name if len(runs) > 1 else column.split("/", 1)[-1]
                marker = "." if evaluated or len(series) < 30 else ""
                if raw:
                    label = f"{label} EMA"
                    raw_label = f"{label.removesuffix(' EMA')} raw"
                    axes.plot(*_xy(raw), "--", color=colour, marker=marker, label=raw_label)
                if series:
                    axes.plot(*_xy(series), color=colour, marker=marker, label=label)
                drawn += bool(raw) + bool(series)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        if drawn > 1:
            axes.legend()
    return out[0]


def _xy(series: Series) -> tuple[list[int], list[float]]:
    return [step for step, _ in series], [value for _, value in series]


def confusion(matrix: npt.NDArray[np.int64], names: Sequence[str], colour: str) -> str:
    """Draw a (K, K) matrix of counts, rows truth, as shares of each row."""
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    out: list[str] = []
    named = len(names) <= _NAMED_CLASSES
    side = min(8.5, max(3.6, 1.6 + 0.28 * len(names)))
    with _svg(side, side, out) as axes:
        from matplotlib.colors import LinearSegmentedColormap, PowerNorm

        colours = LinearSegmentedColormap.from_list("", ["#ffffff", colour])
        # Small shares are what one looks for: a linear scale would show the diagonal alone.
        axes.imshow(shares, cmap=colours, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
        axes.grid(False)
        axes.set_xlabel("prediction")
        axes.set_ylabel("truth")
        if named:
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
        if len(names) <= 12:
            for (i, j), share in np.ndenumerate(shares):
                text = f"{100 * share:.0f}" if matrix[i].any() else "–"
                ink = "#ffffff" if share > 0.5 else "#222222"
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color=ink)
    return out[0]
