"""Making memory banks, the same way for WEDGE-Net and for the PatchCore baseline.

One category's way from files to bank is ``train_category``: images -> features -> metric and lenses -> the patches that
are kept -> how far good parts lie from them -> file.
"""

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
    held_out_distances,
    held_out_from_the_metric,
    through_held_out_lenses,
)
from models.coreset import greedy_coreset, random_subset
from models.detector import Net, combine, make_maps
from models.errors import InputError
from models.wedge_net import RECIPE, Recipe, WedgeNet
from models.whitening import fit_lens, fit_whitening
from utils.data.dataset import Sample, at_once, batches, files_digest, leave_out, train_samples, with_bit_depth
from utils.data.image import size_range
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
from utils.pipeline.inference import LARGE, extract_features, numbers_of, stored_as
from utils.pipeline.patchcore import build_patchcore, patchcore_embedding, patchcore_path
from utils.settings import Settings

CORESET_BYTES = 272  # for each patch, while some are chosen, see ``greedy_coreset``


@dataclass(frozen=True)
class Method:
    """What the two methods do not share when their banks are made.

    ``embedding`` the settings that the features depend on; ``path`` of a category and a ratio: where that bank goes;
    ``folder`` the setting that names its folder; ``bank_dtype`` what the bank is stored in; ``shrinkage`` of the
    metric, None for plain Euclidean distances.
    """

    net: Net
    embedding: dict[str, Any]
    path: Callable[[str, float], Path]
    folder: str
    bank_dtype: torch.dtype = torch.float32
    shrinkage: float | None = None


def wedge_net_method(settings: Settings, recipe: Recipe = RECIPE) -> Method:
    """WEDGE-Net as the settings describe it."""
    return Method(
        build_net(settings, recipe),
        settings.embedding(),
        lambda category, ratio: bank_path(settings.save_dir, category, ratio),
        "SAVE_DIR",
        *((torch.float16, recipe.shrinkage) if settings.form == "wedge" else ()),
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

    ``scales`` (K, S) and ``offsets`` (K,), see ``Detector``; ``scores`` (n,) of the training images with the
    numbers ``images`` (n,), whose patches lie as far from the memory of the others as ``distances`` (n, h*w) of each
    scale say.
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
    settings: Settings, category: str, method: Method, overwrite: bool = False, without: Sequence[str] = ()
) -> list[Trained]:
    """Make the banks of one category, at every ratio that is not there yet; ``without`` are files to leave out."""
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
    net, altered = with_region(method.net, samples, settings, category), []
    foretell(net, samples, settings, category)
    if isinstance(net, WedgeNet) and net.stream is not None:
        net = learn_light(net, samples, settings, category)
        net, altered = learn_conditions(net, samples, settings, category)
    scales = extract_features(net, samples, settings, f"{category}: features")
    unmapped: list[Tensor] = []
    if method.shrinkage is not None:
        if 1 < len(samples) <= FEW:
            unmapped = [scale.clone() for scale in scales]
        net, scales, altered = fit_maps(net, scales, altered, method.shrinkage)
    # Two scales keep twice the share each: then they hold as many numbers as one memory of both layers would.
    sizes = [[bank_size(scale[..., 0].numel(), ratio * len(scales), category) for ratio in ratios] for scale in scales]
    chosen = [choose_patches(*each, settings) for each in zip(scales, sizes, strict=True)]
    picture_sizes = size_range(sample.path for sample in samples)
    trained = []
    for place, ratio in enumerate(ratios):
        memories = [
            remember(scale, order, own[place], method.bank_dtype)
            for scale, order, own in zip(scales, chosen, sizes, strict=True)
        ]
        few = [
            held_out_from_the_metric(
                scale.float(), *remember(scale, order, own[place], torch.float32), method.shrinkage
            )
            for scale, order, own in zip(unmapped, chosen, sizes, strict=False)
        ]
        calibration = calibrate(net, settings, memories, scales, altered, few)
        path = method.path(category, ratio)
        checkpoint = Checkpoint(
            memory_banks=[memory.vectors for memory in memories],
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
            f"{len(memory.vectors)} of {len(samples) * scale.shape[1]} patches in {scale.shape[2]} dimensions"
            for memory, scale in zip(memories, scales, strict=True)
        )
        print(f"[{category}] {len(samples)} images, kept {kept}: {path} ({path.stat().st_size / 1e6:.2f} MB)")
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
    held += CORESET_BYTES * len(samples) * max(patches)
    first = samples[: at_once(settings)]
    start = time.perf_counter()
    for batch in batches(first, settings):
        net.look(batch.images)
    minutes = (time.perf_counter() - start) / len(first) * (len(samples) + others) / 60
    print(
        f"[{category}] {len(samples)} images of {settings.image_size.height} x {settings.image_size.width}, "
        f"{' + '.join(map(str, patches))} patches each: about {held / 1e9 + 1:.0f} GB of memory, and {minutes:.0f} "
        "minutes until patches are chosen",
        flush=True,
    )


