import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from models.errors import InputError
from tests.conftest import SIZE
from tests.test_settings import DEFAULTS
from utils.data.dataset import batches, files_digest, find_categories, test_samples, train_samples
from utils.data.image import Geometry, picture_size, read_image, read_mask
from utils.settings import make_settings
from utils.size import Size

test_samples.__test__ = False  # a function of ours, not a test


@pytest.fixture
def settings(data):
    return make_settings(
        DEFAULTS
        | {"DATA_PATH": data, "IMAGE_SIZE": 64, "RESIZE": 72, "NUM_WORKERS": 0, "BATCH_SIZE": 3, "DEVICE": "cpu"}
    )


def gradient(dtype=np.uint8, scale=1):
    return (np.arange(SIZE * SIZE).reshape(SIZE, SIZE) % 200 * scale).astype(dtype)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    file = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.fromarray(gradient()).convert("RGB").convert(mode).save(file)
    image = read_image(file)
    assert (image.mode, image.size) == ("RGB", (SIZE, SIZE))
    if mode not in ("1", "P"):
        np.testing.assert_allclose(np.asarray(image)[..., 0], gradient(), atol=1)


def test_16_bit_grey_is_scaled_to_8(tmp_path):
    Image.fromarray(gradient(np.uint16, 257)).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "deep.png"))[..., 0], gradient())


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (20, 30)


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("turned", [1, 6])
def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path, crop, turned):
    coarse = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = turned
    path = tmp_path / "large.jpg"
    Image.fromarray(coarse).resize((900, 1200), Image.Resampling.BICUBIC).save(path, quality=93, exif=exif)
    geometry = Geometry(Size(224, 224), 256, crop)
    whole, smaller = read_image(path), read_image(path, geometry=geometry)
    assert [2 * side for side in smaller.size] == list(whole.size) == list(picture_size(path))
    difference = np.abs(geometry.apply(whole).astype(int) - geometry.apply(smaller))
    assert difference.mean() < 0.5 and difference.max() < 8
    assert read_image(path, geometry=Geometry(Size(448, 448), 512, crop)).size == whole.size  # it needs them all


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_an_unreadable_image_is_named(tmp_path, content):
    file = tmp_path / "broken.png"
    if content == "truncated":
        Image.fromarray(gradient()).save(file)
        content = file.read_bytes()[: file.stat().st_size // 2]
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.png"):
        read_image(file)


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (20_000, 6_000)).save(tmp_path / "huge.png")
    with pytest.raises(InputError, match="megapixels"):
        read_image(tmp_path / "huge.png")


def test_mask_of_another_size_is_refused(tmp_path):
    Image.new("L", (10, 20)).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match=r"mask\.png has size 10 x 20, its image has 20 x 20"):
        read_mask(tmp_path / "mask.png", (20, 20))


@pytest.mark.parametrize("kind", ["png", "bmp", "tif", "jpg", "webp"])
def test_a_mask_is_the_same_in_every_format(tmp_path, kind):
    """Around white a JPEG's black is not black; in other files a mask of ones is as good as one of 255."""
    truth = np.zeros((64, 64), bool)
    truth[17:35, 21:59] = True
    lossy = kind in ("jpg", "webp")
    Image.fromarray(truth * np.uint8(255 if lossy else 1)).save(tmp_path / f"mask.{kind}", quality=60)
    noisy = np.asarray(Image.open(tmp_path / f"mask.{kind}").convert("L"))[~truth].any()
    assert noisy == lossy
    found = np.asarray(read_mask(tmp_path / f"mask.{kind}", (64, 64))) > 0
    assert (found != truth).sum() <= (4 if lossy else 0)


@pytest.mark.parametrize("crop", [True, False])
def test_mask_and_image_go_through_the_same_geometry(crop):
    pixels = np.zeros((120, 200), np.uint8)
    pixels[50:70, 90:130] = 255
    picture, geometry = Image.fromarray(pixels), Geometry(Size(64, 64), 96, crop)
    image = geometry.apply(picture.convert("RGB"))[..., 0] > 127
    mask = geometry.apply(picture, Image.Resampling.NEAREST)
    assert mask.shape == (64, 64)
    assert set(np.unique(mask)) == {0, 255}
    assert np.logical_xor(image, mask > 0).sum() <= 0.1 * image.sum()


def test_crop_keeps_the_centre_and_its_proportions():
    pixels = np.zeros((100, 300), np.uint8)
    pixels[40:60, 140:160] = 255  # 20 x 20 in the centre
    cropped = Geometry(Size(48, 48), 50, True).apply(Image.fromarray(pixels), Image.Resampling.NEAREST)
    rows, columns = np.nonzero(cropped)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (10, 10)
    assert abs(rows.mean() - 23.5) <= 0.5
    assert abs(columns.mean() - 23.5) <= 0.5


def test_an_image_smaller_than_the_crop_is_enlarged():
    assert Geometry(Size(224, 224), 256, True).apply(Image.new("RGB", (40, 31))).shape == (224, 224, 3)


def test_batches_are_in_order_and_in_range(settings):
    samples = test_samples(settings, "tile")
    assert [sample.label for sample in samples] == [0] * 4 + [1] * 4
    found = list(batches(samples, settings))
    assert [sample for batch in found for sample in batch.samples] == samples
    images = torch.cat([batch.images for batch in found])
    masks = torch.cat([batch.masks for batch in found])
    assert images.shape == (8, 3, 64, 64)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert not masks[:4].any()
    assert masks[4:].flatten(1).any(dim=1).all()


def test_threads_give_the_same_batches(settings):
    samples = test_samples(settings, "tile")
    alone = torch.cat([batch.images for batch in batches(samples, settings)])
    helped = torch.cat([b.images for b in batches(samples, dataclasses.replace(settings, num_workers=2))])
    assert torch.equal(alone, helped)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_one_line_from_a_thread_too(settings, data, workers):
    broken = data / "tile/train/good/005.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(InputError) as caught:
        list(batches(train_samples(settings, "tile"), dataclasses.replace(settings, num_workers=workers)))
    assert "005.png" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_categories(settings, data, capsys):
    def found(category):
        return find_categories(dataclasses.replace(settings, category=category))

    assert found("all") == ["tile", "bolt"]  # MVTec's first, then others
    assert capsys.readouterr().err == ""  # that others of MVTec's are absent is nothing to act on
    assert found("bolt, tile") == ["bolt", "tile"]
    for category, message in {
        "nut": "there are: bolt, tile",
        "../data": "not a folder's name",
        ",": "no category",
    }.items():
        with pytest.raises(InputError, match=message):
            found(category)


def test_absent_data_says_how_to_get_it(settings, tmp_path):
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match=r"prepare_data\.py"):
            find_categories(dataclasses.replace(settings, data_path=root, category="all"))


def test_missing_parts_of_a_category_are_named(settings, data):
    (data / "tile/ground_truth/spot/002_mask.png").unlink()
    with pytest.raises(InputError, match=r"002_mask\.png"):
        test_samples(settings, "tile")
    for file in (data / "tile/train/good").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="train/good holds no image"):
        train_samples(settings, "tile")


def test_digest_tells_other_files_but_not_another_place(settings, data, tmp_path):
    before = files_digest(train_samples(settings, "tile"))
    moved = data.rename(tmp_path / "moved")
    samples = train_samples(dataclasses.replace(settings, data_path=moved), "tile")
    assert files_digest(samples) == before
    assert files_digest(samples[1:]) != before
