"""What every benchmark shares: fair timing, the machine's name, a table, a CSV file and a plot.

Benchmarks run from the repository's root as modules: ``python -m benchmarks.coreset``.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from utils.pictures.tables import write_csv  # noqa: F401 - for the benchmarks
from utils.pipeline.timing import alternate, describe_machine, describe_versions  # noqa: F401 - for the benchmarks

RESULTS = Path(__file__).parent / "results"
Row = dict[str, str | int | float]


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The median, and half the distance from the smallest to the largest value."""
    return statistics.median(values), (max(values) - min(values)) / 2


def print_table(rows: Sequence[Row]) -> None:
    """Print rows that share their keys as a Markdown table; floats with four significant digits."""
    cells = [list(rows[0])] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    for line in cells:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def plot_bars(path: Path, title: str, unit: str, bars: dict[str, dict[str, float]]) -> None:
    """Save horizontal bars on a log axis: ``bars[group][name]`` in ``unit``, the value written beside each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for group in bars.values() for name in group))
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.35 * sum(map(len, bars.values()))))
    y, ticks = 0.0, {}
    for group, values in bars.items():
        ticks[group] = y + (len(values) - 1) / 2
        for name, value in values.items():
            drawn = axes.barh(y, value, color=f"C{names.index(name)}", label=name)
            axes.bar_label(drawn, fmt=f"{value:.3g}", padding=3)
            y += 1
        y += 1
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # one entry a name
    axes.legend(handles.values(), handles.keys(), loc="best")
    axes.set(xscale="log", xlabel=unit, title=title, yticks=list(ticks.values()), yticklabels=list(ticks))
    axes.invert_yaxis()
    axes.margins(x=0.15, y=0.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
