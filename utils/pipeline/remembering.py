"""Good parts that join a memory after training, without the training pictures.

A picture is NG if its distances, added over the scales, are above the threshold at some place. Of new good parts only
those patches join whose distance is more than its scale's share of the threshold. Afterwards none is, and no score of
these parts is above what the threshold was, but for rounding to float16.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from models.cells import FOLDS
from models.detector import Detector
from models.memory_bank import MemoryBank
from models.wedge_net import Embedding
from utils.pipeline.checkpoint import Checkpoint

FAR = 1.0  # a score beyond the highest of good parts, by this many times its distance from their median, is a defect's


@dataclass(frozen=True)
class Remembered:
    """A memory after n pictures have joined.

    ``checkpoint`` of it; ``patches`` that were added at each scale; ``before`` and ``after`` (n,) the pictures' scores;
    ``new_to`` (n,) their scores against the old memory and the other pictures: what a further part of the kind scores.
    """

    checkpoint: Checkpoint
    patches: list[int]
    before: Tensor
    after: Tensor
    new_to: Tensor


@torch.inference_mode()
def remember_pictures(
    detector: Detector, checkpoint: Checkpoint, seen: Embedding, threshold: float, entry: dict[str, Any]
) -> Remembered:
    """The memory with the pictures that ``detector.net.look`` has ``seen``; the log gets ``entry``.

    Their scores count in the threshold as those of training pictures do: each is scored against the memory and the
    others of them, since against itself it would be nothing new. But none counts for more than the present
    ``threshold``: these pictures were picked because they scored high, and stand for the many that did not.
    """
    conditions = None if seen.reading is None else seen.reading.conditions
    known = detector.distances(seen.features)
    count = len(seen.features[0])
    # A score is the sum of distances, each times its scale, and of an offset: what each may be, (n, S).
    chosen = slice(0, 1) if conditions is None else conditions
    reach = (threshold - detector.offsets[chosen, None]).clamp_min(0) / len(known) / detector.scales[chosen]
    reach = reach.expand(count, -1)

    def added(scale: int, pictures: Tensor) -> Tensor:
        """What some of the pictures add to the memory of a scale, (m, D), as it will be stored."""
        patches, own = seen.features[scale][pictures], known[scale][pictures]
        radius = reach[pictures, scale, None].expand_as(own)
        far = own > radius
        return cover(patches[far].to(checkpoint.memory_banks[scale].dtype).float(), own[far], radius[far])

    def distances(scale: int, new: Tensor, pictures: Tensor) -> Tensor:
        """Of some of the pictures, to the memory with what is new in it."""
        own = known[scale][pictures]
        if not len(new):
            return own
        nearer = MemoryBank(new).nearest(seen.features[scale][pictures].flatten(0, 1))
        return torch.minimum(own, nearer.view(own.shape))

    def scores(parts: Sequence[Tensor], pictures: Tensor) -> Tensor:
        return detector.judge(parts, None if conditions is None else conditions[pictures])[0]

    everyone, scales = torch.arange(count), range(len(known))
    new = [added(scale, everyone) for scale in scales]
    new_to = torch.empty(count)
    for fold in everyone.tensor_split(min(FOLDS, count)):
        others = everyone[~torch.isin(everyone, fold)]
        new_to[fold] = scores([distances(scale, added(scale, others), fold) for scale in scales], fold).cpu()
    banks = [
        torch.cat([bank, own.to(bank.dtype).cpu()]) for bank, own in zip(checkpoint.memory_banks, new, strict=True)
    ]
    patches = [len(own) for own in new]
    return Remembered(
        replace(
            checkpoint,
            memory_banks=banks,
            calibration_scores=torch.cat([checkpoint.calibration_scores, new_to.clamp(max=threshold)]),
            remembered=[*copy.deepcopy(checkpoint.remembered), entry | {"patches": patches}],
        ),
        patches,
        scores(known, everyone).cpu(),
        scores([distances(scale, new[scale], everyone) for scale in scales], everyone).cpu(),
        new_to,
    )


def defect_limit(calibration: Tensor) -> float:
    """The score above which a picture is rather a defect than another kind of good part: far above all good ones."""
    highest, middle = calibration.max(), calibration.median()
    return float(highest + FAR * (highest - middle))


def cover(patches: Tensor, distances: Tensor, radius: Tensor) -> Tensor:
    """Of (n, D) patches, at ``distances`` (n,) from a bank, those (m, D) that leave none beyond its own ``radius``.

    ``radius`` (n,) is less than the distances. The farthest first, as in the selection of a coreset.
    """
    added = []
    while len(patches):
        added.append(patches[distances.argmax()])
        distances = torch.minimum(distances, torch.linalg.vector_norm(patches - added[-1], dim=1))
        left = distances > radius
        patches, distances, radius = patches[left], distances[left], radius[left]
    return torch.stack(added) if added else patches
