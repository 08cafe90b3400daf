"""Training images in every condition: what the frequency stream learns from."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.condition import CLEAN, Condition
from models.wedge_net import WedgeNet
from utils.console import progress
from utils.corruptions import color_jitter, gaussian_blur, gaussian_noise
from utils.dataset import Batch, Sample, batches
from utils.inference import Corruption
from utils.settings import Settings

MEASURED = 200  # training images that tell the conditions apart: more hardly move means and a covariance


def apply_condition(images: Tensor, kind: str, levels: Sequence[float], names: Sequence[str], seed: int) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] in a condition, each at its own level; noise is seeded by name and level."""
    if kind == CLEAN.kind:
        return images
    if kind == "noise":
        parts = [
            gaussian_noise(*each, seed) for each in zip(images.split(1), levels, ([n] for n in names), strict=True)
        ]
    else:
        change = gaussian_blur if kind == "blur" else color_jitter
        parts = [change(image, level) for image, level in zip(images.split(1), levels, strict=True)]
    return torch.cat(parts)


def training_corruption(condition: Condition, samples: Sequence[Sample], seed: int) -> Corruption | None:
    """What puts a batch of the training samples in a condition: their levels are spread over all that belong to it.

    So its bank knows, and its scores tell, what good parts look like between two conditions as well. An image's level
    does not depend on the batch.
    """
    if condition.kind == CLEAN.kind:
        return None
    places = np.random.default_rng(seed).permutation(len(samples))
    spread = condition.low + (condition.high - condition.low) * (places + 0.5) / len(samples)
    levels = {sample.path: float(level) for sample, level in zip(samples, spread, strict=True)}

    def corrupt(batch: Batch) -> Tensor:
        own = [levels[sample.path] for sample in batch.samples]
        names = [f"train/{sample.path.name}" for sample in batch.samples]
        return apply_condition(batch.images, condition.kind, own, names, seed)

    return corrupt


def learn_conditions(net: WedgeNet, samples: Sequence[Sample], settings: Settings, category: str) -> WedgeNet:
    """The network with a stream that knows the training images' light and conditions."""
    places = np.linspace(0, len(samples) - 1, min(MEASURED, len(samples))).round().astype(int)
    samples = [samples[place] for place in places]
    stream = copy.deepcopy(net.stream).cpu()
    count = -(-len(samples) // settings.batch_size)

    def measured(what: str):
        return progress(batches(samples, settings), f"{category}: {what}", count)

    with torch.inference_mode():
        stream.fit_light(torch.cat([stream.measure_light(batch.images) for batch in measured("light")]))
        exact = [condition._replace(low=condition.level, high=condition.level) for condition in stream.conditions]
        corruptions = [
            training_corruption(condition, samples, settings.seed) for condition in (*exact, *stream.conditions)
        ]
        statistics = [
            torch.stack([stream.measure(corrupt(batch) if corrupt else batch.images)[1] for corrupt in corruptions])
            for batch in measured("conditions")
        ]
        stream.fit_conditions(*torch.cat(statistics, dim=1).chunk(2))
    return net.with_stream(stream)
