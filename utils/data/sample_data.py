"""Renders the sample data set: four categories in the MVTec AD layout, to try the programs without a download.

The pictures are computed, not photographed; the numbers they give say that the programs work, not how good they are.
Every image depends on (seed, category, split, index) alone, so one can be rendered by itself.
"""

import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from models.errors import InputError
from utils.data.sample_parts import COLS, PARTS, ROWS, SIZE, Flaw

TRAIN, GOOD, DEFECTS = 40, 12, 8  # images per category: train/good, test/good, each kind of defect
VISIBLE = 0.02  # change of brightness, of 1, from which a pixel counts as defective


class Photo(NamedTuple):
    """A rendered image, what is wrong in it, and the same photograph of the part before it was damaged."""

    image: np.ndarray  # (256, 256, 3) uint8
    mask: np.ndarray  # (256, 256) uint8, 0 or 255
    flawless: np.ndarray  # (256, 256, 3) uint8


def render_image(category: str, split: str, index: int, *, seed: int = 0) -> Photo:
    """One image of the set.

    Args:
        category: 'tile', 'wood', 'bottle' or 'screw'.
        split: 'train/good', 'test/good' or 'test/' and a defect of the category.
        index: number of the image; for a defect 0 (faintest) to 7 (clearest).
        seed: another seed, another set.

    Raises:
        InputError: no such category or split.
    """
    if category not in PARTS:
        raise InputError(f"no sample category {category!r}: choose from {', '.join(PARTS)}")
    draw, kinds = PARTS[category]
    splits = ["train/good", "test/good", *(f"test/{kind}" for kind in kinds)]
    if split not in splits:
        raise InputError(f"no split {split!r} in the sample's {category}: choose from {', '.join(splits)}")
    kind = split.split("/")[1]

    def randomness(use: str) -> Generator:
        return np.random.default_rng([seed, zlib.crc32(f"{category}/{split}/{use}".encode()), index])

    light = randomness("light").normal(-2.3, 0.12)
    before = exposure(draw(randomness("part"), light, None), randomness("camera"), light)
    after = before
    if kind != "good":
        flaw = Flaw(kind, index / (DEFECTS - 1), randomness("flaw"))
        after = exposure(draw(randomness("part"), light, flaw), randomness("camera"), light)
    changed = np.abs(after - before).max(-1) > VISIBLE
    changed |= ndimage.binary_closing(changed, iterations=2)  # where the defect has the ground's own colour by chance
    return Photo(
        develop(after, randomness("sensor")),
        np.where(changed, 255, 0).astype(np.uint8),
        develop(before, randomness("sensor")),
    )


def exposure(picture: np.ndarray, rng: Generator, light: float) -> np.ndarray:
    """What reaches the sensor: uneven light, its colour, vignetting and a lens that is slightly soft."""
    x, y = (COLS - SIZE / 2) / SIZE, (ROWS - SIZE / 2) / SIZE
    towards = x * np.cos(light) + y * np.sin(light)
    level = rng.normal(1, 0.05) * (1 + rng.uniform(0.05, 0.25) * towards) * (1 - rng.uniform(0.05, 0.3) * (x**2 + y**2))
    warmth = rng.normal(0, 0.015)
    picture = picture * level[..., None] * np.array([1 + warmth, 1, 1 - warmth])
    blur = rng.uniform(0.35, 0.7)
    return ndimage.gaussian_filter(np.clip(picture, 0, 1), (blur, blur, 0))


def develop(picture: np.ndarray, rng: Generator) -> np.ndarray:
    """Sensor noise, whose variance grows with the light, and rounding to 8 bits."""
    grain = rng.standard_normal((SIZE, SIZE, 1)) + 0.5 * rng.standard_normal((SIZE, SIZE, 3))
    return np.round(255 * np.clip(picture + grain * np.sqrt(4e-6 + 8e-6 * picture), 0, 1)).astype(np.uint8)


def render_sample(out: Path, *, seed: int = 0, progress: bool = True) -> None:
    """Write the whole set to ``out``/category/{train,test,ground_truth}/..., over what has the same name there.

    Args:
        out: folder, made if it is absent.
        seed: another seed, another set.
        progress: show a bar on stderr.

    Raises:
        OSError: the folder cannot be written.
    """
    jobs = [
        (category, split, index)
        for category, (_, kinds) in PARTS.items()
        for split, count in [("train/good", TRAIN), ("test/good", GOOD), *((f"test/{kind}", DEFECTS) for kind in kinds)]
        for index in range(count)
    ]
    for category, split, index in tqdm(jobs, "rendering", unit="image", file=sys.stderr, disable=not progress):
        photo = render_image(category, split, index, seed=seed)
        _save(photo.image, out / category / split / f"{index:03d}.png")
        if not split.endswith("/good"):
            _save(photo.mask, out / category / split.replace("test", "ground_truth", 1) / f"{index:03d}_mask.png")


def is_rendered(root: Path, category: str) -> bool:
    """Whether a category below ``root`` is the sample's and not the real one of the same name."""
    file = root / category / "train/good/000.png"
    if category not in PARTS or not file.is_file():
        return False
    found, expected = np.asarray(Image.open(file)), render_image(category, "train/good", 0).image
    # Not bit by bit: another version of NumPy or SciPy may round otherwise.
    return found.shape == expected.shape and bool(np.abs(found - expected.astype(float)).mean() < 2)


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
