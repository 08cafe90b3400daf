"""Folders as users and public data sets have them: one command, and the programs read them."""

import csv
import dataclasses
import errno
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prepare_data import main
from tests.test_prepare_data import files_under
from tests.test_settings import DEFAULTS
from utils.data import layouts
from utils.data.dataset import batches, find_categories, train_samples
from utils.data.dataset import test_samples as samples_for_test
from utils.settings import make_settings

SIZE = (40, 32)  # width, height


def picture(path, grey=120):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", SIZE, grey).save(path)


def mask(path, value=255):
    """A mask with a square of ``value`` in it; 0: a black one."""
    pixels = np.zeros(SIZE[::-1], np.uint8)
    pixels[8:16, 8:16] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def read(data, category="all"):
    """What the programs read: {category: (training images, [(test image, defect, does its mask show one?)])}."""
    settings = make_settings(
        DEFAULTS | {"DATA_PATH": data, "CATEGORY": category, "IMAGE_SIZE": 32, "RESIZE": 32, "NUM_WORKERS": 0}
    )
    found = {}
    for name in find_categories(settings):
        samples = samples_for_test(dataclasses.replace(settings, center_crop=False), name)
        marked = [bool(shown.any()) for batch in batches(samples, settings) for shown in batch.masks]
        train = [sample.path.name for sample in train_samples(settings, name)]
        found[name] = (train, [(s.path.name, s.defect, m) for s, m in zip(samples, marked, strict=True)])
    return found


def refused(arguments, capsys):
    """The one line that a refusal prints."""
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    [error] = output.err.splitlines()
    return error


