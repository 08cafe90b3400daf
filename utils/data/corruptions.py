"""What a factory does to a picture: sensor noise, poor focus, changing light and colour, on pixels in [0, 1]."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from models.parallel import one_thread


def corrupt(images: Tensor, kind: str, level: float, names: Sequence[str], seed: int) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] with one level of 'noise', 'blur', 'colour' or 'dark'; 0 changes nothing."""
    if kind == "noise":
        return gaussian_noise(images, level, names, seed)
    return {"blur": gaussian_blur, "colour": color_jitter, "dark": darken}[kind](images, level)


def gaussian_noise(images: Tensor, sigma: float, names: Sequence[str], seed: int) -> Tensor:
    """Add white noise of ``sigma`` grey levels (of 255) to images (B, 3, H, W) float32 in [0, 1]; the sum is clamped.

    An image's noise depends on its name, sigma and seed alone: another order, batch size or number of workers
    gives the same pixels. Sigma 0 gives the images as they are.
    """
    if sigma == 0:
        return images
    noise = [_standard_normal(f"{seed} {float(sigma)} {name}", images.shape[1:]) for name in names]
    return (images + torch.stack(noise).to(images) * (sigma / 255)).clamp_(0, 1)


def _standard_normal(key: str, shape: torch.Size) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Blur images (B, 3, H, W) by a Gaussian of ``sigma`` pixels; the border is mirrored. 0 leaves them as they are."""
    if sigma == 0:
        return images
    from torchvision.transforms.v2 import functional  # slow to import, and noise does without

    size = 2 * min(math.ceil(3 * sigma), min(images.shape[-2:]) - 1) + 1
    return functional.gaussian_blur(images, [size, size], [sigma, sigma])


def darken(images: Tensor, share: float) -> Tensor:
    """Take a share from 0 to 1 of the light away from images in [0, 1], and round to grey levels, as a camera would."""
    return images if share == 0 else (images * (1 - share) * 255).round_().div_(255)


def color_jitter(images: Tensor, factor: float) -> Tensor:
    """Push images (B, 3, H, W) float32 in [0, 1] away from their light and colours, each image by itself; clamped.

    In this order: brightness times 1 + 0.3 factor, contrast times 1 + 0.5 factor, saturation times 1 + 0.5 factor, hue
    turned by 0.1 factor of the circle, at most half of it. ``factor`` >= 0; 0 gives the images as they are.
    """
    if factor == 0:
        return images  # the way to hue and back would round them
    from torchvision.transforms.v2 import functional  # slow to import, and noise does without

    images = functional.adjust_brightness(images, 1 + 0.3 * factor)
    with one_thread():  # it takes each image's mean
        images = functional.adjust_contrast(images, 1 + 0.5 * factor)
    images = functional.adjust_saturation(images, 1 + 0.5 * factor)
    return functional.adjust_hue(images, min(0.1 * factor, 0.5)).clamp_(0, 1)
