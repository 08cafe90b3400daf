"""From an image file to the pixels that the network sees, with Pillow and NumPy alone, so that an edge device can."""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from models.errors import InputError
from utils.size import Size

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")  # others can start programs (EPS) or are seldom fuzzed
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
ORIENTATION = 274  # EXIF tag: 5 to 8 swap height and width
TIFF_BITS, TIFF_PLANES = 258, 284  # tags: bits of each channel; 1 if a pixel's channels lie together
# Pillow's names for two bytes a channel (N: in this machine's order), and for the same bytes in the other order.
SWAPPED = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B" if sys.byteorder == "little" else "L"))
}
SPARE = 1.5  # pixels each way of which one is made: from fewer the result would be seen to differ
MAX_PIXELS = 100_000_000  # a larger picture is refused before it is decoded

# Pillow warns of sizes, for which there is a limit of our own, and of metadata, which is not used. It is silenced for
# the whole process, since ``warnings.catch_warnings`` is not safe where several threads read files.
warnings.filterwarnings("ignore", module="PIL")


def read_image(
    path: Path,
    depth: int | None = None,
    tell: Callable[[str], None] | None = None,
    geometry: "Geometry | None" = None,
) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright (its EXIF rotation applied).

    Grey, palette, RGBA (alpha dropped) and CMYK images are converted; of an animation the first frame is taken.
    A file of 16 bits a channel, grey or RGB, holds pixels of ``depth`` bits (8 to 16, None: 16): 2^depth - 1 becomes
    255. A file of 8 bits is read as it is; where it should be deeper, ``tell`` is called with a line that says so.

    ``geometry`` is what the image is going to be brought to, if nothing else is wanted of it: a large JPEG is then
    decoded at a half, a quarter or an eighth of its size, which leaves SPARE times the pixels needed each way or more.
    Training and what is judged later must be read alike.

    Raises :class:`InputError` naming the file if it is absent, empty, truncated, too large or no image, or has larger
    values than ``depth`` allows.
    """
    with _opened(path) as image:
        if _is_deep(image):
            values, white = _values(image, path), 2 ** (depth or 16) - 1
            if (largest := int(values.max())) > white:
                raise InputError(
                    f"image {path} has values up to {largest}: training had {depth} bits a pixel, 0 to {white} "
                    "(BIT_DEPTH sets it)"
                )
            shades = (np.arange(white + 1) * 255 + white // 2) // white  # rounded, as the same picture in 8 bits is
            return Image.fromarray(shades.astype(np.uint8)[values]).convert("RGB")
        if depth is not None and depth > 8 and tell is not None:
            tell(f"image {path} has 8 bits a pixel, training had {depth}: it is judged as if its white were the same")
        if geometry is not None and image.format == "JPEG":
            upright = _upright_size(image)
            width, height = geometry.scaled(upright)
            needed = (round(SPARE * width), round(SPARE * height))
            image.draft(None, needed if upright == image.size else needed[::-1])
        return _upright(image).convert("RGB")


def read_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """Decode a ground-truth mask to 0 and 255.

    Anything that is not black is defect; in a JPEG or WebP, whose black is not quite black, what is nearer to white.

    Raises :class:`InputError` if it cannot be read or has another ``size`` (width, height) than its image.
    """
    with _opened(path) as image:
        black = 127 if image.format in ("JPEG", "WEBP") else 0
        if _is_deep(image):
            mask = Image.fromarray((np.atleast_3d(_values(image, path)) > 0).any(axis=2))
        else:
            mask = _upright(image).convert("RGB").convert("L")
    if mask.size != size:
        raise InputError(f"mask {path} has size {mask.width} x {mask.height}, its image has {size[0]} x {size[1]}")
    return mask.convert("L").point(lambda value: 255 if value > black else 0)


def largest_value(path: Path) -> int:
    """The largest pixel of a file of 16 bits a channel; 0 of one of 8 bits, which is not decoded.

    Raises :class:`InputError` as ``read_image`` does.
    """
    with _opened(path) as image:
        return int(_values(image, path).max()) if _is_deep(image) else 0


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file, upright; its pixels are not decoded. Raises InputError as ``read_image``."""
    with _opened(path) as image:
        return _upright_size(image)


