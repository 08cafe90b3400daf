"""Run trained detectors over a category's images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from models.detector import Detector, Net, predict_together
from models.errors import InputError
from utils.console import progress
from utils.data.dataset import Batch, Sample, at_once, batches
from utils.settings import Settings


@dataclass(frozen=True)
class Scored:
    """A category's test images, scored: ``scores`` and ``labels`` (N,), ``maps`` and ``masks`` (N, H, W).

    ``masks`` is None if a defective image has none. ``conditions`` and ``unfamiliar`` (N,) as a ``Prediction`` has
    them, and ``statistics`` (N, S) that they follow from; None where there is one condition.
    """

    samples: list[Sample]
    labels: np.ndarray
    scores: np.ndarray
    maps: np.ndarray
    masks: np.ndarray | None
    conditions: np.ndarray | None = None
    unfamiliar: np.ndarray | None = None
    statistics: np.ndarray | None = None


LARGE = 2**28  # features, 1 GB of float32: more of them are kept in half of that

Alteration = Callable[[Batch], Tensor]  # makes the images (B, 3, H, W) that are looked at out of a batch


class Features:
    """Patch features of ``count`` images as they come in: of each scale one array on the CPU, allocated once.

    They are float32, or float16 if there are many: of ``among`` images in all, if that is more than ``count``.
    """

    def __init__(self, count: int, among: int = 0) -> None:
        self.count, self.among, self.filled = count, max(count, among), 0
        self.scales: list[Tensor] = []

    def add(self, features: Sequence[Tensor], samples: Sequence[Sample]) -> None:
        """Put in those (B, P, D) of the next images. Raises :class:`InputError` naming one whose are not finite."""
        if not self.scales:
            dtype = stored_as(self.among * sum(scale[0].numel() for scale in features))
            self.scales = [torch.empty(self.count, *scale.shape[1:], dtype=dtype) for scale in features]
        for whole, part in zip(self.scales, features, strict=True):
            own = whole[self.filled : self.filled + len(part)].copy_(part)
            if not torch.isfinite(own).all():
                bad = (~torch.isfinite(own).all(dim=2).all(dim=1)).nonzero()[0].item()
                raise InputError(f"image {samples[bad].path} gives features that are not finite")
        self.filled += len(samples)


def numbers_of(net: Net, settings: Settings) -> int:
    """How many numbers an image's features are before the metric, at all scales together."""
    return sum(net.patches(settings.image_size, scale) * dim for scale, dim in enumerate(net.raw_dims))


def stored_as(numbers: int) -> torch.dtype:
    """What so many features are kept in."""
    return torch.float32 if numbers <= LARGE else torch.float16


def extract_features(
    net: Net, samples: Sequence[Sample], settings: Settings, what: str, among: int = 0
) -> list[Tensor]:
    """For each scale (N, P, D) patch features of all samples on the CPU, see ``Features``."""
    features = Features(len(samples), among)
    for batch in with_progress(samples, settings, what):
        features.add(net.look(batch.images).features, batch.samples)
    return features.scales


def score_samples(
    detectors: Sequence[Detector],
    samples: Sequence[Sample],
    settings: Settings,
    what: str,
    alter: Alteration | None = None,
) -> list[Scored]:
    """Score the samples with several detectors; what those of one network share is computed once."""
    settings = at_depth_of(detectors, settings)
    found: list[list[dict[str, Tensor]]] = [[] for _ in detectors]
    masks = []
    for batch in with_progress(samples, settings, what):
        images = batch.images if alter is None else alter(batch)
        for prediction, parts in zip(predict_together(detectors, images), found, strict=True):
            part = prediction._asdict()
            parts.append({name: tensor.cpu() for name, tensor in part.items() if tensor is not None})
        masks.append(batch.masks)
    labels = np.array([sample.label for sample in samples])
    have_masks = labels.any() and all(sample.mask is not None for sample in samples if sample.label)
    truth = torch.cat(masks).numpy() if have_masks else None
    results = []
    for parts in found:
        whole = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
        results.append(Scored(list(samples), labels, masks=truth, **whole))
    return results


def at_depth_of(detectors: Sequence[Detector], settings: Settings) -> Settings:
    """The settings with the bit depth that detectors of one category were trained with, if one of them knows."""
    known = [detector.bit_depth for detector in detectors if detector.bit_depth is not None]
    return replace(settings, bit_depth=known[0]) if known else settings


def with_progress(samples: Sequence[Sample], settings: Settings, what: str) -> Iterator[Batch]:
    """The samples in batches, with a progress bar."""
    count = -(-len(samples) // at_once(settings))
    return progress(batches(samples, settings), f"{what} ({len(samples)} images)", count)
