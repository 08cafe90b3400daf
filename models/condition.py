"""The frequency stream that measures the picture: the light it was taken in, and how noisy or blurred it is.

One wavelet transform of three levels tells both. Its approximation band is the picture without its detail: median and
range of each channel tell the light, and an image's are brought back to where those of the training images lie. Its
detail bands' quantiles rise with noise and fall with blur, at the finest level first. Both together tell the condition,
for each of which there is a lens. A defect, which covers a small part of the image, hardly moves a quantile.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pywt
import torch
from scipy.special import gammaincinv  # scipy.stats takes long to import
from torch import Tensor, nn

from models.errors import InputError
from models.parallel import one_thread

KINDS = ("noise", "blur", "colour")
LEVELS = 3  # of the wavelet transform
ENOUGH = 28  # coefficients of a band each way: as many as the coarsest of a picture of 224 pixels has
SHARES = (0.5, 0.9)  # of a detail band: its quantiles; the upper one tells the part where more than half is blank
STATISTICS = 5 + 3 * len(SHARES) * LEVELS  # of an image: light and detail
FLOOR = 0.5 / 255  # half a grey level: what a coefficient below it says is the rounding to 8 bits
GAIN = 4.0  # most that contrast is raised or lowered: a blank picture has none to raise
_ODDS = 50.0  # how much likelier than another condition clean is taken to be before the picture is seen
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

    noise is of a standard deviation in grey levels (of 255), blur of one in pixels, colour a factor of
    ``utils.data.corruptions.color_jitter``: too bright, too much contrast. A condition takes in all levels that are
    nearer to its own than to another's of its kind, so that one between two of them is provided for as well.

    Raises :class:`ValueError` saying what is allowed.
    """
    allowed = (
        "'clean' and any of 'noise<grey levels>', 'blur<pixels>' and 'colour<factor>', such as noise10 or blur1.5, "
        "each once"
    )
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

    ``images`` (B, 3, H, W), their light aligned; ``statistics`` (B, STATISTICS); ``conditions`` (B,) int64, which
    condition each is in; ``unfamiliar`` (B,) bool, whether it is unlike the training images in every one of them.
    """

    images: Tensor
    statistics: Tensor
    conditions: Tensor
    unfamiliar: Tensor


class ConditionStream(nn.Module):
    """Images -> their light aligned, and the condition that each is in.

    Args:
        wavelet: discrete wavelet of PyWavelets.
        conditions: names, see ``parse_conditions``.
        align_light: bring an image's light back to where that of the training images lies; one whose light is like
            theirs is left as it is.
        image_size: height and width of the images in pixels, which must be enough for three levels.

    Raises:
        InputError: the images are too small for the wavelet.
    """

    def __init__(self, wavelet: str, conditions: Sequence[str], align_light: bool, image_size: tuple[int, int]):
        super().__init__()
        shorter = min(image_size)
        if pywt.dwt_max_level(shorter, wavelet) < LEVELS:
            least = next(size for size in range(shorter, 1 << 16) if pywt.dwt_max_level(size, wavelet) >= LEVELS)
            raise InputError(
                f"IMAGE_SIZE is {shorter} on its shorter side; three levels of the wavelet {wavelet} need at least "
                f"{least} pixels: set WAVELET_TYPE = 'haar' or FORM = 'paper'"
            )
        self.conditions = parse_conditions(conditions)
        self.align_light = align_light
        self.step = max(1, min(4, min(image_size) // (2 * ENOUGH)))  # from a pixel that is looked at to the next
        (structure_rows, detail_rows), (structure_columns, detail_columns) = (
            _analysis(wavelet, side) for side in image_size
        )
        self.structure = Separable(structure_rows, structure_columns)
        self.details = nn.ModuleList(
            Separable(rows, columns) for rows, columns in zip(detail_rows, detail_columns, strict=True)
        )
        count, width = len(self.conditions), STATISTICS
        for seen in ("seen_pixels", "seen_structure", *(f"seen_detail{level}" for level in range(LEVELS))):
            self.register_buffer(seen, None, persistent=False)  # all: no region of interest
        self.register_buffer("least_light", -torch.ones(4, 2))  # of the training images, see _brightness_and_cast
        self.register_buffer("most_light", torch.ones(4, 2))
        self.register_buffer("least_clipped", torch.zeros(2))  # shares of white and black pixels in any of them
        self.register_buffer("means", torch.zeros(count, width))
        self.register_buffer("precision", torch.eye(width))  # inverse of the pooled covariance
        # In doubt an image is clean: parts differ too. Squared distances are twice the logarithms of likelihoods.
        self.register_buffer("doubt", torch.tensor([0.0] + [2 * math.log(_ODDS)] * (count - 1)), persistent=False)
        self.register_buffer("limits", torch.full((count,), torch.inf))  # squared distances beyond are unfamiliar

    def forward(self, images: Tensor) -> Reading:
        """(B, 3, H, W) images in [0, 1]; nothing crosses the batch."""
        aligned, statistics = self.measure(images)
        squared = self.squared_distances(statistics)
        least, nearest = squared.min(dim=1)
        return Reading(aligned, statistics, (squared + self.doubt).argmin(dim=1), least > self.limits[nearest])

    def look_inside(self, inside: Tensor) -> None:
        """Take statistics only where ``inside`` (H, W) is not 0: from the coefficients that nothing outside reaches.

        In a region too narrow for any, from those that the least does.
        """
        outside = (inside.cpu() == 0).float()

        def touched(bands: Separable) -> Tensor:
            return bands.rows.cpu().abs() @ outside @ bands.columns.cpu().abs().T

        def least(touched: Tensor) -> Tensor:
            return (touched <= touched.min() + 1e-6).flatten().nonzero()[:, 0]

        self.seen_pixels = least(outside[:: self.step, :: self.step])
        self.seen_structure = least(touched(self.structure))
        for level, bands in enumerate(self.details):
            self.register_buffer(
                f"seen_detail{level}",
                least(_detail_bands(touched(bands)[None, None])[0].amax(dim=0)),
                persistent=False,
            )

    def _seen(self, planes: Tensor, what: str) -> Tensor:
        """(B, C, h, w) -> (B, C, n): all, or what lies inside the region of interest."""
        places = getattr(self, f"seen_{what}")
        return planes.flatten(2) if places is None else planes.flatten(2).index_select(2, places)

    def align(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images, their light aligned: the first of what ``measure`` gives, sooner."""
        gain, offset = self._alignment(self._light_of(images))
        return images * gain[..., None, None] + offset[..., None, None]

    def measure(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) images -> the images, their light aligned, and their statistics (B, STATISTICS).

        Of the light: logs of the shares of white and of black among the pixels, of a large image every sixteenth, which
        no alignment brings back; fewer of them than in any training image are no loss, only other light, and count as
        that many. And, once it is aligned, log of how far the grey image's 90 % quantile is above its median and the
        10 % quantile below it, one by the other, and median and 90 % quantile of the colourfulness, the largest channel
        less the smallest. Of the detail: log of two quantiles of the absolute coefficients of the grey image, for bands
        cH, cV and cD, from the finest level to the coarsest; of each as many as are ``ENOUGH``.
        """
        images = images.contiguous()  # pixels as a file has them are the slower layout, here and for the backbone
        clipped = self._clipped(images).maximum(self.least_clipped)
        structure = self._seen(self.structure(images), "structure")
        gain, offset = self._alignment(_light(structure))
        structure = structure * gain[..., None] + offset[..., None]
        grey, colourfulness = structure.mean(dim=1), structure.amax(dim=1) - structure.amin(dim=1)
        quantiles = _ranked(torch.stack([grey, colourfulness], dim=1), 0.1, 0.5, 0.9)
        bottom, middle, top = quantiles[:, 0].unbind(dim=1)
        skewness = (top - middle + FLOOR).log() - (middle - bottom + FLOOR).log()
        light = [(clipped + 1e-3).log(), skewness[:, None], quantiles[:, 1, 1:]]
        grey = torch.einsum("bc,bchw->bhw", gain / 3, images)[:, None]
        detail = [
            (_ranked(self._seen(_detail_bands(level(grey)), f"detail{number}"), *SHARES).flatten(1) + FLOOR).log()
            for number, level in enumerate(self.details)
        ]
        aligned = images * gain[..., None, None] + offset[..., None, None]
        return aligned, torch.cat([*light, *detail], dim=1)

    def _light_of(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, 2), see ``_light``."""
        return _light(self._seen(self.structure(images), "structure"))

    def _clipped(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2): the shares of white and of black among the pixels of all channels."""
        some = self._seen(images[..., :: self.step, :: self.step], "pixels").flatten(1)
        return torch.stack([where.float().mean(dim=1) for where in (some >= 1 - FLOOR, some <= FLOOR)], dim=1)

    def _alignment(self, light: Tensor) -> tuple[Tensor, Tensor]:
        """Light (B, 3, 2) -> gain and offset (B, 3) that bring it to where the training images' lies: 1 and 0 if it is
        there."""
        median, spread = light.unbind(dim=2)
        if not self.align_light:
            return torch.ones_like(median), torch.zeros_like(median)
        # Light is a factor. That factor first which, nearest to 1, puts median and range of the brightness where the
        # training images' lie: each by itself would stop at its own edge, which no training image need have both of.
        brightness = light.mean(dim=1, keepdim=True).clamp_min(1e-6)
        least = ((self.least_light[:1] - FLOOR) / brightness).amax(dim=2, keepdim=True)
        most = ((self.most_light[:1] + FLOOR) / brightness).amin(dim=2, keepdim=True)
        lit = light * least.clamp_min(1).minimum(most)
        # Then what is left. Not to the training images' mean: light that good parts are seen in is no fault.
        seen = _brightness_and_cast(lit)
        change = seen.maximum(self.least_light).minimum(self.most_light) - seen
        wanted = lit + change[:, :1] + change[:, 1:]
        gain = ((wanted[..., 1] + 1e-6) / (spread + 1e-6)).clip(1 / GAIN, GAIN)
        return gain, wanted[..., 0] - gain * median

    def squared_distances(self, statistics: Tensor) -> Tensor:
        """(B, STATISTICS) -> (B, K) squared Mahalanobis distances to the conditions."""
        apart = statistics[:, None] - self.means
        return (apart @ self.precision * apart).sum(dim=-1)

    def in_plane(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics (N, STATISTICS) and conditions as (N, 2) and (K, 2), where conditions lie farthest apart.

        Distances there are Mahalanobis distances, so that each condition's training images are a round cloud of
        standard deviation 1. Both are on the CPU.
        """
        root = torch.linalg.cholesky(self.precision.double().cpu())
        means = self.means.double().cpu() @ root
        axes = torch.linalg.svd(means - means.mean(dim=0)).Vh[:2].T
        places = statistics.double().cpu() @ root
        return ((places - means[0]) @ axes).float(), ((means - means[0]) @ axes).float()

    def measure_light(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, 4, 2): median of each channel, and range from its 10 to its 90 % quantile; last,
        the shares of white and of black among the pixels."""
        images = images.contiguous()
        return torch.cat([self._light_of(images), self._clipped(images)[:, None]], dim=1)

    def fit_light(self, light: Tensor) -> None:
        """Align to the range of what ``measure_light`` gave for the training images, (N, 4, 2)."""
        self.least_clipped.copy_(light[:, 3].amin(dim=0))
        light = _brightness_and_cast(light[:, :3])
        self.least_light.copy_(light.amin(dim=0))
        self.most_light.copy_(light.amax(dim=0))

    @one_thread()
    def fit_conditions(self, statistics: Tensor) -> None:
        """Learn the conditions from the statistics (K, N, STATISTICS) of N training images in each of them.

        Of few images a condition seems to be known more exactly than it is, and new ones lie farther from it. How much
        farther tells each training image, measured by conditions that were learnt without it. An image is unfamiliar if
        it is farther from the nearest condition than 99.9 % of the training images to which it is the nearest, measured
        in the same way.
        """
        statistics = statistics.double().cpu()
        count = statistics.shape[1]
        fold = torch.arange(count) * min(_FOLDS, count) // count
        distances, own_distances = [], []
        for held_out in fold.unique():
            means, precision = _fit(statistics[:, fold != held_out] if fold.any() else statistics)
            own = statistics[:, fold == held_out]
            apart = own[:, :, None] - means
            squared = (apart @ precision * apart).sum(dim=-1)
            distances.append(squared.flatten(0, 1))
            own_distances.append(squared.diagonal(dim1=0, dim2=2).flatten())
        means, precision = _fit(statistics)
        expected = 2 * gammaincinv(STATISTICS / 2, 0.5)  # the median of chi-squared
        farther = (torch.cat(own_distances).median() / expected).clamp_min(1)
        least, nearest = (torch.cat(distances) / farther).min(dim=1)
        self.means.copy_(means)
        self.precision.copy_(precision / farther)
        for condition, limit in enumerate(self.limits):
            own = least[nearest == condition]
            limit.copy_((own if len(own) else least).quantile(_FAMILIAR))


def _fit(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """(K, N, S) -> means (K, S) and the inverse (S, S) of the pooled covariance, kept away from zero."""
    means = statistics.mean(dim=1)
    apart = (statistics - means[:, None]).flatten(0, 1)
    covariance = apart.T @ apart / max(1, len(apart) - len(means))
    # A hundredth of the logarithm is 1 % of a coefficient: nothing is known more precisely than that.
    return means, torch.linalg.inv(covariance + 1e-4 * torch.eye(len(covariance), dtype=covariance.dtype))


class Separable(nn.Module):
    """A matrix on each side of an image's planes: ``rows`` (h, H) makes h rows of H, ``columns`` (w, W) w columns of W:
    rows @ plane @ columns.T."""

    def __init__(self, rows: np.ndarray, columns: np.ndarray):
        super().__init__()
        self.register_buffer("rows", torch.from_numpy(rows).float(), persistent=False)
        self.register_buffer("columns", torch.from_numpy(columns).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, h, w)"""
        return self.rows @ images @ self.columns.T


