"""Making memory banks, the same way for WEDGE-Net and for the PatchCore baseline.

One category's way from files to bank is ``train_category``: images -> features -> metric and lenses -> the patches that
are kept -> how far good parts lie from them -> file.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.calibration import (
    FEW,
    calibration_images,
    held_out_from_the_metric,
    through_held_out_lenses,
)
from models.cells import Cells
from models.detector import Net, combine, make_maps
from models.errors import InputError
from models.parallel import one_thread
from models.wedge_net import RECIPE, Recipe, WedgeNet
from models.whitening import fit_lens, fit_whitening
from utils.console import Run, in_turn
from utils.data.dataset import Sample, at_once, batches, files_digest, leave_out, train_samples, with_bit_depth
from utils.data.image import Geometry, size_range
from utils.data.region import read_region, region_path
from utils.pipeline.checkpoint import (
    INSIDE,
    Checkpoint,
    bank_path,
    build_net,
    load_checkpoint,
    misfit,
    region_misfit,
    save_checkpoint,
)
from utils.pipeline.conditions import learn_conditions, learn_light, lens_images, most_lens_images
from utils.pipeline.inference import LARGE, numbers_of, stored_as
from utils.pipeline.patchcore import build_patchcore, patchcore_embedding, patchcore_path
from utils.pipeline.shards import Features, embed, in_shards
from utils.settings import Settings

CORESET_BYTES = 272  # for each patch, while some are chosen, see ``greedy_coreset``
RUNNING_BYTES = 240  # for each pixel of a batch, while the network runs
PROGRAM_BYTES = 7e8  # libraries and network
BESIDE_FEATURES = 1.5  # times as long as features take all until patches are chosen: metric and lenses too


@dataclass(frozen=True)
class Method:
    """What the two methods do not share when their banks are made.

    ``embedding`` the settings that the features depend on; ``path`` of a category and a ratio: where that bank goes;
    ``folder`` the setting that names its folder; ``bank_dtype`` what the bank is stored in; ``shrinkage`` of the
    metric, None for plain Euclidean distances; ``averaged``, see ``Cells``.
    """

    net: Net
    embedding: dict[str, Any]
    path: Callable[[str, float], Path]
    folder: str
    bank_dtype: torch.dtype = torch.float32
    shrinkage: float | None = None
    averaged: bool = False


def wedge_net_method(settings: Settings, recipe: Recipe = RECIPE) -> Method:
    """WEDGE-Net as the settings describe it."""
    return Method(
        build_net(settings, recipe),
        settings.embedding(),
        lambda category, ratio: bank_path(settings.save_dir, category, ratio),
        "SAVE_DIR",
        *((torch.float16, recipe.shrinkage, recipe.averaged) if settings.form == "wedge" else ()),
    )


def patchcore_method(settings: Settings) -> Method:
    """The PatchCore baseline as the settings describe it."""
    return Method(
        build_patchcore(settings),
        patchcore_embedding(settings),
        lambda category, ratio: patchcore_path(settings, category, ratio),
        "PatchCore_DIR",
    )


class Calibration(NamedTuple):
    """What makes scores comparable, and how good parts score that the memory has not seen.

    ``scales`` (K, S) and ``offsets`` (K,), see ``Detector``; ``scores`` (n,) of the training images with the numbers
    ``images`` (n,), whose patches lie as far from the memory of the others as ``distances`` (n, h*w) of each scale say.
    """

    scales: Tensor
    offsets: Tensor
    scores: Tensor
    images: Tensor
    distances: list[Tensor]


class Trained(NamedTuple):
    """A checkpoint at ``path``, made from ``samples``; ``before`` is what it replaced, None if nothing was there."""

    net: Net
    path: Path
    checkpoint: Checkpoint
    calibration: Calibration
    samples: list[Sample]
    before: Checkpoint | None


def train_category(
    settings: Settings,
    category: str,
    method: Method,
    overwrite: bool = False,
    without: Sequence[str] = (),
    run: Run = in_turn,
) -> list[Trained]:
    """Make the banks of one category, at every ratio that is not there yet; ``without`` are files to leave out.

    ``run`` does the tasks of its shards, if there are several.
    """
    samples = leave_out(train_samples(settings, category), without)
    ratios = [
        ratio
        for ratio in settings.sampling_ratio
        if overwrite or is_missing(settings, category, ratio, method, samples)
    ]
    if not ratios:
        return []

    settings = with_bit_depth(samples, settings)
    if settings.bit_depth != 8:
        print(f"[{category}] {settings.bit_depth} bits a pixel")
    shards = in_shards(samples, settings.shard_images)
    if len(shards) > 1:
        print(f"[{category}] {len(samples)} images in {len(shards)} shards")
    net, altered = with_region(method.net, samples, settings, category), []
    foretell(net, shards[0], settings, category)
    if isinstance(net, WedgeNet) and net.stream is not None:
        net = learn_light(net, shards, settings, category, run)
        net, altered = learn_conditions(net, samples, settings, category)
    features = embed(net, shards, settings, f"{category}: features", run)
    unmapped: list[Tensor] = []
    if method.shrinkage is not None:
        if 1 < len(samples) <= FEW:
            unmapped = features.of(torch.arange(len(samples)))
        net, altered = fit_maps(net, features, len(samples), altered, method.shrinkage)
    # Two scales keep twice the share each: then they hold as many numbers as one memory of both layers would.
    patches = [len(samples) * own for own in features.patches]
    sizes = [[bank_size(own, ratio * len(patches), category) for ratio in ratios] for own in patches]
    features.choose(sizes)
    picture_sizes = size_range(sample.path for sample in samples)
    trained = []
    for place, ratio in enumerate(ratios):
        chosen = [features.of_size(scale, own[place]) for scale, own in enumerate(sizes)]
        images = calibration_images(
            len(samples), [(own, *each.vectors.shape) for own, each in zip(features.patches, chosen, strict=True)]
        )
        memories = [
            Cells(own, images, len(samples), each.vectors, each.owners, method.averaged)
            for own, each in zip(features.of(images), chosen, strict=True)
        ]
        few = [
            held_out_from_the_metric(own.float(), each.rows, method.shrinkage, method.averaged)
            for own, each in zip(unmapped, chosen, strict=False)
        ]
        calibration = calibrate(net, settings, memories, features, len(samples), altered, few)
        path = method.path(category, ratio)
        checkpoint = Checkpoint(
            memory_banks=[memory.vectors.to(method.bank_dtype) for memory in memories],
            scales=calibration.scales,
            offsets=calibration.offsets,
            settings=method.embedding | {"BIT_DEPTH": settings.bit_depth},
            state=net.state(),
            fingerprint=net.fingerprint,
            category=category,
            sampling_ratio=ratio,
            sampling_method=settings.sampling_method,
            seed=settings.seed,
            training_images=len(samples),
            training_digest=files_digest(samples),
            calibration_scores=calibration.scores,
            picture_sizes=picture_sizes,
            remembered=[],
        )
        trained.append(Trained(net, path, checkpoint, calibration, samples, replaced(path)))
        save_checkpoint(path, checkpoint)
        kept = " and ".join(
            f"{len(memory.vectors)} of {own} patches in {memory.vectors.shape[1]} dimensions"
            for memory, own in zip(memories, patches, strict=True)
        )
        print(f"[{category}] {len(samples)} images, kept {kept}: {path} ({path.stat().st_size / 1e6:.2f} MB)")
        del memories  # they hold features, and the next ratio's come beside them
    return trained


def replaced(path: Path) -> Checkpoint | None:
    """The checkpoint that a new one will replace, without its banks; None if there is none that can be read."""
    try:
        return load_checkpoint(path, metadata_only=True)
    except InputError:
        return None


def with_region(net: Net, samples: Sequence[Sample], settings: Settings, category: str) -> Net:
    """The network looking only at the category's region of interest, if there is one."""
    path = region_path(settings, category)
    if path is None:
        return net
    inside = read_region(path, settings, samples[0])
    print(f"[{category}] looking at {inside.mean():.0%} of the picture: {path}")
    return net.with_region(torch.from_numpy(inside))


