"""What folders and files of a data set are called: which parts are good, and which mask belongs to which image."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from models.errors import InputError
from utils.data.image import EXTENSIONS

GOOD = "good"
GOOD_NAMES = (GOOD, "ok", "normal")  # folders of good parts, in any case
MASK_ENDINGS = ("_mask", "_label", "_gt", "")  # what a mask's name adds to its image's, in this order and in any case
BESIDE = MASK_ENDINGS[:-1]  # a mask in its image's own folder cannot have the image's name


def is_good(folder: Path) -> bool:
    """Does a folder of this name hold good parts?"""
    return folder.name.lower() in GOOD_NAMES


def images(folder: Path) -> list[Path]:
    """The image files of a folder, hidden ones left out, sorted by name; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(
        file for file in folder.iterdir() if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")
    )


def subfolder(parent: Path, name: str) -> Path:
    """``parent / name``; where that is not there, the folder of the same name in another case, if there is one."""
    if (parent / name).is_dir() or not parent.is_dir():
        return parent / name
    others = (path for path in sorted(parent.iterdir()) if path.name.lower() == name.lower() and path.is_dir())
    return next(others, parent / name)


def good_folders(split: Path) -> list[Path]:
    """The folders of good parts in a category's train or test folder."""
    return sorted(path for path in split.glob("*") if is_good(path) and path.is_dir())


def masks_by_name(files: Iterable[Path]) -> dict[str, Path]:
    """Mask files by their names without extension, and by these in lower case. Of two that differ in it, the PNG."""
    ordered = sorted(files, key=lambda file: file.suffix == ".png")
    return {file.stem.lower(): file for file in ordered} | {file.stem: file for file in ordered}


def mask_of(image: Path, masks: Mapping[str, Path], endings: Sequence[str] = MASK_ENDINGS) -> Path | None:
    """The mask of an image among :func:`masks_by_name`, or None."""
    names = (image.stem + ending for ending in endings)
    return next((masks[key] for name in names for key in (name, name.lower()) if key in masks), None)


def labelled_images(test: Path, truth: Path) -> list[tuple[Path, str, Path | None]]:
    """Every image in the folders of ``test``: (file, 'good' or its folder's name, mask), good ones first.

    Without the folder ``truth`` no image has a mask; with one, each defective image must have its own in a folder of
    the defect's name. Raises :class:`InputError` if a mask is missing.
    """
    folders = sorted(path for path in test.glob("*") if path.is_dir() and path != truth)
    found: list[tuple[Path, str, Path | None]] = []
    for folder in sorted(folders, key=lambda folder: not is_good(folder)):
        if is_good(folder) or not truth.is_dir():
            defect = GOOD if is_good(folder) else folder.name
            found += [(image, defect, None) for image in images(folder)]
            continue
        place = subfolder(truth, folder.name)
        masks = masks_by_name(images(place))
        for image in images(folder):
            mask = mask_of(image, masks)
            if mask is None:
                raise InputError(
                    f"mask {place / image.stem}_mask.png of image {image} is missing (it may end in _label, _GT or "
                    "nothing instead, in any image format)"
                )
            found.append((image, folder.name, mask))
    return found


def with_masks_beside(files: Sequence[Path]) -> dict[Path, Path | None]:
    """The pictures among a folder's files, each with the mask that lies beside it (x.jpg: x_label.bmp), or None."""
    masks = masks_by_name(files)
    pairs = {file: mask_of(file, masks, BESIDE) for file in files}
    taken = set(pairs.values())
    return {file: mask for file, mask in pairs.items() if file not in taken}
