"""test.py, visualize_noise_robustness.py and visualize_color_robustness.py as a user runs them."""

import importlib
import shutil

import numpy as np
import pytest
import pywt
import torch
from PIL import Image

import config
import train
import utils.pictures.panels
import visualize_color_robustness
import visualize_noise_robustness
from models.conformal import conformal_threshold
from utils.data.corruptions import color_jitter, gaussian_noise
from utils.data.dataset import batches, test_samples
from utils.pictures.panels import Maps, colour_scale, draw_levels
from utils.pipeline.checkpoint import build_net, load_detector
from utils.pipeline.patchcore import load_patchcore
from utils.settings import SettingsParser

test_samples.__test__ = False
figure3 = importlib.import_module("test")  # the script, which must win over Python's own package of that name


@pytest.fixture
def figures(monkeypatch):
    """The pictures that are drawn, by file name, instead of files: matplotlib takes longest by far to write them."""
    drawn = {}
    monkeypatch.setattr(utils.pictures.panels, "save_figure", lambda path, figure: drawn.update({path.name: figure}))
    return drawn


def settings_of(flags):
    return SettingsParser(config, None).read(flags)[0]


def shown(axis):
    """The array that a panel shows."""
    return np.asarray(axis.get_images()[0].get_array())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_each_ratio_gets_its_pictures(flags, tmp_path, capsys):
    several = [*flags, "--sampling-ratio", "1, 0.01"]
    assert train.main(several) == 0
    assert figure3.main([*several, "--limit", "1"]) == 0
    output = capsys.readouterr().out
    for ratio in ("100pct", "1pct"):
        folder = tmp_path / f"out/{ratio}/results/tile"
        assert names(folder) == ["spot_000.png"]
        assert f"[tile] 1 pictures: {folder}" in output
        with Image.open(folder / "spot_000.png") as picture:
            assert picture.width > 3 * picture.height > 900  # six columns in a row


def test_six_columns_hold_what_they_say(trained, figures):
    trained = [*trained, "--false-alarm-rate", "0.5"]
    assert figure3.main(trained) == 0
    settings = settings_of(trained)
    detector, checkpoint = load_detector(settings, "tile", 0.1, build_net(settings))
    samples = test_samples(settings, "tile")
    batch = next(batches(samples[4:5], settings))
    every = torch.cat([detector.predict(other.images).maps for other in batches(samples, settings)])
    image = batch.images[0].permute(1, 2, 0).numpy()
    aligned = detector.net.stream(batch.images).images  # the light is
    layer2 = detector.net.backbone(aligned)[0][0]
    bands = pywt.dwt2(aligned[0].numpy(), "haar", mode="symmetric", axes=(1, 2))[1]
    detail = np.sqrt(sum(np.square(band).sum(axis=0) for band in bands))

    def scaled(values):
        return (values - values.min()) / (values.max() - values.min())

    axes = figures["spot_000.png"].axes
    titles = ["input", "ground truth", "frequency map", "semantic map", "anomaly score", "overlay"]
    assert [axis.get_title() for axis in axes[:6]] == titles
    np.testing.assert_array_equal(shown(axes[0]), image)
    np.testing.assert_array_equal(shown(axes[1]), batch.masks[0].numpy())
    np.testing.assert_allclose(shown(axes[2]), scaled(detail), atol=1e-4)
    np.testing.assert_allclose(shown(axes[3]), scaled(layer2.abs().mean(0).numpy()), atol=1e-4)
    np.testing.assert_allclose(shown(axes[4]), every[4].numpy(), rtol=1e-4)
    score, threshold = every[4].max().item(), conformal_threshold(checkpoint.calibration_scores.numpy(), 0.5)
    assert threshold < checkpoint.calibration_scores.max()
    title = figures["spot_000.png"].get_suptitle()
    assert title.startswith("tile/spot/000.png    condition clean ")
    assert title.endswith(f"score {score:.4g} > {threshold:.4g}: defective")

    limits = {axis.get_images()[0].get_clim() for figure in figures.values() for axis in figure.axes[4:5]}
    assert len(figures) == 4  # each defective image
    assert len(limits) == 1  # one scale for the category
    low, high = limits.pop()
    assert low == pytest.approx(every.min().item(), rel=1e-4)
    assert high == pytest.approx(max(every.max().item(), threshold), rel=1e-4)


def test_a_limit_is_spread_over_the_defects(trained, data, figures, capsys):
    for folder in ("test", "ground_truth"):
        shutil.copytree(data / "tile" / folder / "spot", data / "tile" / folder / "dent")
    assert figure3.main([*trained, "--limit", "2"]) == 0
    assert set(figures) == {"dent_000.png", "spot_003.png"}
    assert figure3.main([*trained, "--limit", "0"]) == 2
    assert "--limit: must be a whole number of at least 1, not '0'" in capsys.readouterr().err


def test_a_mask_that_is_absent_is_a_grey_panel(trained, data, figures):
    shutil.rmtree(data / "tile/ground_truth")
    assert figure3.main([*trained, "--limit", "1"]) == 0
    axes = figures["spot_000.png"].axes
    assert axes[1].texts[0].get_text() == "no mask" and not axes[1].get_images()


@pytest.mark.parametrize("form", ["wedge", "paper"])
@pytest.mark.parametrize("semantic", [True, False])
def test_the_semantic_map_is_shown_and_says_whether_it_counts(flags, figures, form, semantic):
    own = [*flags, "--form", form, "--use-semantic", str(semantic)]
    assert train.main(own) == figure3.main([*own, "--limit", "1"]) == 0
    panel = figures["spot_000.png"].axes[3]
    assert (shown(panel).min(), shown(panel).max()) == (0, 1)
    assert panel.get_xlabel() == "0 to 1 in each image" + ("" if semantic else ", not in the score")