def foretell(net: Net, samples: Sequence[Sample], settings: Settings, category: str) -> None:
    """Before a training that takes gigabytes: tell how many, and from the first images how long features will take."""
    others = min(len(samples), most_lens_images(net, settings)) * (len(net.conditions) - 1)
    numbers = numbers_of(net, settings)
    if (len(samples) + others) * numbers <= LARGE:
        return
    patches = [net.patches(settings.image_size, scale) for scale in range(len(net.raw_dims))]
    held = sum(count * numbers * stored_as(count * numbers).itemsize for count in (len(samples), others))
    first = samples[: at_once(settings)]
    height, width = settings.image_size
    held += CORESET_BYTES * len(samples) * max(patches) + RUNNING_BYTES * len(first) * height * width + PROGRAM_BYTES
    start = time.perf_counter()
    for batch in batches(first, settings):
        net.look(batch.images)
    minutes = BESIDE_FEATURES * (time.perf_counter() - start) / len(first) * (len(samples) + others) / 60
    print(
        f"[{category}] {len(samples)} images of {height} x {width}, {' + '.join(map(str, patches))} patches each: "
        f"about {held / 1e9:.0f} GB of memory, and {minutes:.0f} minutes until patches are chosen, longer the larger "
        "SAMPLING_RATIO is",
        flush=True,
    )


