"""Good parts as they are: odd pictures among them, the threshold that they set, and good parts of another kind.

    python -m benchmarks.good_parts --data-path DATA --category all --center-crop false --backbone efficientnet_lite0

For each category and draw (a seed of the coreset and of what is drawn), at the first SAMPLING_RATIO:

* 5 % defective test pictures are put among the training pictures: how many of them training names as odd, how many good
  ones, and image AUROC (on the other test pictures) with them, without what was named, and of clean training;
* what training on good pictures alone names; image AUROC, and defects found at the smallest false-alarm rate, with
  these pictures and without them;
* false alarms at nominal 1, 5 and 10 %, and whether they lie in the binomial distribution's 95 % interval;
* good test pictures in another light (a shade from left to right) and nearer to the camera (5 % larger): of those that
  are NG half, 10 at most, are remembered as by remember.py. How many of them and of the other half are OK then, and how
  many defects, as they are and altered alike, are no longer NG.

The last is done without the odd pictures, as on a line. A run that was cut off goes on where it stopped. Writes
``benchmarks/results/good_parts.csv``, a row a category and draw.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models.threads  # noqa: F401 - before torch

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor
from torch.nn import functional

import config
from benchmarks.common import RESULTS
from models.conformal import conformal_threshold, smallest_rate
from utils.console import command, for_each
from utils.data.dataset import Sample, batches, find_categories, test_samples
from utils.metrics import alarm_rates, auroc
from utils.pictures.tables import format_table, mean, read_results, write_csv
from utils.pipeline.checkpoint import make_detector
from utils.pipeline.experiments import few_images
from utils.pipeline.inference import Scored, score_samples
from utils.pipeline.odd_images import find_odd
from utils.pipeline.remembering import remember_pictures
from utils.pipeline.training import Trained, train_category, wedge_net_method
from utils.settings import Settings, SettingsParser, positive

SHARE = 0.05  # of defective pictures among the training pictures
NOMINAL = (0.01, 0.05, 0.1)
TOLD = 10  # good parts that are remembered, at most
KEYS = ("category", "draw", "backbone", "image_size", "ratio", "conditions", "images")
Row = dict[str, Any]


def shade(images: Tensor) -> Tensor:
    """(B, 3, H, W) images in [0, 1] lit from the right: 0.7 to 1.2 times as bright from left to right."""
    return (images * torch.linspace(0.7, 1.2, images.shape[3])).clamp(0, 1)


def nearer(images: Tensor) -> Tensor:
    """(B, 3, H, W) images in [0, 1], their middle 5 % larger."""
    height, width = images.shape[2:]
    top, left = round(height * 0.025), round(width * 0.025)
    middle = images[:, :, top : height - top, left : width - left]
    return functional.interpolate(middle, (height, width), mode="bilinear", antialias=True)


ALTERED = {"light": shade, "nearer": nearer}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument("--draws", type=positive, default=3, help="SEED and those after it (now: 3)")
    parser.add_argument("--images", type=positive, default=150, help="training images at most (now: 150)")
    parser.add_argument("--out", type=Path, default=RESULTS / "good_parts.csv", metavar="FILE", help="the CSV")
    settings, options = parser.read(argv)
    rows: list[Row] = read_results(options.out)

    def work(category: str) -> None:
        for draw in range(settings.seed, settings.seed + options.draws):
            keys = dict(zip(KEYS, (
                category, draw, settings.backbone, "x".join(map(str, settings.image_size)), settings.sampling_ratio[0],
                len(settings.conditions), options.images,
            ), strict=True))  # fmt: skip
            if not any(all(str(row[key]) == str(keys[key]) for key in KEYS) for row in rows):
                with few_images(settings, category, options.images) as own:
                    own = dataclasses.replace(own, seed=draw, sampling_ratio=settings.sampling_ratio[:1])
                    rows.append(keys | measure(own, category))
                write_csv(options.out, rows)

    code = for_each(find_categories(settings), work)
    if rows:
        report(rows)
        print(f"\nwritten: {options.out}")
    return code


def measure(settings: Settings, category: str) -> Row:
    """One category, one draw: all that this module's head says."""
    drawn = np.random.default_rng(settings.seed)
    tests = test_samples(settings, category)
    clean = train(settings, category)
    good = len(clean.samples)
    scored = score(clean, tests, settings)
    row: Row = {"good": good, "mixed_in": (mixed := max(1, round(SHARE * good)))}

    defective = [number for number, sample in enumerate(tests) if sample.label]
    numbers = drawn.choice(defective, mixed, replace=False)
    others = np.setdiff1d(np.arange(len(tests)), numbers)
    folder = clean.samples[0].path.parent
    for number in numbers:
        (folder / f"mixed_{number}{tests[number].path.suffix}").symlink_to(tests[number].path.resolve())
    with_defects = train(settings, category)
    named = names(with_defects)
    found = sum(name.startswith("mixed_") for name in named)
    left = train(settings, category, named) if named else with_defects
    row |= {"found": found / mixed, "good_named": (len(named) - found) / good}
    for name, trained in {"clean_auroc": clean, "mixed_auroc": with_defects, "left_out_auroc": left}.items():
        own = scored if trained is clean else score(trained, tests, settings)
        row[name] = auroc(own.labels[others], own.scores[others])
    for path in folder.glob("mixed_*"):
        path.unlink()

    named = names(clean)
    without = train(settings, category, named) if named else clean
    scored_without = score(without, tests, settings) if named else scored
    row["named"] = len(named) / good
    for name, trained, own in (("", clean, scored), ("_without", without, scored_without)):
        row |= {f"auroc{name}": auroc(own.labels, own.scores), f"detected{name}": at_smallest(trained, own)}

    row["test_good"] = int((scored.labels == 0).sum())
    for rate in NOMINAL:
        row |= alarms(clean, scored, rate)
    for name, alter in ALTERED.items():
        row |= {
            f"{name}_{figure}": value for figure, value in told(without, tests, scored_without, settings, alter).items()
        }
    return row


