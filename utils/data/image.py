"""From an image file to the pixels that the network sees, with Pillow and NumPy alone, so that an edge device can."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from models.errors import InputError
from utils.size import Size

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")  # others can start programs (EPS) or are seldom fuzzed
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MAX_PIXELS = 100_000_000  # a larger picture is refused before it is decoded


def read_image(path: Path) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright (its EXIF rotation applied).

    Grey, palette, RGBA (alpha dropped), CMYK and 16-bit images are converted; of an animation the first frame is taken.
    Raises :class:`InputError` naming the file if it is absent, empty, truncated, too large or no image.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("no regular file")  # a pipe would be waited for, a device read for ever
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size: our own limit follows; of metadata: nothing here uses it
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(
                        f"image {path} has {image.width} x {image.height} pixels, more than "
                        f"{MAX_PIXELS // 10**6} megapixels: scale it down first"
                    )
                return _to_rgb(ImageOps.exif_transpose(image))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"image {path} is not there") from None
    except Exception as error:  # a broken file can make a decoder raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"image {path} cannot be read ({reason}): replace or remove it") from None


def read_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """Decode a ground-truth mask to 0 and 255 (anything that is not black is defect).

    Raises :class:`InputError` if it cannot be read or has another ``size`` (width, height) than its image.
    """
    mask = read_image(path).convert("L")
    if mask.size != size:
        raise InputError(f"mask {path} has size {mask.width} x {mask.height}, its image has {size[0]} x {size[1]}")
    return mask.point(lambda value: 255 if value else 0)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits in one channel, or 32 that hold 16
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("more than 16 bits a pixel")
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    return image.convert("RGB")


@dataclass(frozen=True)
class Geometry:
    """How an image is brought to ``image_size``; an image and its mask go through the same."""

    image_size: Size
    resize: int
    center_crop: bool

    def apply(self, image: Image.Image, resample: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
        """(H, W[, 3]) uint8. The whole is resized; or it is scaled, its proportions kept, and the centre cut out.

        Scaled until it covers the cut with the margin that makes the cut's shorter side ``resize``: of a square cut,
        until its own shorter side is ``resize``.
        """
        height, width = self.image_size
        if not self.center_crop:
            return np.asarray(image.resize((width, height), resample))
        cover = [side * self.resize // min(self.image_size) for side in (width, height)]
        scale = max(least / side for least, side in zip(cover, image.size, strict=True))
        scaled = [max(least, int(side * scale)) for least, side in zip(cover, image.size, strict=True)]
        left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
        return np.asarray(image.resize(scaled, resample).crop((left, top, left + width, top + height)))
