import csv

import numpy as np
import pytest
import pywt
import torch
from PIL import Image

import config
import eval_noise_robustness
import evaluation
import predict
import train
from models.condition import CLEAN, Condition, ConditionStream, parse_conditions
from models.errors import InputError
from tests.conftest import draw_part, make_category
from utils.data.corruptions import corrupt, gaussian_blur
from utils.line.torch_model import TorchModel
from utils.pipeline.checkpoint import load_checkpoint

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
    stream.fit_conditions(torch.stack([stream.measure(in_condition(images, name))[1] for name in NAMES]))
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


def ranked(values, share):
    """The value below which a share lies; the lower one of two medians."""
    values = np.sort(np.ravel(values))
    return values[int(share * (values.size - 1))]


def light_by_hand(image, wavelet):
    """Of a (3, H, W) image: approximation bands (3, h, w) of the third level, their medians and ranges (3, 2)."""
    structure = np.stack([pywt.wavedec2(plane, wavelet, mode="symmetric", level=3)[0] / 8 for plane in image])
    return structure, np.array([[ranked(low, 0.5), ranked(low, 0.9) - ranked(low, 0.1)] for low in structure])


HALF_LEVEL = 0.5 / 255


def clipped_by_hand(image):
    """The shares of white and of black among some pixels of a (3, H, W) image."""
    step = min(4, image.shape[1] // 56)
    some = image[:, ::step, ::step]
    return np.array([(some >= 1 - HALF_LEVEL).mean(), (some <= HALF_LEVEL).mean()])


def factor_by_hand(brightness, least, most):
    """The factor nearest to 1 that brings median and range of the brightness to between ``least`` and ``most``; where
    none does both, the largest that makes neither too large."""
    factors = np.geomspace(1 / 8, 8, 200_001)
    fits = factors[:, None] * brightness <= most + HALF_LEVEL
    both = (fits & (factors[:, None] * brightness >= least - HALF_LEVEL)).all(axis=1)
    if both.any():
        return factors[both][np.abs(np.log(factors[both])).argmin()]
    return factors[fits.all(axis=1)].max()


def read_by_hand(image, wavelet, least, most, least_clipped=(0, 0)):
    """A (3, H, W) image, its light brought to between ``least`` and ``most`` (4, 2), and its statistics (23,)."""
    structure, light = light_by_hand(image, wavelet)
    lit = light * factor_by_hand(light.mean(axis=0), least[0], most[0])
    brightness = lit.mean(axis=0)
    seen = np.concatenate([brightness[None], lit - brightness])
    change = np.clip(seen, least, most) - seen
    wanted = lit + change[0] + change[1:]
    gain = np.clip((wanted[:, 1] + 1e-6) / (light[:, 1] + 1e-6), 1 / 4, 4)
    offset = wanted[:, 0] - gain * light[:, 0]
    statistics = list(np.log(np.maximum(clipped_by_hand(image), least_clipped) + 1e-3))
    structure = structure * gain[:, None, None] + offset[:, None, None]
    grey, colourfulness = structure.mean(axis=0), structure.max(axis=0) - structure.min(axis=0)
    low, middle, high = (ranked(grey, share) for share in (0.1, 0.5, 0.9))
    statistics.append(np.log(high - middle + HALF_LEVEL) - np.log(middle - low + HALF_LEVEL))
    statistics += [ranked(colourfulness, 0.5), ranked(colourfulness, 0.9)]
    aligned = image * gain[:, None, None] + offset[:, None, None]
    for level, bands in enumerate(pywt.wavedec2(aligned.mean(axis=0), wavelet, mode="symmetric", level=3)[:0:-1]):
        step = max(1, min(4 >> level, len(bands[0]) // 28))  # 28 coefficients each way are enough
        some = [band[::step, ::step] for band in bands]
        statistics += [np.log(ranked(np.abs(band), share) + HALF_LEVEL) for band in some for share in (0.5, 0.9)]
    return aligned, np.array(statistics)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior2.2", "sym4"])
def test_measures_are_those_of_pywavelets(wavelet):
    images = torch.nn.functional.interpolate(parts(4, 1), scale_factor=2.0)  # of finer levels some coefficients do
    stream = ConditionStream(wavelet, ["clean"], True, (192, 192))
    light = stream.measure_light(images)
    for image, own in zip(images.double().numpy(), light, strict=True):
        np.testing.assert_allclose(own[:3], light_by_hand(image, wavelet)[1], atol=1e-5)
        np.testing.assert_allclose(own[3], clipped_by_hand(image), atol=1e-6)
    stream.fit_light(light[:3])
    images[1:] = images[1:] * torch.tensor([0.5, 0.7, 1.2]).view(3, 1, 1, 1) + 0.2  # darker, paler; some is clipped
    aligned, statistics = stream.measure(images.clamp_(0, 1))
    known = [each.double().numpy() for each in (stream.least_light, stream.most_light, stream.least_clipped)]
    for image, found, own in zip(images.double().numpy(), aligned, statistics, strict=True):
        wanted, expected = read_by_hand(image, wavelet, *known)
        np.testing.assert_allclose(found, wanted, atol=5e-5)
        np.testing.assert_allclose(own, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(aligned[0], images[0]) and not torch.equal(aligned[1], images[1])


def test_blur_is_told_on_parts_that_cover_a_third_of_a_blank_ground():
    def before_black(images):
        images[..., 32:] = 0
        return images

    stream, images = ConditionStream("haar", NAMES, True, (96, 96)), before_black(parts(20, 4))
    stream.fit_light(stream.measure_light(images))
    stream.fit_conditions(torch.stack([stream.measure(in_condition(images, name))[1] for name in NAMES]))
    reading = stream(in_condition(before_black(parts(20, 5)), "blur1", seed=3))
    assert (reading.conditions == NAMES.index("blur1")).float().mean() >= 0.95


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
    light, known = (stream.measure_light(each)[:, :3] for each in (reading.images, images))
    for part in (light.mean(dim=1), light - light.mean(dim=1, keepdim=True)):
        own = known.mean(dim=1) if part.ndim == 2 else known - known.mean(dim=1, keepdim=True)
        assert (part >= own.amin(dim=0) - 0.01).all() and (part <= own.amax(dim=0) + 0.01).all()
    assert (stream(images * 0.8 + 0.1).conditions == 0).float().mean() >= 0.95  # less contrast is no blur
    still = ConditionStream("haar", ["clean"], False, (96, 96))
    assert torch.equal(still(images).images, images)


def before_white(count, seed):
    """Parts before a ground that the camera clips to white."""
    images = parts(count, seed)
    images[..., 48:] = 1
    return images


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
@pytest.mark.parametrize("draw", [parts, before_white])
def test_in_less_light_pictures_are_brought_back_and_stay_clean(draw, share):
    stream, images = ConditionStream("haar", NAMES, True, (96, 96)), draw(40, 0)
    stream.fit_light(stream.measure_light(images))
    stream.fit_conditions(torch.stack([stream.measure(in_condition(images, name))[1] for name in NAMES]))
    reading = stream(corrupt(draw(40, 2), "dark", share, [], 0))
    assert (reading.conditions == 0).float().mean() >= 0.95 and reading.unfamiliar.float().mean() <= 0.2
    dark = corrupt(images, "dark", share, [], 0)
    reading = stream(dark)
    gain = (reading.images.mean(dim=(1, 2, 3)) / dark.mean(dim=(1, 2, 3)))[:, None, None, None]
    assert gain.mean() > 1 + share / 2
    torch.testing.assert_close(reading.images, dark * gain, rtol=0, atol=0.02)  # brighter, and no paler


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_constant_image_is_no_trouble(stream, value):
    reading = stream(torch.full((2, 3, 96, 96), value))
    assert reading.images.isfinite().all() and reading.statistics.isfinite().all()


def test_nothing_crosses_the_batch(stream):
    images = in_condition(parts(32, 6), "noise20")
    together, alone = stream(images), [stream(image[None]) for image in images]
    for place in range(3):
        torch.testing.assert_close(together[place], torch.cat([reading[place] for reading in alone]))


def test_few_or_equal_training_images_do_not_break_it():
    for images in (parts(1, 0), parts(1, 0).repeat(5, 1, 1, 1), torch.zeros(3, 3, 96, 96)):
        stream = ConditionStream("haar", NAMES, True, (96, 96))
        stream.fit_light(stream.measure_light(images))
        stream.fit_conditions(torch.stack([stream.measure(in_condition(images, name))[1] for name in NAMES]))
        reading = stream(images)
        assert (reading.conditions == 0).all() and reading.images.isfinite().all()


def test_an_image_too_small_for_the_wavelet_is_refused(flags, capsys):
    with pytest.raises(InputError, match="need at least 312 pixels"):
        ConditionStream("db20", ["clean"], True, (64, 64))
    assert train.main([*flags, "--wavelet-type", "db20"]) == 2
    error = capsys.readouterr().err
    assert "IMAGE_SIZE is 64" in error and "set WAVELET_TYPE = 'haar' or FORM = 'paper'" in error
    assert train.main([*flags, "--wavelet-type", "db20", "--form", "paper"]) == 0


def test_conditions_that_a_checkpoint_lacks_are_named(flags, capsys):
    assert train.main([*flags, "--conditions", "clean,noise10"]) == 0
    assert evaluation.main([*flags, "--conditions", "clean,noise20"]) == 2
    error = capsys.readouterr().err
    assert "CONDITIONS = 'clean,noise10', the setting is 'clean,noise20'" in error
    assert evaluation.main([*flags, "--conditions", "noise10, clean"]) == 0


def test_a_second_training_gives_the_same_bank(line, tmp_path):
    assert train.main([*line.flags, "--save-dir", str(tmp_path), "--batch-size", "3"]) == 0
    first, second = load_checkpoint(line.checkpoint), load_checkpoint(tmp_path / "10pct/model_data_tile_10pct.pt")
    torch.testing.assert_close(first.state, second.state, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(first.calibration_scores, second.calibration_scores, atol=1e-2, rtol=1e-2)


def test_on_noisy_pictures_it_finds_more_and_alarms_less(tmp_path):
    make_category(tmp_path / "data", "tile", 7, train=24, good=20, bad=20, shade=0.7)
    figures = {}
    for name, conditions in {"plain": "clean", "lenses": "clean,noise20,noise30"}.items():
        flags = ["--data-path", str(tmp_path / "data"), "--save-dir", str(tmp_path / name), "--image-size", "96"]
        flags += ["--center-crop", "false", "--backbone", "efficientnet_lite0", "--conditions", conditions]
        flags += ["--num-workers", "0", "--device", "cpu", "--patchcore-dir", str(tmp_path / "none")]
        assert train.main(flags) == 0
        assert eval_noise_robustness.main([*flags, "--levels", "0,20,30"]) == 0
        with open(tmp_path / name / "full_noise_comparison_smoothed_tile_10pct.csv", encoding="utf-8") as file:
            figures[name] = {float(row["level"]): row for row in csv.DictReader(file)}
    for level in (20, 30):
        plain, own = figures["plain"][level], figures["lenses"][level]
        assert float(own["wedge_net_auroc"]) > float(plain["wedge_net_auroc"]) + 0.05
        assert float(plain["wedge_net_false_alarm_rate"]) == 1
        assert float(own["wedge_net_false_alarm_rate"]) <= 0.2
        assert float(own["wedge_net_unfamiliar_rate"]) <= 0.1
    clean = [float(figures[name][0]["wedge_net_auroc"]) for name in ("lenses", "plain")]
    assert clean[0] > clean[1] - 0.02


def test_a_single_condition_still_flags_what_is_unlike_training(flags, tmp_path):
    assert train.main(flags) == evaluation.main(flags) == 0
    model = TorchModel(tmp_path / "out/10pct/model_data_tile_10pct.pt", config)
    judged = model.predict(np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8))
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
