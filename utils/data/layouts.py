"""Data sets brought into MVTec AD's layout: folders that a user has, and public sets as they are distributed.

A reader lists which file goes where; :meth:`Layout.write` then links or copies all of them, whole or not at all. Each
reader's docstring says where its layout is described.
"""

import csv
import errno
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from models.errors import InputError
from utils.atomic import atomic_folder
from utils.console import progress
from utils.data.image import EXTENSIONS, read_image, read_mask
from utils.data.magnetic_tile import TEST_EVERY
from utils.data.names import (
    BESIDE,
    GOOD,
    good_folders,
    images,
    is_good,
    labelled_images,
    mask_of,
    masks_by_name,
    subfolder,
    with_masks_beside,
)

Item = TypeVar("Item")


# --- Writing --------------------------------------------------------------------------------------------------------


class Layout:
    """Which file goes where below a folder that is still to be written."""

    def __init__(self) -> None:
        self.files: dict[PurePosixPath, Path] = {}
        self._taken: dict[str, Path] = {}

    def add(self, folder: str, image: Path, mask: Path | None = None, stem: str | None = None) -> None:
        """Put an image into ``folder`` ('bolt/test/scratch'), under another ``stem`` if given, and its mask as well.

        Raises :class:`InputError` if a file is not there, or if another one has its place.
        """
        place, stem = PurePosixPath(folder), stem or image.stem
        self._put(place / f"{stem}{image.suffix}", image, f"{folder}/{stem}{image.suffix}")
        if mask is not None:
            truth = place.parents[1] / "ground_truth" / place.name / f"{stem}_mask"
            self._put(truth.with_name(truth.name + mask.suffix), mask, str(truth))  # a.png and a.jpg cannot share one

    def _put(self, target: PurePosixPath, file: Path, key: str) -> None:
        if not file.is_file():
            raise InputError(f"{file} is missing")
        key = key.lower()  # not every file system tells cases apart
        if key in self._taken:
            raise InputError(f"{self._taken[key]} and {file} would both become {target}: rename one of them")
        self._taken[key] = self.files[target] = file

    def summary(self, out: Path) -> str:
        """How many images and masks each category gets, one line each."""
        counts: dict[Path, Counter] = {}
        for target in self.files:
            split, kind = target.parts[-3:-1]
            counts.setdefault(out.joinpath(*target.parts[:-3]), Counter())[
                "masks" if split == "ground_truth" else f"{split}/{kind}"
            ] += 1
        return "\n".join(
            f"{place}: " + ", ".join(f"{n} {what}" for what, n in of.items()) for place, of in counts.items()
        )

    def write(self, out: Path, copy: bool) -> None:
        """Write the folder ``out``, whole or not at all: symbolic links to the files, or copies of them.

        Raises :class:`InputError` if no good part is to be trained on, if ``out`` holds something already, or if its
        disk knows no links.
        """
        check_free(out)
        if not any(target.parts[-3:-1] == ("train", GOOD) for target in self.files):
            raise InputError(f"{out} would get no good part to train on")
        with atomic_folder(out) as folder:
            for target, file in progress(self.files.items(), "copying" if copy else "linking"):
                place = folder / target
                place.parent.mkdir(parents=True, exist_ok=True)
                if copy:
                    shutil.copyfile(file, place)
                    continue
                try:
                    place.symlink_to(file.resolve())
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    raise InputError(f"{out} cannot hold links ({error.strerror}): add --copy") from None


def check_free(out: Path) -> None:
    """Raise :class:`InputError` unless ``out`` is absent or an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} is there already: name another folder, or move it away")


# --- The user's own folders -----------------------------------------------------------------------------------------


def pictures(folder: Path) -> list[Path]:
    """The images of a folder that must hold some. Raises :class:`InputError`."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    found = images(folder)
    if not found:
        raise InputError(f"{folder} holds no image ({', '.join(EXTENSIONS)}); folders inside it are not looked into")
    return found


