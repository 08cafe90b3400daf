"""An anomaly map over the image that it belongs to, with Pillow and NumPy alone."""

import hashlib
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from utils.atomic import atomic_file

COLOURS = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], np.float32)
FOUND, REGION = "#00ff00", "#ff2fb9"  # outlines: neither a camera's background nor one of a map's colours
ENLARGED = 2  # times, so that the outline, one pixel of the map wide, leaves the image visible


def overlay(
    image: np.ndarray, anomaly_map: np.ndarray, threshold: float, region: np.ndarray | None = None
) -> Image.Image:
    """Draw a map (H, W) over an image (H, W, 3) uint8, enlarged; what lies above the threshold is outlined in green.

    A ``region`` (H, W) bool, if only that is looked at, is outlined in pink, as in the figures.
    Colours run from black (no distance) over red (the threshold, at half) to yellow (twice the threshold and more); the
    closer to the threshold, the less of the image shows through.
    """
    size = (image.shape[1] * ENLARGED, image.shape[0] * ENLARGED)
    pixels = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR), np.float32)
    values = np.asarray(Image.fromarray(anomaly_map.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    level = np.clip(values / (2 * max(threshold, 1e-12)), 0, 1)
    stops = np.linspace(0, 1, len(COLOURS))
    colours = np.stack([np.interp(level, stops, COLOURS[:, channel]) for channel in range(3)], axis=2)
    strength = np.clip(2 * level, 0, 1)[..., None] ** 4 * 0.6
    blended = pixels * (1 - strength) + colours * strength
    for shape, colour in ((region, REGION), (anomaly_map > threshold, FOUND)):
        if shape is not None:
            blended[_outline(shape).repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1)] = ImageColor.getrgb(colour)
    return Image.fromarray(blended.round().astype(np.uint8))


def _outline(region: np.ndarray) -> np.ndarray:
    """The pixels of a region (H, W) bool that have a neighbour outside of it."""
    padded = np.pad(region, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return region & ~inside


def overlay_path(folder: Path, image: Path) -> Path:
    """Where an image's overlay goes: always directly in ``folder``, and another file for another image."""
    stem = re.sub(r"[^\w.-]", "_", image.stem, flags=re.ASCII)[:80]
    digest = hashlib.sha256(str(image).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return folder / f"{stem}_{digest}.png"


def save_overlay(path: Path, picture: Image.Image) -> None:
    """Write a PNG whole or not at all."""
    with atomic_file(path) as temporary:
        picture.save(temporary, format="png")
