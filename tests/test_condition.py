import csv
import math

import numpy as np
import pytest
import pywt
import torch
from PIL import Image

import config
import eval_noise_robustness
import evaluation
import export_onnx
import predict
import train
from models.condition import CLEAN, Condition, ConditionStream, parse_conditions
from models.errors import InputError
from models.wedge_net import grid_size
from tests.conftest import draw_part, make_category
from utils.data.corruptions import corrupt, gaussian_blur
from utils.data.dataset import batches
from utils.data.dataset import test_samples as samples_for_test
from utils.line.edge_model import OnnxModel
from utils.line.torch_model import TorchModel
from utils.pipeline.checkpoint import bank_path, build_net, load_checkpoint, load_detector
from utils.settings import SettingsParser

NAMES = ("clean", "noise10", "noise20", "noise40", "blur1", "blur2", "colour1")


def parts(count, seed):
    """(count, 3, 96, 96) in [0, 1]"""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([draw_part(rng) for _ in range(count)])).permute(0, 3, 1, 2).float() / 255


def in_condition(images, condition, seed=0):
    kind = condition.rstrip("0123456789.")
    level = float(condition.removeprefix(kind) or 0)
    return images if kind == "clean" else corrupt(images, kind, level, [str(i) for i in range(len(images))], seed)


@pytest.fixture(scope="module")
def stream():
    """One that knows 40 parts in six conditions."""
    stream, images = ConditionStream("haar", NAMES, True, (96, 96)), parts(40, 0)
    stream.fit_light(stream.measure_light(images))
    details = torch.stack([stream.measure(in_condition(images, name))[1] for name in NAMES])
    stream.fit_conditions(details)
    return stream


def test_each_condition_takes_in_what_is_nearest():
    assert parse_conditions(["noise20", "clean", "blur1", "noise10", "blur2.5"]) == (
        CLEAN,
        Condition("noise10", "noise", 10, 2.5, 15),
        Condition("noise20", "noise", 20, 15, 25),
        Condition("blur1", "blur", 1, 0.25, 1.75),
        Condition("blur2.5", "blur", 2.5, 1.75, 3.25),
    )
    assert parse_conditions(["clean"]) == (CLEAN,)


@pytest.mark.parametrize(
    "names", ["clean,noise0", "clean,blur-1", "clean,fog", "noise10", "", "clean,clean", "clean,noise10,noise10.0", 5]
)
def test_unknown_conditions_are_one_line(flags, capsys, names):
    assert train.main([*flags, "--conditions", str(names)]) == 2
    error = capsys.readouterr().err
    assert "CONDITIONS is" in error and "noise10" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior2.2", "sym4"])
def test_measures_are_those_of_pywavelets(wavelet):
    stream, images = ConditionStream(wavelet, ["clean"], True, (96, 96)), parts(3, 1)
    light = stream.measure_light(images).numpy()
    for image, own in zip(images.double().numpy(), light, strict=True):
        for channel, (median, spread) in zip(image, own, strict=True):
            low = np.sort(pywt.wavedec2(channel, wavelet, mode="symmetric", level=3)[0].ravel() / 8)
            places = [int(share * (low.size - 1)) for share in (0.5, 0.1, 0.9)]
            np.testing.assert_allclose([median, spread], [low[places[0]], low[places[2]] - low[places[1]]], atol=1e-5)
    stream.fit_light(stream.measure_light(images))
    aligned, statistics = stream.measure(images)
    detail = statistics[:, -18:]
    for image, own in zip(aligned.double().numpy(), detail.numpy(), strict=True):
        bands = pywt.wavedec2(image.mean(axis=0), wavelet, mode="symmetric", level=3)[:0:-1]
        found = [
            np.sort(np.abs(band[::2, ::2] if level == 0 else band).ravel())
            for level, each in enumerate(bands)
            for band in each
        ]
        quantiles = [values[int(share * (values.size - 1))] for values in found for share in (0.5, 0.9)]
        np.testing.assert_allclose(np.exp(own), np.array(quantiles) + 0.5 / 255, rtol=1e-3)


def test_blur_is_told_on_parts_that_cover_a_third_of_a_blank_ground():
    def before_black(images: torch.Tensor) -> torch.Tensor:
        images = images.clone()
        images[..., 32:] = 0
        return images

    stream = ConditionStream("haar", NAMES, True, (96, 96))
    images = before_black(parts(20, 4))
    stream.fit_light(stream.measure_light(images))
    stream.fit_conditions(torch.stack([stream.measure(in_condition(images, name))[1] for name in NAMES]))
    number = NAMES.index("blur1")
    reading = stream(in_condition(before_black(parts(20, 5)), "blur1", seed=3))
    assert (reading.conditions == number).float().mean() >= 0.95


@pytest.mark.parametrize("name", NAMES)
def test_new_images_are_known_by_their_condition(stream, name):
    reading = stream(in_condition(parts(40, 2), name, seed=5))
    right = reading.conditions == [condition.name for condition in stream.conditions].index(name)
    assert right.float().mean() >= 0.95
    assert reading.unfamiliar.float().mean() <= 0.1


