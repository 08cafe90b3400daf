"""MVTec AD: where it comes from, what belongs to it, and whether a folder holds all of it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.errors import InputError
from utils.atomic import scratch_folder
from utils.data.archives import unpack
from utils.data.image import EXTENSIONS

# train/good, test/good, test/<defects> images of each category, in the data set's own order; one mask per defect image.
COUNTS = {
    "bottle": (209, 20, 63),
    "cable": (224, 58, 92),
    "capsule": (219, 23, 109),
    "carpet": (280, 28, 89),
    "grid": (264, 21, 57),
    "hazelnut": (391, 40, 70),
    "leather": (245, 32, 92),
    "metal_nut": (220, 22, 93),
    "pill": (267, 26, 141),
    "screw": (320, 41, 119),
    "tile": (230, 33, 84),
    "toothbrush": (60, 12, 30),
    "transistor": (213, 60, 40),
    "wood": (247, 19, 60),
    "zipper": (240, 32, 119),
}
MVTEC_CATEGORIES = tuple(COUNTS)
TEXTURES = ("carpet", "grid", "leather", "tile", "wood")

PAGE = "https://www.mvtec.com/company/research/datasets/mvtec-ad"
ARCHIVE = "mvtec_anomaly_detection.tar.xz"  # 5.3 GB
URL = f"https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/download/420938113-1629960298/{ARCHIVE}"
SHA256 = "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d"
LICENCE = (
    "MVTec AD is licensed CC BY-NC-SA 4.0: no commercial use, name its authors, pass it on under the same terms "
    "(https://creativecommons.org/licenses/by-nc-sa/4.0)"
)


@dataclass(frozen=True)
class CategoryCheck:
    """What a category's folder holds, and each thing in which it differs from what it should hold."""

    name: str
    exists: bool
    counts: tuple[int, int, int]  # images in train/good, test/good, test/<defects>
    masks: int  # those that belong to a defect image
    problems: list[str]


def check_tree(root: Path, counts: Mapping[str, tuple[int, int, int]]) -> list[CategoryCheck]:
    """Compare ``root`` with the image counts that each category should have. Empty files count as missing."""
    return [_check_category(root / name, expected) for name, expected in counts.items()]


def _check_category(folder: Path, expected: tuple[int, int, int]) -> CategoryCheck:
    if not folder.is_dir():
        return CategoryCheck(folder.name, False, (0, 0, 0), 0, [f"{folder.name} is missing"])
    train, good = _files(folder / "train" / "good"), _files(folder / "test" / "good")
    defects = [file for kind in sorted((folder / "test").glob("*")) if kind.name != "good" for file in _files(kind)]
    found = (len(train), len(good), len(defects))
    problems = [
        f"{folder.name}/{split} has {has} images instead of {should}"
        for split, has, should in zip(("train/good", "test/good", "test/<defects>"), found, expected, strict=True)
        if has != should
    ]
    masks = {mask for kind in (folder / "ground_truth").glob("*") for mask in _files(kind)}
    wanted = [folder / "ground_truth" / image.parent.name / f"{image.stem}_mask.png" for image in defects]
    absent = [mask for mask in wanted if mask not in masks]
    problems += [f"{mask.relative_to(folder.parent).as_posix()} is missing" for mask in absent]
    return CategoryCheck(folder.name, True, found, len(wanted) - len(absent), problems)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("[!.]*") if file.suffix.lower() in EXTENSIONS and file.stat().st_size)


def table(checks: Sequence[CategoryCheck]) -> str:
    """The counts of each category, one line each, and under them what is wrong (the first ten lines of it)."""
    numbers = [(*check.counts, check.masks) for check in checks]
    states = ["missing" if not check.exists else "incomplete" if check.problems else "complete" for check in checks]
    rows = [
        ("category", "train", "test good", "test defects", "masks", ""),
        *((check.name, *row, state) for check, row, state in zip(checks, numbers, states, strict=True)),
        ("total", *map(sum, zip(*numbers, strict=True)), ""),
    ]
    lines = ["{:12}{:>7}{:>11}{:>14}{:>7}  {}".format(*row).rstrip() for row in rows]
    problems = [problem for check in checks if check.exists for problem in check.problems]
    if len(problems) > 10:
        problems[10:] = [f"... and {len(problems) - 10} more"]
    return "\n".join(lines + problems)


def install(archive: Path, root: Path) -> None:
    """Unpack the archive and move what ``root`` lacks into it; what is there already is never touched.

    Raises:
        InputError: the archive is unsafe, damaged or not the whole of MVTec AD, or the disk is full; ``root`` is then
            as it was.
    """
    with scratch_folder(root / "unpacking") as scratch:
        unpack(archive, scratch)
        problems = [problem for check in check_tree(scratch, COUNTS) for problem in check.problems]
        if problems:
            more = f" (and {len(problems) - 1} more such differences)" if len(problems) > 1 else ""
            raise InputError(f"{archive} is not the whole of MVTec AD: {problems[0]}{more}")
        for entry in sorted(scratch.iterdir()):
            if not (root / entry.name).exists():
                os.replace(entry, root / entry.name)