def prepared(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


# --- What the programs read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["good", "ok", "normal", "OK", "Good", "NORMAL"])
@pytest.mark.parametrize("train, test, truth", [("train", "test", "ground_truth"), ("Train", "TEST", "Ground_Truth")])
def test_good_parts_are_read_under_each_name(tmp_path, name, train, test, truth):
    picture(tmp_path / "bolt" / train / name / "0.png")
    picture(tmp_path / "bolt" / test / "Zebra" / "1.png")
    picture(tmp_path / "bolt" / test / "a scratch" / "1.png")
    picture(tmp_path / "bolt" / test / name / "1.png")
    mask(tmp_path / "bolt" / truth / "zebra" / "1_mask.png")
    mask(tmp_path / "bolt" / truth / "a scratch" / "1_mask.png")
    assert read(tmp_path) == {
        "bolt": (["0.png"], [("1.png", "good", False), ("1.png", "Zebra", True), ("1.png", "a scratch", True)])
    }


@pytest.mark.parametrize(
    "name", ["7_mask.png", "7_label.bmp", "7_GT.tif", "7.png", "7.webp", "7_Mask.TIFF", "7_MASK.PNG", "7_gt.BMP"]
)
def test_masks_are_found_under_each_name(tmp_path, name):
    picture(tmp_path / "bolt/train/ok/0.bmp")
    picture(tmp_path / "bolt/test/ko/7.BMP")
    mask(tmp_path / "bolt/ground_truth/ko" / name)
    assert read(tmp_path)["bolt"][1] == [("7.BMP", "ko", True)]


def test_of_several_masks_the_one_named_as_mvtecs_is_read(tmp_path):
    picture(tmp_path / "bolt/train/good/0.png")
    picture(tmp_path / "bolt/test/dent/7.png")
    for name in ("7.png", "7_GT.png", "7_label.png", "7_mask.bmp", "7_mask.webp"):
        mask(tmp_path / "bolt/ground_truth/dent" / name, 0)
    mask(tmp_path / "bolt/ground_truth/dent/7_mask.png")
    assert read(tmp_path)["bolt"][1] == [("7.png", "dent", True)]


def test_a_mask_of_another_image_is_not_taken(tmp_path, capsys):
    picture(tmp_path / "bolt/train/good/0.png")
    picture(tmp_path / "bolt/test/dent/7.png")
    for name in ("77_mask.png", "7_masks.png", "7_mask.txt", "_7.png"):
        (tmp_path / "bolt/ground_truth/dent").mkdir(parents=True, exist_ok=True)
        (tmp_path / "bolt/ground_truth/dent" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"mask .*ground_truth/dent/7_mask\.png of image .*7\.png is missing"):
        read(tmp_path)


# --- folder ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """Ten good parts, three scratched and two dented ones, no split; the newest good part has the first name."""
    root = tmp_path / "photos"
    for number in range(10):
        picture(root / f"fine/part {number}.jpg", 100 + number)
        os.utime(root / f"fine/part {number}.jpg", (1e9 - number * 3600,) * 2)
    for kind, count in {"scratch": 3, "dent": 2}.items():
        for number in range(count):
            picture(root / kind / f"{number}.png")
    return root


def with_masks(photos, place):
    for image in sorted([*photos.glob("scratch/*.png"), *photos.glob("dent/*.png")]):
        mask(place(image))


def test_a_folder_of_good_and_folders_of_bad_parts_become_a_category(photos, tmp_path, capsys):
    prepared("folder", photos / "fine", "--bad", photos / "scratch", "--bad", photos / "dent", tmp_path / "data/bolt")
    output = capsys.readouterr().out
    assert "8 train/good, 2 test/good, 3 test/scratch, 2 test/dent" in output
    assert f"--data-path {tmp_path}/data --category bolt" in output
    [(train, test)] = read(tmp_path / "data").values()
    good = [name for name, defect, _ in test if defect == "good"]
    assert len(train) == 8 and len(good) == 2
    assert sorted(train + good) == sorted(os.listdir(photos / "fine"))
    assert [defect for _, defect, _ in test[2:]] == ["dent"] * 2 + ["scratch"] * 3
    assert os.listdir(tmp_path / "data") == ["bolt"]
    assert all(file.is_symlink() for file in (tmp_path / "data").rglob("*") if file.is_file())


@pytest.mark.parametrize(
    "line",
    [
        "fine --bad scratch dent OUT",
        "fine --bad scratch --bad dent OUT",
        "fine OUT --bad scratch --bad dent",
        "fine --bad scratch dent --masks truth OUT",
        "--masks truth --bad scratch --bad dent -- fine OUT",
        "--bad scratch --masks truth fine OUT --bad dent",
    ],
)
def test_the_folders_may_be_named_in_any_usual_order(photos, monkeypatch, line):
    with_masks(photos, lambda image: photos / "truth" / image.parent.name / image.name)
    monkeypatch.chdir(photos)
    prepared("folder", *line.split())
    assert {file.parent.name for file in (photos / "OUT/test").rglob("*.*")} == {"good", "scratch", "dent"}


def test_folders_of_any_kind_are_read_or_refused_in_one_line(tmp_path, capsys):
    """Names with quotes, dots, blanks, other alphabets; broken files, dead links, folders named as files."""
    rng = random.Random(8)
    stems = [
        "part 1",
        "a'b",
        'a"b',
        "teil-ä",
        "零件",
        ".hidden",
        "x.y.z",
        "000",
        "000_mask",
        "000_label",
        "UPPER",
        "-x",
    ]
    suffixes = [".png", ".PNG", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".txt", ""]
    outcomes = set()
    for number in range(60):
        photos = tmp_path / f"photos{number}"
        for folder in ("good", "bad", "masks"):
            (photos / folder).mkdir(parents=True)
            for _ in range(rng.randrange(6)):
                path = photos / folder / (rng.choice(stems) + rng.choice(suffixes))
                if path.exists() or path.is_symlink():
                    continue
                match rng.randrange(12):
                    case 0:
                        path.mkdir()
                    case 1:
                        path.symlink_to("nowhere")
                    case 2:
                        path.write_bytes(rng.randbytes(40))
                    case _:
                        Image.new("L", SIZE, rng.randrange(256)).save(path, format="png")
        out = tmp_path / f"data{number}/bolt"
        line = [
            "folder",
            photos / "good",
            "--bad",
            photos / "bad",
            *rng.choice([[], ["--masks", photos / "masks"]]),
            out,
        ]
        before = files_under(photos)
        code = main([str(argument) for argument in line])
        error = capsys.readouterr().err
        outcomes.add(code)
        assert files_under(photos) == before
        if code == 0:
            settings = make_settings(DEFAULTS | {"DATA_PATH": out.parent, "CATEGORY": "bolt"})
            assert train_samples(settings, "bolt")
            continue
        assert code == 2 and len(error.splitlines()) == 1 and error.startswith("error: "), error
        assert not out.exists()
    assert outcomes == {0, 2}


def test_the_split_is_the_seeds_and_has_the_share_that_was_asked_for(photos, tmp_path):
    tested = {}
    for name, options in {"a": (), "b": ("--seed", 42), "c": ("--seed", 1), "d": ("--test-share", 0.5)}.items():
        prepared("folder", photos / "fine", *options, tmp_path / "data" / name)
        tested[name] = sorted(os.listdir(tmp_path / "data" / name / "test/good"))
    assert tested["a"] == tested["b"] != tested["c"]
    assert len(tested["d"]) == 5


def test_by_date_the_newest_are_tested(photos, tmp_path, capsys):
    prepared("folder", photos / "fine", "--by-date", tmp_path / "bolt")
    assert sorted(os.listdir(tmp_path / "bolt/test/good")) == ["part 0.jpg", "part 1.jpg"]
    assert "until 2001-09-0" in capsys.readouterr().out  # so that a copy's dates, which say nothing, are seen


def test_few_good_parts_are_trained_on(photos, tmp_path):
    for file in sorted((photos / "fine").iterdir())[1:]:
        file.unlink()
    prepared("folder", photos / "fine", "--bad", photos / "dent", tmp_path / "data/bolt")
    [(train, test)] = read(tmp_path / "data").values()
    assert train == ["part 0.jpg"] and {defect for _, defect, _ in test} == {"dent"}


@pytest.mark.parametrize("place", ["beside", "one folder", "a folder for each"])
def test_masks_are_brought_along(photos, tmp_path, place):
    options = [] if place == "beside" else ["--masks", photos / "truth"]
    bad = [photos / "scratch"] if place == "one folder" else [photos / "scratch", photos / "dent"]
    with_masks(
        photos,
        {
            "beside": lambda image: image.with_name(f"{image.stem}_label.bmp"),
            "one folder": lambda image: photos / "truth" / f"{image.stem}.tif",
            "a folder for each": lambda image: photos / "truth" / image.parent.name.upper() / f"{image.stem}_GT.png",
        }[place],
    )
    prepared("folder", photos / "fine", "--bad", *bad, *options, tmp_path / "data/bolt")
    [(_, test)] = read(tmp_path / "data").values()
    assert len(test) == 2 + (3 if place == "one folder" else 5)
    assert all(marked == (defect != "good") for _, defect, marked in test)
    assert len(files_under(tmp_path / "data/bolt/ground_truth")) == len(test) - 2


def test_copies_outlive_their_originals_and_links_outlive_a_move_of_the_data(photos, tmp_path):
    prepared("folder", photos / "fine", "--copy", tmp_path / "copied/bolt")
    prepared("folder", photos / "fine", tmp_path / "linked/bolt")
    assert not any(file.is_symlink() for file in (tmp_path / "copied").rglob("*"))
    image = "part 5.jpg"
    [copied] = (tmp_path / "copied").rglob(image)
    assert copied.read_bytes() == (photos / "fine" / image).read_bytes()
    (tmp_path / "linked").rename(tmp_path / "moved")
    [linked] = (tmp_path / "moved").rglob(image)
    assert linked.resolve() == photos / "fine" / image


def spoil_nothing(photos):
    pass


def spoil_empty(photos):
    for file in (photos / "fine").iterdir():
        file.rename(file.with_suffix(".txt"))


def spoil_masks(photos):
    mask(photos / "scratch/0_mask.png")


def spoil_good(photos):
    mask(photos / "fine/part 0_mask.png")


def spoil_stem(photos):
    with_masks(photos, lambda image: photos / "truth" / image.name)
    picture(photos / "dent/0.jpg")


def spoil_name(photos):
    (photos / "scratch").rename(photos / "OK")
    (photos / "other/dent").mkdir(parents=True)
    picture(photos / "other/dent/0.png")


def spoil_out(photos):
    picture(photos / "OUT/thesis.png")


@pytest.mark.parametrize(
    "spoil, line, words",
    [
        (spoil_nothing, "nowhere OUT", "nowhere is not a folder"),
        (spoil_nothing, "fine/part\t0.jpg OUT", "is not a folder"),
        (spoil_nothing, "fine --bad nowhere OUT", "nowhere is not a folder"),
        (spoil_nothing, "fine --bad scratch --masks nowhere OUT", "nowhere is not a folder"),
        (spoil_nothing, ". OUT", "holds no image"),
        (spoil_empty, "fine OUT", "fine holds no image"),
        (spoil_nothing, "fine --bad fine OUT", "fine is given twice"),
        (spoil_nothing, "fine --bad scratch ./scratch OUT", "scratch is given twice"),
        (spoil_name, "fine --bad OK OUT", "OK is named like a folder of good parts"),
        (spoil_name, "fine --bad dent other/dent OUT", "two folders of bad parts are named dent"),
        (spoil_nothing, "fine --masks scratch OUT", "scratch must hold the masks"),
        (spoil_nothing, "fine --bad scratch --masks scratch OUT", "scratch must hold the masks"),
        (spoil_masks, "fine --bad scratch OUT", "1.png has no mask, nor have 1 other images of 3"),
        (spoil_good, "fine OUT", "fine holds masks beside its images"),
        (spoil_stem, "fine --bad dent --masks truth OUT", "would both become ground_truth/dent/0_mask.png"),
        (spoil_out, "fine OUT", "OUT is there already"),
        (spoil_out, "fine OUT/thesis.png", "thesis.png is there already"),
        (spoil_nothing, "fine", "OUT"),
        (spoil_nothing, "fine scratch OUT", "unrecognized arguments: OUT"),
        (spoil_nothing, "fine --bad scratch OUT --gamma 2", "unrecognized arguments: --gamma"),
        (spoil_nothing, "fine --test-share 1 OUT", "above 0 and below 1, not '1'"),
        (spoil_nothing, "fine --test-share half OUT", "above 0 and below 1, not 'half'"),
        (spoil_nothing, "fine --seed x OUT", "--seed"),
        (spoil_nothing, "fine --by-date --seed 1 OUT", "not allowed with"),
    ],
)
def test_bad_folders_are_one_line_and_nothing_is_lost(photos, monkeypatch, capsys, spoil, line, words):
    spoil(photos)
    monkeypatch.chdir(photos)
    before = {file: (photos / file).read_bytes() for file in files_under(photos)}
    assert words in refused(["folder", *(word.replace("\t", " ") for word in line.split(" "))], capsys)
    assert {file: (photos / file).read_bytes() for file in files_under(photos)} == before
    assert not [path for path in photos.rglob("*") if path.name.endswith(".tmp")]
    assert spoil is spoil_out or not (photos / "OUT").exists()


@pytest.mark.parametrize(
    "method, error, code, words",
    [
        ("symlink_to", OSError(errno.EPERM, "Operation not permitted"), 2, "add --copy"),
        ("symlink_to", OSError(errno.ENOSPC, "No space left on device"), 2, "No space left"),
        ("symlink_to", KeyboardInterrupt(), 130, "interrupted"),
        ("iterdir", PermissionError(errno.EACCES, "Permission denied"), 2, "Permission denied"),
    ],
)
def test_a_failure_half_way_leaves_nothing(photos, tmp_path, monkeypatch, capsys, method, error, code, words):
    whole, calls = getattr(Path, method), []

    def fails(path, *arguments):
        calls.append(path)
        if len(calls) > (4 if method == "symlink_to" else 0):
            raise error
        return whole(path, *arguments)

    monkeypatch.setattr(Path, method, fails)
    assert main(["folder", str(photos / "fine"), str(tmp_path / "data/bolt")]) == code
    assert words in capsys.readouterr().err
    monkeypatch.undo()
    assert not (tmp_path / "data").exists() or not os.listdir(tmp_path / "data")


# --- Public data sets, as they are distributed ----------------------------------------------------------------------


def make_visa(root):
    rows = []
    for name in ("candle", "pcb1"):
        for number, split in enumerate(["train", "train", "test"]):
            file = f"{name}/Data/Images/Normal/{number:04d}.JPG"
            picture(root / file)
            rows.append((name, split, "normal", file, ""))
        for number in range(2):
            file, its = f"{name}/Data/Images/Anomaly/{number:03d}.JPG", f"{name}/Data/Masks/Anomaly/{number:03d}.png"
            picture(root / file)
            mask(root / its, 1 + number)  # numbers of kinds of defect
            rows.append((name, "test", "anomaly", file, its))
        (root / name / "image_anno.csv").write_text("image,label,mask\n")
    (root / "split_csv").mkdir()
    with open(root / "split_csv/1cls.csv", "w", newline="") as file:
        csv.writer(file).writerows([("object", "split", "label", "image", "mask"), *rows])


def make_btad(root):
    for name, image, its in (("01", "bmp", "png"), ("02", "png", "png"), ("03", "bmp", "bmp")):
        for folder in ("train/ok", "test/ok", "test/ko"):
            picture(root / name / folder / f"0000.{image}")
        mask(root / name / f"ground_truth/ko/0000.{its}")
        (root / name / "ground_truth/ok").mkdir()


def make_mpdd(root):
    for name in ("bracket_black", "tubes"):
        for folder in ("train/good", "test/good", "test/scratches"):
            picture(root / name / folder / "000.png")
        mask(root / name / "ground_truth/scratches/000_mask.png")


def make_sdd(root):
    for item in range(1, 8):
        for part in range(2):
            picture(root / f"kos{item:02d}/Part{part}.jpg")
            mask(root / f"kos{item:02d}/Part{part}_label.bmp", 255 * (part == 1 and item in (2, 6)))


def make_sdd2(root):
    for split, start in {"train": 10000, "test": 20000}.items():
        for number in range(start, start + 4):
            picture(root / split / f"{number}.png")
            mask(root / split / f"{number}_GT.png", 255 * (number % 4 == 3))
    for name in ("10001 (copy).png", "10001_GT (copy).png"):
        picture(root / "train" / name)


def make_mvtec2(root):
    for name in ("can", "walnuts"):
        for folder in ("train/good", "validation/good", "test_public/good", "test_public/bad"):
            for condition in ("regular", "overexposed"):
                picture(root / name / folder / f"000_{condition}.png")
        for condition in ("regular", "overexposed"):
            mask(root / name / f"test_public/ground_truth/bad/000_{condition}_mask.png")
        for folder in ("test_private", "test_private_mixed"):
            picture(root / name / folder / "000.png")


def make_elpv(root):
    lines = []
    for kind, first in (("mono", 1), ("poly", 101)):
        for number, probability in enumerate(["0.0"] * 6 + ["1.0", "0.3333333333333333", "0.6666666666666666"], first):
            picture(root / f"images/cell{number:04d}.png")
            lines.append(f"images/cell{number:04d}.png  {probability:18}  {kind}\n")
    (root / "labels.csv").write_text("".join(lines))


MAKERS = {
    "visa": make_visa,
    "btad": make_btad,
    "mpdd": make_mpdd,
    "kolektor": make_sdd,
    "kolektor 2": make_sdd2,
    "mvtec2": make_mvtec2,
    "elpv": make_elpv,
}


@pytest.fixture
def convert(tmp_path):
    """Make a tree in a public layout, convert it, and give what the programs then read."""

    def run(name, *options):
        MAKERS[name](tmp_path / "source")
        before = files_under(tmp_path / "source")
        prepared(name.split()[0], tmp_path / "source", tmp_path / "data", *options)
        assert files_under(tmp_path / "source") == before
        return read(tmp_path / "data")

    return run


def test_every_public_set_has_a_test():
    assert {name.split()[0] for name in MAKERS} == set(layouts.PUBLIC_SETS)


def test_visa(convert):
    bad = [("000.JPG", "bad", True), ("001.JPG", "bad", True)]
    one = (["0000.JPG", "0001.JPG"], [("0002.JPG", "good", False), *bad])
    assert convert("visa") == {"candle": one, "pcb1": one}


def test_btad(convert, tmp_path):
    expected = {
        name: ([f"0000.{suffix}"], [(f"0000.{suffix}", "good", False), (f"0000.{suffix}", "ko", True)])
        for name, suffix in {"01": "bmp", "02": "png", "03": "bmp"}.items()
    }
    assert convert("btad") == expected
    assert read(tmp_path / "source") == expected  # as it is, too


def test_mpdd(convert, tmp_path):
    one = (["000.png"], [("000.png", "good", False), ("000.png", "scratches", True)])
    assert convert("mpdd") == {"bracket_black": one, "tubes": one} == read(tmp_path / "source")


def test_kolektor(convert):
    [(name, (train, test))] = convert("kolektor").items()
    assert name == "kolektorsdd"
    tested = [image for image, defect, _ in test if defect == "good"]
    assert tested == ["kos01_Part0.jpg", "kos01_Part1.jpg", "kos06_Part0.jpg"]  # the first of every five commutators
    assert [(image, marked) for image, defect, marked in test if defect == "defect"] == [
        ("kos02_Part1.jpg", True),
        ("kos06_Part1.jpg", True),
    ]
    assert len(train) == 14 - 3 - 2 and not {image[:5] for image in train} & {"kos01", "kos06"}


def test_kolektor2(convert):
    good = [(f"{number}.png", "good", False) for number in (20000, 20001, 20002)]
    train = [f"{number}.png" for number in (10000, 10001, 10002)]  # neither the defective part nor the stray copy
    assert convert("kolektor 2") == {"kolektorsdd2": (train, [*good, ("20003.png", "defect", True)])}


def test_mvtec2(convert):
    names = ["000_overexposed.png", "000_regular.png"]
    test = [(name, defect, defect == "bad") for defect in ("good", "bad") for name in names]
    assert convert("mvtec2") == {"can": (names, test), "walnuts": (names, test)}


@pytest.mark.parametrize("place", ["", "src/elpv_dataset/data"])
def test_elpv(tmp_path, place):
    make_elpv(tmp_path / "source" / place)
    prepared("elpv", tmp_path / "source", tmp_path / "data")
    found = read(tmp_path / "data")
    assert list(found) == ["elpv_mono", "elpv_poly"]
    for (train, test), first in zip(found.values(), (1, 101), strict=True):
        assert train == [f"cell{first + i:04d}.png" for i in (1, 2, 3, 4)]
        assert [(int(image[4:8]) - first, defect) for image, defect, _ in test] == [
            (0, "good"),
            (5, "good"),
            (6, "defect_100pct"),
            (7, "defect_33pct"),
            (8, "defect_67pct"),
        ]


@pytest.mark.parametrize("name", MAKERS)
def test_a_public_set_can_be_copied(convert, tmp_path, name):
    convert(name, "--copy")
    assert not any(path.is_symlink() for path in (tmp_path / "data").rglob("*"))


@pytest.mark.parametrize("name", MAKERS)
def test_another_layout_is_one_line_and_an_existing_folder_is_kept(tmp_path, capsys, name):
    command, other = name.split()[0], "visa" if name != "visa" else "btad"
    MAKERS[other](tmp_path / "other")
    for source in (tmp_path / "nowhere", tmp_path / "other"):
        assert "is missing" in refused([command, source, tmp_path / "data"], capsys)
    MAKERS[name](tmp_path / "source")
    picture(tmp_path / "full/thesis.png")
    assert "there already" in refused([command, tmp_path / "source", tmp_path / "full"], capsys)
    assert files_under(tmp_path / "full") == ["thesis.png"]
    assert sorted(os.listdir(tmp_path)) == ["full", "other", "source"]


@pytest.mark.parametrize(
    "name, file, content, words",
    [
        ("visa", "split_csv/1cls.csv", None, "1cls.csv is missing"),
        ("visa", "split_csv/1cls.csv", b"", "its columns must be"),
        ("visa", "split_csv/1cls.csv", b"\xff\xfe\x00\x01", "its columns must be"),
        ("visa", "split_csv/1cls.csv", b"object,split,label,image,mask\n", "no good part to train on"),
        ("visa", "split_csv/1cls.csv", b"object,split,label,image,mask\n../x,train,normal,a,\n", "line 2"),
        ("visa", "split_csv/1cls.csv", b"object,split,label,image,mask\ncandle,train\n", "line 2"),
        ("visa", "pcb1/Data/Images/Normal/0001.JPG", None, "0001.JPG is missing"),
        ("visa", "pcb1/Data/Masks/Anomaly/001.png", None, "001.png is missing"),
        ("btad", "02/train/ok", None, "02/train/good is missing"),
        ("btad", "02/ground_truth", None, "02/ground_truth is missing"),
        ("btad", "03/ground_truth/ko/0000.bmp", None, "of image"),
        ("mvtec2", "can/test_public/ground_truth/bad/000_regular_mask.png", None, "000_regular_mask.png of image"),
        ("kolektor", "kos03/Part1_label.bmp", None, "Part1.jpg is missing"),
        ("kolektor", "kos03/Part1_label.bmp", b"no image", "Part1_label.bmp cannot be read"),
        ("kolektor 2", "test", None, "test/10000.png is missing"),
        ("elpv", "labels.csv", b"", "no good part to train on"),
        ("elpv", "labels.csv", b"images/cell0001.png inf mono\n", "line 1"),
        ("elpv", "labels.csv", b"images/cell0001.png 0.0 mono\n\x00\xff\n", "line 2"),
        ("elpv", "images/cell0102.png", None, "cell0102.png is missing"),
    ],
)
def test_a_faulty_public_set_is_named_and_leaves_nothing(tmp_path, capsys, name, file, content, words):
    MAKERS[name](tmp_path / "source")
    if content is None:
        (tmp_path / "source" / file).rename(tmp_path / "moved away")
    else:
        (tmp_path / "source" / file).write_bytes(content)
    assert words in refused([name.split()[0], tmp_path / "source", tmp_path / "data"], capsys)
    assert not (tmp_path / "data").exists()
