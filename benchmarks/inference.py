"""How fast the backbone runs: plain torch beside this project's two engines.

    python -m benchmarks.inference

Writes ``benchmarks/results/inference.csv`` and ``.png``; exit code 1 if an engine's feature maps differ.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

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

BACKBONES = ("efficientnet_lite0", "resnet50")
REPEATS = {1: 20, 16: 5}  # rounds, by batch
IMAGE_SIZE = 224
TOLERANCE = 1e-4  # relative to the largest feature


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


def main() -> int:
    """Measure, print, save; the exit code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"Backbone to layer 3, {IMAGE_SIZE} x {IMAGE_SIZE} pixels")
    print(describe_machine())
    print(describe_versions("torch", "torchvision", "onnxruntime"))
    rows = [row for name in BACKBONES for batch in REPEATS for row in measure(name, batch, device)]
    print_table(rows)
    write_csv(RESULTS / "inference.csv", rows)
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        bars.setdefault(f"{row['backbone']}, batch {row['batch']}", {})[row["way"]] = row["images_per_second"]
    plot_bars(RESULTS / "inference.png", "Backbone alone", "images per second", bars)
    return int(any(row["difference"] > TOLERANCE for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
