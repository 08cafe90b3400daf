"""Training images in every condition: what the frequency stream learns from."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.condition import CLEAN, Condition
from models.detector import Net
from models.wedge_net import WedgeNet
from utils.console import Run, in_turn, succeeded
from utils.data.corruptions import corrupt
from utils.data.dataset import Batch, Sample, evenly
from utils.pipeline.inference import LARGE, Alteration, Features, numbers_of, with_progress
from utils.settings import Settings

_FEWEST = 8  # of them, however large
LENS_IMAGES = 32  # training images that are looked at in every condition


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


def lens_images(count: int, most: int = LENS_IMAGES) -> Tensor:
    """Which of ``count`` training images are looked at in every condition: the numbers of ``most``, evenly spaced."""
    return torch.tensor(evenly(range(count), most))


def most_lens_images(net: Net, settings: Settings) -> int:
    """How many they are at most: fewer of images so large that their features would take more than 2 GB."""
    features = (len(net.conditions) - 1) * numbers_of(net, settings)
    return min(LENS_IMAGES, max(_FEWEST, 4 * LARGE // max(1, features)))


def learn_light(
    net: WedgeNet, shards: Sequence[Sequence[Sample]], settings: Settings, category: str, run: Run
) -> WedgeNet:
    """The network with a stream that knows the light of the training images; ``run`` measures each shard of them."""

    @torch.inference_mode()
    def measure(samples: Sequence[Sample]) -> Tensor:
        parts = with_progress(samples, settings, f"{category}: light")
        return torch.cat([stream.measure_light(net.fill(batch.images)) for batch in parts])

    stream = copy.deepcopy(net.stream).cpu()
    light = list(succeeded((run if len(shards) > 1 else in_turn)(measure, shards)))
    with torch.inference_mode():
        stream.fit_light(torch.cat(light))
    return net.with_stream(stream)


def learn_conditions(
    net: WedgeNet, samples: Sequence[Sample], settings: Settings, category: str
) -> tuple[WedgeNet, list[list[Tensor]]]:
    """The network with a stream that tells the conditions apart; and features of the ``lens_images`` in each of them.

    Features before the metric: for each condition but the clean one, and each scale, (n, P, D).
    """
    some = [samples[number] for number in lens_images(len(samples), most_lens_images(net, settings))]
    alterations = [training_alteration(condition, some, settings.seed) for condition in net.conditions]
    found = [Features(len(some), len(some) * (len(alterations) - 1)) for _ in alterations[1:]]
    statistics: list[list[Tensor]] = [[] for _ in alterations]
    for batch in with_progress(some, settings, f"{category}: conditions"):
        # Clean features are taken of all images, elsewhere.
        statistics[0].append(net.prepare(batch.images.to(net.device))[1].statistics)
        for alter, own, features in zip(alterations[1:], statistics[1:], found, strict=True):
            embedding = net.look(alter(batch), condition=0)
            own.append(embedding.reading.statistics)
            features.add(embedding.features, batch.samples)
    stream = copy.deepcopy(net.stream).cpu()
    stream.fit_conditions(torch.stack([torch.cat(own) for own in statistics]))
    return net.with_stream(stream), [own.scales for own in found]
