"""What each part of the method is worth: one part changed at a time, everything else as the settings have it.

    python ablation.py
    python ablation.py --category all --sampling-ratio 0.01 --seeds 3

Banks are made in memory, for several seeds of the coreset, since results move with its starting point. Writes
SAVE_DIR/ablation_10pct.csv and .png for each ratio: image AUROC (mean, and half its range over the seeds), pixel AUROC
and AUPRO of each variant and category. Settings are in config.py.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import models.threads  # noqa: F401 - before torch

import numpy as np
import torch

import config
from models.backbone import feature_channels
from models.scoring import WEDGE_NET
from models.whitening import METRICS, fit_whitening
from utils.console import check_writable, command, for_each
from utils.data.dataset import find_categories
from utils.metrics import Metrics, evaluate
from utils.pictures.figures import draw_ablation
from utils.pictures.tables import category_means, format_table, mean, write_csv
from utils.pipeline.checkpoint import build_net
from utils.pipeline.experiments import Features, banks, extract, predict, single_bank
from utils.pipeline.training import bank_size
from utils.settings import Settings, SettingsParser, positive, ratio_name
from utils.size import Size

TOP_SHARE = 0.01  # of a map's pixels, where a score is their mean
Item = TypeVar("Item")
FIGURES = ("image_auroc", "image_auroc_spread", "pixel_auroc", "aupro", "bank_mb")


@dataclass(frozen=True)
class Variant:
    """One row: ``part`` of the method that is changed, ``name`` of what it is changed to, and all choices."""

    part: str
    name: str
    settings: Settings
    layers: tuple[int, ...] = (2, 3)
    sigma: float = WEDGE_NET.sigma
    top: bool = False  # score: the mean of the map's highest values, or its maximum

    def features(self) -> tuple[Any, ...]:
        """What the features of the images depend on."""
        return self.settings.frequency_stream, self.settings.image_size

    def bank(self) -> tuple[Any, ...]:
        """What the bank depends on, beside the features."""
        s = self.settings
        return self.layers, s.use_semantic, s.metric, s.whitening_shrinkage, s.embedding_dim, s.bank_dtype


def variants(settings: Settings) -> Iterator[Variant]:
    """The settings as they are, then every change of one part."""

    def changed(part: str, name: str, **changes: Any) -> Variant:
        return Variant(part, name, dataclasses.replace(settings, **changes))

    yield Variant("", "as configured", settings)
    paper = {"frequency_stream": "gate", "use_semantic": True, "metric": "euclidean"}
    yield changed("", "the paper's own form", **paper, embedding_dim=None, bank_dtype="float32")
    for stream in {"gate", "off"} - {settings.frequency_stream}:
        yield changed("frequency stream", stream, frequency_stream=stream)
    yield changed("semantic stream", "off" if settings.use_semantic else "on", use_semantic=not settings.use_semantic)
    for metric in set(METRICS) - {settings.metric}:
        yield changed("metric", metric, metric=metric)
    if settings.metric == "whitened":
        for shrinkage in (0.1, 0.3, 1.0, 3.0, 10.0):
            if shrinkage != settings.whitening_shrinkage:
                yield changed("shrinkage", f"{shrinkage:g}", whitening_shrinkage=shrinkage)
    for dim, name in ((None, "all"), (0.98, "98 % of the distances"), (96, "96"), (48, "48")):
        if dim != settings.embedding_dim:
            yield changed("dimensions", name, embedding_dim=dim)
    other = {"float16": "float32", "float32": "float16"}[settings.bank_dtype]
    yield changed("bank stored in", other, bank_dtype=other)
    yield Variant("layers", "2 alone", settings, layers=(2,))
    yield Variant("layers", "3 alone", settings, layers=(3,))
    for size in (224, 320):
        shorter = min(settings.image_size)
        if size != shorter:
            sides = Size(*(round(side * size / shorter) for side in settings.image_size))
            resize = round(settings.resize * size / shorter)
            yield changed("image size", f"{size} px", image_size=sides, resize=resize)
    for sigma in (2.0, 8.0):
        yield Variant("smoothing", f"sigma {sigma:g} px", settings, sigma=sigma)
    yield Variant("image score", f"mean of the top {TOP_SHARE * 100:g} %", settings, top=True)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure every variant on every category; returns the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument("--seeds", type=positive, default=3, help="coresets for each variant: SEED and those after it")
    settings, options = parser.read(argv)
    settings = single_bank(settings)
    categories = find_categories(settings)
    check_writable(settings.save_dir, "SAVE_DIR")
    build_net(settings)  # a wrong setting is one message, not one for each category
    rows: list[dict[str, Any]] = []
    code = for_each(categories, lambda category: rows.extend(measure(settings, category, options.seeds)))
    for ratio in settings.sampling_ratio:
        own = [row for row in rows if row["ratio"] == ratio]
        if own:
            report(settings, ratio, own)
    return code


def measure(settings: Settings, category: str, seeds: int) -> list[dict[str, Any]]:
    """A row for each variant and ratio of one category."""
    rows = []
    for alike in grouped(variants(settings), Variant.features):
        own = dataclasses.replace(alike[0].settings, use_semantic=True)
        net, (layer2, layer3) = build_net(own), feature_channels(own.backbone)
        raw = extract(net, own, category)
        columns = {2: range(layer2), 3: range(layer2, layer2 + layer3)}
        semantic = range(layer2 + layer3, net.dim)
        for same_bank in grouped(alike, Variant.bank):
            kept = [*itertools.chain(*(columns[layer] for layer in same_bank[0].layers))]
            kept += semantic if same_bank[0].settings.use_semantic else ()
            rows += measure_bank(same_bank, raw.select(kept), category, seeds)
    order = [(variant.part, variant.name) for variant in variants(settings)]
    return sorted(rows, key=lambda row: order.index((row["part"], row["variant"])))


def measure_bank(same_bank: Sequence[Variant], raw: Features, category: str, seeds: int) -> list[dict[str, Any]]:
    """A row for each ratio and each of the variants that share their banks; ``raw`` are the features that they keep."""
    settings, dim = same_bank[0].settings, raw.train.shape[2]
    kept = None if settings.embedding_dim is None else min(settings.embedding_dim, dim)
    features = raw.mapped(fit_whitening(raw.train.flatten(0, 1), settings.metric, settings.whitening_shrinkage, kept))
    images, patches, dim = features.train.shape
    dtype = getattr(torch, settings.bank_dtype)
    sizes = {ratio: bank_size(images * patches, ratio, category) for ratio in settings.sampling_ratio}
    found: dict[tuple[float, Variant], list[Metrics]] = {}
    for seed in range(settings.seed, settings.seed + seeds):
        what = ", ".join(filter(None, (category, same_bank[0].part, same_bank[0].name, f"seed {seed}")))
        masks = features.masks if seed == settings.seed else None
        for ratio, distances in zip(sizes, banks(features, [*sizes.values()], seed, dtype, what), strict=True):
            for variant in same_bank:
                found.setdefault((ratio, variant), []).append(judge(variant, distances, features.labels, masks))
    rows = []
    for (ratio, variant), figures in found.items():
        aurocs = [each.image_auroc for each in figures if each.image_auroc is not None]
        rows.append(
            {
                "category": category,
                "ratio": ratio,
                "part": variant.part,
                "variant": variant.name,
                "image_auroc": mean(aurocs),
                "image_auroc_spread": (max(aurocs) - min(aurocs)) / 2 if aurocs else None,
                "pixel_auroc": figures[0].pixel_auroc,
                "aupro": figures[0].aupro,
                "bank_mb": sizes[ratio] * dim * dtype.itemsize / 1e6,
                "seeds": seeds,
            }
        )
    return rows


def judge(variant: Variant, distances: torch.Tensor, labels: np.ndarray, masks: np.ndarray | None) -> Metrics:
    """The metrics of one bank's (T, h*w) distances, scored as the variant does."""
    scores, maps, *_ = predict(distances, variant.settings.image_size, WEDGE_NET._replace(sigma=variant.sigma))
    if variant.top:
        scores = maps.flatten(1).topk(round(TOP_SHARE * maps[0].numel()), dim=1).values.mean(dim=1)
    return evaluate(labels, scores.numpy(), masks, maps.numpy())


def grouped(items: Iterable[Item], key: Callable[[Item], Any]) -> list[list[Item]]:
    """Lists of the items that share a key, in the order in which the keys appear."""
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def report(settings: Settings, ratio: float, rows: list[dict[str, Any]]) -> None:
    """Means over the categories, the console's table, CSV and picture of one ratio."""
    means = category_means(rows, ("part", "variant"), FIGURES)
    several = len({row["category"] for row in rows}) > 1
    path = settings.save_dir / f"ablation_{ratio_name(ratio)}.csv"
    write_csv(path, rows + means if several else rows)
    shown = means if several else rows
    draw_ablation(path.with_suffix(".png"), shown, rows)
    table = [{name: row[name] for name in ("part", "variant", *FIGURES)} for row in shown]
    what = f"mean of {len({row['category'] for row in rows})} categories" if several else rows[0]["category"]
    print(f"\n[{what}] {ratio_name(ratio)}, {rows[0]['seeds']} seeds\n{format_table(table)}")
    print(f"written: {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(main())