def train(settings: Settings, category: str, without: Sequence[str] = ()) -> Trained:
    """WEDGE-Net on the images that lie there."""
    (trained,) = train_category(settings, category, wedge_net_method(settings), True, without)
    return trained


def names(trained: Trained) -> list[str]:
    """Files that training names as odd."""
    return [trained.samples[trained.calibration.images[number]].path.name for number in find_odd(trained)[2]]


def score(trained: Trained, samples: Sequence[Sample], settings: Settings, alter: Any = None) -> Scored:
    """The samples, their images altered by ``alter``, with what training made."""
    detector = make_detector(trained.checkpoint, trained.net, settings.image_size, trained.path)
    hook = None if alter is None else lambda batch: alter(batch.images)
    return score_samples([detector], samples, settings, trained.checkpoint.category, hook)[0]


def at_smallest(trained: Trained, scored: Scored) -> float:
    """The share of the defects that is found at the smallest false-alarm rate which the training images vouch for."""
    calibration = trained.checkpoint.calibration_scores.numpy()
    return alarm_rates(scored.labels, scored.scores, conformal_threshold(calibration, smallest_rate(calibration)))[1]


def alarms(trained: Trained, scored: Scored, rate: float) -> Row:
    """False alarms at a nominal rate, or the smallest that can be had, and whether the binomial interval holds them."""
    calibration = trained.checkpoint.calibration_scores.numpy()
    kept = max(rate, smallest_rate(calibration))
    good = scored.scores[scored.labels == 0]
    count = int((good > conformal_threshold(calibration, rate)).sum())
    low, high = binom.interval(0.95, len(good), kept)
    place = "below" if count < low else "above" if count > high else "inside"
    name = f"at_{rate * 100:g}"
    return {f"kept_{name}": kept, f"alarms_{name}": count / len(good), f"interval_{name}": place}


def told(trained: Trained, tests: Sequence[Sample], scored: Scored, settings: Settings, alter: Any) -> Row:
    """What remembering some of the altered good pictures that are NG does to them, to others and to defects."""
    checkpoint = trained.checkpoint
    before = conformal_threshold(checkpoint.calibration_scores.numpy(), settings.false_alarm_rate)
    altered = score(trained, tests, settings, alter)
    wrong = [number for number in np.flatnonzero(altered.labels == 0) if altered.scores[number] > before]
    known, unseen = wrong[0::2][:TOLD], wrong[1::2][:TOLD]
    row: Row = {"called_bad": len(wrong), "told": len(known), "told_ok": None, "unseen": len(unseen), "unseen_ok": None}
    row |= {"defects_lost": None, "altered_defects_lost": None}
    if not known:
        return row
    detector = make_detector(checkpoint, trained.net, settings.image_size, trained.path)
    images = torch.cat([alter(batch.images) for batch in batches([tests[number] for number in known], settings)])
    done = remember_pictures(detector, checkpoint, detector.net.look(images), before, {})
    after = conformal_threshold(done.checkpoint.calibration_scores.numpy(), settings.false_alarm_rate)
    learnt = trained._replace(checkpoint=done.checkpoint)
    again = score(learnt, tests, settings, alter)
    row["told_ok"] = float((again.scores[known] <= after).mean())
    row["unseen_ok"] = float((again.scores[unseen] <= after).mean()) if unseen else None
    for name, old, new in (
        ("defects_lost", scored, score(learnt, tests, settings)),
        ("altered_defects_lost", altered, again),
    ):
        found = (old.labels == 1) & (old.scores > before)
        row[name] = float((new.scores[found] <= after).mean()) if found.any() else None
    return row


def report(rows: Sequence[Row]) -> None:
    """Print each category's means over the draws, and the means of the categories."""

    def shown(title: str, columns: Sequence[str]) -> None:
        each = [
            {"category": category}
            | {name: _mean([row[name] for row in rows if row["category"] == category]) for name in columns}
            for category in dict.fromkeys(row["category"] for row in rows)
        ]
        total = {"category": "mean"} | {name: _mean([row[name] for row in each]) for name in columns}
        print(f"\n{title}\n" + format_table([*each, total]))

    shown(
        "5 % defective pictures among the training pictures:",
        ("good", "mixed_in", "found", "good_named", "clean_auroc", "mixed_auroc", "left_out_auroc"),
    )
    shown("good pictures alone:", ("named", "auroc", "auroc_without", "detected", "detected_without"))
    kinds = ("kept", "alarms", "interval")
    shown("false alarms:", ["test_good"] + [f"{kind}_at_{rate * 100:g}" for rate in NOMINAL for kind in kinds])
    figures = ("called_bad", "told", "told_ok", "unseen", "unseen_ok", "defects_lost", "altered_defects_lost")
    for name in ALTERED:
        shown(f"remembered, {name}:", [f"{name}_{figure}" for figure in figures])


def _mean(values: Sequence[Any]) -> Any:
    """The mean of numbers; of texts which there are, and how often."""
    if any(isinstance(value, str) for value in values):
        kinds = dict.fromkeys(value for value in values if "," not in str(value) and " " not in str(value))
        return ", ".join(f"{values.count(kind)} {kind}" for kind in kinds) or "-"
    return mean([None if value is None or math.isnan(value) else float(value) for value in values])


if __name__ == "__main__":
    sys.exit(main())
