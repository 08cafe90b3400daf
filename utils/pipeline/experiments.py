"""Variants of a detector, trained in a folder that is thrown away and measured on a category's test images."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from models.detector import Detector
from models.wedge_net import RECIPE, Recipe
from utils.data.dataset import evenly, test_samples, train_samples
from utils.data.region import region_path
from utils.metrics import FALSE_ALARMS, alarm_rates, evaluate, training_threshold
from utils.pipeline.checkpoint import load_detector
from utils.pipeline.inference import score_samples
from utils.pipeline.patchcore import load_patchcore
from utils.pipeline.robustness import BLUR, COLOUR, DARK, NOISE, Corruption
from utils.pipeline.training import patchcore_method, train_category, wedge_net_method
from utils.settings import Settings

CLEAN = "clean"
CORRUPTIONS = tuple(  # up to the levels that CONDITIONS is there for, and darkness, which light alignment is
    dataclasses.replace(corruption, levels=levels)
    for corruption, levels in ((NOISE, (10, 25, 40)), (BLUR, (1, 2)), (COLOUR, (0.5, 1.0)), (DARK, (0.2, 0.4)))
)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """``name``; ``changes`` to the settings; ``recipe`` of form 'wedge'; ``patchcore`` for the baseline instead."""

    name: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    recipe: Recipe = RECIPE
    patchcore: bool = False

    def apply(self, settings: Settings) -> Settings:
        """The settings with its changes; the baseline has the backbone of the settings."""
        if self.patchcore:
            settings = dataclasses.replace(
                settings, patchcore_backbone=settings.backbone, patchcore_weights=settings.backbone_weights
            )
        return dataclasses.replace(settings, **self.changes)


@contextlib.contextmanager
def few_images(settings: Settings, category: str, images: int | None) -> Iterator[Settings]:
    """Settings by which a category has no more than so many of its training images, and writes into a folder that
    goes away: links to the data, evenly spaced."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "data", category)
        (root / "train" / "good").mkdir(parents=True)
        samples = train_samples(settings, category)
        for sample in samples if images is None else evenly(samples, images):
            (root / "train" / "good" / sample.path.name).symlink_to(sample.path.resolve())
        for part in ("test", "ground_truth"):
            if (source := settings.data_path / category / part).is_dir():
                (root / part).symlink_to(source.resolve())
        yield dataclasses.replace(
            settings,
            data_path=root.parent,
            region=region_path(settings, category),
            save_dir=Path(folder, "wedge"),
            patchcore_dir=Path(folder, "patchcore"),
        )


def train_variant(variant: Variant, settings: Settings, category: str) -> tuple[Detector, float]:
    """Train a variant by settings of ``few_images``; its detector, and the seconds from files to a bank."""
    settings = dataclasses.replace(variant.apply(settings), save_dir=settings.save_dir / variant.name.replace("/", "_"))
    start = time.perf_counter()
    method = patchcore_method(settings) if variant.patchcore else wedge_net_method(settings, variant.recipe)
    train_category(settings, category, method, overwrite=True)
    seconds = time.perf_counter() - start
    if variant.patchcore:
        return load_patchcore(settings, category), seconds
    return load_detector(settings, category, settings.sampling_ratio[0], method.net)[0], seconds


def measure_detector(
    detector: Detector, settings: Settings, category: str, corruptions: Sequence[Corruption] = (), pixels: bool = True
) -> Iterator[Row]:
    """A row for the images as they are, then one for each corruption and level: figures of merit, and the rates at the
    threshold that training set for 5 % false alarms."""
    samples = test_samples(settings, category)
    threshold = training_threshold(detector.calibration_scores.numpy(), FALSE_ALARMS)
    levels = [(CLEAN, None, 0.0)] + [(each.kind, each, level) for each in corruptions for level in each.levels if level]
    for kind, corruption, level in levels:
        alter = None if corruption is None else corruption.hook(settings, level, settings.seed)
        what = f"{category}, {kind} {level:g}" if level else f"{category}, {kind}"
        (scored,) = score_samples([detector], samples, settings, what, alter)
        metrics = evaluate(scored.labels, scored.scores, scored.masks if pixels else None, scored.maps, detector.inside)
        alarms, detections = alarm_rates(scored.labels, scored.scores, threshold)
        yield {
            "corruption": kind,
            "level": level,
            "image_auroc": metrics.image_auroc,
            "pixel_auroc": metrics.pixel_auroc,
            "aupro": metrics.aupro,
            "false_alarm_rate": alarms,
            "detection_rate": detections,
        }