def fit_maps(
    net: WedgeNet, features: Features, count: int, altered: Sequence[list[Tensor | None]], shrinkage: float
) -> tuple[WedgeNet, list[list[Tensor]]]:
    """The network with metric and lenses, of ``count`` training images, whose features are mapped by the metric.

    And for each condition and scale (n, h*w, K) features of the ``lens_images``, each through a lens that has not seen
    it. What is given is used up.
    """
    metrics = [fit_whitening(moments, shrinkage).rounded() for moments in features.moments()]
    features.to_metric(metrics)
    clean = features.of(lens_images(count, len(altered[0][0]))) if altered else []
    maps, lensed = [[metric] for metric in metrics], [[] for _ in altered]
    for place, (metric, own) in enumerate(zip(metrics, maps, strict=True)):
        for scales, seen in zip(altered, lensed, strict=True):
            corrupted, dtype = metric(scales[place]), scales[place].dtype
            scales[place] = None  # what is lensed takes its room
            own.append(metric.then(fit_lens(corrupted.flatten(0, 1), clean[place].flatten(0, 1))).rounded())
            seen.append(through_held_out_lenses(corrupted, clean[place]).to(dtype))
    return net.with_maps(maps), lensed


def calibrate(
    net: Net,
    settings: Settings,
    memories: Sequence[Cells],
    features: Features,
    count: int,
    altered: Sequence[Sequence[Tensor]],
    few: Sequence[Tensor] = (),
) -> Calibration:
    """What makes scores comparable, and the scores of good parts that are new, of ``count`` training images.

    The unit of a scale is the root mean square distance of good patches to the memory of other images. In each other
    condition mean and standard deviation of good parts' scores become those of clean ones. ``few``, if given, are
    distances of all training images at each scale that are to be relied on instead, see ``held_out_from_the_metric``.
    """
    maps = make_maps(net, settings.image_size)
    units = torch.ones(len(net.conditions), len(memories))
    offsets = torch.zeros(len(units))

    def scores(held_out: Sequence[Tensor]) -> Tensor:
        if not len(held_out[0]):
            return torch.zeros(0)
        return torch.cat(
            [combine(part, units, offsets, maps)[0] for part in zip(*(own.split(64) for own in held_out), strict=True)]
        )

    images = memories[0].images
    held_out = list(few) or [memory.distances(images, memory.features)[0] for memory in memories]
    judged = _all_finite(held_out)
    images, held_out = images[judged], [own[judged] for own in held_out]
    if len(memories) > 1:  # of a single scale, distances are the scores' unit
        # A single image has no others to be compared with; its patches' own spread is the best guess.
        known = [
            own if len(own) else memory.features.float().square().sum(dim=2).sqrt()
            for own, memory in zip(held_out, memories, strict=True)
        ]
        with one_thread():
            units[:] = 1 / torch.stack([own.square().mean().sqrt() for own in known]).clamp_min(1e-6)
    calibration = scores(held_out)
    if altered:
        numbers = lens_images(count, len(altered[0][0]))
        states = [features.of(numbers), *altered]
        by_scale = [
            memory.distances(numbers, *(state[scale] for state in states)) for scale, memory in enumerate(memories)
        ]
        clean, *others = (scores([own[_all_finite(state)] for own in state]) for state in zip(*by_scale, strict=True))
        for condition, own in enumerate(others, start=1):
            if len(own) > 1 and own.std() > 0 and clean.std() > 0:
                factor = clean.std() / own.std()
                units[condition] *= factor
                offsets[condition] = clean.mean() - factor * own.mean()
    return Calibration(units, offsets, calibration, images, held_out)


