"""Banks that are made, searched and judged in memory: many variants of a detector on features extracted once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from models.coreset import greedy_coreset
from models.detector import Net
from models.memory_bank import MemoryBank
from models.scoring import AnomalyMap, Prediction, Scoring
from models.wedge_net import grid_size
from models.whitening import Whitening
from utils.console import progress
from utils.data.dataset import Sample, batches, train_samples, with_bit_depth
from utils.data.dataset import test_samples as samples_for_test
from utils.pipeline.inference import extract_features
from utils.settings import Settings

_AT_ONCE = 16  # test images searched together


@dataclass(frozen=True)
class Features:
    """A category's features, ``train`` (N, h*w, D) and ``test`` (T, h*w, D); ``labels`` (T,), ``masks`` (T, H, W)."""

    train: Tensor
    test: Tensor
    labels: np.ndarray
    masks: np.ndarray | None

    def select(self, columns: slice | Sequence[int]) -> "Features":
        """Only some of the D columns."""
        return Features(
            self.train[..., columns].contiguous(), self.test[..., columns].contiguous(), self.labels, self.masks
        )

    def mapped(self, whitening: Whitening | None) -> "Features":
        """All of them in a metric."""
        if whitening is None:
            return self
        return Features(whitening(self.train), whitening(self.test), self.labels, self.masks)


def single_bank(settings: Settings) -> Settings:
    """The settings with one memory bank, as variants are compared here: 'condition' has several and is left out."""
    return replace(settings, frequency_stream="off") if settings.frequency_stream == "condition" else settings


def extract(net: Net, settings: Settings, category: str) -> Features:
    """The features of a category's training and test images."""
    good, samples = train_samples(settings, category), samples_for_test(settings, category)
    settings = with_bit_depth(good, settings)
    labels = np.array([sample.label for sample in samples])
    return Features(
        extract_features(net, good, settings, f"{category}: training features"),
        extract_features(net, samples, settings, f"{category}: test features"),
        labels,
        _masks(samples, settings) if all(sample.mask for sample in samples if sample.label) else None,
    )


def _masks(samples: Sequence[Sample], settings: Settings) -> np.ndarray:
    return torch.cat([batch.masks for batch in batches(samples, settings)]).numpy()


def banks(features: Features, sizes: Sequence[int], seed: int, dtype: torch.dtype, what: str) -> Iterator[Tensor]:
    """(T, h*w) distances of the test patches to a bank of each size; all sizes come from one selection."""
    patches = features.train.flatten(0, 1)
    chosen = greedy_coreset(patches, max(sizes), seed, progress=True)
    for size in sizes:
        bank = MemoryBank(patches[chosen[:size].sort().values].to(dtype))
        parts = progress(
            features.test.split(_AT_ONCE), f"{what}, {len(bank)} vectors", -(-len(features.test) // _AT_ONCE)
        )
        yield torch.cat([bank.nearest(part.flatten(0, 1)).view(part.shape[:2]) for part in parts])


def predict(distances: Tensor, image_size: tuple[int, int], scoring: Scoring) -> Prediction:
    """(T, h*w) distances -> the images' scores and anomaly maps."""
    grid = grid_size(image_size)
    return AnomalyMap(grid, image_size, scoring).predict(distances.view(-1, *grid))
