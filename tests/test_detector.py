"""A whole detector, from pixels to score, beside loops in NumPy that follow the method's description step by step."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, uniform_filter

import config
import train
from models.backbone import build_backbone
from tests.test_condition import in_condition, read_by_hand
from utils.data.dataset import batches, train_samples
from utils.data.dataset import test_samples as samples_for_test
from utils.pipeline.checkpoint import build_net, load_checkpoint, load_detector, make_detector
from utils.settings import SettingsParser

CENTRING = 0.7  # share of an image's mean that is taken out of layer 3
BACKGROUND, LEAST = 0.5, 0.2  # share of an image's lower quartile that is taken out of its distances, and its floor


def enlarged(grid, size):
    """A (h, w) grid of distances as (H, W), linearly between the middles of its cells, which its edges continue."""
    for axis, pixels in enumerate(size):
        cells = grid.shape[axis]
        places = (np.arange(pixels) + 0.5) * cells / pixels - 0.5
        grid = np.apply_along_axis(lambda line, at=places, n=cells: np.interp(at, np.arange(n), line), axis, grid)
    return grid


def judged_by_hand(image, saved, backbone):
    """Score, (H, W) map, condition and whether it is unfamiliar, of one (3, H, W) image; all from a file's contents."""
    state = {name: tensor.double().numpy() for name, tensor in saved.state.items()}
    known = (state[f"stream.{name}"] for name in ("least_light", "most_light", "least_clipped"))
    aligned, statistics = read_by_hand(image, "haar", *known)
    apart = [(statistics - mean) @ state["stream.precision"] @ (statistics - mean) for mean in state["stream.means"]]
    condition = int(np.argmin([own + (2 * np.log(50) if place else 0) for place, own in enumerate(apart)]))  # or clean
    unfamiliar = min(apart) > state["stream.limits"][int(np.argmin(apart))]

    layers = [layer[0].double().numpy() for layer in backbone(torch.from_numpy(aligned)[None].float())]
    layers[1] = layers[1] - CENTRING * layers[1].mean(axis=(1, 2), keepdims=True)
    anomaly_map = np.zeros(image.shape[1:])
    for scale, layer in enumerate(layers):
        averaged = uniform_filter(layer, size=(1, 3, 3), mode="constant")
        matrix, offset = state[f"maps.{scale}.matrices"][condition], state[f"maps.{scale}.offsets"][condition, 0]
        bank = saved.memory_banks[scale].double().numpy()
        distances = np.empty(layer.shape[1:])
        for row in range(layer.shape[1]):
            for column in range(layer.shape[2]):
                patch = averaged[:, row, column] @ matrix + offset
                distances[row, column] = np.sqrt(((bank - patch) ** 2).sum(axis=1).min())
        distances *= saved.scales[condition, scale].item()
        quartile = np.sort(distances, axis=None)[-(-distances.size // 4) - 1]
        whole = enlarged(distances - BACKGROUND * max(quartile, LEAST), image.shape[1:])
        anomaly_map += gaussian_filter(whole, 4)
    anomaly_map += saved.offsets[condition].item()
    return anomaly_map.max(), anomaly_map, condition, unfamiliar


@pytest.fixture(scope="module")
def images(line):
    """Test images as they are, noisy, blurred, too bright, in other light, and snow, (20, 3, 64, 64)."""
    settings, _ = SettingsParser(config, None).read(line.flags)
    clean = torch.cat([batch.images for batch in batches(samples_for_test(settings, "tile"), settings)])
    some = clean[[0, 7]]
    altered = [in_condition(some, name) for name in ("noise10", "noise30", "blur2", "colour1", "noise150")]
    return torch.cat([clean, *altered, some * 0.6])


def test_it_judges_as_loops_over_images_places_and_vectors_do(line, images):
    settings, _ = SettingsParser(config, None).read(line.flags)
    detector, saved = load_detector(settings, "tile", 0.1, build_net(settings))
    assert (len(saved.memory_banks), saved.scales.shape) == (2, (10, 2))
    found = detector.predict(images)
    assert len(found.conditions.unique()) >= 4 and 0 < found.unfamiliar.sum() < len(images)
    backbone = build_backbone("efficientnet_lite0")
    for place, image in enumerate(images.double().numpy()):
        score, anomaly_map, condition, unfamiliar = judged_by_hand(image, saved, backbone)
        assert found.conditions[place] == condition and found.unfamiliar[place] == unfamiliar
        assert found.scores[place].item() == pytest.approx(score, rel=1e-3)
        np.testing.assert_allclose(found.maps[place], anomaly_map, rtol=1e-3, atol=1e-3)


def test_an_image_scores_the_same_alone_and_among_images_in_other_conditions(line, images):
    settings, _ = SettingsParser(config, None).read(line.flags)
    detector, _ = load_detector(settings, "tile", 0.1, build_net(settings))
    together = detector.predict(torch.cat([images, images[:12]]))
    assert len(together.scores) == 32
    for place, image in enumerate(images):
        alone = detector.predict(image[None])
        torch.testing.assert_close(alone.scores[0], together.scores[place], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.maps[0], together.maps[place], rtol=1e-3, atol=1e-3)


def test_a_file_holds_metric_and_lenses_in_half_precision_and_memory_and_queries_agree(flags, tmp_path):
    """Every patch is in a whole memory: but for its rounding to float16, a training image scores nothing."""
    whole = [*flags, "--sampling-ratio", "1", "--conditions", "clean,noise20"]
    assert train.main(whole) == 0
    path = tmp_path / "out/100pct/model_data_tile_100pct.pt"
    stored = torch.load(path, weights_only=True)
    assert {bank.dtype for bank in stored["memory_banks"]} == {torch.float16}
    halves = {name for name, tensor in stored["state"].items() if tensor.dtype == torch.float16}
    assert halves == {"maps.0.matrices", "maps.1.matrices"}
    settings, _ = SettingsParser(config, None).read(whole)
    saved = load_checkpoint(path)
    detector = make_detector(saved, build_net(settings).with_state(saved.state), settings.image_size, path)
    for name, tensor in detector.net.state().items():
        assert torch.equal(tensor, stored["state"][name].float())
    images = torch.cat([batch.images for batch in batches(train_samples(settings, "tile"), settings)])
    for own, bank in zip(detector.net.embed(images), detector.banks, strict=True):
        torch.testing.assert_close(own.flatten(0, 1), bank.vectors.float(), rtol=2e-3, atol=2e-3)
    scores = detector.predict(images).scores
    assert scores.max() < 0.02 < 0.1 * saved.calibration_scores.min()


def test_form_paper_stores_float32_and_no_maps(flags, tmp_path):
    assert train.main([*flags, "--form", "paper"]) == 0
    saved = load_checkpoint(tmp_path / "out/10pct/model_data_tile_10pct.pt")
    (bank,) = saved.memory_banks
    assert bank.dtype == torch.float32
    assert torch.equal(saved.scales, torch.ones(1, 1)) and torch.equal(saved.offsets, torch.zeros(1))
    assert not any(name.startswith("maps") for name in saved.state)


def test_bytes_are_those_of_vectors_and_maps(line):
    settings, _ = SettingsParser(config, None).read(line.flags)
    detector, saved = load_detector(settings, "tile", 0.1, build_net(settings))
    numbers = sum(bank.numel() for bank in saved.memory_banks)
    numbers += sum(tensor.numel() for name, tensor in saved.state.items() if name.endswith("matrices"))
    assert detector.bank_bytes == 2 * numbers
    assert detector.bank_vectors == sum(map(len, saved.memory_banks))
    assert line.checkpoint.stat().st_size == pytest.approx(detector.bank_bytes, rel=0.5)