def test_a_category_without_defects_does_not_cost_the_others(flags, data, figures, capsys):
    every = [*flags, "--category", "all"]
    assert train.main(every) == 0
    shutil.rmtree(data / "tile/test/spot")
    assert figure3.main([*every, "--limit", "1"]) == 1
    error = capsys.readouterr().err
    assert "error: tile: tile has no defective test image to draw" in error and "1 of 2 failed: tile" in error
    assert {name for name in figures if not name.startswith("odd_images")} == {"spot_000.png"}


@pytest.mark.parametrize(
    ("script", "file", "levels", "corrupt"),
    [
        (
            visualize_noise_robustness,
            "Figure_Noise_Robustness_tile.png",
            (0, 10, 20, 40),
            lambda images, level: gaussian_noise(images, level, ["tile/test/good/000.png"], 42),
        ),
        (visualize_color_robustness, "Figure_Color_Robustness_tile_Final.png", (0, 1, 2, 3), color_jitter),
    ],
)
def test_four_levels_of_four_columns(trained, patchcore_bank, figures, script, file, levels, corrupt):
    assert script.main(trained) == 0
    settings = settings_of(trained)
    image = next(batches(test_samples(settings, "tile")[:1], settings)).images
    images = torch.cat([corrupt(image, level) for level in levels])
    detectors = [load_patchcore(settings, "tile"), load_detector(settings, "tile", 0.1, build_net(settings))[0]]
    assert set(figures) == {file}
    grid = np.array(figures[file].axes[:16]).reshape(4, 4)
    assert [axis.get_title() for axis in grid[0]] == ["original", "corrupted", "PatchCore (100 %)", "WEDGE-Net (10 %)"]
    assert [axis.get_ylabel().split(" = ")[1] for axis in grid[:, 0]] == [str(level) for level in levels]
    for row, corrupted in zip(grid, images, strict=True):
        np.testing.assert_array_equal(shown(row[0]), image[0].permute(1, 2, 0).numpy())
        np.testing.assert_allclose(shown(row[1]), corrupted.permute(1, 2, 0).numpy(), atol=1e-6)
    for column, detector in zip(grid.T[2:], detectors, strict=True):
        prediction = detector.predict(images)
        for axis, values, score in zip(column, prediction.maps.numpy(), prediction.scores.tolist(), strict=True):
            np.testing.assert_allclose(shown(axis), values, rtol=1e-4)
            assert axis.get_xlabel().startswith(f"score {score:.4g}")
        assert len({axis.get_images()[0].get_clim() for axis in column}) == 1  # one scale for the method
    assert len(figures[file].axes) == 18  # and two colour bars that state it


def test_without_a_patchcore_bank_its_column_is_grey(trained, tmp_path, capsys):
    assert visualize_color_robustness.main(trained) == 0
    assert "PatchCore is left out for tile" in capsys.readouterr().err
    with Image.open(tmp_path / "out/Figure_Color_Robustness_tile_Final.png") as picture:
        assert abs(picture.width / picture.height - 0.85) < 0.1
        pixels = np.asarray(picture.convert("RGB"))
    grey = (pixels == 217).all(axis=2)  # 0.85
    assert 0.15 < grey.mean() < 0.25  # the better part of one column of four
    columns = np.flatnonzero(grey.mean(axis=0) > 0.5) / pixels.shape[1]
    assert columns.min() > 0.45 and columns.max() < 0.8  # and that is the third


def test_several_ratios_do_not_overwrite_each_other(flags, figures):
    several = [*flags, "--sampling-ratio", "0.1, 0.01"]
    assert train.main(several) == 0
    assert visualize_color_robustness.main(several) == 0
    assert visualize_noise_robustness.main(several) == 0
    assert {name for name in figures if not name.startswith("odd_images")} == {
        "Figure_Color_Robustness_tile_10pct_Final.png",
        "Figure_Color_Robustness_tile_1pct_Final.png",
        "Figure_Noise_Robustness_tile_10pct.png",
        "Figure_Noise_Robustness_tile_1pct.png",
    }


def test_an_unreadable_patchcore_bank_is_one_line_and_a_grey_column(trained, patchcore_bank, figures, capsys):
    patchcore_bank.write_bytes(b"nothing")
    assert visualize_noise_robustness.main(trained) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith(f"error: memory bank {patchcore_bank} cannot be read")
    texts = [text.get_text() for axis in figures["Figure_Noise_Robustness_tile.png"].axes for text in axis.texts]
    assert texts == ["Skipped"] * 4


def test_a_category_without_good_test_images_is_one_line(trained, data, figures, capsys):
    shutil.rmtree(data / "tile/test/good")
    assert visualize_noise_robustness.main(trained) == 2
    assert "error: tile has no good test image (test/good) to draw" in capsys.readouterr().err
    assert not figures


def test_a_good_part_below_the_threshold_does_not_look_hot(tmp_path, figures):
    maps = np.full((4, 8, 8), 0.2, np.float32)
    draw_levels(tmp_path / "a.png", "x", ["0"] * 4, np.zeros((4, 8, 8, 3)), {"A": Maps(maps, [0.2] * 4, 0.9)})
    image = figures["a.png"].axes[2].get_images()[0]
    assert image.get_clim() == pytest.approx((0.2, 0.9))
    assert colour_scale(maps, None)(maps).max() == 0
