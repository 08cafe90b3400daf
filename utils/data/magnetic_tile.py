"""The Magnetic Tile Defects data set (Huang, Qiu and Yuan, 2020) as a category in the MVTec AD layout."""

import shutil
from pathlib import Path

from models.errors import InputError
from utils.atomic import atomic_folder
from utils.console import progress
from utils.data.image import read_image, read_mask

SOURCE = "https://github.com/abin24/Magnetic-tile-defect-datasets."  # its name does end with a full stop
DEFECTS = ("blowhole", "break", "crack", "fray", "uneven")
TEST_EVERY = 5  # of the good tiles, sorted by name, the first of every five is tested on: 191 of 952


def convert(source: Path, category: Path) -> dict[str, int]:
    """Write the category's folder, whole or not at all, from a checkout of the data set.

    The photographs are copied as they are; their masks become 0 and 255. ``MT_Free`` gives the good tiles, split
    between train and test by TEST_EVERY. Returns the number of images in 'train/good', 'test/good', 'test/crack', ...

    Raises:
        InputError: a folder, image or mask of the checkout is missing, unreadable or a mask of another size.
    """
    good = _photographs(source / "MT_Free")
    splits = {
        "train/good": [image for number, image in enumerate(good) if number % TEST_EVERY],
        "test/good": good[::TEST_EVERY],
        **{f"test/{defect}": _photographs(source / f"MT_{defect.capitalize()}") for defect in DEFECTS},
    }
    jobs = [(split, number, image) for split, images in splits.items() for number, image in enumerate(images)]
    with atomic_folder(category) as folder:
        for split, number, image in progress(jobs, "converting"):
            size = read_image(image).size
            target = folder / split / f"{number:03d}{image.suffix.lower()}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, target)
            if not split.endswith("good"):
                mask = folder / "ground_truth" / target.parent.name / f"{target.stem}_mask.png"
                mask.parent.mkdir(parents=True, exist_ok=True)
                read_mask(image.with_suffix(".png"), size).save(mask)
    return {split: len(images) for split, images in splits.items()}


def _photographs(folder: Path) -> list[Path]:
    images = sorted(file for file in (folder / "Imgs").glob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
    if not images:
        raise InputError(f"{folder / 'Imgs'} holds no .jpg: {folder.parent} must be a checkout of {SOURCE}")
    return images
