"""Training images in every condition: what the frequency stream learns from."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.condition import CLEAN, Condition
from models.wedge_net import WedgeNet
from utils.data.corruptions import corrupt
from utils.data.dataset import Batch, Sample, evenly
from utils.pipeline.inference import Alteration, extract_features, with_progress
from utils.settings import Settings

LENS_IMAGES = 64  # training images that are looked at in every condition


def training_alteration(condition: Condition, samples: Sequence[Sample], seed: int) -> Alteration | None:
    """What puts a batch of the training samples in a condition: their levels are spread over all that belong to it.

    So its lens knows, and its scores tell, what good parts look like between two conditions as well. An image's level
    and noise do not depend on the batch.
    """
    if condition.kind == CLEAN.kind:
        return None
    places = np.random.default_rng(seed).permutation(len(samples))
    spread = condition.low + (condition.high - condition.low) * (places + 0.5) / len(samples)
    levels = {sample.path: float(level) for sample, level in zip(samples, spread, strict=True)}

    def alter(batch: Batch) -> Tensor:
        paths = [sample.path for sample in batch.samples]
        return torch.cat(
            [
                corrupt(image, condition.kind, levels[path], [f"train/{path.name}"], seed)
                for image, path in zip(batch.images.split(1), paths, strict=True)
            ]
        )

    return alter


def lens_images(count: int) -> Tensor:
    """Which of ``count`` training images are looked at in every condition: their numbers, evenly spaced."""
    return torch.tensor(evenly(range(count), LENS_IMAGES))


def learn_conditions(net: WedgeNet, samples: Sequence[Sample], settings: Settings, category: str) -> WedgeNet:
    """The network with a stream that knows the training images' light and conditions."""
    stream = copy.deepcopy(net.stream).cpu()
    with torch.inference_mode():
        light = [
            stream.measure_light(net.fill(batch.images))
            for batch in with_progress(samples, settings, f"{category}: light")
        ]
        stream.fit_light(torch.cat(light))
        some = [samples[number] for number in lens_images(len(samples))]
        exact = [condition._replace(low=condition.level, high=condition.level) for condition in stream.conditions]
        alterations = [
            training_alteration(condition, some, settings.seed) for condition in (*exact, *stream.conditions)
        ]
        statistics = [
            torch.stack([stream.measure(net.fill(alter(batch) if alter else batch.images))[1] for alter in alterations])
            for batch in with_progress(some, settings, f"{category}: conditions")
        ]
        stream.fit_conditions(*torch.cat(statistics, dim=1).chunk(2))
    return net.with_stream(stream)


def altered_features(
    net: WedgeNet, samples: Sequence[Sample], settings: Settings, category: str
) -> tuple[Tensor, list[list[Tensor]]]:
    """The numbers (n,) of some of the training images, and their features in each condition but the clean one.

    For each condition and scale (n, h*w, D), before the metric.
    """
    numbers = lens_images(len(samples))
    some = [samples[number] for number in numbers]
    return numbers, [
        extract_features(
            net, some, settings, f"{category}, {condition.name}", training_alteration(condition, some, settings.seed)
        )
        for condition in net.conditions[1:]
    ]