def draw(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Split into those to train on and ``share`` to test on, at random. One item alone is trained on."""
    chosen = set(random.Random(seed).sample(range(len(items)), _held_out(len(items), share)))
    train = [item for number, item in enumerate(items) if number not in chosen]
    return train, [items[number] for number in sorted(chosen)]


def by_date(files: Sequence[Path], share: float) -> tuple[list[Path], list[Path]]:
    """Split into older files to train on and the newest ``share`` to test on, by date of last change."""
    ordered = sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name))
    cut = len(ordered) - _held_out(len(ordered), share)
    return ordered[:cut], ordered[cut:]


def _held_out(count: int, share: float) -> int:
    return min(max(1, round(share * count)), count - 1)


def own_folders(train: Sequence[Path], test: Sequence[Path], bad: Sequence[Path], masks: Path | None) -> Layout:
    """One category from good parts, already split, and a folder for each defect, which is named after it.

    Masks lie beside their images (x.png: x_mask.png), or in ``masks`` or a folder of the defect's name in it.

    Raises:
        InputError: a folder is no folder, holds no image, is given twice or is named like another's or like good
            parts; masks among good parts; some defective images have masks and others have not.
    """
    layout = Layout()
    good = train[0].parent
    if len(with_masks_beside([*train, *test])) < len(train) + len(test):
        raise InputError(f"{good} holds masks beside its images (such as x_mask.png beside x.png): move them away")
    for image in train:
        layout.add(f"train/{GOOD}", image)
    for image in test:
        layout.add(f"test/{GOOD}", image)
    given = [good.resolve()]
    defects: dict[Path, Path | None] = {}
    for folder in bad:
        place = folder.resolve()
        if place in given:
            raise InputError(f"{folder} is given twice: good parts and each defect need a folder of their own")
        if is_good(place):
            raise InputError(f"{folder} is named like a folder of good parts: rename it after its defect")
        if place.name.lower() in [other.name.lower() for other in given[1:]]:
            raise InputError(f"two folders of bad parts are named {place.name}: rename one after its defect")
        given.append(place)
        found = with_masks_beside(pictures(folder))
        if masks is not None:
            named = masks_by_name(images(subfolder(masks, place.name)) or pictures(masks))
            found = {image: mask_of(image, named) for image in found}
        for image, mask in found.items():
            layout.add(f"test/{place.name}", image, mask)
        defects |= found
    if masks is not None and (masks.resolve() in given or not bad):
        raise InputError(f"{masks} must hold the masks of --bad folders and nothing else; beside images they are found")
    without = [image for image, mask in defects.items() if mask is None]
    if without and (masks is not None or len(without) < len(defects)):
        raise InputError(
            f"{without[0]} has no mask, nor have {len(without) - 1} other images of {len(defects)}: every defective "
            f"image needs one (<name>{', <name>'.join(BESIDE)} or <name>), or none has"
        )
    return layout


# --- Public data sets -----------------------------------------------------------------------------------------------


def visa(source: Path) -> Layout:
    """VisA: <object>/Data/Images/Normal, .../Anomaly, <object>/Data/Masks/Anomaly; split_csv/1cls.csv is the split.

    Described in the README.md and prepare_data.py of github.com/amazon-science/spot-diff. Masks number the kinds of
    defect; whatever is not 0 counts.
    """
    table = source / "split_csv" / "1cls.csv"
    _require(table.is_file(), table)
    with open(table, newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = list(csv.reader(file))
    layout = Layout()
    if not rows or rows[0] != ["object", "split", "label", "image", "mask"]:
        raise InputError(f"{table} is not VisA's: its columns must be object, split, label, image, mask")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != 5 or row[1] not in ("train", "test") or PurePosixPath(row[0]).name != row[0]:
            raise InputError(f"{table}, line {number}, is not VisA's: {','.join(row)[:80]}")
        category, split, label, image, mask = row
        if label == "normal":
            layout.add(f"{category}/{split}/{GOOD}", source / image)
        elif split == "test":
            layout.add(f"{category}/test/bad", source / image, source / mask)
    return layout


def btad(source: Path) -> Layout:
    """BTAD: 01 to 03, each with train/ok, test/ok, test/ko, ground_truth/ko; masks are named as their images.

    Described in src/anomalib/data/datasets/image/btech.py of github.com/open-edge-platform/anomalib. Images are BMP or
    PNG, masks too, and not always the same: hence by name.
    """
    return _like_mvtec(source, ("01", "02", "03"), "test", "ground_truth")


def mpdd(source: Path) -> Layout:
    """MPDD: six metal parts in MVTec AD's layout, as github.com/stepanje/MPDD links to it."""
    names = ("bracket_black", "bracket_brown", "bracket_white", "connector", "metal_plate", "tubes")
    return _like_mvtec(source, names, "test", "ground_truth")


def mvtec2(source: Path) -> Layout:
    """MVTec AD 2: <object>/train/good, test_public/good, test_public/bad, test_public/ground_truth/bad.

    Described in arXiv 2503.21622 and the code at mvtec.com/company/research/datasets/mvtec-ad-2. The private test sets
    have no labels, and ``validation`` is for setting thresholds: both are left out.
    """
    names = ("can", "fabric", "fruit_jelly", "rice", "sheet_metal", "vial", "wallplugs", "walnuts")
    return _like_mvtec(source, names, "test_public", "test_public/ground_truth")


def _like_mvtec(source: Path, names: Sequence[str], test: str, truth: str) -> Layout:
    """Those of the categories ``names`` that are there, as they are."""
    layout = Layout()
    present = [name for name in names if (source / name).is_dir()]
    _require(bool(present), source / names[0])
    for name in present:
        category = source / name
        good = [image for folder in good_folders(category / "train") for image in images(folder)]
        _require(bool(good), category / "train" / GOOD)
        _require((category / truth).is_dir(), category / truth)
        for image in good:
            layout.add(f"{name}/train/{GOOD}", image)
        for image, kind, mask in labelled_images(category / test, category / truth):
            layout.add(f"{name}/test/{kind}", image, mask)
    return layout


def kolektor(source: Path) -> Layout:
    """KolektorSDD (kos01 to kos50: Part0.jpg, Part0_label.bmp) or KolektorSDD2 (train, test: 10000.png, 10000_GT.png).

    Described in datasets/README.md, data/input_ksdd.py and data/input_ksdd2.py of
    github.com/vicoslab/mixed-segdec-net-comind2021. A part is defective if its mask is not black. KolektorSDD has no
    split for training on good parts alone: of every five commutators the good pictures of the first are tested on, so
    that none of them has been seen. KolektorSDD2's split is kept; defective parts in its ``train`` are left out.
    """
    commutators = sorted(path for path in source.glob("kos*") if path.is_dir())
    folders = commutators or [source / "train", source / "test"]
    pairs = []
    for folder in folders:
        # The archive of KolektorSDD2 holds one picture twice: '10301 (copy).png', '10301_GT (copy).png'.
        found = with_masks_beside([file for file in images(folder) if "(copy)" not in file.name])
        _require(bool(found), folder / ("Part0.jpg" if commutators else "10000.png"))
        pairs += found.items()
    tested = set(commutators[::TEST_EVERY]) or {source / "test"}
    layout = Layout()
    for image, mask in progress(pairs, "reading masks"):
        if mask is None:
            raise InputError(
                f"the mask of {image} is missing ({image.stem}_label.bmp or {image.stem}_GT.png beside it)"
            )
        good = read_mask(mask, read_image(image).size).getbbox() is None
        stem = f"{image.parent.name}_{image.stem}" if commutators else None  # each has a Part0
        name = "kolektorsdd" if commutators else "kolektorsdd2"
        if good:
            layout.add(f"{name}/{'test' if image.parent in tested else 'train'}/{GOOD}", image, stem=stem)
        elif commutators or image.parent in tested:
            layout.add(f"{name}/test/defect", image, mask, stem)
    return layout


def elpv(source: Path) -> Layout:
    """elpv: labels.csv, lines of an image's path, its probability of a defect (0, 1/3, 2/3, 1) and mono or poly.

    Described in the README.md of github.com/zae-bayern/elpv-dataset; later versions keep it in src/elpv_dataset/data.
    Mono- and polycrystalline cells become a category each, probabilities above 0 a defect each. There are no masks and
    no split: of the good cells, in the list's order, the first of every five is tested on.
    """
    root = next(
        (root for root in (source, source / "src/elpv_dataset/data") if (root / "labels.csv").is_file()), source
    )
    _require((root / "labels.csv").is_file(), root / "labels.csv")
    layout = Layout()
    good: Counter = Counter()
    for number, line in enumerate((root / "labels.csv").read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            file, probability, kind = line.split()
            percent = round(100 * float(probability))
            if kind not in ("mono", "poly") or not 0 <= percent <= 100:
                raise ValueError
        except (ValueError, OverflowError):
            raise InputError(f"{root / 'labels.csv'}, line {number}, is not 'path probability mono|poly'") from None
        folder = f"test/defect_{percent}pct"
        if percent == 0:
            folder = f"{'train' if good[kind] % TEST_EVERY else 'test'}/{GOOD}"
            good[kind] += 1
        layout.add(f"elpv_{kind}/{folder}", root / file)
    return layout


def _require(found: bool, path: Path) -> None:
    if not found:
        raise InputError(f"{path} is missing: the first argument must be the data set's folder as it was unpacked")


@dataclass(frozen=True)
class PublicSet:
    """A data set that others publish: its reader, its name, and the page to get it from."""

    read: Callable[[Path], Layout]
    title: str
    page: str


PUBLIC_SETS = {
    "visa": PublicSet(visa, "VisA, twelve objects", "https://github.com/amazon-science/spot-diff"),
    "btad": PublicSet(btad, "BTAD, three products", "https://avires.dimi.uniud.it/papers/btad/btad.zip"),
    "mpdd": PublicSet(mpdd, "MPDD, six metal parts", "https://github.com/stepanje/MPDD"),
    "kolektor": PublicSet(
        kolektor, "KolektorSDD or KolektorSDD2", "https://www.vicos.si/resources/kolektorsdd or .../kolektorsdd2"
    ),
    "mvtec2": PublicSet(
        mvtec2, "MVTec AD 2, eight objects", "https://www.mvtec.com/company/research/datasets/mvtec-ad-2"
    ),
    "elpv": PublicSet(elpv, "elpv, solar cells", "https://github.com/zae-bayern/elpv-dataset"),
}
