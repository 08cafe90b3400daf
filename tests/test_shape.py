"""Pictures of any shape: what is rectangular stays rectangular from the file to the figure."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import pywt
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

import config
import eval_noise_robustness
import evaluation
import export_onnx
import predict
import test as figure3
import train
import train_patchcore
import visualize_noise_robustness
from models.condition import ConditionStream
from models.scoring import AnomalyMap
from tests.test_settings import DEFAULTS
from utils.data.dataset import batches
from utils.data.dataset import test_samples as samples_for_test
from utils.data.image import Geometry, read_image
from utils.line.edge_model import OnnxModel
from utils.line.torch_model import TorchModel
from utils.pictures.heatmap import overlay_path
from utils.pictures.tables import read_csv
from utils.pipeline.checkpoint import bank_path, build_net, load_checkpoint, load_detector
from utils.pipeline.inference import score_samples
from utils.settings import SettingsParser, make_settings
from utils.size import Size

HEIGHT, WIDTH = 224, 896  # of a part, four times as wide as high
SHAPE = (64, 256)  # what a network sees of it here, where it need not be seen well


def draw_long_part(rng: np.random.Generator) -> np.ndarray:
    """(HEIGHT, WIDTH, 3) uint8: brushed metal, light from one side."""
    light = 130 + 20 * np.linspace(0, 1, WIDTH) + rng.uniform(-6, 6)
    grain = rng.normal(0, 6, (HEIGHT, 1)) + rng.normal(0, 6, (HEIGHT, WIDTH))
    return np.clip(light + grain, 0, 255).astype(np.uint8)[..., None].repeat(3, axis=2)


def make_long_category(root: Path, name: str, train: int = 12, good: int = 6, bad: int = 6) -> None:
    """A category in the MVTec layout, whose defects are scratches across the grain: 24 pixels high, 4 wide, dark with
    bright rims, so that nothing is left of them where four columns become one."""
    rng = np.random.default_rng(5)
    for folder, count in {"train/good": train, "test/good": good}.items():
        (root / name / folder).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(draw_long_part(rng)).save(root / name / folder / f"{index:03d}.png")
    for folder in ("test/scratch", "ground_truth/scratch"):
        (root / name / folder).mkdir(parents=True)
    for index in range(bad):
        pixels, mask = draw_long_part(rng), np.zeros((HEIGHT, WIDTH), np.uint8)
        top, left = rng.integers(20, HEIGHT - 50), rng.integers(20, WIDTH - 40)
        left -= left % 4
        mask[top : top + 24, left : left + 4] = 255
        pixels[top : top + 24, left : left + 4] += np.array([25, -25, -25, 25], np.int8)[:, None].view(np.uint8)
        Image.fromarray(pixels).save(root / name / "test/scratch" / f"{index:03d}.png")
        Image.fromarray(mask).save(root / name / "ground_truth/scratch" / f"{index:03d}_mask.png")


@dataclass(frozen=True)
class Long:
    """A long part's category, trained and exported at SHAPE."""

    flags: list[str]
    images: Path
    checkpoint: Path
    model: Path

    def sized(self, size: str, save_dir: Path) -> list[str]:
        """The flags for another size, its banks in a folder of their own."""
        return [*self.flags, "--image-size", size, "--save-dir", str(save_dir)]


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Long:
    root = tmp_path_factory.mktemp("long")
    make_long_category(root / "data", "rail")
    pairs = {
        "data-path": root / "data",
        "category": "rail",
        "save-dir": root / "out",
        "patchcore-dir": root / "patchcore",
        "backbone": "efficientnet_lite0",
        "patchcore-backbone": "efficientnet_lite0",
        "conditions": "clean, noise20",
        "image-size": "64,256",
        "center-crop": "false",
        "num-workers": 0,
        "device": "cpu",
        "false-alarm-rate": 0.1,
    }
    flags = [text for name, value in pairs.items() for text in (f"--{name}", str(value))]
    assert train.main(flags) == 0
    assert export_onnx.main(flags) == 0
    bank = root / "out/10pct/model_data_rail_10pct"
    return Long(flags, root / "data/rail/test", bank.with_suffix(".pt"), bank.with_suffix(".onnx"))


# --- the setting ---


@pytest.mark.parametrize(
    ("given", "expected"), [(224, (224, 224)), ((224, 896), (224, 896)), ([448, 224], (448, 224)), ((32, 32), (32, 32))]
)
def test_a_size_is_a_number_or_height_and_width(given, expected):
    size = make_settings(DEFAULTS | {"IMAGE_SIZE": given}).image_size
    assert size == expected and (size.height, size.width) == expected


@pytest.mark.parametrize("flag", ["224,896", "(224, 896)", "[224, 896]"])
def test_a_flag_takes_both(flag):
    settings, _ = SettingsParser(config, "").read(["--image-size", flag])
    assert settings.image_size == (224, 896)


