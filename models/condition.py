"""The frequency stream that measures the picture: the light it was taken in, and how noisy or blurred it is.

One wavelet transform of three levels tells both. Its approximation band is the picture without its detail: median and
range of each channel tell the light, and an image's are brought back to where those of the training images lie. Its
detail bands' quantiles rise with noise and fall with blur, at the finest level first. Both together tell the condition,
for each of which there is a lens. A defect, which covers a small part of the image, hardly moves a quantile.
"""

import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pywt
import torch
from scipy.sparse import csr_array, eye_array, kron
from torch import Tensor, nn

from models.errors import InputError

Array = Tensor | np.ndarray

KINDS = ("noise", "blur", "colour")
LEVELS = 3  # of the wavelet transform
SHARES = (0.5, 0.9)  # of a detail band: its quantiles; the upper one tells the part where more than half is blank
STATISTICS = 5 + 3 * len(SHARES) * LEVELS  # of an image: light and detail
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
        (structure_rows, detail_rows), (structure_columns, detail_columns) = (
            _analysis(wavelet, side) for side in image_size
        )
        self.structure = _Separable(structure_rows, structure_columns, planes=3)
        self.details = nn.ModuleList(
            _Separable(rows, columns, planes=1) for rows, columns in zip(detail_rows, detail_columns, strict=True)
        )
        count, width = len(self.conditions), STATISTICS
        for seen in ("seen_pixels", "seen_structure", *(f"seen_detail{level}" for level in range(LEVELS))):
            self.register_buffer(seen, None, persistent=False)  # all: no region of interest
        self.register_buffer("least_light", -torch.ones(4, 2))  # of the training images, see _brightness_and_cast
        self.register_buffer("most_light", torch.ones(4, 2))
        self.register_buffer("means", torch.zeros(count, width))
        self.register_buffer("precision", torch.eye(width))  # inverse of the pooled covariance
        # In doubt an image is clean.
        self.register_buffer("doubt", torch.tensor([0.0] + [_DOUBT] * (count - 1)), persistent=False)
        self.register_buffer("limits", torch.full((count,), torch.inf))  # squared distances beyond are unfamiliar

    def forward(self, images: Tensor) -> Reading:
        """(B, 3, H, W) images in [0, 1]; nothing crosses the batch."""
        aligned, statistics = self.measure(images)
        return Reading(aligned, statistics, *_one_by_one(self._judge, statistics))

    def look_inside(self, inside: Tensor) -> None:
        """Take statistics only where ``inside`` (H, W) is not 0: from the coefficients that nothing outside reaches.

        In a region too narrow for any, from those that the least does.
        """
        outside = (inside.cpu() == 0).float()

        def touched(bands: _Separable) -> Tensor:
            return bands.rows.cpu().abs() @ outside @ bands.columns.cpu().abs().T

        def least(touched: Tensor) -> Tensor:
            return (touched <= touched.min() + 1e-6).flatten().nonzero()[:, 0]

        self.seen_pixels = least(outside[::2, ::2])
        self.seen_structure = least(touched(self.structure))
        for level, bands in enumerate(self.details):
            self.register_buffer(
                f"seen_detail{level}",
                least(_detail_bands(touched(bands)[None, None])[0].amax(dim=0)),
                persistent=False,
            )

    def _seen(self, planes: Array, what: str) -> Array:
        """(B, C, h, w) -> the same, or (B, C, n, 1) of what lies inside the region of interest."""
        places = getattr(self, f"seen_{what}")
        if places is None:
            return planes
        rows = planes.reshape(*planes.shape[:2], -1)
        chosen = rows[:, :, places.numpy()] if isinstance(rows, np.ndarray) else rows.index_select(2, places)
        return chosen[..., None]

    def measure(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) images -> the images, their light aligned, and their statistics (B, STATISTICS).

        Of the light: logs of the shares of white and of black among every fourth pixel's values, which no alignment
        brings back; and, once it is aligned, log of how far the grey image's 90 % quantile is above its median and the
        10 % quantile below it, one by the other, and median and 90 % quantile of the colourfulness, the largest channel
        less the smallest. Of the detail: log of two quantiles of the absolute coefficients of the grey image, for bands
        cH, cV and cD, from the finest level to the coarsest. Of the finest level every fourth coefficient is enough.
        """
        images = images.contiguous()  # pixels as a file has them are the slower layout, here and for the backbone
        statistics, gain, offset = _one_by_one(self._measure, images)
        if _in_numpy(images) and (gain == 1).all() and not offset.any():  # most often nothing needs to change
            return images, statistics
        return _one_by_one(_with_light, images, gain, offset)[0], statistics

    def _measure(self, images: Array) -> tuple[Array, Array, Array]:
        """(B, 3, H, W) -> statistics (B, STATISTICS), and each channel's gain and offset (B, 3), for its light."""
        xp = _library(images)
        some = self._seen(images[..., ::2, ::2], "pixels").reshape(images.shape[0], -1)
        clipped = xp.stack([_share(some >= 1 - _FLOOR), _share(some <= _FLOOR)], axis=1)
        structure = self._seen(self.structure(images), "structure")
        gain, offset = self._alignment(_light(structure))
        structure = _with_light(structure, gain, offset)[0]
        grey, colourfulness = structure.mean(axis=1), xp.amax(structure, axis=1) - xp.amin(structure, axis=1)
        quantiles = _ranked(xp.stack([grey, colourfulness], axis=1), 0.1, 0.5, 0.9)
        bottom, middle, top = quantiles[:, 0, 0], quantiles[:, 0, 1], quantiles[:, 0, 2]
        skewness = xp.log(top - middle + _FLOOR) - xp.log(middle - bottom + _FLOOR)
        light = [xp.log(clipped + 1e-3), skewness[:, None], quantiles[:, 1, 1:]]
        grey = xp.einsum("bc,bchw->bhw", gain / 3, images)[:, None]
        bands = [
            _ranked(self._seen(_detail_bands(level(grey)), f"detail{number}"), *SHARES)
            for number, level in enumerate(self.details)
        ]
        detail = [xp.log(band.reshape(band.shape[0], -1) + _FLOOR) for band in bands]  # len() would fix the batch
        return xp.concatenate([*light, *detail], axis=1), gain, offset

    def _alignment(self, light: Array) -> tuple[Array, Array]:
        """Light (B, 3, 2) -> gain and offset (B, 3) that bring it to where the training images' lies: 1 and 0 if it is
        there."""
        xp = _library(light)
        median, spread = light[..., 0], light[..., 1]
        if not self.align_light:
            return xp.ones_like(median), xp.zeros_like(median)
        seen = _brightness_and_cast(light)
        # Not to the training images' mean: light that good parts are seen in is no fault, and parts differ.
        least, most = _like(light, self.least_light), _like(light, self.most_light)
        change = xp.minimum(xp.maximum(seen, least), most) - seen
        wanted = light + change[:, :1] + change[:, 1:]
        gain = ((wanted[..., 1] + 1e-6) / (spread + 1e-6)).clip(1 / _GAIN, _GAIN)
        return gain, wanted[..., 0] - gain * median

    def _judge(self, statistics: Array) -> tuple[Array, Array]:
        """Statistics (B, STATISTICS) -> conditions and whether they are unfamiliar, (B,) each."""
        xp = _library(statistics)
        squared = self.squared_distances(statistics)
        nearest = xp.argmin(squared, axis=1)
        doubt, limits = _like(statistics, self.doubt), _like(statistics, self.limits)
        return xp.argmin(squared + doubt, axis=1), xp.amin(squared, axis=1) > limits[nearest]

    def squared_distances(self, statistics: Array) -> Array:
        """(B, STATISTICS) -> (B, K) squared Mahalanobis distances to the conditions."""
        apart = statistics[:, None] - _like(statistics, self.means)
        return (apart @ _like(statistics, self.precision) * apart).sum(axis=-1)

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
        """(B, 3, H, W) images -> (B, 3, 2): median of each channel, and range from its 10 to its 90 % quantile."""
        return _one_by_one(lambda each: (_light(self._seen(self.structure(each), "structure")),), images.contiguous())[
            0
        ]

    def fit_light(self, light: Tensor) -> None:
        """Align to the range of what ``measure_light`` gave for the training images, (N, 3, 2)."""
        light = _brightness_and_cast(light)
        self.least_light.copy_(light.amin(dim=0))
        self.most_light.copy_(light.amax(dim=0))

    def fit_conditions(self, statistics: Tensor) -> None:
        """Learn the conditions from the statistics (K, N, STATISTICS) of N training images in each of them.

        An image is unfamiliar if it is farther from the nearest condition than 99.9 % of the training images to which
        it is the nearest, measured by conditions that were learnt without them.
        """
        statistics = statistics.double().cpu()
        count = statistics.shape[1]
        fold = torch.arange(count) * min(_FOLDS, count) // count
        distances = []
        for held_out in fold.unique():
            means, precision = _fit(statistics[:, fold != held_out] if fold.any() else statistics)
            own = statistics[:, fold == held_out].flatten(0, 1)
            apart = own[:, None] - means
            distances.append((apart @ precision * apart).sum(dim=-1))
        least, nearest = torch.cat(distances).min(dim=1)
        means, precision = _fit(statistics)
        self.means.copy_(means)
        self.precision.copy_(precision)
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


