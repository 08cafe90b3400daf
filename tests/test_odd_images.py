"""The good pictures themselves: odd ones are named, what is left out stays out, twins are told."""

import csv

import numpy as np
import pytest
from conftest import draw_part, make_category
from PIL import Image
from scipy import stats

import make_report
import train
from utils.data.dataset import leave_out, same_bytes
from utils.data.image import size_range
from utils.pipeline import odd_images
from utils.pipeline.checkpoint import load_checkpoint
from utils.pipeline.odd_images import odd_limit

COUNT = 26


@pytest.fixture
def root(tmp_path):
    """DATA_PATH with a category whose training picture 007 has a dark square at x 24, y 60, 12 x 12 pixels."""
    make_category(tmp_path / "data", "tile", 5, train=COUNT)
    picture = tmp_path / "data/tile/train/good/007.png"
    pixels = np.array(Image.open(picture))
    pixels[60:72, 24:36] = 10
    Image.fromarray(pixels).save(picture)
    return tmp_path / "data"


@pytest.fixture
def small(root, tmp_path):
    """The flags of a small training without a crop, so that a picture's pixels are easily told."""
    pairs = {
        "data-path": root,
        "save-dir": tmp_path / "out",
        "backbone": "efficientnet_lite0",
        "image-size": 96,
        "center-crop": "false",
        "conditions": "clean",
        "num-workers": 0,
        "device": "cpu",
        "category": "tile",
    }
    return [text for name, value in pairs.items() for text in (f"--{name}", str(value))]


def table(tmp_path, ratio="10pct"):
    with open(tmp_path / f"out/{ratio}/odd_images_tile_{ratio}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_limit_follows_the_spread_of_most_and_not_the_odd_ones():
    rng = np.random.default_rng(0)
    good = rng.lognormal(0, 0.1, 200)
    limit = odd_limit(good)
    assert (good > limit).mean() <= 0.02
    mixed = np.concatenate([good, np.full(20, 5.0)])
    assert odd_limit(mixed) < limit  # the more are odd, the more that is high is odd
    assert (good > odd_limit(mixed)).mean() <= 0.1
    assert odd_limit(3 * good) == pytest.approx(3 * limit)
    assert odd_limit(good[: odd_images.FEWEST - 1]) == np.inf
    assert np.isfinite(odd_limit(np.zeros(20)))  # nothing but twins


def test_an_odd_picture_is_named_shown_and_boxed_and_its_threshold_told(small, tmp_path, capsys):
    assert train.main(small) == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if "look at these first" in line]
    assert " unlike the others, 007.png" in line
    assert "--without FILE" in line
    now, then = (float(word) for word in line.split(" from ")[1].split(" to about "))
    assert then < now
    assert f"threshold {now:.4g}: false-alarm rate 0.037, the smallest that 26 good parts can vouch for" in shown
    assert "which takes 99" in shown
    row, *others = table(tmp_path)
    assert row["file"] == "007.png" and len(others) <= 2  # to be looked at in vain
    assert float(row["score"]) > float(row["limit"])
    left, top, width, height = (int(row[f"box_{side}"]) for side in ("x", "y", "width", "height"))
    assert left <= 30 < left + width and top <= 66 < top + height  # the square's middle
    assert width < 60 and height < 60
    with Image.open(tmp_path / "out/10pct/odd_images_tile_10pct.png") as picture:
        assert min(picture.size) > 100
    # The bank is made of all pictures: nothing is left out by itself.
    assert load_checkpoint(tmp_path / "out/10pct/model_data_tile_10pct.pt").training_images == COUNT


@pytest.mark.parametrize("by", ["name", "path", "file"])
def test_what_is_left_out_is_out_and_the_threshold_falls(small, root, tmp_path, capsys, by):
    assert train.main(small) == 0
    before = capsys.readouterr().out
    more = ["--overwrite"]
    if by == "file":
        (root / "tile/exclude.txt").write_text("# a scratch\n\n007.png\n")
    else:
        more += ["--without", "007.png" if by == "name" else str(root / "tile/train/good/007.png")]
    assert train.main([*small, *more]) == 0
    after = capsys.readouterr().out
    assert "look at these first" in before and "look at these first" not in after
    assert "no training picture is unlike the others" in after
    (line,) = [line for line in after.splitlines() if " below the " in line]
    assert f"from {COUNT} pictures" in line
    checkpoint = load_checkpoint(tmp_path / "out/10pct/model_data_tile_10pct.pt")
    assert checkpoint.training_images == len(checkpoint.calibration_scores) == COUNT - 1
    assert table(tmp_path) == []
    assert not (tmp_path / "out/10pct/odd_images_tile_10pct.png").exists()  # of the training before


