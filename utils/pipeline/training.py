"""Making memory banks, the same way for WEDGE-Net and for the PatchCore baseline."""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.calibration import held_out_scores
from models.condition import CLEAN, Condition
from models.coreset import greedy_coreset, random_subset
from models.detector import Net
from models.errors import InputError
from models.scoring import AnomalyMap
from models.wedge_net import grid_size
from models.whitening import Whitening, fit_whitening
from utils.data.dataset import Sample, files_digest, train_samples, with_bit_depth
from utils.pipeline.checkpoint import Checkpoint, bank_path, build_net, load_checkpoint, misfit, save_checkpoint
from utils.pipeline.conditions import learn_conditions, training_alteration
from utils.pipeline.inference import extract_features
from utils.pipeline.patchcore import build_patchcore, patchcore_embedding, patchcore_path
from utils.settings import Settings


@dataclass(frozen=True)
class Method:
    """What the two methods do not share when their banks are made.

    ``embedding`` the settings that the features depend on; ``path`` of a category and a ratio: where that bank goes;
    ``folder`` the setting that names its folder; ``fit_metric`` makes (N, D) training patches into the map that the
    features go through, or None, given the number of dimensions to keep or None for what the settings say;
    ``bank_dtype`` what the bank is stored in; ``prepare`` makes a category's training images, the settings and its name
    into the net that knows their conditions, None where there is but one.
    """

    net: Net
    embedding: dict[str, Any]
    path: Callable[[str, float], Path]
    folder: str
    fit_metric: Callable[[Tensor, int | None], Whitening | None] = lambda patches, dim: None
    bank_dtype: torch.dtype = torch.float32
    prepare: Callable[[Sequence[Sample], Settings, str], Net] | None = None


def wedge_net_method(settings: Settings) -> Method:
    """WEDGE-Net as the settings describe it."""
    net = build_net(settings)
    return Method(
        net,
        settings.embedding(),
        lambda category, ratio: bank_path(settings.save_dir, category, ratio),
        "SAVE_DIR",
        lambda patches, dim: fit_whitening(
            patches, settings.metric, settings.whitening_shrinkage, dim or settings.embedding_dim
        ),
        getattr(torch, settings.bank_dtype),
        None if net.stream is None else functools.partial(learn_conditions, net),
    )


def patchcore_method(settings: Settings) -> Method:
    """The PatchCore baseline as the settings describe it."""
    return Method(
        build_patchcore(settings),
        patchcore_embedding(settings),
        lambda category, ratio: patchcore_path(settings, category, ratio),
        "PatchCore_DIR",
    )


def train_category(settings: Settings, category: str, method: Method, overwrite: bool = False) -> None:
    """Make the banks of one category, at every ratio that is not there yet."""
    samples = train_samples(settings, category)
    ratios = [
        ratio
        for ratio in settings.sampling_ratio
        if overwrite or is_missing(settings, category, ratio, method, samples)
    ]
    if not ratios:
        return

    settings = with_bit_depth(samples, settings)
    if settings.bit_depth != 8:
        print(f"[{category}] {settings.bit_depth} bits a pixel")
    net = method.net if method.prepare is None else method.prepare(samples, settings, category)
    made, dim = [], None
    for condition, share in zip(net.conditions, settings.bank_shares(len(net.conditions)), strict=True):
        own_ratios = [ratio * share for ratio in ratios]
        made.append(train_condition(net, condition, samples, own_ratios, settings, method, category, dim))
        if made[0][0] is not None:
            dim = made[0][0].dim  # clean's, for all of them
    maps = [whitening for whitening, _ in made if whitening is not None]
    if maps:
        net = net.with_whitening(maps)

    for place, ratio in enumerate(ratios):
        banks, scores = zip(*(banks[place] for _, banks in made), strict=True)
        path = method.path(category, ratio)
        checkpoint = Checkpoint(
            memory_bank=banks[0] if len(banks) == 1 else torch.cat(banks),
            bank_sizes=torch.tensor([len(bank) for bank in banks]),
            score_scales=scales_alike(scores),
            settings=method.embedding | {"BIT_DEPTH": settings.bit_depth},
            state=net.state(),
            fingerprint=net.fingerprint,
            category=category,
            sampling_ratio=ratio,
            sampling_method=settings.sampling_method,
            seed=settings.seed,
            training_images=len(samples),
            training_digest=files_digest(samples),
            calibration_scores=scores[0],
        )
        save_checkpoint(path, checkpoint)
        each = "" if len(banks) == 1 else f", for each of {len(banks)} conditions"
        if len(banks[-1]) != len(banks[0]):
            each = f", and {len(banks[-1])} for each of {len(banks) - 1} other conditions"
        patches = len(samples) * math.prod(grid_size(settings.image_size))
        kept = f"kept {len(banks[0])} of {patches} patches in {banks[0].shape[1]} dimensions"
        print(f"[{category}] {len(samples)} images, {kept}{each}: {path}")


def train_condition(
    net: Net,
    condition: Condition,
    samples: Sequence[Sample],
    ratios: Sequence[float],
    settings: Settings,
    method: Method,
    category: str,
    dim: int | None,
) -> tuple[Whitening | None, list[tuple[Tensor, Tensor]]]:
    """The metric of one condition, in ``dim`` dimensions or as many as the settings say, and for each ratio a bank
    (M, D) and scores of images that it does not know."""
    what = category if condition == CLEAN else f"{category}, {condition.name}"
    alter = training_alteration(condition, samples, settings.seed)
    features = extract_features(net, samples, settings, f"{what}: features", alter)
    whitening = method.fit_metric(features.flatten(0, 1), dim)
    if whitening is not None:
        features = whitening.apply_in_place(features)
    patches = features.flatten(0, 1)
    chosen = choose_patches(patches, ratios, settings, what)
    anomaly_map = AnomalyMap(grid_size(settings.image_size), settings.image_size, net.scoring).to(net.device)
    made = []
    for ratio in ratios:
        size = bank_size(len(patches), ratio, what)
        # A whole bank is the features themselves: a copy would double the memory.
        rows = torch.arange(len(patches)) if ratio == 1 else chosen[:size].sort().values
        bank = (patches if ratio == 1 else patches[rows]).to(method.bank_dtype)
        made.append((bank, held_out_scores(features, bank, rows // features.shape[1], anomaly_map)))
    return whitening, made


def scales_alike(scores: Sequence[Tensor]) -> Tensor:
    """(K, 2): by what each condition's scores are multiplied and what is added, to be like those of the first one.

    ``scores`` K times (n,) are of good parts. Mean and standard deviation become the first one's.
    """
    scales = torch.tensor([[1.0, 0.0]]).repeat(len(scores), 1)
    for scale, own in zip(scales[1:], scores[1:], strict=True):
        if min(len(own), len(scores[0])) > 1 and own.std() > 0 and scores[0].std() > 0:
            factor = scores[0].std() / own.std()
            scale[:] = torch.stack([factor, scores[0].mean() - factor * own.mean()])
    return scales


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
    if reason is None and saved.memory_bank.dtype != method.bank_dtype:
        reason = f"it is stored in {str(saved.memory_bank.dtype).removeprefix('torch.')}"
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