@pytest.mark.parametrize(
    "given",
    [31, (31, 224), (224, 31), (224.0, 896), (224, 448, 896), (224,), (), "224x896", True, None, (True, 64), -1],
)
def test_a_wrong_size_is_one_line_and_exit_code_2(given, flags, capsys):
    assert train.main([*flags, "--image-size", str(given)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"IMAGE_SIZE is {given!r}; it must be" in error
    assert "a whole number of at least 32, or two of them, height and width, such as (224, 896)" in error


def test_a_margin_smaller_than_the_crop_is_refused(flags, capsys):
    assert train.main([*flags, "--image-size", "80,256"]) == 2  # RESIZE is 72
    assert "RESIZE is 72, smaller than the crop: it must be at least IMAGE_SIZE's" in capsys.readouterr().err


def test_a_wavelet_too_long_for_the_shorter_side_is_refused(long, tmp_path, capsys):
    assert train.main([*long.sized("32,896", tmp_path), "--wavelet-type", "db4"]) == 2
    assert "IMAGE_SIZE is 32 on its shorter side" in capsys.readouterr().err


# --- geometry ---


def square_before(image: Image.Image, size: int, resize: int) -> np.ndarray:
    """What a square was cut by before there were rectangles."""
    scale = resize / min(image.size)
    width, height = (max(resize, int(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(
        image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    )


@pytest.mark.parametrize("shape", [(96, 96), (300, 100), (101, 333), (1000, 7), (37, 41)])
@pytest.mark.parametrize(("size", "resize"), [(224, 256), (64, 72), (100, 100), (63, 71)])
def test_a_square_is_cut_as_ever_to_the_bit(shape, size, resize):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))
    found = Geometry(Size(size, size), resize, True).apply(image)
    np.testing.assert_array_equal(found, square_before(image, size, resize))


@pytest.mark.parametrize("shape", [(100, 400), (400, 100), (200, 200), (1, 900), (63, 1000)])
@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("size", [(64, 256), (256, 64)])
def test_any_picture_fills_the_rectangle(shape, crop, size):
    image = Image.fromarray(np.full((*shape, 3), 200, np.uint8))
    found = Geometry(Size(*size), 72, crop).apply(image)
    assert found.shape == (*size, 3) and (found == 200).all()  # no black border of a crop that went beyond


def test_a_crop_keeps_proportions_and_a_margin_on_both_sides():
    pixels = np.zeros((90, 360), np.uint8)
    pixels[35:55, 170:190] = 255  # 20 x 20 in the centre
    cropped = Geometry(Size(64, 256), 72, True).apply(Image.fromarray(pixels), Image.Resampling.NEAREST)
    rows, columns = np.nonzero(cropped)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (16, 16)  # scaled by 72 / 90 alike
    assert abs(rows.mean() - 31.5) <= 0.5 and abs(columns.mean() - 127.5) <= 0.5


# --- models ---


@pytest.mark.parametrize("grid", [(4, 9), (9, 4)])
def test_a_rectangular_map_is_scipys(grid):
    size = tuple(8 * side for side in grid)
    distances = torch.rand(2, *grid, generator=torch.Generator().manual_seed(0))
    upsampled = torch.nn.functional.interpolate(distances[:, None], size=size, mode="bilinear")[:, 0].double().numpy()
    expected = np.stack([gaussian_filter(each, sigma=4) for each in upsampled])
    np.testing.assert_allclose(AnomalyMap(grid, size)(distances).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("wavelet", ["haar", "bior2.2"])
def test_the_stream_measures_a_rectangle_as_pywavelets_does(wavelet):
    stream = ConditionStream(wavelet, ["clean"], True, (96, 160))
    image = torch.rand(1, 3, 96, 160, generator=torch.Generator().manual_seed(1))
    structure, *details = pywt.wavedec2(image[0].numpy(), wavelet, mode="symmetric", level=3)
    np.testing.assert_allclose(stream.structure(image)[0], structure / 8, atol=1e-5)
    coarsest = stream.details[2](image.mean(dim=1, keepdim=True))[0, 0]
    height, width = (side // 2 for side in coarsest.shape)
    np.testing.assert_allclose(coarsest[height:, :width], details[0][0].mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(coarsest[:height, width:], details[0][1].mean(axis=0), atol=1e-4)


@pytest.mark.parametrize(("form", "patches"), [("wedge", [8 * 32, 4 * 16]), ("paper", [8 * 32])])
@pytest.mark.parametrize("semantic", ["true", "false"])
def test_an_image_is_embedded_alike_alone_and_among_31_others(long, form, patches, semantic):
    settings, _ = SettingsParser(config, "").read([*long.flags, "--form", form, "--use-semantic", semantic])
    net = build_net(settings)
    images = torch.rand(32, 3, *SHAPE, generator=torch.Generator().manual_seed(2))
    together = net.embed(images)
    assert [scale.shape[1] for scale in together] == [np.prod(grid) for grid in net.grids(SHAPE)] == patches
    for place in (0, 31):
        for alone, scale in zip(net.embed(images[place : place + 1]), together, strict=True):
            torch.testing.assert_close(alone[0], scale[place], rtol=1e-4, atol=1e-5)


# --- from file to verdict ---


def test_scores_are_the_same_in_every_batch(long):
    settings, _ = SettingsParser(config, "").read(long.flags)
    detector, _ = load_detector(settings, "rail", 0.1, build_net(settings))
    samples = samples_for_test(settings, "rail")
    images = torch.cat([batch.images for batch in batches(samples, settings)])
    alone = torch.cat([detector.predict(image[None]).scores for image in images])
    among = detector.predict(torch.cat([images, torch.rand(32 - len(images), 3, *SHAPE)])).scores[: len(images)]
    torch.testing.assert_close(alone, among, rtol=1e-4, atol=0)


def test_onnx_and_torch_agree_on_a_rectangle(long):
    model, reference = OnnxModel(long.model), TorchModel(long.checkpoint, config)
    assert model.info.geometry == reference.info.geometry == Geometry(Size(*SHAPE), min(SHAPE), False)
    assert model.info.settings == load_checkpoint(long.checkpoint).settings
    pixels = np.stack([model.info.geometry.apply(read_image(path)) for path in sorted(long.images.rglob("*.png"))])
    found, wanted = model.predict(pixels), reference.predict(pixels)
    assert found.maps.shape == (12, *SHAPE)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4)
    np.testing.assert_allclose(found.maps, wanted.maps, atol=1e-3)
    np.testing.assert_array_equal(found.conditions, wanted.conditions)
    assert ((found.scores > model.info.threshold) == (wanted.scores > model.info.threshold)).all()


def test_another_size_does_not_fit_and_says_both(long, capsys):
    assert evaluation.main([*long.flags, "--image-size", "256,64"]) == 2
    assert "it was made with IMAGE_SIZE = [64, 256], the setting is [256, 64]" in capsys.readouterr().err


def test_a_scratch_is_found_where_the_part_keeps_its_shape(long, tmp_path):
    found = {}
    for size in ("224,896", "224"):
        own = [*long.sized(size, tmp_path / size), "--conditions", "clean", "--sampling-ratio", "0.02"]
        assert train.main(own) == evaluation.main(own) == 0
        (row,) = read_csv(tmp_path / size / "final_evaluation_results.csv")
        found[size] = row["image_auroc"], row["pixel_auroc"]
    assert min(found["224,896"]) > 0.95
    assert found["224"][0] < 0.8


def test_a_defect_of_ten_pixels_in_a_large_picture_is_found_at_the_size_that_it_needs(flags, tmp_path):
    """On 1,000 x 750 pixels, bright with a dark rim: at 96 x 96 both are one pixel, and nothing is left."""
    rng = np.random.default_rng(7)
    for folder, count in {"train/good": 12, "test/good": 6, "test/spot": 6}.items():
        (tmp_path / "data/plate" / folder).mkdir(parents=True)
        for number in range(count):
            pixels = rng.normal(rng.uniform(120, 135), 8, (750, 1000))
            if folder == "test/spot":
                top, left = rng.integers(100, 600, 2) // 10 * 10
                pixels[top : top + 10, left : left + 10] -= 27
                pixels[top + 2 : top + 8, left + 2 : left + 8] += 75
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / f"data/plate/{folder}/{number}.png")
    found = {}
    for size in ("96", "384,512"):
        own = [*flags, "--category", "plate", "--image-size", size, "--center-crop", "false"]
        own += ["--sampling-ratio", "0.02", "--save-dir", str(tmp_path / size)]
        assert train.main(own) == evaluation.main(own) == 0
        (row,) = read_csv(tmp_path / size / "final_evaluation_results.csv")
        found[size] = row["image_auroc"]
    assert found["384,512"] == 1 and found["96"] < 0.8


# --- pictures ---


def test_maps_masks_and_figures_are_rectangular(long, tmp_path):
    settings, _ = SettingsParser(config, "").read(long.flags)
    detector, _ = load_detector(settings, "rail", 0.1, build_net(settings))
    (scored,) = score_samples([detector], samples_for_test(settings, "rail"), settings, "rail")
    assert scored.maps.shape == scored.masks.shape == (12, *SHAPE)
    assert all(mask.any() for mask in scored.masks[6:])
    assert evaluation.main(long.flags) == figure3.main([*long.flags, "--limit", "1"]) == 0
    (picture,) = (bank_path(settings.save_dir, "rail", 0.1).parent / "results/rail").glob("*.png")
    width, height = Image.open(picture).size
    assert 1.4 < width / height < 2.5  # three rows of two panels, each four times as wide as high


def test_robustness_figures_are_rectangular_too(long):
    out = long.checkpoint.parents[1]
    assert train_patchcore.main(long.flags) == 0
    assert eval_noise_robustness.main([*long.flags, "--levels", "0,20"]) == 0
    assert visualize_noise_robustness.main(long.flags) == 0
    width, height = Image.open(out / "Figure_Noise_Robustness_rail.png").size
    assert width > 2 * height  # four columns and rows of panels, and room for what is written


def test_an_overlay_has_the_pictures_shape(long, tmp_path):
    assert predict.main([str(long.model), str(long.images), "--heatmaps", str(tmp_path)]) == 0
    for path in long.images.rglob("*.png"):
        assert Image.open(overlay_path(tmp_path, path)).size == (2 * SHAPE[1], 2 * SHAPE[0])
