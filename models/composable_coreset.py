"""A coreset of a matrix that nobody holds whole: of the coresets of its shards."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.coreset import greedy_coreset


class Part(NamedTuple):
    """Rows of a matrix that nobody holds whole: their ``numbers`` (k,) in it, and the rows themselves, (k, D)."""

    numbers: Tensor
    vectors: Tensor

    def take(self, places: Tensor) -> "Part":
        """Some of them, in the order of ``places``."""
        return Part(self.numbers[places], self.vectors[places])


def coreset_of_shard(features: Tensor, first: int, size: int, seed: int = 0) -> Part:
    """``greedy_coreset`` of a shard (n, D) that begins with row ``first`` of the whole; all of it if ``size`` >= n."""
    rows = Part(torch.arange(first, first + len(features)), features)
    return rows if size >= len(features) else _choice_among(rows, size, seed)


def _choice_among(rows: Part, size: int, seed: int) -> Part:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* only .* are distinct")  # the whole may have more
        return rows.take(greedy_coreset(rows.vectors, min(size, len(rows.numbers)), seed))


class Merged:
    """One coreset of ``size`` rows out of those of shards: the same greedy choice, among what the shards have chosen.

    That is a composable coreset (Indyk, Mahabadi, Mahdian and Mirrokni, PODS 2014). Where the best ``size`` centres,
    wherever they lie, leave no row farther than r, the greedy choice among *any* part of the rows leaves none of that
    part farther than 2 r: if it did, its centres and that row were size + 1 rows, each more than 2 r from the others,
    and two of them would share one of the best centres (Gonzalez, 1985). So a row is within 2 r of a centre of its
    shard, that one within 2 r of one that remains: 4 r for one merging (Malkomes et al., NIPS 2015), and 2 r more for
    each further one. The choice from the whole has 2 r. What is measured lies near that: docs/scale.md.

    The result depends on the shards and their order alone, not on who made them or when. A single one stays as it is.

    Args:
        size: rows to choose.
        seed: settles the first row of each choice.
        at_once: how many coresets are merged in one go, at least 2. About as many wait at a time, so that S shards are
            merged log(S) / log(at_once) times over.
    """

    def __init__(self, size: int, seed: int = 0, at_once: int = 8) -> None:
        self.size, self.seed, self.at_once = size, seed, max(2, at_once)
        self.waiting: list[list[Part]] = []  # what was merged never, once, twice, ...

    def add(self, part: Part, times: int = 0) -> None:
        """Take the coreset of the next shard: ``size`` rows, or all that it has."""
        if times == len(self.waiting):
            self.waiting.append([])
        own = self.waiting[times]
        own.append(part)
        if len(own) == self.at_once:
            self.waiting[times] = []
            self.add(self._merge(own), times + 1)

    def result(self) -> Part:
        """The coreset of all that were added, in the order of choice."""
        left: list[Part] = []
        for own in self.waiting:
            left = [self._merge([*own, *left])] if own or left else []
        (part,) = left
        if len(part.numbers) < self.size:
            warnings.warn(f"{self.size} rows asked for, but only {len(part.numbers)} are distinct", stacklevel=2)
        return part

    def _merge(self, parts: Sequence[Part]) -> Part:
        if len(parts) == 1:
            return parts[0]
        union = Part(*(torch.cat(each) for each in zip(*parts, strict=True)))
        return _choice_among(union, self.size, self.seed)
