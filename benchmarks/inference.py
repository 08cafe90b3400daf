"""How fast the backbone runs, how fast a whole image is judged, and how fast training reads features.

    python -m benchmarks.inference --data-path magnetic_tile_data --category magnetic_tile

Backbone: plain torch beside this project's two engines. Whole image, from a tensor to score and map, one at a time:
WEDGE-Net and our PatchCore beside anomalib's PatchcoreModel in torch and in OpenVINO, which gets the same weights and
the same bank, all beside the backbone alone; banks of 1 and 10 % of the patches of up to 150 training images. The other
row of WEDGE-Net knows no condition but the clean one: the difference is what conditions cost. Training: images a second
from files to features, beside the same loader with plain torch.

Writes ``benchmarks/results/inference.csv``, ``inference_image.csv`` and ``.png`` of both; exit code 1 if an engine's
feature maps differ by more than 1e-4, or our PatchCore's scores from anomalib's by more than 1e-3, relative.
"""

import copy
import dataclasses
import functools
import importlib.util
import itertools
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import config
from benchmarks.anomalib_models import Verdict, build_patchcore, in_openvino
from benchmarks.common import (
    RESULTS,
    Row,
    alternate,
    describe_machine,
    describe_versions,
    median_and_spread,
    plot_bars,
    print_table,
    write_csv,
)
from models.backbone import Backbone, build_backbone
from models.engine import make_engine
from models.errors import InputError
from models.wedge_net import WedgeNet
from utils.console import command
from utils.data.dataset import batches, evenly, find_categories, test_samples, train_samples
from utils.pipeline.experiments import Variant, few_images, train_variant
from utils.pipeline.inference import extract_features
from utils.settings import Settings, SettingsParser, positive

BACKBONES = ("efficientnet_lite0", "resnet50")
REPEATS = {1: 20, 16: 5}  # rounds, by batch
IMAGE_SIZE = 224
TOLERANCE = 1e-4  # relative to the largest feature
SCORE_TOLERANCE = 1e-3  # relative
RATIOS = (0.01, 0.1)
IN_A_ROW = 5  # images that a way judges before another has its turn: as from a camera, with its own data in the caches
TRAINING_IMAGES = 64  # that features are read of, to measure how fast
OURS, BASELINE = "WEDGE-Net", "PatchCore, ours"
VARIANTS = (
    Variant(OURS),
    Variant("WEDGE-Net, clean alone", {"conditions": ("clean",)}),
    Variant(BASELINE, patchcore=True),
)
BOUND, ANOMALIB, OPENVINO = "backbone alone", "anomalib PatchCore", "anomalib PatchCore, OpenVINO"


@functools.cache  # where the weights cannot be had, it takes a while to find out
def load(name: str) -> tuple[Backbone, str]:
    """The backbone and what its weights are: random ones where the real ones cannot be had; they take the same time."""
    try:
        return build_backbone(name), "ImageNet"
    except InputError:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the table says it
            return build_backbone(name, "random"), "random"


