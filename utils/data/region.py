"""The region of interest on the disk: a picture, white where images are looked at."""

from pathlib import Path

import numpy as np
from PIL import Image

from models.errors import InputError
from utils.data.dataset import Sample
from utils.data.image import Geometry, picture_size, read_image
from utils.settings import Settings

NAME = "region.png"  # in a category's folder
_SHAPE_TOLERANCE = 0.02  # of height by width, beside the photographs': rounding, when one of them is scaled


def region_path(settings: Settings, category: str) -> Path | None:
    """REGION, or the category's own region.png if there is one."""
    if settings.region is not None:
        return settings.region
    path = settings.data_path / category / NAME
    return path if path.exists() else None


def read_region(path: Path, settings: Settings, like: Sample | None = None) -> np.ndarray:
    """(H, W) bool, True where images are looked at: a region through the same geometry as its images.

    Raises :class:`InputError` if it cannot be read, leaves nothing to look at, or has not the shape of ``like``, one of
    the images.
    """
    region = read_image(path).convert("L")
    if like is not None:
        width, height = picture_size(like.path)
        if abs(region.height * width / (region.width * height) - 1) > _SHAPE_TOLERANCE:
            raise InputError(
                f"region {path} is {region.width} x {region.height}, image {like.path} is {width} x {height}: it must "
                "have their shape, in any size"
            )
    geometry = Geometry(settings.image_size, settings.resize, settings.center_crop)
    inside = geometry.apply(region, Image.Resampling.NEAREST) >= 128
    if not inside.any():
        crop = " where the crop lies" if settings.center_crop else ""
        raise InputError(f"region {path} is all black{crop}: white is what is looked at")
    return inside
