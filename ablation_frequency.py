"""What the frequency stream is worth: its parts switched on and off, on clean and on noisy, blurred and other images.

    python ablation_frequency.py
    python ablation_frequency.py --category all --sampling-ratio 0.01

Every variant is trained anew, in a folder of its own that is removed at the end, beside PatchCore with the same ratio;
'shrinkage' is what wavelets are commonly used for, the noise taken out of each image before it is looked at.
Writes SAVE_DIR/ablation_frequency_10pct.csv and .png for each ratio: image AUROC, false alarms and detections at the
threshold that training set for 5 % false alarms, for every level of every corruption; and
SAVE_DIR/ablation_frequency_10pct_summary.csv with memory, training time and FPS beside their means. Settings are in
config.py.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import models.threads  # noqa: F401 - before torch

import numpy as np
import pywt
import torch
from torch import Tensor

import config
from models.backbone import feature_channels
from models.detector import Detector
from models.engine import OnnxEngine, TorchEngine
from utils.console import check_writable, command, for_each
from utils.data.dataset import batches, find_categories
from utils.data.dataset import test_samples as samples_for_test
from utils.metrics import FALSE_ALARMS
from utils.pictures.figures import draw_frequency_ablation
from utils.pictures.tables import category_means, format_table, mean, write_csv
from utils.pipeline.checkpoint import load_detector
from utils.pipeline.inference import at_depth_of
from utils.pipeline.patchcore import load_patchcore, patchcore_dim
from utils.pipeline.robustness import BLUR, COLOUR, DARK, FIGURES, NOISE, cell, measure
from utils.pipeline.timing import alternate
from utils.pipeline.training import patchcore_method, train_category, wedge_net_method
from utils.settings import Settings, SettingsParser, positive, ratio_name

CORRUPTIONS = {  # beside the images as they are; false alarms count up to a level that a factory may well see
    "noise": (dataclasses.replace(NOISE, levels=(5, 10, 20, 30, 40)), 40),
    "blur": (dataclasses.replace(BLUR, levels=(1, 1.5, 2, 3)), 2),
    "colour": (dataclasses.replace(COLOUR, levels=(0.5, 1, 2)), 1),
    "dark": (dataclasses.replace(DARK, levels=(0.2, 0.4, 0.6)), 0.4),
}
PATCHCORE = "PatchCore"
SHRINKAGE = "shrinkage"
Row = dict[str, Any]


def variants(settings: Settings, ratio: float) -> Iterator[tuple[str, Settings]]:
    """Names and settings, the first one what the others are measured by."""
    settings = dataclasses.replace(settings, sampling_ratio=(ratio,))
    both = dataclasses.replace(settings, frequency_stream="condition", light_alignment=True)
    yield PATCHCORE, settings
    yield "off", dataclasses.replace(settings, frequency_stream="off")
    yield SHRINKAGE, dataclasses.replace(settings, frequency_stream="off")
    yield "gate", dataclasses.replace(settings, frequency_stream="gate")
    yield "light alone", dataclasses.replace(both, conditions=("clean",))
    yield "conditions alone", dataclasses.replace(both, light_alignment=False)
    yield "both", both
    yield "both, equal memory", in_bytes_of_patchcore(both, ratio)
    other = "off" if settings.use_semantic else "on"
    yield f"both, semantic {other}", dataclasses.replace(both, use_semantic=not settings.use_semantic)


def in_bytes_of_patchcore(settings: Settings, ratio: float) -> Settings:
    """All banks together as large as the baseline's one, half of it clean's: without the semantic stream."""
    theirs = 4 * patchcore_dim(settings)  # bytes of a float32 vector
    dim = settings.embedding_dim
    if dim is None or dim < 1:  # no more than all
        dim = sum(feature_channels(settings.backbone))
    ours = getattr(torch, settings.bank_dtype).itemsize * dim
    return dataclasses.replace(
        settings, use_semantic=False, clean_share=0.5, sampling_ratio=(min(1.0, ratio * theirs / ours),)
    )


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure every variant on every category; returns the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument(
        "--noise-seeds", type=positive, default=1, metavar="N", help="draw the noise N times: the mean (now: 1)"
    )
    settings, options = parser.read(argv)
    categories = find_categories(settings)
    check_writable(settings.save_dir, "SAVE_DIR")
    levels: list[Row] = []
    totals: list[Row] = []

    def work(category: str) -> None:
        for ratio in settings.sampling_ratio:
            own_levels, own_totals = measure_category(settings, category, ratio, options.noise_seeds)
            levels.extend(own_levels)
            totals.extend(own_totals)

    code = for_each(categories, work)
    for ratio in settings.sampling_ratio:
        if own := [row for row in totals if row["ratio"] == ratio]:
            report(settings, ratio, [row for row in levels if row["ratio"] == ratio], own)
    return code


def measure_category(settings: Settings, category: str, ratio: float, seeds: int) -> tuple[list[Row], list[Row]]:
    """A row for each variant, corruption and level, and one for each variant."""
    levels, totals, detectors = [], [], {}
    for name, own in variants(settings, ratio):
        detectors[name], seconds = trained(name, own, category)
        samples = samples_for_test(own, category)
        what = [detectors[name]], samples, own
        (clean,) = measure(*what, dataclasses.replace(NOISE, levels=(0,)), 1, f"{category}, {name}")
        for kind, (corruption, _) in CORRUPTIONS.items():
            (curve,) = measure(*what, corruption, seeds, f"{category}, {name}")
            curve = [clean[0], *curve]
            for level, figures in zip((0, *corruption.levels), curve, strict=True):
                row = {"category": category, "ratio": ratio, "variant": name, "corruption": kind, "level": level}
                means = zip(FIGURES, figures.mean(axis=0), strict=True)
                levels.append(row | {key: cell(value) for key, value in means})
        total = {"category": category, "ratio": ratio, "variant": name}
        total |= summary([row for row in levels if row["variant"] == name])
        totals.append(total | {"bank_mb": detectors[name].bank_bytes / 1e6, "train_s": seconds})
    speeds = fps(detectors, settings, category)
    return levels, [row | {"fps": speeds[row["variant"]]} for row in totals]


def trained(variant: str, settings: Settings, category: str) -> tuple[Detector, float]:
    """The detector of one variant, and the seconds that its training took."""
    with tempfile.TemporaryDirectory(dir=settings.save_dir, prefix=".ablation") as folder:
        settings = dataclasses.replace(settings, save_dir=Path(folder), patchcore_dir=Path(folder))
        start = time.perf_counter()
        method = (patchcore_method if variant == PATCHCORE else wedge_net_method)(settings)
        if variant == SHRINKAGE:
            method.net.backbone = Shrinking(method.net.backbone, settings.wavelet_type)
        train_category(settings, category, method)
        seconds = time.perf_counter() - start
        if variant == PATCHCORE:
            return load_patchcore(settings, category), seconds
        return load_detector(settings, category, settings.sampling_ratio[0], method.net)[0], seconds


class Shrinking:
    """An engine that takes the noise out of the images before the backbone sees them."""

    def __init__(self, engine: TorchEngine | OnnxEngine, wavelet: str) -> None:
        self.engine, self.wavelet = engine, wavelet
        self.name, self.at_once = engine.name, engine.at_once

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.engine(shrink(images, self.wavelet))


def shrink(images: Tensor, wavelet: str) -> Tensor:
    """(B, 3, H, W) images -> the same without what looks like white noise: BayesShrink (Chang, Yu, Vetterli, 2000).

    Three levels of the wavelet. The noise's variance is told from the median of the finest diagonal band. In each band
    coefficients are brought nearer to 0 by that variance over the signal's standard deviation, the smaller ones to 0.
    """
    levels = pywt.wavedec2(images.cpu().numpy(), wavelet, level=3, axes=(2, 3))
    spread = np.median(np.abs(levels[-1][2]), axis=(2, 3), keepdims=True) / 0.6745
    for place, bands in enumerate(levels[1:], start=1):
        signal = [np.sqrt((np.square(band).mean(axis=(2, 3), keepdims=True) - spread**2).clip(1e-12)) for band in bands]
        levels[place] = tuple(
            np.sign(band) * (np.abs(band) - spread**2 / own).clip(0) for band, own in zip(bands, signal, strict=True)
        )
    size = images.shape[2:]
    whole = pywt.waverec2(levels, wavelet, axes=(2, 3))[..., : size[0], : size[1]]
    return torch.from_numpy(whole).to(images).clamp(0, 1)


def summary(rows: Sequence[Row]) -> Row:
    """Means over the levels of each corruption, and the most false alarms on those that a factory may well see."""
    found: Row = {"clean_auroc": next(row["auroc"] for row in rows if not row["level"])}
    for kind in CORRUPTIONS:
        found[f"{kind}_auroc"] = mean([row["auroc"] for row in rows if row["corruption"] == kind])
    for kind, (_, most) in CORRUPTIONS.items():
        rates = [row["false_alarm_rate"] for row in rows if row["corruption"] == kind and row["level"] <= most]
        found[f"{kind}_false_alarm_rate"] = None if None in rates else max(rates)
    return found


def fps(detectors: Mapping[str, Detector], settings: Settings, category: str) -> dict[str, float]:
    """Images a second of each detector, one image at a time, in turn."""
    samples = samples_for_test(settings, category)[:8]
    settings = at_depth_of(list(detectors.values()), settings)
    images = [image[None] for batch in batches(samples, settings) for image in batch.images]
    seconds = alternate(
        {name: lambda each=detector: [each.predict(image) for image in images] for name, detector in detectors.items()},
        repeats=5,
        device=settings.device,
    )
    return {name: len(images) / float(np.median(times)) for name, times in seconds.items()}


def report(settings: Settings, ratio: float, levels: list[Row], totals: list[Row]) -> None:
    """Means over the categories, the console's table, CSV and picture of one ratio."""
    several = len({row["category"] for row in totals}) > 1
    names = [name for name in totals[0] if name not in ("category", "ratio", "variant")]
    mean_totals = category_means(totals, ("variant",), names) if several else totals
    mean_levels = category_means(levels, ("variant", "corruption", "level"), FIGURES) if several else levels
    path = settings.save_dir / f"ablation_frequency_{ratio_name(ratio)}.csv"
    write_csv(path, levels + mean_levels if several else levels)
    write_csv(path.with_name(f"{path.stem}_summary.csv"), totals + mean_totals if several else totals)
    what = f"mean of {len({row['category'] for row in totals})} categories" if several else totals[0]["category"]
    draw_frequency_ablation(path.with_suffix(".png"), f"{what}, {ratio * 100:g} % of the patches", mean_levels)
    print(
        f"\n[{what}] {ratio_name(ratio)}; AUROC: mean over the levels; false alarms: the most at "
        f"{', '.join(f'{kind} to {most:g}' for kind, (_, most) in CORRUPTIONS.items())}, nominal {FALSE_ALARMS:.0%}"
    )
    print(format_table([{name: row[name] for name in ("variant", *names)} for row in mean_totals]))
    print(f"written: {path}, {path.stem}_summary.csv and {path.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(main())