def largest_difference(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """Of both feature maps, relative to the largest feature of each."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def measure(name: str, batch: int, device: torch.device) -> list[Row]:
    """One row for each way to run the backbone, timed in turn."""
    backbone, weights = load(name)
    images = torch.rand(batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    kinds = ("torch", "onnxruntime") if device.type == "cpu" else ("torch",)
    engines = {f"engine: {kind}": make_engine(backbone, device, kind) for kind in kinds}
    ways: dict[str, Callable] = {"torch, plain": backbone.to(device), **engines}
    with torch.inference_mode():
        expected = backbone(images)
        differences = {way: largest_difference(run(images), expected) for way, run in ways.items()}
        calls = {way: lambda run=run: run(images) for way, run in ways.items()}
        seconds = alternate(calls, REPEATS[batch], warmups=2)

    plain, _ = median_and_spread(seconds["torch, plain"])
    rows = []
    for way, times in seconds.items():
        median, spread = median_and_spread(times)
        rows.append(
            {
                "backbone": name,
                "weights": weights,
                "batch": batch,
                "way": way,
                "milliseconds": median * 1e3,
                "spread_ms": spread * 1e3,
                "images_per_second": batch / median,
                "times_plain_torch": plain / median,
                "difference": differences[way],
            }
        )
    return rows


def whole_images(settings: Settings, name: str, images: int, repeats: int) -> tuple[list[Row], list[str]]:
    """One row for each way to judge an image with each bank, and what differs from anomalib."""
    backbone, weights = load(name)
    category = find_categories(settings)[0]
    chosen = None if weights == "ImageNet" else "random"
    settings = dataclasses.replace(settings, backbone=name, backbone_weights=chosen)
    some = evenly(test_samples(settings, category), 20)
    pixels = [image[None].contiguous() for batch in batches(some, settings) for image in batch.images]
    pixels = [image.to(settings.device) for image in pixels]

    rows: list[Row] = []
    wrong: list[str] = []
    for ratio in RATIOS:
        with few_images(settings, category, images) as own, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the table says which weights are random
            own = dataclasses.replace(own, sampling_ratio=(ratio,))
            trained = {each.name: train_variant(each, own, category)[0] for each in VARIANTS}
        judges: dict[str, Callable] = {BOUND: trained[OURS].net.backbone}
        judges |= {way: detector.predict for way, detector in trained.items()}
        theirs = trained[BASELINE].banks[0].vectors
        if importlib.util.find_spec("anomalib") is not None:
            judges[ANOMALIB] = Verdict(build_patchcore(backbone, theirs), backbone).to(settings.device)
            if settings.device.type == "cpu" and importlib.util.find_spec("openvino") is not None:
                judges[OPENVINO] = in_openvino(
                    Verdict(build_patchcore(backbone, theirs), backbone), settings.image_size
                )
        with torch.inference_mode():
            expected = judges[BASELINE](pixels[0]).scores.cpu()
            for peer in judges.keys() & {ANOMALIB, OPENVINO}:
                difference = ((judges[peer](pixels[0])[0].cpu() - expected).abs() / expected).item()
                if not difference <= SCORE_TOLERANCE:
                    wrong.append(
                        f"{name}, {ratio:.0%}: our PatchCore's score differs from {peer}'s by {difference:.1g}"
                    )
            calls = {way: in_turn(judge, pixels) for way, judge in judges.items()}
            seconds = alternate(calls, repeats, warmups=1, device=settings.device)
        medians = {way: median_and_spread([each / IN_A_ROW for each in times]) for way, times in seconds.items()}
        for way, (median, spread) in medians.items():
            row = {"backbone": name, "weights": weights, "ratio": ratio, "way": way}
            row |= {"milliseconds": median * 1e3, "spread_ms": spread * 1e3, "images_per_second": 1 / median}
            row["share_of_backbone"] = medians[BOUND][0] / median
            for peer, column in ((ANOMALIB, "times_anomalib"), (OPENVINO, "times_openvino")):
                row[column] = medians[peer][0] / median if peer in medians else ""
            rows.append(row)
    return rows, wrong


def in_turn(judge: Callable, images: Sequence[Tensor]) -> Callable[[], object]:
    """``judge`` of the next images at each call, one after the other."""
    turn = itertools.cycle(images)
    return lambda: [judge(image) for image in itertools.islice(turn, IN_A_ROW)]


class PlainTorch:
    """The backbone as torch runs it, in the place of an engine: a whole batch at once."""

    at_once = 1 << 30

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.backbone(images)


def training_speed(settings: Settings, name: str) -> None:
    """Print images a second from files to features: ours, and plain torch behind the same loader."""
    backbone, _ = load(name)
    net = WedgeNet(backbone, device=settings.device, engine=settings.engine)
    plain = copy.copy(net)
    plain.backbone = PlainTorch(backbone.to(settings.device))
    samples = train_samples(settings, find_categories(settings)[0])[:TRAINING_IMAGES]
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(3):
        for way, each in (("ours", net), ("plain", plain)):
            start = time.perf_counter()
            extract_features(each, samples, settings, f"{name}, training features, {way}")
            seconds[way].append(time.perf_counter() - start)
    ours, plain_torch = (len(samples) / median_and_spread(times)[0] for times in seconds.values())
    print(
        f"{name}: files to features, {len(samples)} images: {ours:.1f} images/s, plain torch {plain_torch:.1f}: "
        f"{ours / plain_torch:.2f} times"
    )


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument("--images", type=positive, default=150, help="training images to take patches from")
    parser.add_argument("--repeats", type=positive, default=10, help="rounds of measurement of whole images")
    settings, options = parser.read(argv)
    print(describe_machine(settings.device))
    print(describe_versions("torch", "torchvision", "onnxruntime", "anomalib", "openvino"))
    print(f"\nBackbone to layer 3, {IMAGE_SIZE} x {IMAGE_SIZE} pixels")
    rows = [row for name in BACKBONES for batch in REPEATS for row in measure(name, batch, settings.device)]
    print_table(rows)
    write_csv(RESULTS / "inference.csv", rows)
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        bars.setdefault(f"{row['backbone']}, batch {row['batch']}", {})[row["way"]] = row["images_per_second"]
    plot_bars(RESULTS / "inference.png", "Backbone alone", "images per second", bars)
    wrong = [
        f"{row['backbone']}, batch {row['batch']}: {row['way']} by {row['difference']:.1g}"
        for row in rows
        if not row["difference"] <= TOLERANCE
    ]

    rows, bars = [], {}
    print()
    for name in BACKBONES:
        training_speed(settings, name)
    for name in BACKBONES:
        its_rows, its_wrong = whole_images(settings, name, options.images, options.repeats)
        rows += its_rows
        wrong += its_wrong
    print("\nWhole image, one at a time, from a tensor to score and map")
    print_table(rows)
    write_csv(RESULTS / "inference_image.csv", rows)
    for row in rows:
        group = f"{row['backbone']}\n{row['ratio']:.0%} of the patches"
        bars.setdefault(group, {})[row["way"]] = row["images_per_second"]
    plot_bars(RESULTS / "inference_image.png", "One picture at a time", "pictures per second", bars)
    for line in wrong:
        print(f"DIFFERS: {line}")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
