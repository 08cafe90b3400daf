"""Speed and memory of WEDGE-Net beside PatchCore, one image at a time, with the AUROC that they buy.

    python benchmark_fps.py
    python benchmark_fps.py --category all --sampling-ratio all --calls 200

Rows are PatchCore with its largest bank and WEDGE-Net with 100 %, 10 %, 1 % and SAMPLING_RATIO of the patches, as far
as the banks exist. Three things are timed, in turn, over test images, after a warm-up and waiting for the device:

- the paper's protocol: features and search, from an image on the device to a distance for each patch; where a detector
  runs as one graph, on a CPU, to its score and map, which takes longer;
- end to end: from a decoded image (uint8 pixels) to its score;
- the bound: the backbone alone, run as the row runs it. No search can make the row faster than that.

Latencies are the median (p50) and the 95th percentile of the calls; FPS is 1000 / p50. The mean over the categories is
that of the latencies, FPS follows from it. Speed-up is against the first row that exists.

Writes SAVE_DIR/benchmark_fps_results_10pct.csv and .png, named by the largest SAMPLING_RATIO. Settings are in
config.py.
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import models.threads  # noqa: F401 - before torch

import numpy as np
import torch
from torch import Tensor

import config
from models.detector import Detector
from models.errors import InputError
from models.wedge_net import WedgeNet
from utils.console import check_writable, command, for_each
from utils.data.dataset import Sample, batches, evenly, find_categories, test_samples
from utils.metrics import auroc
from utils.pictures.figures import draw_speed
from utils.pictures.tables import format_table, mean, write_csv
from utils.pipeline.checkpoint import bank_path, build_net, load_detector
from utils.pipeline.inference import at_depth_of, score_samples
from utils.pipeline.patchcore import find_patchcore, load_patchcore
from utils.pipeline.timing import alternate, describe_machine, describe_versions
from utils.settings import ALL_RATIOS, Settings, SettingsParser, positive, ratio_name

PATCHCORE, WEDGE_NET = "PatchCore", "WEDGE-Net"
WARMUPS = 5  # rounds
Row = dict[str, Any]


class Model(NamedTuple):
    """A row of the table: a method and the share of the training patches that it keeps."""

    name: str
    ratio: float


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Time whatever banks the categories have; returns the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument(
        "--calls", type=positive, default=50, metavar="N", help="timed calls of each kind, row and category (now: 50)"
    )
    settings, options = parser.read(argv)
    categories = find_categories(settings)
    check_writable(settings.save_dir, "SAVE_DIR")
    net = build_net(settings)
    where = {
        "device": str(settings.device),
        "machine": describe_machine(settings.device),
        "versions": describe_versions("torch", "onnxruntime"),
    }
    print("\n".join(f"{name}: {text}" for name, text in where.items()))
    rows: list[Row] = []
    code = for_each(categories, lambda category: rows.extend(benchmark(settings, category, net, options.calls)))
    if rows:
        rows, means = compare(rows)
        path = settings.save_dir / f"benchmark_fps_results_{ratio_name(settings.sampling_ratio[0])}.csv"
        write_csv(path, [row | where for row in (rows + means if len(categories) > 1 else rows)])
        draw_speed(path.with_suffix(".png"), means)
        print(f"\n{format_table([summary(row) for row in means])}\n\nwritten: {path} and {path.with_suffix('.png')}")
    return code


def benchmark(settings: Settings, category: str, net: WedgeNet, calls: int) -> list[Row]:
    """One row for each bank that the category has."""
    detectors = load_detectors(settings, category, net)
    samples = test_samples(settings, category)
    pixels = load_pixels(at_depth_of(list(detectors.values()), settings), samples, calls)
    functions = {}
    for model, detector in detectors.items():
        bound, search, end_to_end = timed_calls(detector, pixels)
        functions[model.name] = bound  # once for all banks of one network
        functions[model, "search"], functions[model, "end_to_end"] = search, end_to_end
    with torch.inference_mode():
        seconds = alternate(functions, calls, WARMUPS, settings.device)

    scored = score_samples(list(detectors.values()), samples, settings, f"{category}: AUROC")
    rows = []
    for (model, detector), result in zip(detectors.items(), scored, strict=True):
        row = {
            "category": category,
            "model": model.name,
            "ratio": model.ratio,
            "categories": 1,
            "image_auroc": auroc(result.labels, result.scores),
            "bank_vectors": detector.bank_vectors,
            "bank_mb": detector.bank_bytes / 1e6,
            **latency("", seconds[model, "search"]),
            "speed_up": None,
            **latency("end_to_end_", seconds[model, "end_to_end"]),
            **latency("backbone_", seconds[model.name]),
            "calls": calls,
            "backbone": detector.net.backbone_name,
            "engine": detector.net.backbone.name,
            "one_graph": int(detector.one_piece),  # all of it in the engine, or the backbone alone
            "dtype": "float32",  # of the arithmetic
            "bank_dtype": str(detector.banks[0].vectors.dtype).removeprefix("torch."),
        }
        rows.append(row)
        print(
            f"[{category}] {label(model)}: {row['fps']:.1f} FPS ({row['p50_ms']:.2f} ms, p95 {row['p95_ms']:.2f}), "
            f"end to end {row['end_to_end_fps']:.1f}, backbone alone {row['backbone_fps']:.1f}"
        )
    return rows


def label(model: Model) -> str:
    """'WEDGE-Net 10 %'"""
    return f"{model.name} {model.ratio * 100:g} %"


def load_detectors(settings: Settings, category: str, net: WedgeNet) -> dict[Model, Detector]:
    """The category's banks, in the table's order; those that are missing are named.

    Raises :class:`InputError` if a bank cannot be used, or none is there.
    """
    detectors, missing = {}, []
    if found := find_patchcore(settings, category):
        detectors[Model(PATCHCORE, found[1])] = load_patchcore(settings, category)
    else:
        missing.append(PATCHCORE)
    for ratio in sorted({*ALL_RATIOS, *settings.sampling_ratio}, reverse=True):
        model = Model(WEDGE_NET, ratio)
        if bank_path(settings.save_dir, category, ratio).exists():
            detectors[model] = load_detector(settings, category, ratio, net)[0]
        else:
            missing.append(label(model))
    if not detectors:
        raise InputError(f"{category} has no memory bank in SAVE_DIR {settings.save_dir}: make one with train.py")
    if missing:
        print(f"[{category}] no memory bank, so no row: {', '.join(missing)}", file=sys.stderr)
    return detectors


def load_pixels(settings: Settings, samples: Sequence[Sample], limit: int) -> list[Tensor]:
    """(H, W, 3) uint8 pixels of at most ``limit`` samples, at even distances: good ones and every defect."""
    images = torch.cat([batch.images for batch in batches(evenly(samples, limit), settings)])
    return list((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous())


def timed_calls(detector: Detector, pixels: Sequence[Tensor]) -> tuple[Callable[[], object], ...]:
    """The backbone alone, features and search, and pixels to score; each call takes the next image."""
    net = detector.net

    def as_image(array: Tensor) -> Tensor:
        return array.to(net.device).permute(2, 0, 1)[None].float().div_(255)

    images = [as_image(array) for array in pixels]
    for_bound, for_search, for_score = itertools.cycle(images), itertools.cycle(images), itertools.cycle(pixels)

    def search() -> object:
        image = next(for_search)
        return detector.predict(image) if detector.one_piece else detector.distances(net.embed(image))

    bound = net.backbone
    if net.device.type == "cuda":  # recorded as the row is, with next to nothing of it to bring back
        from models.cuda_detector import record

        bound = record(lambda image: [net.backbone(image)[1][:, :1, :1, :1]], images[0])

    return (
        lambda: bound(next(for_bound)),
        search,
        lambda: detector.predict(as_image(next(for_score))).scores.item(),
    )


def latency(prefix: str, seconds: Sequence[float]) -> Row:
    """Median, 95th percentile and the rate that the median makes."""
    p50, p95 = (float(value) for value in np.percentile(seconds, (50, 95)) * 1e3)
    return {f"{prefix}p50_ms": p50, f"{prefix}p95_ms": p95, f"{prefix}fps": 1e3 / p50}


def compare(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows with their speed-ups, model by model, and for each model the mean over its categories.

    Speed-up is of a model's latencies against those of the first model, over the categories that have both.
    """
    rows = sorted(rows, key=lambda row: (row["model"] != PATCHCORE, -row["ratio"]))  # stable: in the categories' order
    models = list(dict.fromkeys(Model(row["model"], row["ratio"]) for row in rows))
    first = {row["category"]: row["p50_ms"] for row in rows if (row["model"], row["ratio"]) == models[0]}

    def speed_up(own: Sequence[Row]) -> float | None:
        shared = [row for row in own if row["category"] in first]
        return sum(first[row["category"]] for row in shared) / sum(row["p50_ms"] for row in shared) if shared else None

    rows = [row | {"speed_up": speed_up([row])} for row in rows]
    means = []
    for model in models:
        own = [row for row in rows if (row["model"], row["ratio"]) == model]
        row = own[0] | {"category": "mean", "categories": len(own), "bank_vectors": None}
        row |= {name: mean([r[name] for r in own]) for name in row if name.endswith(("_auroc", "_mb", "_ms"))}
        row |= {name: 1e3 / row[name.replace("fps", "p50_ms")] for name in row if name.endswith("fps")}
        means.append(row | {"speed_up": speed_up(own)})
    return rows, means


def summary(row: Row) -> Row:
    """What the console shows of a mean."""
    shown = {"model": row["model"], "memory": f"{row['ratio'] * 100:g} %"}
    names = ("categories", "image_auroc", "bank_mb", "fps", "speed_up", "p50_ms", "p95_ms", "end_to_end_fps")
    return shown | {name: row[name] for name in (*names, "backbone_fps")}


if __name__ == "__main__":
    sys.exit(main())
