"""The data set on disk: which categories there are, which files they hold, and batches of them as tensors."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.errors import InputError
from utils.console import progress, warn_once
from utils.data.ahead import ahead
from utils.data.image import EXTENSIONS, Geometry, largest_value, picture_size, read_image, read_mask
from utils.data.mvtec import MVTEC_CATEGORIES
from utils.data.names import GOOD, good_folders, images, labelled_images, subfolder
from utils.settings import Settings
from utils.size import DEPTHS

Item = TypeVar("Item")
MOST_PIXELS = 2**23  # in a batch: 167 images of 224 x 224, or 8 of 1,024 x 1,024
EXCLUDED = "exclude.txt"  # in a category's folder
HOW_TO_GET_DATA = (
    "get MVTec AD with 'python prepare_data.py mvtec', a rendered sample with 'python prepare_data.py sample', or "
    "make a category of your own folders with 'python prepare_data.py folder'"
)


@dataclass(frozen=True)
class Sample:
    """One image of a category: its file, its defect ('good' if none) and its mask (None for good ones)."""

    path: Path
    defect: str
    mask: Path | None = None

    @property
    def label(self) -> int:
        """0 for a good part, 1 for a defective one."""
        return int(self.defect != GOOD)


@dataclass(frozen=True)
class Batch:
    """``images`` (B, 3, H, W) float32 in [0, 1]; ``masks`` (B, H, W) bool; ``samples`` their files, in order."""

    images: Tensor
    masks: Tensor
    samples: list[Sample]


def find_categories(settings: Settings) -> list[str]:
    """The categories that CATEGORY asks for, in MVTec's order, then others by name.

    'all' takes whatever is there. Raises :class:`InputError` if DATA_PATH or a category that was named is absent.
    """
    root = settings.data_path
    if not root.is_dir():
        raise InputError(f"DATA_PATH {root} is not a folder: {HOW_TO_GET_DATA}")
    present = sorted(
        folder.name for folder in root.iterdir() if folder.name[0] != "." and good_folders(subfolder(folder, "train"))
    )
    if settings.category.lower() == "all":
        if not present:
            raise InputError(
                f"DATA_PATH {root} holds no category (a folder with train/{GOOD} in it): {HOW_TO_GET_DATA}"
            )
        known = [name for name in MVTEC_CATEGORIES if name in present]
        return known + [name for name in present if name not in known]
    names = list(dict.fromkeys(name.strip() for name in settings.category.split(",") if name.strip()))
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise InputError(f"CATEGORY {name!r} is not a folder's name")
        if not (root / name).is_dir():
            there = f"there are: {', '.join(present)}" if present else HOW_TO_GET_DATA
            raise InputError(f"category {name!r} is not in DATA_PATH {root}; {there}")
    if not names:
        raise InputError("CATEGORY names no category")
    return names


def train_samples(settings: Settings, category: str) -> list[Sample]:
    """The good images that a category is trained on, without those that its ``exclude.txt`` names, one file a line.

    Raises :class:`InputError` if there are none, or a name is none of theirs.
    """
    root = settings.data_path / category
    train = subfolder(root, "train")
    folders = good_folders(train)
    samples = [Sample(path, GOOD) for folder in folders for path in images(folder)]
    if not samples:
        folder = folders[0] if folders else train / GOOD
        raise InputError(f"{folder} holds no image ({', '.join(EXTENSIONS)}): training needs good parts there")
    listed = root / EXCLUDED
    return leave_out(samples, _lines(listed), str(listed)) if listed.is_file() else samples


def leave_out(samples: Sequence[Sample], names: Sequence[str], by: str = "--without") -> list[Sample]:
    """The samples but those that are named, by file name or by path; ``by`` says where, for an error.

    Raises :class:`InputError` if a name is none of theirs, or none is left.
    """
    gone = set()
    for name in names:
        found = [sample for sample in samples if name in (sample.path.name, str(sample.path))]
        found = found or [sample for sample in samples if Path(name).resolve() == sample.path.resolve()]
        if not found:
            raise InputError(f"{by}: {name} is none of the {len(samples)} training images in {samples[0].path.parent}")
        gone.update(sample.path for sample in found)
    if len(gone) == len(samples):
        raise InputError(f"{by} leaves out every one of the {len(samples)} training images")
    return [sample for sample in samples if sample.path not in gone]


def _lines(path: Path) -> list[str]:
    """A text file's lines, without empty ones and those that begin with #."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text in UTF-8: it names training images to leave out, one a line") from None
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def same_bytes(paths: Iterable[Path]) -> list[list[Path]]:
    """Files that are the same to the byte, in groups of two and more."""
    return [twins for alike in _grouped(paths, _size) for twins in _grouped(alike, _digest)]


