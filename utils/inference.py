"""Run trained detectors over a category's images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.detector import Detector, Net
from models.errors import InputError
from utils.console import progress
from utils.dataset import Batch, Sample, batches
from utils.settings import Settings


@dataclass(frozen=True)
class Scored:
    """A category's test images, scored: ``scores`` and ``labels`` (N,), ``maps`` and ``masks`` (N, H, W).

    ``masks`` is None if a defective image has none.
    """

    samples: list[Sample]
    labels: np.ndarray
    scores: np.ndarray
    maps: np.ndarray
    masks: np.ndarray | None


def extract_features(net: Net, samples: Sequence[Sample], settings: Settings, what: str) -> Tensor:
    """(N, h*w, D) float32 patch features of all samples, in one array on the CPU, allocated once."""
    features = None
    start = 0
    for batch in _with_progress(samples, settings, what):
        embedded = net.embed(batch.images)
        if not torch.isfinite(embedded).all():
            bad = (~torch.isfinite(embedded).all(dim=2).all(dim=1)).nonzero()[0].item()
            raise InputError(f"image {batch.samples[bad].path} gives features that are not finite")
        if features is None:
            features = torch.empty(len(samples), *embedded.shape[1:])
        features[start : start + len(embedded)] = embedded
        start += len(embedded)
    return features


def score_samples(
    detectors: Sequence[Detector],
    samples: Sequence[Sample],
    settings: Settings,
    what: str,
    corrupt: Callable[[Batch], Tensor] | None = None,
) -> list[Scored]:
    """Score the samples with several banks; an embedding that they share is computed once.

    ``corrupt`` makes the images (B, 3, H, W) that are scored out of a batch; None leaves them as they are.
    """
    scores, maps, masks = [[] for _ in detectors], [[] for _ in detectors], []
    for batch in _with_progress(samples, settings, what):
        images = batch.images if corrupt is None else corrupt(batch)
        features = {net: net.embed(images) for net in dict.fromkeys(detector.net for detector in detectors)}
        for detector, its_scores, its_maps in zip(detectors, scores, maps, strict=True):
            prediction = detector.predict_features(features[detector.net])
            its_scores.append(prediction.scores.cpu())
            its_maps.append(prediction.maps.cpu())
        masks.append(batch.masks)
    labels = np.array([sample.label for sample in samples])
    have_masks = labels.any() and all(sample.mask is not None for sample in samples if sample.label)
    truth = torch.cat(masks).numpy() if have_masks else None
    return [
        Scored(list(samples), labels, torch.cat(its_scores).numpy(), torch.cat(its_maps).numpy(), truth)
        for its_scores, its_maps in zip(scores, maps, strict=True)
    ]


def _with_progress(samples: Sequence[Sample], settings: Settings, what: str) -> Iterator[Batch]:
    count = -(-len(samples) // settings.batch_size)
    return progress(batches(samples, settings), f"{what} ({len(samples)} images)", count)
