"""What a detector is worth as a whole: WEDGE-Net beside anomalib's PatchCore and PaDiM, on the same images.

    python -m benchmarks.peers --data-path sample_data --category all
    python -m benchmarks.peers --data-path magnetic_tile_data --category magnetic_tile --center-crop false

All of them have the same backbone and weights, are trained on the same images, no more than --images of them, and judge
the same test images. WEDGE-Net is what the settings describe, with 1 and 10 % of the patches; anomalib's models are as
it has them, in torch, PatchCore with one neighbour and 10 %. Training counts from files to a model; FPS is of one image
at a time, from a tensor to score and map.

Writes ``benchmarks/results/peers_<categories>.csv`` and ``.png``: AUROC over speed.
"""

import dataclasses
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import config
from benchmarks.anomalib_models import Verdict, build_padim, build_patchcore
from benchmarks.common import RESULTS, Row, alternate, median_and_spread, print_table, write_csv
from benchmarks.inference import load
from models.backbone import Backbone
from models.errors import InputError
from utils.console import command, for_each
from utils.data.dataset import batches, evenly, find_categories, test_samples, train_samples
from utils.metrics import evaluate
from utils.pictures.tables import category_means
from utils.pipeline.experiments import Variant, few_images, train_variant
from utils.pipeline.inference import with_progress
from utils.pipeline.timing import describe_machine, describe_versions
from utils.settings import Settings, SettingsParser, positive

RATIOS = (0.01, 0.1)
PATCHCORE_RATIO = 0.1
OURS, PATCHCORE, PADIM = "WEDGE-Net {:.0%}", f"anomalib PatchCore {PATCHCORE_RATIO:.0%}", "anomalib PaDiM"
DETECTORS = (*map(OURS.format, RATIOS), PATCHCORE, PADIM)
FIGURES = ("image_auroc", "pixel_auroc", "aupro", "model_mb", "train_s", "fps")
Judge = Callable[[Tensor], tuple[Tensor, Tensor]]  # images (B, 3, H, W) -> scores (B,) and maps (B, H, W)


def our_judges(settings: Settings, category: str, without: Sequence[str]) -> Iterator[tuple[str, Judge, float, float]]:
    """Name, judge, megabytes and seconds of training of WEDGE-Net with each ratio."""
    for ratio in RATIOS:
        name = OURS.format(ratio)
        if name in without:
            continue
        own = dataclasses.replace(settings, sampling_ratio=(ratio,))
        detector, seconds = train_variant(Variant("WEDGE-Net"), own, category)
        judge = lambda images, detector=detector: detector.predict(images)[:2]  # noqa: E731
        yield name, judge, detector.bank_bytes / 1e6, seconds


def their_judges(
    settings: Settings, category: str, backbone: Backbone, without: Sequence[str]
) -> Iterator[tuple[str, Judge, float, float]]:
    """The same of anomalib's models."""
    models = {
        PATCHCORE: build_patchcore(backbone),
        PADIM: build_padim(backbone, settings.seed),
    }
    for name, peer in models.items():
        if name in without:
            continue
        start = time.perf_counter()
        peer.to(settings.device)
        peer.feature_extractor.eval()  # frozen, batch norms as well, while the rest is in training
        mean, std = backbone.mean.to(settings.device), backbone.std.to(settings.device)
        for batch in with_progress(train_samples(settings, category), settings, f"{category}, {name}"):
            peer((batch.images.to(settings.device) - mean) / std)
        if hasattr(peer, "subsample_embedding"):
            torch.manual_seed(settings.seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about an argument that is not given
                peer.subsample_embedding(PATCHCORE_RATIO)
            held = [peer.memory_bank]
        else:
            peer.fit()
            held = [peer.gaussian.mean, peer.gaussian.inv_covariance]
        verdict = Verdict(peer, backbone).to(settings.device)
        yield name, verdict, sum(tensor.nbytes for tensor in held) / 1e6, time.perf_counter() - start


@torch.no_grad()
def measure(settings: Settings, category: str, images: int, without: Sequence[str]) -> list[Row]:
    """One row for each detector."""
    backbone, weights = load(settings.backbone)
    rows: list[Row] = []
    judges: dict[str, Judge] = {}
    with few_images(settings, category, images) as own:
        samples = test_samples(own, category)
        masked = all(sample.mask is not None for sample in samples if sample.label)
        for name, judge, megabytes, seconds in (
            *our_judges(own, category, without),
            *their_judges(own, category, backbone, without),
        ):
            found = [(*judge(batch.images.to(own.device)), batch.masks) for batch in with_progress(samples, own, name)]
            scores, maps, masks = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
            row: Row = {"category": category, "backbone": f"{settings.backbone}, {weights} weights", "detector": name}
            labels = np.array([sample.label for sample in samples])
            metrics = evaluate(labels, scores, masks if masked else None, maps)
            row |= {name: getattr(metrics, name) for name in ("image_auroc", "pixel_auroc", "aupro")}
            rows.append(row | {"model_mb": megabytes, "train_s": seconds})
            judges[name] = judge
        some = [image[None].to(own.device) for batch in batches(evenly(samples, 8), own) for image in batch.images]
    calls = {name: lambda judge=judge: [judge(image) for image in some] for name, judge in judges.items()}
    seconds = alternate(calls, repeats=5, device=settings.device)
    return [row | {"fps": len(some) / median_and_spread(seconds[row["detector"]])[0]} for row in rows]


def draw(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Save speed and image AUROC of each detector, its megabytes beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for number, row in enumerate(rows):
        marker = "s" if row["detector"].startswith("anomalib") else "o"
        label = f"{row['detector'].replace('%', ' %')}: {row['model_mb']:.3g} MB"
        axes.plot(row["fps"], row["image_auroc"], marker, color=f"C{number}", markersize=10, label=label)
    axes.set(xlabel="images per second, one at a time", ylabel="image AUROC", title=title, xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument(
        "--images", type=positive, default=40, help="training images, at even distances; anomalib takes long"
    )
    parser.add_argument("--without", default="", metavar="LIST", help="detectors to leave out, as the table calls them")
    settings, options = parser.read(argv)
    without = [name.strip() for name in options.without.split(",") if name.strip()]
    if unknown := set(without) - set(DETECTORS):
        raise InputError(f"--without {', '.join(sorted(unknown))}: there are {', '.join(DETECTORS)}")
    if set(without) == set(DETECTORS):
        raise InputError("--without leaves every detector out")
    print(describe_machine(settings.device))
    print(describe_versions("torch", "onnxruntime", "anomalib"))
    rows: list[Row] = []
    categories = find_categories(settings)
    code = for_each(categories, lambda category: rows.extend(measure(settings, category, options.images, without)))
    if rows:
        means = category_means(rows, ("detector",), FIGURES) if len(categories) > 1 else []
        print_table(rows + means)
        path = RESULTS / f"peers_{'_'.join(categories)}.csv"
        write_csv(path, rows + means)
        what = ", ".join(categories) if len(categories) < 5 else f"{len(categories)} categories"
        draw(path.with_suffix(".png"), f"{what}, {settings.backbone}", means or rows)
        print(f"written: {path} and {path.with_suffix('.png')}")
    return code


if __name__ == "__main__":
    sys.exit(main())
