"""The features of a category's training images: all of them in memory, or a shard of SHARD_IMAGES images at a time.

Training asks three things of them: their moments, for the metric; which patches to keep; and a few images' own. In
shards, each is a task for every shard, which embeds its images anew: to read features from a disk that all share would
cost more than a GPU takes to make them. What comes of it depends on the shards, not on how many workers there are.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.composable_coreset import Merged, Part, coreset_of_shard
from models.coreset import greedy_coreset, random_subset
from models.detector import Net
from models.errors import InputError
from models.whitening import Affine, Moments, moments_of, pooled
from utils.console import Run, succeeded
from utils.data.dataset import Sample
from utils.pipeline.inference import extract_features
from utils.settings import Settings


class Chosen(NamedTuple):
    """Patches of one scale that were chosen, ``vectors`` (M, D); for each of them the number of its training image,
    ``owners`` (M,), and its own among all patches, ``rows`` (M,), ascending."""

    vectors: Tensor
    owners: Tensor
    rows: Tensor


class InMemory:
    """Features of all images, of each scale (N, P, D); ``patches`` of an image there are P."""

    def __init__(self, scales: list[Tensor], settings: Settings) -> None:
        self.scales, self.settings = scales, settings
        self.patches = [scale.shape[1] for scale in scales]
        self.chosen: list[Tensor] = []

    def moments(self) -> list[Moments]:
        """Of the patches of each scale."""
        return [moments_of(scale.flatten(0, 1)) for scale in self.scales]

    def to_metric(self, metrics: Sequence[Affine]) -> None:
        """Map them, in their own memory."""
        self.scales = [metric.apply_in_place(scale) for metric, scale in zip(metrics, self.scales, strict=True)]

    def of(self, images: Tensor) -> list[Tensor]:
        """Features (n, P, D) of some images, by their numbers, which ascend."""
        return [scale[images] for scale in self.scales]

    def choose(self, sizes: Sequence[Sequence[int]]) -> None:
        """Choose the patches of memories of several sizes; ``sizes`` of each scale."""
        self.chosen = [choose_patches(*each, self.settings) for each in zip(self.scales, sizes, strict=True)]

    def of_size(self, scale: int, size: int) -> Chosen:
        """Those of a scale for a memory of one of these sizes."""
        patches = self.scales[scale].flatten(0, 1)
        # A whole bank is the features themselves: a copy would double the memory.
        whole = size == len(patches)
        rows = torch.arange(size) if whole else self.chosen[scale][:size].sort().values
        return Chosen(patches if whole else patches[rows], rows // self.patches[scale], rows)


class InShards:
    """The same of images that are never in memory together: what is kept is a coreset of the shards' coresets."""

    def __init__(self, net: Net, shards: Sequence[list[Sample]], settings: Settings, what: str, run: Run) -> None:
        self.net, self.shards, self.settings, self.what, self.run = net, shards, settings, what, run
        self.patches = [net.patches(settings.image_size, scale) for scale in range(len(net.raw_dims))]
        self.metrics: list[Affine] = []
        self.chosen: list[Part] = []

    def moments(self) -> list[Moments]:
        """Of the patches of each scale, summed over the shards."""
        each = self._tasks(self.shards, lambda _first, scales: [moments_of(scale.flatten(0, 1)) for scale in scales])
        whole = next(each)
        for own in each:
            whole = [pooled(pair) for pair in zip(whole, own, strict=True)]
        return whole

    def to_metric(self, metrics: Sequence[Affine]) -> None:
        """Map whatever is asked for from now on."""
        self.metrics = list(metrics)

    def of(self, images: Tensor) -> list[Tensor]:
        """Features (n, P, D) of some images, by their numbers, which ascend."""
        samples = [sample for shard in self.shards for sample in shard]
        some = in_shards([samples[number] for number in images.tolist()], self.settings.shard_images)
        return [torch.cat(own) for own in zip(*self._tasks(some, lambda _first, scales: scales), strict=True)]

    def choose(self, sizes: Sequence[Sequence[int]]) -> None:
        """Choose the patches of memories of several sizes; ``sizes`` of each scale."""
        images, most, seed = sum(map(len, self.shards)), [max(own) for own in sizes], self.settings.seed
        whole = any(size == images * patches for size, patches in zip(most, self.patches, strict=True))
        if whole or self.settings.sampling_method == "random":
            what = "a SAMPLING_RATIO that keeps every patch" if whole else "SAMPLING_METHOD = 'random'"
            raise InputError(f"{what} is not to be had with SHARD_IMAGES: set it to None")
        # As many coresets are merged at once as have half as many rows again as a shard.
        shard = self.settings.shard_images
        merged = [
            Merged(size, seed, 3 * shard * patches // (2 * size))
            for size, patches in zip(most, self.patches, strict=True)
        ]
        first_rows = self.patches

        def choose(first: int, scales: Sequence[Tensor]) -> list[Part]:
            return [
                coreset_of_shard(scale.flatten(0, 1), first * patches, size, seed)
                for scale, patches, size in zip(scales, first_rows, most, strict=True)
            ]

        for parts in self._tasks(self.shards, choose):
            for own, part in zip(merged, parts, strict=True):
                own.add(part)
        self.chosen = [own.result() for own in merged]

    def of_size(self, scale: int, size: int) -> Chosen:
        """Those of a scale for a memory of one of these sizes."""
        part = self.chosen[scale]
        part = part.take(part.numbers[:size].argsort())
        return Chosen(part.vectors, part.numbers // self.patches[scale], part.numbers)

    def _tasks(self, shards: Sequence[list[Sample]], function: Callable[[int, list[Tensor]], Any]) -> Iterator[Any]:
        """``function`` of each shard's first image and features, in the metric once there is one."""
        net, settings, metrics, what = self.net, self.settings, self.metrics, self.what

        def work(shard: tuple[int, list[Sample]]) -> Any:
            first, samples = shard
            scales = extract_features(net, samples, settings, what, among=settings.shard_images)
            for place, metric in enumerate(metrics):
                scales[place] = metric.apply_in_place(scales[place])
            return function(first, scales)

        firsts = accumulate((len(shard) for shard in shards), initial=0)
        return succeeded(self.run(work, list(zip(firsts, shards, strict=False))))


Features = InMemory | InShards


def embed(net: Net, shards: Sequence[list[Sample]], settings: Settings, what: str, run: Run) -> Features:
    """The features of images in their shards."""
    if len(shards) == 1:
        return InMemory(extract_features(net, shards[0], settings, what), settings)
    return InShards(net, shards, settings, what, run)


def in_shards(samples: Sequence[Sample], images: int | None) -> list[list[Sample]]:
    """The samples, so many at a time; None for all."""
    return (
        [list(samples[start : start + images]) for start in range(0, len(samples), images)]
        if images
        else [list(samples)]
    )


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
