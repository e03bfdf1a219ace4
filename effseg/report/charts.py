"""The report's charts: SVG inside the page, with text that the browser renders."""

# K classes

from collections.abc import Sequence
from io import StringIO
from typing import Any

import numpy as np
import numpy.typing as npt

from effseg.errors import needs
from effseg.metrics.tables import TITLES
from effseg.report.collect import Run

with needs("report"):
    from matplotlib import rc_context
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours of the runs: Okabe and Ito's, which colour-blind people can distinguish."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "effseg",  # reproducible ids
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


def curves(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return title and SVG of each chart for which any of the runs has values."""
    keys = list(dict.fromkeys(key for run in runs for key in run.curves))
    # The losses of a source are train/SOURCE/NAME; learned weights of the losses are not losses.
    losses = [key for key in keys if key.startswith("train/") and key.count("/") == 1]
    losses = sorted((k for k in losses if "log_variance" not in k), key="train/loss".__ne__)
    if len(losses) == 2:  # the sum and its only term
        losses = ["train/loss"]
    charts: list[tuple[str, list[str]]] = [("loss", losses)]
    for key in keys:
        source, _, name = key.removeprefix("val/").rpartition("/")
        if key.startswith("val/") and name in TITLES:
            charts.append((f"{source} {TITLES[name]}".strip(), [key]))
    # A group's parameters without weight decay have the rate of the others.
    rates = [key for key in keys if key.startswith("lr-") and not key.endswith("_no_decay")]
    charts.append(("learning rate", rates))
    seconds = ["seconds/train", "seconds/evaluation"]
    charts.append(("seconds per epoch", [key for key in seconds if key in keys]))
    # Several columns of several runs would not be distinguishable in one chart.
    limit = 1 if len(runs) > 1 else None
    return [(title, _lines(runs, columns[:limit])) for title, columns in charts if columns]


def _lines(runs: Sequence[Run], columns: Sequence[str]) -> str:
    """Draw columns over steps, with a colour per run, or per column of a single run."""
    evaluated = columns[0].startswith("val/")
    with rc_context(_STYLE):
        figure = Figure((5, 2.9), layout="constrained")
        axes = figure.subplots()
        for i, run in enumerate(runs):
            for j, column in enumerate(columns):
                series = run.curves.get(column, [])
                raw = run.curves.get(f"{column}_raw", [])
                colour = COLOURS[max(i, j) % len(COLOURS)]
                label = run.name if len(runs) > 1 else column.split("/", 1)[-1]
                marker = "." if evaluated or len(series) < 30 else ""
                kinds = (raw, "--", f"{label} raw"), (series, "-", f"{label} EMA" if raw else label)
                for values, style, name in kinds:
                    if values:
                        steps_and_values = zip(*values, strict=True)
                        axes.plot(*steps_and_values, style, color=colour, marker=marker, label=name)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        if len(axes.lines) > 1:
            axes.legend()
        return _svg(figure)


def confusion(matrix: npt.NDArray[np.int64], names: Sequence[str], colour: str) -> str:
    """Draw a (K, K) matrix of counts, rows truth, as shares of each row."""
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(8.5, max(3.6, 1.6 + 0.28 * len(names)))
    colours = LinearSegmentedColormap.from_list("", ["#ffffff", colour])
    with rc_context(_STYLE):
        figure = Figure((side, side), layout="constrained")
        axes = figure.subplots()
        # On a linear scale the errors, which are small shares, would be invisible.
        axes.imshow(shares, cmap=colours, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
        axes.grid(False)
        axes.set_xlabel("prediction")
        axes.set_ylabel("truth")
        if len(names) <= _NAMED_CLASSES:
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
        if len(names) <= 12:
            for (i, j), share in np.ndenumerate(shares):
                text = f"{100 * share:.0f}" if matrix[i].any() else "–"
                ink = "#ffffff" if share > 0.5 else "#222222"
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color=ink)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    text = StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