class _Separable(nn.Module):
    """A matrix on each side of an image's planes: ``rows`` (h, H) makes h rows of H, ``columns`` (w, W) w columns of W:
    rows @ plane @ columns.T."""

    def __init__(self, rows: np.ndarray, columns: np.ndarray, planes: int):
        super().__init__()
        self.planes = planes
        self.register_buffer("rows", torch.from_numpy(rows).float(), persistent=False)
        self.register_buffer("columns", torch.from_numpy(columns).float(), persistent=False)
        # Few of a wavelet transform's entries are not zero. One product does for all planes, one below the other.
        self.sparse_rows, self.sparse_columns = (
            kron(eye_array(planes), csr_array(matrix), format="csr").astype(np.float32) for matrix in (rows, columns)
        )

    def forward(self, images: Array) -> Array:
        """(B, planes, H, W) -> (B, planes, h, w); B is 1 in NumPy."""
        if isinstance(images, Tensor):
            return self.rows @ images @ self.columns.T
        fewer = (self.sparse_rows @ images.reshape(-1, images.shape[-1])).reshape(self.planes, -1, images.shape[-1])
        both = self.sparse_columns @ fewer.swapaxes(1, 2).reshape(-1, fewer.shape[1])
        return both.reshape(1, self.planes, -1, fewer.shape[1]).swapaxes(2, 3)


