"""The frequency stream that measures the picture: the light it was taken in, and how noisy or blurred it is.

One wavelet transform of three levels tells both. Its approximation band is the picture without its detail: its median
and range tell the light, and an image's are brought back to where those of the training images lie. Its detail bands'
medians rise with noise and fall with blur, at the finest level first: they tell the condition, for each of which there
is a memory bank. A defect, which covers a small part of the image, hardly moves a median.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pywt
import torch
from torch import Tensor, nn

from models.errors import InputError
from models.frequency import WaveletTransform

KINDS = ("noise", "blur")
LEVELS = 3  # of the wavelet transform
_FLOOR = 0.5 / 255  # half a grey level: what a coefficient below it says is the rounding to 8 bits
_GAIN = 4.0  # most that contrast is raised or lowered: a blank picture has none to raise
_DOUBT = 6.0  # squared Mahalanobis distance by which another condition must be nearer than clean
_FAMILIAR = 0.999  # share of the training images that count as familiar
_FOLDS = 10


class Condition(NamedTuple):
    """``name`` such as 'noise10'; ``kind`` of KINDS, or 'clean'; ``level``; ``low`` to ``high`` what belongs to it."""

    name: str
    kind: str
    level: float
    low: float
    high: float


CLEAN = Condition("clean", "clean", 0, 0, 0)


def parse_conditions(names: Sequence[str]) -> tuple[Condition, ...]:
    """'clean', 'noise10', 'blur1.5' -> conditions, clean first.

    noise is of a standard deviation in grey levels (of 255), blur of one in pixels. A condition takes in all levels
    that are nearer to its own than to another's of its kind, so that one between two of them is provided for as well.

    Raises :class:`ValueError` saying what is allowed.
    """
    allowed = "'clean' and any of 'noise<grey levels>' and 'blur<pixels>', such as noise10 or blur1.5, each once"
    levels: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for name in names:
        match = re.fullmatch(rf"({'|'.join(KINDS)})(\d+(?:\.\d+)?)", name)
        if match is not None and 0 < float(match[2]) <= 255:
            levels[match[1]].append(float(match[2]))
        elif name != CLEAN.name:
            raise ValueError(allowed)
    if (
        len(set(names)) != len(names)
        or any(len(set(own)) != len(own) for own in levels.values())
        or CLEAN.name not in names
    ):
        raise ValueError(allowed)
    conditions = [CLEAN]
    for kind, own in levels.items():
        own = sorted(own)
        for place, level in enumerate(own):
            low = (own[place - 1] + level) / 2 if place else level / 4
            high = (level + own[place + 1]) / 2 if level != own[-1] else level + min(level / 2, level - low)
            conditions.append(Condition(f"{kind}{level:g}", kind, level, low, high))
    return tuple(conditions)


class Reading(NamedTuple):
    """What the stream sees in B images.

    ``images`` (B, 3, H, W), their light aligned; ``detail`` (B, 9); ``conditions`` (B,) int64, which condition each is
    in; ``unfamiliar`` (B,) bool, whether it is unlike the training images in every one of them.
    """

    images: Tensor
    detail: Tensor
    conditions: Tensor
    unfamiliar: Tensor


class ConditionStream(nn.Module):
    """Images -> their light aligned, and the condition that each is in.

    Args:
        wavelet: discrete wavelet of PyWavelets.
        conditions: names, see ``parse_conditions``.
        align_light: bring an image's light back to where that of the training images lies; one whose light is like
            theirs is left as it is.
        image_size: height and width of the images, which must be enough for three levels.

    Raises:
        InputError: the images are too small for the wavelet.
    """

    def __init__(self, wavelet: str, conditions: Sequence[str], align_light: bool, image_size: int):
        super().__init__()
        if pywt.dwt_max_level(image_size, wavelet) < LEVELS:
            least = next(size for size in range(image_size, 1 << 16) if pywt.dwt_max_level(size, wavelet) >= LEVELS)
            raise InputError(
                f"IMAGE_SIZE is {image_size}; three levels of the wavelet {wavelet} need at least {least} pixels: "
                "set WAVELET_TYPE = 'haar' or FREQUENCY_STREAM = 'off'"
            )
        self.conditions = parse_conditions(conditions)
        self.align_light = align_light
        self.transform = WaveletTransform(wavelet)
        self.register_buffer("structure", _structure(wavelet, image_size), persistent=False)
        count, width = len(self.conditions), 3 * LEVELS
        self.register_buffer("least_light", torch.zeros(3, 2))  # of the training images: each channel's median, range
        self.register_buffer("most_light", torch.ones(3, 2))
        self.register_buffer("means", torch.zeros(count, width))
        self.register_buffer("precision", torch.eye(width))  # inverse of the pooled covariance
        self.register_buffer("limit", torch.tensor(torch.inf))  # squared distance from which on an image is unfamiliar

    def forward(self, images: Tensor) -> Reading:
        """(B, 3, H, W) images in [0, 1]; nothing crosses the batch."""
        aligned, detail = self.measure(images)
        squared = self.squared_distances(detail)
        # In doubt an image is clean.
        handicap = _DOUBT * (torch.arange(len(self.conditions), device=squared.device) > 0)
        conditions = (squared + handicap).argmin(dim=1)
        return Reading(aligned, detail, conditions, squared.amin(dim=1) > self.limit)

    def measure(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) images -> the images, their light aligned, and their detail.

        Detail (B, 9) is the log of the median absolute coefficient of the grey image, for bands cH, cV and cD, from the
        finest level to the coarsest. Of the finest level every fourth coefficient is enough.
        """
        if self.align_light:
            light = self.measure_light(images)
            # Not to the training images' mean: light that good parts are seen in is no fault, and parts differ.
            wanted = light.clamp(self.least_light, self.most_light)
            gain = (wanted[..., 1] / light[..., 1].clamp_min(1e-6)).clamp(1 / _GAIN, _GAIN)
            offset = wanted[..., 0] - gain * light[..., 0]
            images = images * gain[..., None, None] + offset[..., None, None]
        low, medians = images.mean(dim=1, keepdim=True), []
        for level in range(LEVELS):
            low, *details = self.transform(low)[:, 0].split(1, dim=1)
            medians += [_median(band[..., ::2, ::2] if level == 0 else band) for band in details]
        return images, (torch.stack(medians, dim=1) + _FLOOR).log()

    def squared_distances(self, detail: Tensor) -> Tensor:
        """(B, 9) -> (B, K) squared Mahalanobis distances to the conditions."""
        apart = detail[:, None] - self.means
        return (apart @ self.precision * apart).sum(dim=-1)

    def in_plane(self, detail: Tensor) -> tuple[Tensor, Tensor]:
        """Detail (N, 9) and the conditions in the plane (N, 2), (K, 2) in which the conditions lie farthest apart.

        Distances there are Mahalanobis distances, so that each condition's training images are a round cloud of
        standard deviation 1.
        """
        root = torch.linalg.cholesky(self.precision.double())
        means = self.means.double() @ root
        axes = torch.linalg.svd(means - means.mean(dim=0)).Vh[:2].T
        places = detail.double() @ root
        return ((places - means[0]) @ axes).float(), ((means - means[0]) @ axes).float()

    def measure_light(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, 3, 2): median of each channel, and range from its 10 to its 90 % quantile."""
        pixels = (self.structure @ images @ self.structure.T).flatten(2).sort(dim=-1).values
        last = pixels.shape[-1] - 1
        median, bottom, top = (pixels[..., round(last * share)] for share in (0.5, 0.1, 0.9))
        return torch.stack([median, top - bottom], dim=-1)

    def fit_light(self, light: Tensor) -> None:
        """Align to the range of what ``measure_light`` gave for the training images, (N, 3, 2)."""
        self.least_light.copy_(light.amin(dim=0))
        self.most_light.copy_(light.amax(dim=0))

    def fit_conditions(self, details: Tensor, between: Tensor) -> None:
        """Learn the conditions from the detail (K, N, 9) of N training images at each one's own level.

        An image is unfamiliar if it is farther from all conditions than 99.9 % of the training images are, each
        measured by conditions that were learnt without it. So that levels in between are familiar, the detail of the
        same images at all levels that belong to a condition, ``between`` (K, N, 9), counts as well.
        """
        details, between = details.double().cpu(), between.double().cpu()
        fold = torch.arange(details.shape[1]) * min(_FOLDS, details.shape[1]) // details.shape[1]
        nearest = []
        for held_out in fold.unique():
            means, precision = _fit(details[:, fold != held_out] if fold.any() else details)
            own = torch.cat([details[:, fold == held_out], between[:, fold == held_out]])
            apart = own.flatten(0, 1)[:, None] - means
            nearest.append((apart @ precision * apart).sum(dim=-1).amin(dim=1))
        means, precision = _fit(details)
        self.means.copy_(means)
        self.precision.copy_(precision)
        self.limit.copy_(torch.cat(nearest).quantile(_FAMILIAR))


def _fit(details: Tensor) -> tuple[Tensor, Tensor]:
    """(K, N, 9) -> means (K, 9) and the inverse (9, 9) of the pooled covariance, kept away from zero."""
    means = details.mean(dim=1)
    apart = (details - means[:, None]).flatten(0, 1)
    covariance = apart.T @ apart / max(1, len(apart) - len(means))
    # A hundredth of the logarithm is 1 % of a coefficient: nothing is known more precisely than that.
    return means, torch.linalg.inv(covariance + 1e-4 * torch.eye(len(covariance), dtype=covariance.dtype))


def _structure(wavelet: str, size: int) -> Tensor:
    """The (h, size) matrix that takes a column of pixels to its approximation band, divided by the band's gain."""
    low = pywt.wavedec(np.eye(size), wavelet, mode="symmetric", level=LEVELS)[0]
    return torch.tensor(low.T / 2 ** (LEVELS / 2), dtype=torch.float32)


def _median(band: Tensor) -> Tensor:
    """(B, 1, h, w) -> (B,): median absolute coefficient."""
    magnitudes = band.flatten(1).abs()
    return magnitudes.topk(magnitudes.shape[1] // 2 + 1, dim=1, sorted=False).values.amin(dim=1)