def test_what_training_never_saw_is_unfamiliar(stream):
    images = parts(8, 3)
    assert stream(in_condition(images, "noise150")).unfamiliar.all()
    assert stream(gaussian_blur(images, 8)).unfamiliar.all()
    assert stream(torch.rand(4, 3, 96, 96)).unfamiliar.all()


def test_light_and_cast_are_brought_back_to_those_of_the_training_images(stream):
    images = parts(40, 0)
    assert torch.equal(stream(images).images, images)  # what training saw is left as it is
    beside = stream(torch.cat([images[:3], images[:1] * 0.3])).images
    assert torch.equal(beside[:3], images[:3]) and not torch.equal(beside[3], images[0] * 0.3)
    changed = images * torch.tensor([0.7, 1.4, 1.1]).view(3, 1, 1) + torch.tensor([0.3, 0.2, -0.2]).view(3, 1, 1)
    reading = stream(changed)
    light, known = stream.measure_light(reading.images), stream.measure_light(images)
    for part in (light.mean(dim=1), light - light.mean(dim=1, keepdim=True)):
        own = known.mean(dim=1) if part.ndim == 2 else known - known.mean(dim=1, keepdim=True)
        assert (part >= own.amin(dim=0) - 0.01).all() and (part <= own.amax(dim=0) + 0.01).all()
    assert (stream(images * 0.8 + 0.1).conditions == 0).float().mean() >= 0.95  # less contrast is no blur
    still = ConditionStream("haar", ["clean"], False, (96, 96))
    assert torch.equal(still(images).images, images)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_constant_image_is_no_trouble(stream, value):
    reading = stream(torch.full((2, 3, 96, 96), value))
    assert reading.images.isfinite().all() and reading.statistics.isfinite().all()


def test_nothing_crosses_the_batch(stream):
    images = in_condition(parts(32, 6), "noise20")
    together, alone = stream(images), [stream(image[None]) for image in images]
    for place in range(3):
        torch.testing.assert_close(together[place], torch.cat([reading[place] for reading in alone]))


def test_a_gpus_way_measures_the_same(stream, monkeypatch):
    """A GPU and an exported graph work on tensors, all images at once, a CPU on arrays, one by one."""
    images = in_condition(parts(6, 4), "noise10")
    images[1] *= 0.4
    light, expected = stream.measure_light(images), stream(images)
    assert not torch.equal(expected.images[1], images[1])
    monkeypatch.setattr("models.condition._in_numpy", lambda batch: False)
    torch.testing.assert_close(stream.measure_light(images), light)
    torch.testing.assert_close(stream(images), expected, atol=1e-5, rtol=1e-4)


def test_few_or_equal_training_images_do_not_break_it():
    for images in (parts(1, 0), parts(1, 0).repeat(5, 1, 1, 1), torch.zeros(3, 3, 96, 96)):
        stream = ConditionStream("haar", NAMES, True, (96, 96))
        stream.fit_light(stream.measure_light(images))
        details = torch.stack([stream.measure(in_condition(images, name))[1] for name in NAMES])
        stream.fit_conditions(details)
        reading = stream(images)
        assert (reading.conditions == 0).all() and reading.images.isfinite().all()


def test_an_image_too_small_for_the_wavelet_is_refused(flags, capsys):
    with pytest.raises(InputError, match="need at least 312 pixels"):
        ConditionStream("db20", ["clean"], True, (64, 64))
    small = [*flags, "--frequency-stream", "condition", "--wavelet-type", "db20"]
    assert train.main(small) == 2
    assert "IMAGE_SIZE is 64" in capsys.readouterr().err


def test_conditions_that_the_bank_lacks_are_named(flags, capsys):
    own = [*flags, "--frequency-stream", "condition"]
    assert train.main([*own, "--conditions", "clean,noise10"]) == 0
    assert evaluation.main([*own, "--conditions", "clean,noise20"]) == 2
    error = capsys.readouterr().err
    assert "CONDITIONS = 'clean,noise10', the setting is 'clean,noise20'" in error
    assert evaluation.main([*own, "--conditions", "noise10, clean"]) == 0


def test_all_banks_may_share_the_memory_of_one(flags, tmp_path, capsys):
    own = [*flags, "--frequency-stream", "condition", "--conditions", "clean,noise20,blur1", "--clean-share", "0.5"]
    assert train.main(own) == 0
    settings, _ = SettingsParser(config, None).read(own)
    checkpoint = load_checkpoint(bank_path(settings.save_dir, settings.category, 0.1))
    total = int(0.1 * checkpoint.training_images * math.prod(grid_size(settings.image_size)))
    assert checkpoint.bank_sizes.tolist() == pytest.approx([total / 2, total / 4, total / 4], abs=1)
    assert "for each of 2 other conditions" in capsys.readouterr().out
    assert evaluation.main(own) == 0
    assert evaluation.main([*own, "--clean-share", "0.6"]) == 2
    assert "CLEAN_SHARE = 0.5, the setting is 0.6" in capsys.readouterr().err
    assert train.main([*own, "--clean-share", "1"]) == 2
    assert "CLEAN_SHARE is 1; it must be None or a number" in capsys.readouterr().err


