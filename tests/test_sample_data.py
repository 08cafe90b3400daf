"""The sample data set: layout, repeatability, and masks that say exactly what the defect changed."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import utils.data.sample_data as sample_data
from models.errors import InputError
from utils.data.sample_data import DEFECTS, GOOD, TRAIN, Photo, render_image, render_sample
from utils.data.sample_parts import PARTS

KINDS = [(category, kind) for category, (_, kinds) in PARTS.items() for kind in kinds]


@pytest.mark.parametrize(("category", "kind"), KINDS)
@pytest.mark.parametrize("index", [0, DEFECTS - 1])
def test_the_mask_is_what_the_defect_changed(category, kind, index):
    photo = render_image(category, f"test/{kind}", index)
    assert photo.image.shape == photo.flawless.shape == (256, 256, 3)
    assert photo.image.dtype == photo.mask.dtype == np.uint8
    assert photo.mask.shape == (256, 256)
    assert set(np.unique(photo.mask)) == {0, 255}
    inside = photo.mask > 0
    assert 10 <= inside.sum() < 256 * 256 / 4
    assert inside[16:240, 16:240].sum() >= 10  # the centre crop does not lose it
    change = np.abs(photo.image.astype(int) - photo.flawless).max(-1)
    assert change[~inside].max() <= np.ceil(255 * sample_data.VISIBLE) + 1  # below the threshold, after rounding
    assert not change[~ndimage.binary_dilation(inside, iterations=25)].any()  # a shadow reaches a little further
    assert change[inside].mean() > 255 * sample_data.VISIBLE


@pytest.mark.parametrize("category", PARTS)
def test_an_image_depends_on_its_own_name_alone(category):
    first = render_image(category, "train/good", 3)
    render_image(category, "train/good", 4)
    again = render_image(category, "train/good", 3)
    np.testing.assert_array_equal(first.image, again.image)
    assert not first.mask.any()
    for split, index, seed in (("train/good", 4, 0), ("test/good", 3, 0), ("train/good", 3, 1)):
        assert (render_image(category, split, index, seed=seed).image != first.image).mean() > 0.5


@pytest.mark.parametrize("category", PARTS)
def test_photographs_are_well_exposed(category):
    for index in range(3):
        image = render_image(category, "train/good", index).image
        assert 40 < image.mean() < 220
        assert image.std() > 5
        assert (image == 255).all(-1).mean() < 0.3


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match=r"'carpet'.*tile"):
        render_image("carpet", "train/good", 0)
    for split in ("test/broken", "train/crack", "train", "good"):
        with pytest.raises(InputError, match="crack"):
            render_image("tile", split, 0)


def test_the_set_has_the_mvtec_layout(tmp_path, monkeypatch, capsys):
    rendered = []

    def fake(category, split, index, *, seed):
        rendered.append((category, split, index, seed))
        pixels = np.full((8, 8), 255 * (not split.endswith("good")), np.uint8)
        return Photo(np.full((8, 8, 3), index, np.uint8), pixels, np.zeros((8, 8, 3), np.uint8))

    monkeypatch.setattr(sample_data, "render_image", fake)
    render_sample(tmp_path / "set", seed=5, progress=False)
    assert capsys.readouterr().err == ""
    assert len(rendered) == len(set(rendered)) == len(PARTS) * (TRAIN + GOOD + 3 * DEFECTS)
    assert {seed for *_, seed in rendered} == {5}
    expected = set()
    for category, (_, kinds) in PARTS.items():
        expected |= {f"{category}/train/good/{i:03d}.png" for i in range(TRAIN)}
        expected |= {f"{category}/test/good/{i:03d}.png" for i in range(GOOD)}
        for kind in kinds:
            expected |= {f"{category}/test/{kind}/{i:03d}.png" for i in range(DEFECTS)}
            expected |= {f"{category}/ground_truth/{kind}/{i:03d}_mask.png" for i in range(DEFECTS)}
    assert {p.relative_to(tmp_path / "set").as_posix() for p in tmp_path.rglob("*.png")} == expected
    with Image.open(tmp_path / "set/tile/test/crack/002.png") as image:
        assert (image.mode, image.getpixel((0, 0))) == ("RGB", (2, 2, 2))
    with Image.open(tmp_path / "set/tile/ground_truth/crack/002_mask.png") as mask:
        assert (mask.mode, mask.getpixel((0, 0))) == ("L", 255)