def fit_maps(
    net: WedgeNet, scales: Sequence[Tensor], altered: Sequence[list[Tensor | None]], shrinkage: float
) -> tuple[WedgeNet, list[Tensor], list[list[Tensor]]]:
    """The network with metric and lenses, and in them the features of the training images, as they are and altered.

    Of each scale (N, h*w, D) -> (N, h*w, K), and for each condition and scale the same of the ``lens_images``, each
    through a lens that has not seen it. What is given is used up.
    """
    numbers = lens_images(len(scales[0]), len(altered[0][0])) if altered else []
    maps, mapped, lensed = [], [], [[] for _ in altered]
    for place, scale in enumerate(scales):
        metric = fit_whitening(scale.flatten(0, 1), shrinkage).rounded()
        scale = metric.apply_in_place(scale)
        clean, own = scale[numbers], [metric]
        for features, seen in zip(altered, lensed, strict=True):
            corrupted, dtype = metric(features[place]), features[place].dtype
            features[place] = None  # what is lensed takes its room
            own.append(metric.then(fit_lens(corrupted.flatten(0, 1), clean.flatten(0, 1))).rounded())
            seen.append(through_held_out_lenses(corrupted, clean).to(dtype))
        maps.append(own)
        mapped.append(scale)
    return net.with_maps(maps), mapped, lensed


class Memory(NamedTuple):
    """``vectors`` (M, D) of one scale and ``owners`` (M,), the number of the training image that each comes from."""

    vectors: Tensor
    owners: Tensor


def remember(features: Tensor, chosen: Tensor, size: int, dtype: torch.dtype) -> Memory:
    """The memory of ``size`` of the patches (N, h*w, D), of which ``chosen`` names those worth keeping first."""
    patches = features.flatten(0, 1)
    # A whole bank is the features themselves: a copy would double the memory.
    whole = size == len(patches)
    rows = torch.arange(size) if whole else chosen[:size].sort().values
    return Memory((patches if whole else patches[rows]).to(dtype), rows // features.shape[1])


def calibrate(
    net: Net,
    settings: Settings,
    memories: Sequence[Memory],
    scales: Sequence[Tensor],
    altered: Sequence[Sequence[Tensor]],
    few: Sequence[Tensor] = (),
) -> Calibration:
    """What makes scores comparable, and the scores of good parts that are new.

    The unit of a scale is the root mean square distance of good patches to the memory of other images. In each other
    condition mean and standard deviation of good parts' scores become those of clean ones. ``few``, if given, are
    distances of all training images at each scale that are to be relied on instead, see ``held_out_from_the_metric``.
    """
    count = len(scales[0])
    images = calibration_images(
        count,
        [(scale.shape[1], len(memory.vectors), scale.shape[2]) for scale, memory in zip(scales, memories, strict=True)],
    )
    maps = make_maps(net, settings.image_size)
    units = torch.ones(len(net.conditions), len(scales))
    offsets = torch.zeros(len(units))

    def distances(
        parts: Sequence[Tensor], numbers: Tensor, found: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """The numbers of the images that can be judged at all scales, and their held-out distances at each."""
        found = found or [
            held_out_distances(part, numbers, count, *memory) for part, memory in zip(parts, memories, strict=True)
        ]
        known = torch.stack([own.isfinite().all(dim=1) for own in found]).all(dim=0)
        return numbers[known], [own[known] for own in found]

    def scores(held_out: Sequence[Tensor]) -> Tensor:
        if not len(held_out[0]):
            return torch.zeros(0)
        return torch.cat(
            [combine(part, units, offsets, maps)[0] for part in zip(*(own.split(64) for own in held_out), strict=True)]
        )

    images, held_out = distances([scale[images] for scale in scales], images, few)
    if len(scales) > 1:  # of a single scale, distances are the scores' unit
        for scale, (own, features) in enumerate(zip(held_out, scales, strict=True)):
            # A single image has no others to be compared with; its patches' own spread is the best guess.
            known = own if len(own) else features.float().square().sum(dim=2).sqrt()
            units[:, scale] = 1 / known.square().mean().sqrt().clamp_min(1e-6)
    calibration = scores(held_out)
    numbers = lens_images(count, len(altered[0][0])) if altered else []
    clean = scores(distances([scale[numbers] for scale in scales], numbers)[1]) if altered else None
    for condition, parts in enumerate(altered, start=1):
        own = scores(distances(parts, numbers)[1])
        if len(own) > 1 and own.std() > 0 and clean.std() > 0:
            factor = clean.std() / own.std()
            units[condition] *= factor
            offsets[condition] = clean.mean() - factor * own.mean()
    return Calibration(units, offsets, calibration, images, held_out)


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


def choose_patches(features: Tensor, sizes: Sequence[int], settings: Settings) -> Tensor:
    """Indices of the patches (N, h*w, D) to keep for the largest of ``sizes`` that is not all of them.

    Both methods choose one after the other, so a smaller bank is the beginning of a larger one.
    """
    patches = features.flatten(0, 1)
    size = max((size for size in sizes if size < len(patches)), default=0)
    if not size:
        return torch.arange(0)
    if settings.sampling_method == "random":
        return random_subset(len(patches), size, settings.seed)
    return greedy_coreset(patches, size, settings.seed, progress=True)


def bank_size(patches: int, ratio: float, category: str) -> int:
    """How many patches a ratio keeps: rounded down, at least one, at most all."""
    size = int(patches * ratio)
    if size == 0:
        print(f"[{category}] ratio {ratio} of {patches} patches is less than one: keeping 1", file=sys.stderr)
    return min(max(1, size), patches)
