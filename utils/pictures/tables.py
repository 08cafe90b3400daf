"""Results as CSV files and as tables on the console."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.atomic import atomic_file

# How a float is written, by the last word of its column's name; any other, and those are between 0 and 1, as 0.9912.
FORMATS = {"fps": ".1f", "ms": ".2f", "mb": ".1f", "s": ".1f", "percent": "+.1f", "up": ".2f"} | dict.fromkeys(
    ("ratio", "level", "sigma", "factor"), "g"
)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write rows under ``columns``, or the first one's keys; None is an empty cell.

    An old file stays until the new one is whole.
    """
    with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns or rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """What :func:`write_csv` wrote: numbers as int or float, an empty cell as None, anything else as text."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: _number(text) for name, text in row.items()} for row in csv.DictReader(file)]


def read_results(path: Path) -> list[dict[str, Any]]:
    """A script's table for the report, means first since a long table scrolls; no rows if it is not there."""
    rows = read_csv(path) if path.is_file() else []
    return sorted(rows, key=lambda row: row["category"] != "mean")


def _number(text: str) -> str | int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text or None


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned text: names to the left, numbers to the right, None as '-'."""
    header = list(rows[0])
    cells = [header] + [[format_cell(name, row[name]) for name in header] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    numeric = [all(isinstance(row[name], (int, float, type(None))) for row in rows) for name in header]
    lines = [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        )
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def format_cell(column: str, value: Any) -> str:
    """A table's cell as text, on the console and in the report."""
    if value is None:
        return "-"
    return format(value, FORMATS.get(column.split("_")[-1], ".4f")) if isinstance(value, float) else str(value)


def category_means(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], figures: Sequence[str]) -> list[dict]:
    """For each combination of ``keys``, in their order, a row 'mean' whose ``figures`` are averaged over categories."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        {**own[0], "category": "mean"} | {name: mean([row[name] for row in own]) for name in figures}
        for own in groups.values()
    ]


def averages(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows 'mean' of a table, or all of one that has a single category and so no means."""
    return [row for row in rows if row["category"] == "mean"] or list(rows)


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are defined; None if none is."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
