"""Evaluate WEDGE-Net: score a category's test images against its memory bank.

    python evaluation.py
    python evaluation.py --category all --sampling-ratio all

Prints image-level AUROC with the pixel figures beside it; writes SAVE_DIR/final_evaluation_results.csv and .png, and
with FORM = 'wedge' SAVE_DIR/conditions_tile.csv and .png: the condition that each test image was judged in. What each
false-alarm rate buys is in SAVE_DIR/false_alarm_rates.csv and .png. Settings are in config.py.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import models.threads  # noqa: F401 - before torch

import torch

import config
from models.conformal import describe_rate
from models.wedge_net import WedgeNet
from utils.console import check_writable, command, for_each
from utils.data.dataset import find_categories, test_samples
from utils.metrics import Metrics, alarm_rates, evaluate, rates_bought, training_threshold
from utils.pictures.figures import draw_conditions, draw_evaluation, draw_rates
from utils.pictures.sections import rates_path
from utils.pictures.tables import category_means, format_table, mean, write_csv
from utils.pipeline.checkpoint import build_net, load_detector
from utils.pipeline.cluster import workers
from utils.pipeline.inference import Scored, score_samples
from utils.settings import Settings, SettingsParser, ratio_name

FIGURES = ("threshold", "kept_rate", "false_alarm_rate", "detection_rate")  # that are averaged over categories


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate every category and ratio that the settings ask for; returns the exit code."""
    settings, _ = SettingsParser(config, __doc__).read(argv)
    categories = find_categories(settings)
    check_writable(settings.save_dir, "SAVE_DIR")
    net = build_net(settings)
    rows: list[dict[str, Any]] = []
    bought: list[dict[str, Any]] = []

    def gather(found: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
        rows.extend(found[0])
        bought.extend(found[1])

    with workers(settings, net) as run:
        code = for_each(categories, lambda category: evaluate_category(settings, category, net), gather, run)
    if rows:
        rows.sort(key=lambda row: -row["ratio"])  # ratio by ratio, each in the order of the categories
        means = mean_rows(rows) if len(categories) > 1 else []
        path = settings.save_dir / "final_evaluation_results.csv"
        write_csv(path, rows + means)
        draw_evaluation(path.with_suffix(".png"), rows, means)
        print("\n" + format_table(rows + means) + f"\n\nwritten: {path} and {path.with_suffix('.png')}")
    if bought:
        show_rates(settings, bought, averaged=len(categories) > 1)
    return code


def evaluate_category(
    settings: Settings, category: str, net: WedgeNet
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row of figures for each ratio, and for each ratio what each false-alarm rate buys."""
    samples = test_samples(settings, category)
    loaded = [load_detector(settings, category, ratio, net) for ratio in settings.sampling_ratio]
    detectors = [detector for detector, _ in loaded]
    rows, bought = [], []
    for ratio, (detector, checkpoint), scored in zip(
        settings.sampling_ratio, loaded, score_samples(detectors, samples, settings, category), strict=True
    ):
        inside = detector.inside
        metrics = evaluate(scored.labels, scored.scores, scored.masks, scored.maps, inside)
        print(describe(category, ratio, metrics, "" if inside is None else " in the region of interest"))
        calibration = checkpoint.calibration_scores.numpy()
        limit = training_threshold(calibration, settings.false_alarm_rate)
        alarms, detections = alarm_rates(scored.labels, scored.scores, limit)
        asked = describe_rate(calibration, settings.false_alarm_rate)
        if limit is None:
            print(f"[{category}] {asked}")
        else:
            print(f"[{category}] threshold {limit:.4g} for {asked}: " + describe_alarms(alarms, detections))
            own = rates_bought(scored.labels, scored.scores, calibration)
            bought += [{"category": category, "ratio": ratio} | each for each in own]
        row = {"category": category, "ratio": ratio} | asdict(metrics)
        row |= {"threshold": limit, "false_alarm_rate": alarms, "detection_rate": detections}
        row["region_share"] = None if inside is None else float(inside.mean())
        row["unfamiliar_rate"] = None if scored.unfamiliar is None else float(scored.unfamiliar.mean())
        good = int((scored.labels == 0).sum())
        row |= {"test_good": good, "test_defective": len(samples) - good, "training_images": checkpoint.training_images}
        rows.append(row | {"bank_vectors": detector.bank_vectors, "bank_mb": detector.bank_bytes / 1e6})
    if scored.conditions is not None:
        show_conditions(settings, category, detector.net, scored)
    return rows, bought


def show_rates(settings: Settings, rows: list[dict[str, Any]], averaged: bool) -> None:
    """Tell what each false-alarm rate buys, of several categories their mean."""
    rows.sort(key=lambda row: -row["ratio"])
    means = category_means(rows, ("ratio", "asked_rate"), FIGURES) if averaged else []
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


def show_conditions(settings: Settings, category: str, net: WedgeNet, scored: Scored) -> None:
    """Tell in which condition each test image was judged, and draw how that was decided."""
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


def describe(category: str, ratio: float, metrics: Metrics, where: str = "") -> str:
    """The line that a user looks for; ``where`` says which pixels count."""
    if metrics.image_auroc is None:
        return (
            f"[{category}] Image-level AUROC: undefined ({ratio_name(ratio)}): it takes good and defective test images"
        )
    line = f"[{category}] Image-level AUROC: {metrics.image_auroc:.4f}  ({ratio_name(ratio)}: "
    if metrics.pixel_auroc is not None:
        line += f"pixel AUROC {metrics.pixel_auroc:.4f}, AUPRO {metrics.aupro:.4f}{where}, "
    return line + f"F1-max {metrics.f1_max:.4f} at {metrics.f1_threshold:.4g})"


def describe_alarms(alarms: float | None, detections: float | None) -> str:
    """What a threshold from the training images does on the test images."""
    measured = {"good parts called defective": alarms, "defects found": detections}
    return ", ".join(f"{name} {value:.1%}" for name, value in measured.items() if value is not None)


def mean_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each ratio the mean over the categories, where a figure is defined."""
    means = []
    for ratio in dict.fromkeys(row["ratio"] for row in rows):
        own = [row for row in rows if row["ratio"] == ratio]
        figures = {
            name: mean([row[name] for row in own])
            for name in (
                "image_auroc",
                "pixel_auroc",
                "aupro",
                "f1_max",
                "false_alarm_rate",
                "detection_rate",
                "unfamiliar_rate",
                "bank_mb",
            )
        }
        means.append(dict.fromkeys(own[0]) | {"category": "mean", "ratio": ratio} | figures)
        if figures["image_auroc"] is not None:
            print(f"[mean of {len(own)}] Image-level AUROC: {figures['image_auroc']:.4f}  ({ratio_name(ratio)})")
    return means


if __name__ == "__main__":
    sys.exit(main())