def _grouped(paths: Iterable[Path], key: Callable[[Path], Any]) -> list[list[Path]]:
    groups: dict[Any, list[Path]] = {}
    for path in paths:
        groups.setdefault(key(path), []).append(path)
    return [group for group in groups.values() if len(group) > 1]


def _size(path: Path) -> int:
    return path.stat().st_size


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_samples(settings: Settings, category: str) -> list[Sample]:
    """The test images of a category, good ones first, then defect by defect.

    Without a ground_truth folder no image has a mask; with one, each defective image must have its own
    (``<name>_mask.png``, or what ``utils.data.names`` allows beside). Raises :class:`InputError` if a mask or every
    test image is missing.
    """
    root = settings.data_path / category
    test = subfolder(root, "test")
    samples = [Sample(*found) for found in labelled_images(test, subfolder(root, "ground_truth"))]
    if not samples:
        raise InputError(f"{test} holds no image in test/{GOOD} or test/<defect>")
    return samples


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """``count`` of the items, or all, at even distances: a few of a sorted list should not all be of its first kind."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]


def files_digest(samples: Sequence[Sample]) -> str:
    """A short hash of the files' names and sizes: was a bank trained on these files, wherever they lie now?"""
    lines = "\n".join(f"{sample.path.name} {sample.path.stat().st_size}" for sample in samples)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def with_bit_depth(samples: Sequence[Sample], settings: Settings) -> Settings:
    """The settings with the bit depth of these training images, unless BIT_DEPTH gives one.

    It is the smallest of ``DEPTHS`` that their largest value fits in: what a camera of 12 bits writes is a file of 16.
    Raises :class:`InputError` naming a file that cannot be used.
    """
    if settings.bit_depth is not None:
        return settings
    largest = 0
    for sample in progress(samples, "bit depth"):
        largest = max(largest, largest_value(sample.path))
        if largest >= 2 ** DEPTHS[-2]:
            break  # it cannot be more
    return replace(settings, bit_depth=next(depth for depth in DEPTHS if largest < 2**depth))


def at_once(settings: Settings) -> int:
    """Images in a batch: BATCH_SIZE, or fewer large ones, so that memory is bounded whatever their size."""
    height, width = settings.image_size
    return max(1, min(settings.batch_size, MOST_PIXELS // (height * width)))


def batches(samples: Sequence[Sample], settings: Settings) -> Iterator[Batch]:
    """The samples in order, ``at_once`` of them at a time; NUM_WORKERS threads decode the next ones meanwhile.

    The first one that has fewer bits than BIT_DEPTH is told. Raises :class:`InputError` naming the file that cannot be
    used.
    """
    geometry, told = Geometry(settings.image_size, settings.resize, settings.center_crop), False

    def decode(sample: Sample) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Its pixels (H, W, 3) and mask (H, W), uint8, and what there is to tell."""
        notes: list[str] = []
        pixels = geometry.apply(read_image(sample.path, settings.bit_depth, notes.append, geometry))
        if sample.mask is None:
            return pixels, np.zeros(pixels.shape[:2], np.uint8), notes
        mask = read_mask(sample.mask, picture_size(sample.path))
        return pixels, geometry.apply(mask, Image.Resampling.NEAREST), notes

    size = at_once(settings)
    decoded = ahead(decode, samples, settings.num_workers, max(size, settings.num_workers))
    for start in range(0, len(samples), size):
        pixels, masks, notes = zip(*islice(decoded, size), strict=True)
        if any(notes) and not told:
            warn_once(f"{next(chain(*notes))}; others like it are not named")
            told = True
        yield Batch(as_images(pixels), torch.from_numpy(np.stack(masks)) > 0, list(samples[start : start + size]))


def as_images(pixels: Sequence[np.ndarray]) -> Tensor:
    """Pictures' pixels, each (H, W, 3) uint8 -> (N, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().div_(255)
