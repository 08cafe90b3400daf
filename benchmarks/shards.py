"""What a memory costs in accuracy and time if it is chosen in shards, and how much memory a worker takes.

    python -m benchmarks.shards --data-path DATA --category magnetic_tile --center-crop false
        --backbone efficientnet_lite0 --sampling-ratio 0.01

For several seeds and each scale: the covering radius (the farthest that a training patch lies from the memory) of the
choice from the whole and of that from shards, and the seconds of both, all shards one after the other on this machine.
Then image AUROC of detectors trained both ways. --memory measures instead the peak of a process that chooses from one
shard of made-up patches, and of one that merges: 200,000 x 152 in 20 shards.

Writes ``benchmarks/results/shards.csv`` and ``shards_auroc.csv``.
"""

import dataclasses
import resource
import subprocess
import sys
import time
from collections.abc import Sequence

import models.threads  # noqa: F401 - before torch

import torch
from torch import Tensor

import config
from benchmarks.common import RESULTS, Row, print_table, write_csv
from models.composable_coreset import Merged, Part, coreset_of_shard
from models.coreset import greedy_coreset
from models.memory_bank import MemoryBank
from models.whitening import fit_whitening
from utils.console import command
from utils.data.dataset import find_categories, train_samples
from utils.pipeline.checkpoint import build_net
from utils.pipeline.experiments import Variant, few_images, measure_detector, train_variant
from utils.pipeline.inference import extract_features
from utils.pipeline.shards import in_shards
from utils.pipeline.timing import describe_machine
from utils.settings import Settings, SettingsParser, positive

PATCHES, DIM, SHARDS, KEPT = 200_000, 152, 20, 0.01  # of --memory


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument("--shards", type=positive, default=8, help="shards of the training images (now: 8)")
    parser.add_argument("--seeds", type=positive, default=3, help="coresets: SEED and those after it (now: 3)")
    parser.add_argument("--memory", action="store_true", help="the peak memory of a worker, instead")
    settings, options = parser.read(argv)
    if options.memory:
        print_table([in_a_process(step) for step in ("nothing", "shard", "merge")])
        return 0
    print(describe_machine())
    seeds = range(settings.seed, settings.seed + options.seeds)
    radii: list[Row] = []
    aurocs: list[Row] = []
    for category in find_categories(settings):
        images = -(-len(train_samples(settings, category)) // options.shards)
        radii += covering(settings, category, images, seeds)
        for seed in seeds:
            for name, own in (("whole", None), ("in shards", images)):
                aurocs.append(
                    {"category": category, "seed": seed, "chosen": name} | trained(settings, category, seed, own)
                )
    for name, rows in (("shards", radii), ("shards_auroc", aurocs)):
        print_table(rows)
        write_csv(RESULTS / f"{name}.csv", rows)
    return 0


def covering(settings: Settings, category: str, images: int, seeds: Sequence[int]) -> list[Row]:
    """A row for each scale and seed: radius and seconds, chosen from the whole and from shards of so many images."""
    samples = train_samples(settings, category)
    rows: list[Row] = []
    for place, features in enumerate(extract_features(build_net(settings), samples, settings, category)):
        features = fit_whitening(features.flatten(0, 1)).rounded().apply_in_place(features)
        patches, share = features.flatten(0, 1), 2 * settings.sampling_ratio[0]
        size = int(len(patches) * share)
        for seed in seeds:
            start = time.perf_counter()
            whole = patches[greedy_coreset(patches, size, seed)]
            middle = time.perf_counter()
            merged, first, longest = Merged(size, seed, 3 * images * features.shape[1] // (2 * size)), 0, 0.0
            for shard in features.split(images):
                begun = time.perf_counter()
                merged.add(coreset_of_shard(shard.flatten(0, 1), first, size, seed))
                longest, first = max(longest, time.perf_counter() - begun), first + shard.shape[:2].numel()
            part = merged.result()
            end = time.perf_counter()
            radius, of_shards = (covering_radius(patches, bank) for bank in (whole, part.vectors))
            rows.append(
                {
                    "category": category,
                    "scale": place,
                    "patches": len(patches),
                    "dimensions": patches.shape[1],
                    "chosen": size,
                    "shards": len(in_shards(samples, images)),
                    "seed": seed,
                    "radius": radius,
                    "radius_ratio": of_shards / radius,
                    "whole_s": middle - start,
                    "shards_s": end - middle,
                    "longest_shard_s": longest,
                }
            )
    return rows


def covering_radius(patches: Tensor, bank: Tensor) -> float:
    """The largest distance of a patch (N, D) to its nearest vector of the bank (M, D)."""
    return float(max(MemoryBank(bank).nearest(part).max() for part in patches.split(4096)))


def trained(settings: Settings, category: str, seed: int, images: int | None) -> dict[str, float]:
    """Image AUROC of a detector trained in shards of so many images."""
    with few_images(settings, category, None) as own:
        own = dataclasses.replace(own, seed=seed, shard_images=images, sampling_ratio=settings.sampling_ratio[:1])
        detector, seconds = train_variant(Variant("own"), own, category)
        (row,) = measure_detector(detector, own, category, pixels=False)
    return {"image_auroc": row["image_auroc"], "train_s": seconds}


def in_a_process(step: str) -> Row:
    """The peak of a process that does one step, in MB, beside what a shard has."""
    code = f"from benchmarks.shards import peak; print(peak({step!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {"step": step, "peak_mb": float(done.stdout), "shard_mb": PATCHES // SHARDS * DIM * 4 / 1e6}


def peak(step: str) -> float:
    """Megabytes of this process after one of a worker's steps: 'nothing' but the imports, 'shard' or 'merge'."""
    rows, size = PATCHES // SHARDS, int(PATCHES * KEPT)
    generator = torch.Generator().manual_seed(0)
    if step == "shard":
        coreset_of_shard(torch.randn(rows, DIM, generator=generator), 0, size)
    if step == "merge":
        merged = Merged(size, 0, 3 * rows // (2 * size))
        for _ in range(SHARDS):
            merged.add(Part(torch.arange(size), torch.randn(size, DIM, generator=generator)))
        merged.result()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    raise SystemExit(main())
