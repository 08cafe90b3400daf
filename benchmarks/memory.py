"""How good a bank is for its bytes: WEDGE-Net's metric, fewer dimensions and half precision beside PatchCore.

    python -m benchmarks.memory --data-path sample_data --category all --backbone efficientnet_lite0
    python -m benchmarks.memory --data-path real_data --category magnetic_tile --center-crop false --seeds 1

Banks of 0.02 to 10 % of the training patches, for several seeds of the coreset; PatchCore with the same backbone. Takes
the settings of train.py and trains in memory. Writes ``benchmarks/results/memory.csv`` and ``.png``: image AUROC (mean,
lowest and highest over the seeds), pixel AUROC and AUPRO over the bank's bytes. Exit code 1 if a category failed.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

import config
from benchmarks.common import RESULTS, Row, print_table, write_csv
from models.backbone import feature_channels
from models.scoring import PATCHCORE, WEDGE_NET, Scoring
from models.whitening import Whitening, fit_whitening
from utils.console import command, for_each
from utils.data.dataset import find_categories
from utils.metrics import aupro, auroc
from utils.pictures.tables import category_means, mean
from utils.pipeline.checkpoint import build_net
from utils.pipeline.experiments import Features, banks, extract, predict, single_bank
from utils.pipeline.patchcore import build_patchcore
from utils.pipeline.timing import describe_machine, describe_versions
from utils.pipeline.training import bank_size
from utils.settings import Settings, SettingsParser, positive

RATIOS = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0002)
FIGURES = ("image_auroc", "lowest", "highest", "pixel_auroc", "aupro", "bank_kb")


def methods(settings: Settings, category: str) -> Iterator[tuple[str, Features, torch.dtype, Scoring]]:
    """Yield the name, the features, what the bank is stored in and the scoring of each method."""
    raw = extract(build_net(dataclasses.replace(settings, use_semantic=True)), settings, category)
    layers = raw.select(slice(0, sum(feature_channels(settings.backbone))))
    own = raw if settings.use_semantic else layers
    yield "WEDGE-Net, euclidean, float32 (the paper's)", raw, torch.float32, WEDGE_NET
    yield "WEDGE-Net, as configured", own.mapped(fit(own, settings)), getattr(torch, settings.bank_dtype), WEDGE_NET
    small = fit_whitening(layers.train.flatten(0, 1), "whitened", 1.0, min(96, layers.train.shape[2]))
    yield "WEDGE-Net, no semantic, e = 1, 96 dims, float16", layers.mapped(small), torch.float16, WEDGE_NET
    del raw, layers, own
    baseline = dataclasses.replace(
        settings, patchcore_backbone=settings.backbone, patchcore_weights=settings.backbone_weights
    )
    yield "PatchCore, float32", extract(build_patchcore(baseline), settings, category), torch.float32, PATCHCORE


def fit(features: Features, settings: Settings) -> Whitening | None:
    """The settings' own metric."""
    patches = features.train.flatten(0, 1)
    return fit_whitening(patches, settings.metric, settings.whitening_shrinkage, settings.embedding_dim)


def measure(settings: Settings, category: str, seeds: int) -> list[Row]:
    """A row for each method and bank size."""
    rows = []
    for name, features, dtype, scoring in methods(settings, category):
        images, patches, dim = features.train.shape
        sizes = [bank_size(images * patches, ratio, category) for ratio in RATIOS]
        aurocs, pixels = {}, {}
        for seed in range(settings.seed, settings.seed + seeds):
            what = f"{category}, {name}, seed {seed}"
            for ratio, distances in zip(RATIOS, banks(features, sizes, seed, dtype, what), strict=True):
                prediction = predict(distances, settings.image_size, scoring)
                aurocs.setdefault(ratio, []).append(auroc(features.labels, prediction.scores.numpy()))
                if seed == settings.seed and features.masks is not None:
                    maps = prediction.maps.numpy()
                    pixel = auroc(features.masks.ravel().astype(np.uint8), maps.ravel())
                    pixels[ratio] = (pixel, aupro(features.masks, maps))
        for ratio, size in zip(RATIOS, sizes, strict=True):
            values = aurocs[ratio]
            pixel, overlap = pixels.get(ratio, (None, None))
            rows.append(
                {
                    "category": category,
                    "method": name,
                    "ratio": ratio,
                    "vectors": size,
                    "dimensions": dim,
                    "bank_kb": size * dim * dtype.itemsize / 1e3,
                    "image_auroc": mean(values),
                    "lowest": min(values),
                    "highest": max(values),
                    "pixel_auroc": pixel,
                    "aupro": overlap,
                    "seeds": seeds,
                }
            )
    return rows


def plot(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Image AUROC over the bank's bytes, a curve for each method, the seeds' range as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = [row for row in rows if row["method"] == method]
        size = [row["bank_kb"] for row in own]
        axes.plot(size, [row["image_auroc"] for row in own], marker="o", color=f"C{number}", label=method)
        axes.fill_between(
            size, [row["lowest"] for row in own], [row["highest"] for row in own], color=f"C{number}", alpha=0.15
        )
    axes.set(xscale="log", xlabel="memory bank, kB", ylabel="image AUROC", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument("--seeds", type=positive, default=3, help="coresets for each method: SEED and those after it")
    settings, options = parser.read(argv)
    settings = single_bank(settings)
    print(describe_machine())
    print(describe_versions("torch"))
    rows: list[Row] = []
    categories = find_categories(settings)
    code = for_each(categories, lambda category: rows.extend(measure(settings, category, options.seeds)))
    if rows:
        several = len({row["category"] for row in rows}) > 1
        shown = category_means(rows, ("method", "ratio"), FIGURES) if several else rows
        write_csv(RESULTS / "memory.csv", rows + shown if several else rows)
        print_table(shown)
        what = f"mean of {len(categories)} categories" if several else rows[0]["category"]
        plot(RESULTS / "memory.png", f"{what}, {settings.backbone}, {options.seeds} seeds", shown)
    return code


if __name__ == "__main__":
    sys.exit(main())
