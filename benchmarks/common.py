"""What every benchmark shares: fair timing, the machine's name, a table, a CSV file and a plot.

Benchmarks run from the repository's root as modules: ``python -m benchmarks.coreset``.
"""

import csv
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
Row = dict[str, str | int | float]


def describe_machine() -> str:
    """One line: processor, cores, threads in use, GPU if there is one, operating system."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}, {platform.system()}"


def describe_versions(*packages: str) -> str:
    """One line: the versions of Python and of ``packages``, named as pip names them, or that one is absent."""
    versions = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} absent")
    return ", ".join(versions)


def alternate(functions: dict[str, Callable[[], object]], repeats: int, warmups: int = 1) -> dict[str, list[float]]:
    """Time ``functions`` in turn, ``repeats`` rounds of all of them, so that a slow minute hits all alike.

    Each round starts with another function. Returns the seconds of each call, in the order of the rounds; ``warmups``
    rounds before them are not kept. Work on a GPU is waited for.
    """
    seconds = {name: [] for name in functions}
    names = list(functions)
    for turn in range(-warmups, repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            functions[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


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


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows that share their keys; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


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
    axes.margins(x=0.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
