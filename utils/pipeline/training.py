"""Making memory banks, the same way for WEDGE-Net and for the PatchCore baseline.

One category's way from files to bank is ``train_category``: images -> features -> metric and lenses -> the patches that
are kept -> how far good parts lie from them -> file.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.calibration import calibration_images, held_out_distances
from models.coreset import greedy_coreset, random_subset
from models.detector import Net, combine
from models.errors import InputError
from models.scoring import AnomalyMap
from models.wedge_net import RECIPE, Recipe, WedgeNet
from models.whitening import fit_lens, fit_whitening
from utils.data.dataset import Sample, files_digest, leave_out, train_samples, with_bit_depth
from utils.data.image import size_range
from utils.pipeline.checkpoint import Checkpoint, bank_path, build_net, load_checkpoint, misfit, save_checkpoint
from utils.pipeline.conditions import altered_features, learn_conditions, lens_images
from utils.pipeline.inference import extract_features
from utils.pipeline.patchcore import build_patchcore, patchcore_embedding, patchcore_path
from utils.settings import Settings


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
    net = method.net
    if isinstance(net, WedgeNet) and net.stream is not None:
        net = learn_conditions(net, samples, settings, category)
    scales = extract_features(net, samples, settings, f"{category}: features")
    altered: list[list[Tensor]] = []
    if method.shrinkage is not None:
        net, scales, altered = fit_maps(net, scales, samples, settings, category, method.shrinkage)
    chosen = [choose_patches(scale.flatten(0, 1), ratios, settings, category) for scale in scales]
    sizes = size_range(sample.path for sample in samples)
    trained = []
    for ratio in ratios:
        memories = [remember(*each, ratio, method.bank_dtype, category) for each in zip(scales, chosen, strict=True)]
        calibration = calibrate(net, settings, memories, scales, altered)
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
            picture_sizes=sizes,
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


def fit_maps(
    net: WedgeNet,
    scales: Sequence[Tensor],
    samples: Sequence[Sample],
    settings: Settings,
    category: str,
    shrinkage: float,
) -> tuple[WedgeNet, list[Tensor], list[list[Tensor]]]:
    """The network with metric and lenses, and in it the training features of each scale, (N, h*w, K).

    Also, for each other condition and scale, the features (n, h*w, K) of some of the training images in that condition.
    """
    numbers, conditions = altered_features(net, samples, settings, category)
    maps, altered = [], [[] for _ in conditions]
    mapped = []
    for place, scale in enumerate(scales):
        metric = fit_whitening(scale.flatten(0, 1), shrinkage).rounded()
        scale = metric.apply_in_place(scale)
        clean, own = scale[numbers].flatten(0, 1), [metric]
        for condition, features in enumerate(conditions):
            lens = metric.then(fit_lens(metric(features[place]).flatten(0, 1), clean)).rounded()
            own.append(lens)
            altered[condition].append(lens(features[place]))
        maps.append(own)
        mapped.append(scale)
    return net.with_maps(maps), mapped, altered


class Memory(NamedTuple):
    """``vectors`` (M, D) of one scale and ``owners`` (M,), the number of the training image that each comes from."""

    vectors: Tensor
    owners: Tensor


def remember(features: Tensor, chosen: Tensor, ratio: float, dtype: torch.dtype, category: str) -> Memory:
    """The memory that holds a ratio of the patches (N, h*w, D), of which ``chosen`` names those worth keeping first."""
    patches = features.flatten(0, 1)
    # A whole bank is the features themselves: a copy would double the memory.
    rows = (
        torch.arange(len(patches)) if ratio == 1 else chosen[: bank_size(len(patches), ratio, category)].sort().values
    )
    return Memory((patches if ratio == 1 else patches[rows]).to(dtype), rows // features.shape[1])


def calibrate(
    net: Net,
    settings: Settings,
    memories: Sequence[Memory],
    scales: Sequence[Tensor],
    altered: Sequence[Sequence[Tensor]],
) -> Calibration:
    """What makes scores comparable, and the scores of good parts that are new.

    The unit of a scale is the root mean square distance of good patches to the memory of other images. In each other
    condition mean and standard deviation of good parts' scores become those of clean ones.
    """
    count = len(scales[0])
    images = calibration_images(
        count,
        [(scale.shape[1], len(memory.vectors), scale.shape[2]) for scale, memory in zip(scales, memories, strict=True)],
    )
    maps = [AnomalyMap(grid, settings.image_size, net.scoring) for grid in net.grids(settings.image_size)]
    units = torch.ones(len(net.conditions), len(scales))
    offsets = torch.zeros(len(units))

    def distances(parts: Sequence[Tensor], numbers: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The numbers of the images that can be judged at all scales, and their held-out distances at each."""
        found = [
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

    images, held_out = distances([scale[images] for scale in scales], images)
    if len(scales) > 1:  # of a single scale, distances are the scores' unit
        for scale, (own, features) in enumerate(zip(held_out, scales, strict=True)):
            # A single image has no others to be compared with; its patches' own spread is the best guess.
            known = own if len(own) else features.square().sum(dim=2).sqrt()
            units[:, scale] = 1 / known.square().mean().sqrt().clamp_min(1e-6)
    calibration = scores(held_out)
    numbers = lens_images(count)
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
    reason = misfit(saved, method.embedding, method.net)
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


def choose_patches(patches: Tensor, ratios: Sequence[float], settings: Settings, category: str) -> Tensor:
    """Indices of the patches to keep for the largest ratio below 1; a smaller ratio keeps the first of them.

    Both methods choose one after the other, so a smaller bank is the beginning of a larger one.
    """
    partial = [ratio for ratio in ratios if ratio < 1]
    if not partial:
        return torch.arange(0)
    size = bank_size(len(patches), max(partial), category)
    if settings.sampling_method == "random":
        return random_subset(len(patches), size, settings.seed)
    return greedy_coreset(patches, size, settings.seed, progress=True)


def bank_size(patches: int, ratio: float, category: str) -> int:
    """How many patches a ratio keeps: rounded down, at least one."""
    size = int(patches * ratio)
    if size == 0:
        print(f"[{category}] ratio {ratio} of {patches} patches is less than one: keeping 1", file=sys.stderr)
    return max(1, size)