def test_scores_mean_the_same_in_every_condition(line):
    """Good parts' mean and spread are the first condition's, and each image is searched in its own bank alone."""
    settings, _ = SettingsParser(config, None).read(line.flags)
    detector, checkpoint = load_detector(settings, "tile", 0.1, build_net(settings))
    assert len(detector.banks) == 10
    assert torch.equal(checkpoint.score_scales[0], torch.tensor([1.0, 0.0]))
    images = torch.cat([batch.images for batch in batches(samples_for_test(settings, "tile"), settings)])
    images = torch.cat([images, in_condition(images, "noise30"), in_condition(images, "blur2")])
    found = detector.predict(images)
    embedding = detector.net.embed(images)
    assert len(found.conditions.unique()) >= 3
    for place, condition in enumerate(found.conditions.tolist()):
        distances = torch.cdist(embedding.features[place], detector.banks[condition].vectors.float()).amin(dim=1)
        maps = detector.anomaly_map(distances.view(1, 8, 8))
        scale, offset = checkpoint.score_scales[condition]
        torch.testing.assert_close(found.maps[place], maps[0] * scale + offset, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found.scores[place], found.maps[place].max())
    alone = torch.cat([detector.predict(image[None]).scores for image in images])
    torch.testing.assert_close(alone, found.scores, rtol=1e-4, atol=1e-4)


def test_a_second_training_gives_the_same_bank(line, tmp_path):
    assert train.main([*line.flags, "--save-dir", str(tmp_path), "--batch-size", "3"]) == 0
    first, second = load_checkpoint(line.checkpoint), load_checkpoint(tmp_path / "10pct/model_data_tile_10pct.pt")
    torch.testing.assert_close(first.state, second.state, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(first.calibration_scores, second.calibration_scores, atol=1e-2, rtol=1e-2)


def test_on_noisy_pictures_it_finds_more_and_alarms_less(tmp_path):
    make_category(tmp_path / "data", "tile", 7, train=24, good=20, bad=20, shade=0.7)
    figures = {}
    for stream in ("off", "condition"):
        flags = ["--data-path", str(tmp_path / "data"), "--save-dir", str(tmp_path / stream), "--image-size", "96"]
        flags += ["--center-crop", "false", "--backbone", "efficientnet_lite0", "--frequency-stream", stream]
        flags += ["--num-workers", "0", "--device", "cpu", "--patchcore-dir", str(tmp_path / "none")]
        assert train.main(flags) == 0
        assert eval_noise_robustness.main([*flags, "--levels", "0,20,30"]) == 0
        with open(tmp_path / stream / "full_noise_comparison_smoothed_tile_10pct.csv", encoding="utf-8") as file:
            figures[stream] = {float(row["level"]): row for row in csv.DictReader(file)}
    for level in (20, 30):
        plain, own = figures["off"][level], figures["condition"][level]
        assert float(own["wedge_net_auroc"]) > float(plain["wedge_net_auroc"]) + 0.05
        assert float(plain["wedge_net_false_alarm_rate"]) == 1
        assert float(own["wedge_net_false_alarm_rate"]) <= 0.2
        assert float(own["wedge_net_unfamiliar_rate"]) <= 0.1
    clean = [float(figures[stream][0]["wedge_net_auroc"]) for stream in ("condition", "off")]
    assert clean[0] > clean[1] - 0.02


def test_a_single_condition_still_flags_what_is_unlike_training(flags, data, tmp_path):
    own = [*flags, "--frequency-stream", "condition", "--conditions", "clean"]
    assert train.main(own) == export_onnx.main(own) == evaluation.main(own) == 0
    path = tmp_path / "out/10pct/model_data_tile_10pct"
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    for model in (TorchModel(path.with_suffix(".pt"), config), OnnxModel(path.with_suffix(".onnx"))):
        judged = model.predict(pixels)
        assert judged.unfamiliar.all() and not judged.conditions.any()


def test_predict_tells_the_condition_and_flags_what_is_like_none(line, tmp_path, capsys):
    # 72 pixels are only cropped: noise that is resized with the picture would be another.
    image = np.asarray(Image.open(line.images / "good/000.png").resize((72, 72), Image.Resampling.BILINEAR)).astype(
        float
    )
    rng = np.random.default_rng(0)
    for name, sigma in {"a_clean": 0, "b_noisy": 20, "c_snow": 150}.items():
        pixels = np.clip(image + rng.normal(0, 1, image.shape) * sigma, 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{name}.png")
    for model in (line.checkpoint, line.model):
        table = tmp_path / "verdicts.csv"
        assert predict.main([str(model), str(tmp_path), "--csv", str(table)]) == 0
        shown = capsys.readouterr()
        with open(table, encoding="utf-8") as file:
            conditions = [row["condition"] for row in csv.DictReader(file)]
        assert conditions[0] == "clean" and conditions[1].startswith("noise") and conditions[2] == "unfamiliar"
        assert "c_snow.png: light, focus or noise unlike anything in training: check the camera" in shown.err
        assert "1 unlike anything in training" in shown.err
        assert shown.out.splitlines()[1].endswith(conditions[1])
