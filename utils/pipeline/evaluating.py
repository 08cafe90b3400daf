"""What evaluation.py tells of a scored category: figures, conditions, and what each false-alarm rate buys."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from models.conformal import describe_rate
from models.detector import Detector
from models.wedge_net import WedgeNet
from utils.metrics import alarm_rates, evaluate, training_threshold
from utils.pictures.figures import draw_conditions, draw_evaluation, draw_rates
from utils.pictures.sections import rates_path
from utils.pictures.tables import category_means, format_table, mean, write_csv
from utils.pipeline.checkpoint import Checkpoint
from utils.pipeline.inference import Scored
from utils.settings import Settings, ratio_name

MEANT = (  # of figures, those that are averaged over categories
    "image_auroc", "pixel_auroc", "aupro", "f1_max", "false_alarm_rate", "detection_rate", "unfamiliar_rate", "bank_mb"
)  # fmt: skip
AVERAGED = ("threshold", "kept_rate", "false_alarm_rate", "detection_rate")  # likewise of what a rate buys
Row = dict[str, Any]


def figures(detector: Detector, checkpoint: Checkpoint, scored: Scored, rate: float) -> Row:
    """Metrics of a category's scores, what the threshold for false-alarm ``rate`` does, and what the detector takes."""
    inside = detector.inside
    row = asdict(evaluate(scored.labels, scored.scores, scored.masks, scored.maps, inside))
    limit = training_threshold(checkpoint.calibration_scores.numpy(), rate)
    alarms, detections = alarm_rates(scored.labels, scored.scores, limit)
    row |= {"threshold": limit, "false_alarm_rate": alarms, "detection_rate": detections}
    row["region_share"] = None if inside is None else float(inside.mean())
    row["unfamiliar_rate"] = None if scored.unfamiliar is None else float(scored.unfamiliar.mean())
    defective = int(scored.labels.sum())
    row |= {"test_good": len(scored.labels) - defective, "test_defective": defective}
    row |= {"training_images": checkpoint.training_images, "bank_vectors": detector.bank_vectors}
    return row | {"bank_mb": detector.bank_bytes / 1e6}


def tell_figures(row: Row, calibration: np.ndarray, rate: float) -> None:
    """Print what a user looks for: AUROC, and what the threshold for ``rate`` does to the test images."""
    category, ratio = row["category"], ratio_name(row["ratio"])
    if row["image_auroc"] is None:
        print(f"[{category}] Image-level AUROC: undefined ({ratio}): it takes good and defective test images")
    else:
        where = "" if row["region_share"] is None else " in the region of interest"
        line = f"[{category}] Image-level AUROC: {row['image_auroc']:.4f}  ({ratio}: "
        if row["pixel_auroc"] is not None:
            line += f"pixel AUROC {row['pixel_auroc']:.4f}, AUPRO {row['aupro']:.4f}{where}, "
        print(f"{line}F1-max {row['f1_max']:.4f} at {row['f1_threshold']:.4g})")
    asked = describe_rate(calibration, rate)
    if row["threshold"] is None:
        print(f"[{category}] {asked}")
        return
    measured = {"good parts called defective": row["false_alarm_rate"], "defects found": row["detection_rate"]}
    told = ", ".join(f"{name} {value:.1%}" for name, value in measured.items() if value is not None)
    print(f"[{category}] threshold {row['threshold']:.4g} for {asked}: {told}")


def tell_conditions(settings: Settings, category: str, net: WedgeNet, scored: Scored) -> None:
    """Tell in which condition each test image was judged, and draw how that was decided, if there are several."""
    if scored.conditions is None:
        return
    names = [condition.name for condition in net.conditions]
    places, centres = (part.numpy() for part in net.stream.in_plane(torch.from_numpy(scored.statistics)))
    rows = [
        {
            "file": sample.path.relative_to(settings.data_path).as_posix(),
            "label": sample.label,
            "condition": names[condition],
            "unfamiliar": int(unfamiliar),
            "axis_1": float(place[0]),
            "axis_2": float(place[1]),
        }
        for sample, condition, unfamiliar, place in zip(
            scored.samples, scored.conditions, scored.unfamiliar, places, strict=True
        )
    ]
    path = settings.save_dir / f"conditions_{category}.csv"
    write_csv(path, rows)
    draw_conditions(path.with_suffix(".png"), category, dict(zip(names, centres, strict=True)), rows)
    counts = Counter(row["condition"] for row in rows)
    found = ", ".join(f"{counts[name]} {name}" for name in names if counts[name])
    print(f"[{category}] test images by condition: {found}; {path}")
    if strange := [row["file"] for row in rows if row["unfamiliar"]]:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        print(f"[{category}] light, focus or noise unlike anything in training: {', '.join(strange[:3])}{more}")


def write_figures(settings: Settings, rows: Sequence[Row], averaged: bool) -> None:
    """Save, draw and print the rows of all categories, ratio by ratio, and of several categories the mean."""
    if not rows:
        return
    rows = sorted(rows, key=lambda row: -row["ratio"])  # each in the order of the categories
    means = _mean_rows(rows) if averaged else []
    path = settings.save_dir / "final_evaluation_results.csv"
    write_csv(path, rows + means)
    draw_evaluation(path.with_suffix(".png"), rows, means)
    print("\n" + format_table(rows + means) + f"\n\nwritten: {path} and {path.with_suffix('.png')}")


def write_rates(settings: Settings, rows: Sequence[Row], averaged: bool) -> None:
    """Save, draw and tell what each false-alarm rate buys, of several categories their mean."""
    if not rows:
        return
    rows = sorted(rows, key=lambda row: -row["ratio"])
    means = category_means(rows, ("ratio", "asked_rate"), AVERAGED) if averaged else []
    means = [row | {"training_pictures": None} for row in means]
    path = rates_path(settings)
    write_csv(path, rows + means)
    draw_rates(path.with_suffix(".png"), means or rows)
    print(
        "\nwhat each false-alarm rate buys: asked for; kept, if the training pictures are too few for it; good test "
        "pictures called bad and defects found; pictures there are and pictures the rate needs\n"
        + format_table(means or rows)
    )
    print(f"\nwritten: {path} and {path.with_suffix('.png')}")


def _mean_rows(rows: Sequence[Row]) -> list[Row]:
    """For each ratio the mean over the categories, where a figure is defined."""
    means = []
    for ratio in dict.fromkeys(row["ratio"] for row in rows):
        own = [row for row in rows if row["ratio"] == ratio]
        found = {name: mean([row[name] for row in own]) for name in MEANT}
        means.append(dict.fromkeys(own[0]) | {"category": "mean", "ratio": ratio} | found)
        if found["image_auroc"] is not None:
            print(f"[mean of {len(own)}] Image-level AUROC: {found['image_auroc']:.4f}  ({ratio_name(ratio)})")
    return means