def _analysis(wavelet: str, size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Matrices for a line of ``size`` pixels: to its approximation band of the last level, divided by the band's
    gain; and to both bands, one below the other, of each level; of finer ones, only as many as are enough."""
    low, details = np.eye(size), []
    for level in reversed(range(LEVELS)):
        low, high = pywt.dwt(low, wavelet, mode="symmetric", axis=0)
        step = max(1, min(1 << level, len(low) // ENOUGH))
        details.append(np.concatenate([low[::step], high[::step]]))
    return low / 2 ** (LEVELS / 2), details


def _detail_bands(bands: Tensor) -> Tensor:
    """(B, 1, 2h, 2w), low bands before high ones both ways -> (B, 3, h, w) absolute cH, cV and cD."""
    (_, low_high), (high_low, high_high) = (half.chunk(2, dim=2) for half in bands[:, 0].abs().chunk(2, dim=1))
    return torch.stack([high_low, low_high, high_high], dim=1)


def _light(structure: Tensor) -> Tensor:
    """(B, 3, n) -> (B, 3, 2): median, and range from the 10 to the 90 % quantile."""
    low, median, high = _ranked(structure, 0.1, 0.5, 0.9).unbind(dim=2)
    return torch.stack([median, high - low], dim=2)


def _brightness_and_cast(light: Tensor) -> Tensor:
    """(B, 3, 2) of the channels -> (B, 4, 2): the channels' mean, and what each differs from it."""
    brightness = light.mean(dim=1, keepdim=True)
    return torch.cat([brightness, light - brightness], dim=1)


def _ranked(planes: Tensor, *shares: float) -> Tensor:
    """(B, C, n) -> (B, C, len(shares)): the value below which each share lies; the lower one of two medians."""
    ranked = planes.sort(dim=2).values
    return torch.stack([ranked[..., int((planes.shape[2] - 1) * share)] for share in shares], dim=2)