def size_range(paths: Iterable[Path]) -> list[tuple[int, int]]:
    """The smallest and the largest (width, height) of image files, each side by itself."""
    widths, heights = zip(*map(picture_size, paths), strict=True)
    return [(min(widths), min(heights)), (max(widths), max(heights))]


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file, its header read. What goes wrong while it is decoded becomes :class:`InputError` here."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("no regular file")  # a pipe would be waited for, a device read for ever
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"image {path} has {image.width} x {image.height} pixels, more than "
                    f"{MAX_PIXELS // 10**6} megapixels: scale it down first"
                )
            yield image
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"image {path} is not there") from None
    except Exception as error:  # a broken file can make a decoder raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"image {path} cannot be read ({reason}): replace or remove it") from None


def _upright(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    return ImageOps.exif_transpose(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def _raw_mode(image: Image.Image) -> str:
    """How the pixels lie in a file that is opened and not decoded, in Pillow's words: 'RGB;16B', 'L', ..."""
    if image.format not in ("PNG", "TIFF") or not image.tile:
        return image.mode
    how = image.tile[0].args
    return how if isinstance(how, str) else how[0]


def _is_deep(image: Image.Image) -> bool:
    """Whether an image that is opened and not decoded has more than 8 bits a channel."""
    separate = image.format == "TIFF" and max(image.tag_v2.get(TIFF_BITS, (8,))) == 16
    return image.mode.startswith("I") or ";16" in _raw_mode(image) or separate


def _values(image: Image.Image, path: Path) -> np.ndarray:
    """The pixels (H, W) or (H, W, 3) uint16 of a deep image that is opened and not decoded.

    Pillow has no colours of 16 bits: it keeps each value's first byte, the last where it is made to believe that the
    bytes are swapped. So a colour picture is decoded twice.
    """
    if image.mode.startswith("I"):  # 16 bits in one channel, or 32 that hold 16
        values = np.asarray(ImageOps.exif_transpose(image))
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("more than 16 bits a pixel")
        return values.astype(np.uint16, copy=False)
    swapped = SWAPPED.get(_raw_mode(image))
    if swapped is None or (image.format == "TIFF" and image.tag_v2.get(TIFF_PLANES, 1) != 1):
        raise ValueError("16 bits a channel that are neither grey nor RGB, pixel by pixel")
    high = np.asarray(ImageOps.exif_transpose(image))[..., :3]
    with Image.open(path, formats=FORMATS) as again:
        again.tile = [
            tile._replace(args=swapped if isinstance(tile.args, str) else (swapped, *tile.args[1:]))
            for tile in again.tile
        ]
        low = np.asarray(ImageOps.exif_transpose(again))[..., :3]
    return high.astype(np.uint16) << 8 | low


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
        (scaled_width, scaled_height), (left, top) = self._placed(image.size)
        scaled = image.resize((scaled_width, scaled_height), resample)
        return np.asarray(scaled.crop((left, top, left + width, top + height)))

    def in_file(self, size: tuple[int, int]) -> tuple[tuple[float, float], tuple[float, float]]:
        """Where the pixels of :meth:`apply` lie in an image of ``size`` (width, height).

        Returns (x, y) of their upper left corner and (width, height) of each, in the image's pixels.
        """
        scaled, corner = self.scaled(size), (0, 0) if not self.center_crop else self._placed(size)[1]
        scale_x, scale_y = (side / other for side, other in zip(size, scaled, strict=True))
        return (corner[0] * scale_x, corner[1] * scale_y), (scale_x, scale_y)

    def scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) to which a whole image of ``size`` is scaled, before anything is cut out of it."""
        return self._placed(size)[0] if self.center_crop else self.image_size[::-1]

    def _placed(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """(width, height) to which an image of ``size`` is scaled, and the (left, top) corner of the cut in it."""
        height, width = self.image_size
        cover = [side * self.resize // min(self.image_size) for side in (width, height)]
        scale = max(least / side for least, side in zip(cover, size, strict=True))
        scaled_width, scaled_height = (max(least, int(side * scale)) for least, side in zip(cover, size, strict=True))
        return (scaled_width, scaled_height), ((scaled_width - width) // 2, (scaled_height - height) // 2)