def _analysis(wavelet: str, size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Matrices for a line of ``size`` pixels: to its approximation band of the last level, divided by the band's
    gain; and to both bands, one below the other, of each level; of the finest, every other coefficient."""
    low, details = np.eye(size), []
    for level in range(LEVELS):
        low, high = pywt.dwt(low, wavelet, mode="symmetric", axis=0)
        step = 2 if level == 0 else 1
        details.append(np.concatenate([low[::step], high[::step]]))
    return low / 2 ** (LEVELS / 2), details


def _detail_bands(bands: Array) -> Array:
    """(B, 1, 2h, 2w), low bands before high ones both ways -> (B, 3, h, w) absolute cH, cV and cD."""
    height, width = (size // 2 for size in bands.shape[2:])
    bands = abs(bands[:, 0])
    parts = [bands[:, height:, :width], bands[:, :height, width:], bands[:, height:, width:]]
    return _library(bands).stack(parts, axis=1)


def _light(structure: Array) -> Array:
    """(B, 3, h, w) -> (B, 3, 2)"""
    quantiles = _ranked(structure, 0.1, 0.5, 0.9)
    return _library(structure).stack([quantiles[..., 1], quantiles[..., 2] - quantiles[..., 0]], axis=2)


def _brightness_and_cast(light: Array) -> Array:
    """(B, 3, 2) of the channels -> (B, 4, 2): the channels' mean, and what each differs from it."""
    brightness = light.mean(axis=1)[:, None]
    return _library(light).concatenate([brightness, light - brightness], axis=1)


def _ranked(planes: Array, *shares: float) -> Array:
    """(B, C, h, w) -> (B, C, len(shares)): the value below which each share lies; the lower one of two medians."""
    values = planes.reshape(*planes.shape[:2], -1)
    ranks = [int((values.shape[2] - 1) * share) for share in shares]
    if isinstance(values, np.ndarray):  # ten times as fast as torch's sort, median or kthvalue
        return np.partition(values, ranks)[..., ranks]
    return values.sort(dim=2).values[..., ranks]


def _with_light(images: Array, gain: Array, offset: Array) -> tuple[Array]:
    """Images (B, 3, H, W), or their structure, with gain and offset (B, 3) of each channel."""
    aligned = images * gain[..., None, None]
    aligned += offset[..., None, None]
    return (aligned,)


def _share(where: Array) -> Array:
    """(B, n) bool -> (B,) float32, the share that is true."""
    if isinstance(where, np.ndarray):
        return np.array([np.count_nonzero(each) for each in where], np.float32) / where.shape[1]
    return where.float().mean(dim=1)


def _one_by_one(function: Callable[..., tuple[Array, ...]], *batches: Tensor) -> tuple[Tensor, ...]:
    """``function`` of batches (B, ...); on a CPU of one image after the other, as NumPy arrays.

    Its many small steps take NumPy a third of torch's time, no other thread has to wake up for them, and one image's
    intermediate results stay in the caches.
    """
    if not _in_numpy(batches[0]):
        return function(*batches)
    images = zip(*(batch.numpy()[:, None] for batch in batches), strict=True)
    results = zip(*(function(*image) for image in images), strict=True)
    return tuple(torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts)) for parts in results)


def _in_numpy(batch: Tensor) -> bool:
    """Whether it can be worked on outside torch: on a CPU, while no graph is made."""
    return batch.device.type == "cpu" and not torch.compiler.is_exporting()


def _library(values: Array) -> ModuleType:
    """What works on such values: functions that are called alike in both are taken from here."""
    return np if isinstance(values, np.ndarray) else torch


def _like(values: Array, known: Tensor) -> Array:
    """``known`` as what ``values`` are."""
    return known.numpy() if isinstance(values, np.ndarray) else known