def _all_finite(scales: Sequence[Tensor]) -> Tensor:
    """Which images (n,) can be judged at all scales, whose distances (n, P) are given."""
    return torch.stack([own.isfinite().all(dim=1) for own in scales]).all(dim=0)


def tell_edges(trained: Trained, settings: Settings, category: str) -> None:
    """Say it if CENTER_CROP cuts off more of long pictures than it does of square ones."""
    if not settings.center_crop:
        return
    geometry = Geometry(settings.image_size, settings.resize, settings.center_crop)
    cut = max(
        1 - math.prod(settings.image_size) / math.prod(geometry.scaled(size))
        for size in trained.checkpoint.picture_sizes
    )
    if cut > 0.3:  # of square pictures it is 0.23, as in the paper
        print(
            f"[{category}] CENTER_CROP leaves {cut:.0%} of a picture out, at its edges; with --center-crop false all "
            "of it is looked at"
        )


def is_missing(settings: Settings, category: str, ratio: float, method: Method, samples: Sequence[Sample]) -> bool:
    """Whether a bank has to be made: one that is there and fits is skipped, one that does not fit is not replaced."""
    path = method.path(category, ratio)
    if not path.exists():
        return True
    saved = load_checkpoint(path, metadata_only=True)
    reason = misfit(saved, method.embedding, method.net) or region_misfit(saved, settings, category)
    if reason is None and INSIDE in saved.state and region_path(settings, category) is None:
        reason = "it was made with a region, and there is none now"
    if reason is None and saved.training_digest != files_digest(samples):
        reason = f"it was made from {saved.training_images} other training images"
    if reason is None and (saved.sampling_method, saved.seed) != (settings.sampling_method, settings.seed):
        reason = f"it was made by {saved.sampling_method} sampling with SEED {saved.seed}"
    if reason is not None:
        raise InputError(
            f"{path} is there but does not fit: {reason}; use --overwrite to replace it, or another {method.folder}"
        )
    print(f"[{category}] {path} is there and fits: skipped (--overwrite trains it again)")
    return False


def bank_size(patches: int, ratio: float, category: str) -> int:
    """How many patches a ratio keeps: rounded down, at least one, at most all."""
    size = int(patches * ratio)
    if size == 0:
        print(f"[{category}] ratio {ratio} of {patches} patches is less than one: keeping 1", file=sys.stderr)
    return min(max(1, size), patches)