def test_a_model_is_not_replaced_by_the_way(small, tmp_path, capsys):
    assert train.main(small) == 0
    bank = tmp_path / "out/10pct/model_data_tile_10pct.pt"
    before = bank.read_bytes()
    assert train.main([*small, "--without", "007.png"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert bank.read_bytes() == before


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["nothing.png"], "--without: nothing.png is none of the 26 training images"),
        (["../test/spot/000.png/"], "is none of the 26"),
        ([f"{number:03d}.png" for number in range(COUNT)], "leaves out every one"),
    ],
)
def test_bad_names_are_one_line(small, names, reason, capsys):
    assert train.main([*small, "--without", *names]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert len(error.strip().splitlines()) == 1


def test_a_bad_list_is_one_line_and_names_its_file(small, root, capsys):
    listed = root / "tile/exclude.txt"
    for text, reason in ((b"008.png\nno.png\n", "exclude.txt: no.png is none"), (b"\xff\xfe\x00", "no text in UTF-8")):
        listed.write_bytes(text)
        assert train.main(small) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert len(error.strip().splitlines()) == 1


def test_names_belong_to_one_category(small, root, capsys):
    make_category(root, "bolt", 1)
    assert train.main([*small, "--category", "all", "--without", "007.png"]) == 2
    assert "of one category" in capsys.readouterr().err


def test_all_but_one_odd_or_too_few_to_tell_is_no_crash(small, root, tmp_path, capsys):
    good = root / "tile/train/good"
    rng = np.random.default_rng(1)
    for number in range(1, COUNT):
        Image.fromarray(rng.integers(0, 256, (96, 96, 3), np.uint8)).save(good / f"{number:03d}.png")
    assert train.main(small) == 0
    assert len(table(tmp_path)) <= COUNT // 2
    capsys.readouterr()
    for number in range(3, COUNT):
        (good / f"{number:03d}.png").unlink()
    assert train.main([*small, "--overwrite"]) == 0
    assert "3 training pictures are too few to tell" in capsys.readouterr().out
    for number in range(1, 3):
        (good / f"{number:03d}.png").unlink()
    assert train.main([*small, "--overwrite"]) == 0
    assert table(tmp_path) == []


def test_the_same_picture_twice_is_told_in_one_line(small, root, capsys):
    good, test = root / "tile/train/good", root / "tile/test/good"
    (good / "copy.png").write_bytes((good / "000.png").read_bytes())
    (good / "another.png").write_bytes((good / "000.png").read_bytes())
    (test / "leak.png").write_bytes((good / "003.png").read_bytes())
    assert train.main(small) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "under two names" in line]
    assert "training files that repeat another: 2 (good/000.png = good/another.png, ...)" in line
    assert "test files that are in training: 1 (good/003.png = good/leak.png)" in line


def test_without_test_images_nothing_is_missed(small, root, capsys):
    for path in sorted((root / "tile/test").rglob("*.png")):
        path.unlink()
    assert train.main(small) == 0
    assert "under two names" not in capsys.readouterr().out


def test_twins_are_the_same_to_the_byte(tmp_path):
    for name, text in {"a": b"12", "b": b"12", "c": b"13", "d": b"1", "e": b"12"}.items():
        (tmp_path / name).write_bytes(text)
    groups = same_bytes(sorted(tmp_path.iterdir()))
    assert [[path.name for path in group] for group in groups] == [["a", "b", "e"]]


def test_sizes_are_those_of_upright_pictures(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGB", (20, 50)).save(tmp_path / "b.png")
    assert size_range(sorted(tmp_path.iterdir())) == [(20, 40), (30, 50)]


def test_the_report_begins_with_them(small, root, tmp_path):
    (root / "tile/train/good/007.png").rename(root / "tile/train/good/<b>&.png")
    assert train.main(small) == 0
    assert make_report.main(small) == 0
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert page.index('id="look-at-these-first"') < page.index('id="beside-the-paper"')
    section = page.split('id="look-at-these-first"')[1].split("</section>")[0]
    assert "&lt;b&gt;&amp;.png" in section and "<b>&.png" not in section
    assert "data:image/" in section
    (root / "tile/exclude.txt").write_text("<b>&.png\n")
    assert train.main([*small, "--overwrite"]) == 0
    assert make_report.main(small) == 0
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "No training picture of tile is unlike the others" in page


def test_one_name_may_stand_for_two_files(root):
    from utils.data.dataset import Sample

    samples = [Sample(root / folder / name, "good") for folder in ("good", "ok") for name in ("1.png", "2.png")]
    assert [sample.path.name for sample in leave_out(samples, ["1.png"])] == ["2.png", "2.png"]
    assert len(leave_out(samples, [str(root / "ok/1.png")])) == 3


def test_the_limit_is_that_of_benjamini_and_hochberg():
    """Beside SciPy's distribution: those are named whose chance is small enough for their place among all."""
    rng = np.random.default_rng(2)
    for count in (8, 30, 300):
        scores = rng.gumbel(2, 0.3, count)
        scores[: count // 20] *= 3
        lower, middle, upper = np.quantile(scores, (0.25, 0.5, 0.75))
        width = (upper - lower) / np.subtract(*stats.gumbel_r.ppf((0.75, 0.25)))
        likely = stats.gumbel_r.sf(scores, middle - width * stats.gumbel_r.ppf(0.5), width)
        named = stats.false_discovery_control(likely) <= odd_images.GOOD_AMONG
        np.testing.assert_array_equal(scores > odd_limit(scores), named)


def test_parts_alike_are_not_odd():
    """What the sample draws is even: of many draws hardly one is called odd."""
    rng = np.random.default_rng(5)
    means = [np.array([draw_part(rng).mean() for _ in range(40)]) for _ in range(20)]
    assert np.mean([(each > odd_limit(each)).mean() for each in means]) < 0.02
