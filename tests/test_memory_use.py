"""Large pictures in bounded memory: what is kept in half precision, in fewer images, in smaller batches."""

import dataclasses

import pytest
import torch

import config
import evaluation
import train
from models.errors import InputError
from models.whitening import Affine, fit_lens, fit_whitening
from utils.data.dataset import at_once, batches, train_samples
from utils.pictures.tables import read_csv
from utils.pipeline import conditions, inference, training
from utils.pipeline.checkpoint import build_net
from utils.pipeline.conditions import lens_images, most_lens_images
from utils.pipeline.inference import Features, extract_features, numbers_of
from utils.settings import SettingsParser
from utils.size import Size


def settings_of(flags, *more):
    return SettingsParser(config, "").read([*flags, *more])[0]


def features(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) @ torch.randn(dim, dim, generator=generator) + 3


# --- half precision ---


def test_few_features_are_float32_and_many_float16(flags, monkeypatch):
    settings = settings_of(flags, "--category", "tile")
    net, samples = build_net(settings), train_samples(settings, "tile")
    whole = extract_features(net, samples, settings, "test")
    assert [scale.dtype for scale in whole] == [torch.float32] * 2
    assert sum(scale.numel() for scale in whole) == len(samples) * numbers_of(net, settings)
    monkeypatch.setattr(inference, "LARGE", len(samples) * numbers_of(net, settings) - 1)
    for half, full in zip(extract_features(net, samples, settings, "test"), whole, strict=True):
        assert half.dtype == torch.float16
        torch.testing.assert_close(half.float(), full, rtol=1e-3, atol=1e-4)


def test_features_that_half_precision_cannot_hold_are_refused_by_name(flags, monkeypatch):
    settings = settings_of(flags, "--category", "tile")
    samples = train_samples(settings, "tile")
    monkeypatch.setattr(inference, "LARGE", 0)
    values = torch.ones(2, 3, 4)
    values[1, 2, 3] = 1e5  # float16 ends at 65,504
    with pytest.raises(InputError, match=f"{samples[1].path} gives features that are not finite"):
        Features(2).add([values], samples[:2])


def test_metric_and_lens_of_half_precision_are_those_of_single(monkeypatch):
    monkeypatch.setattr("models.whitening._BLOCK", 1 << 12)  # many blocks
    clean = features(3000, 16)
    corrupted = 0.7 * clean + 0.2 * features(3000, 16, seed=1)
    for function, given in ((fit_whitening, (clean,)), (fit_lens, (corrupted, clean))):
        full, half = function(*given), function(*(each.half() for each in given))
        torch.testing.assert_close(half.matrix, full.matrix, rtol=0.02, atol=0.02)
        torch.testing.assert_close(half(clean), full(clean), rtol=0.02, atol=0.05)


def test_half_precision_is_mapped_in_its_own_memory():
    values = features(300, 16).half().view(10, 30, 16)
    affine = Affine(torch.randn(16, 5, generator=torch.Generator().manual_seed(0)), torch.ones(5))
    expected, place = affine(values.clone()), values.data_ptr()
    mapped = affine.apply_in_place(values)
    assert mapped.shape == (10, 30, 5) and mapped.dtype == torch.float16 and mapped.data_ptr() == place
    torch.testing.assert_close(mapped.float(), expected, rtol=1e-3, atol=1e-2)


def test_a_training_in_half_precision_gives_the_same_figures(flags, monkeypatch, tmp_path):
    found = []
    for large in (1 << 28, 0):
        for module in (inference, training):
            monkeypatch.setattr(module, "LARGE", large)
        own = [*flags, "--category", "tile", "--save-dir", str(tmp_path / str(large))]
        assert train.main(own) == evaluation.main(own) == 0
        found += read_csv(tmp_path / str(large) / "final_evaluation_results.csv")
    for column in ("image_auroc", "pixel_auroc", "aupro"):
        assert found[0][column] == pytest.approx(found[1][column], abs=0.005)
    assert found[0]["threshold"] == pytest.approx(found[1]["threshold"], rel=0.03)


# --- fewer at a time ---


def test_a_batch_holds_fewer_of_large_pictures(flags):
    settings = settings_of(flags, "--batch-size", "32", "--category", "tile")
    sized = {side: dataclasses.replace(settings, image_size=Size(side, side)) for side in (64, 224, 1024, 8192)}
    assert {side: at_once(own) for side, own in sized.items()} == {64: 32, 224: 32, 1024: 8, 8192: 1}
    assert [len(batch.images) for batch in batches(train_samples(settings, "tile"), sized[64])] == [8]


def test_large_pictures_are_looked_at_in_every_condition_less_often(flags, monkeypatch):
    settings = settings_of(flags, "--category", "tile", "--form", "wedge", "--conditions", "clean, noise20, blur1")
    net = build_net(settings)
    one = (len(net.conditions) - 1) * numbers_of(net, settings)
    for numbers, most in ((100 * one, 32), (20 * one, 20), (one, 8)):
        monkeypatch.setattr(conditions, "LARGE", numbers // 4)
        assert most_lens_images(net, settings) == most
    assert lens_images(200, 8).tolist() == [0, 28, 57, 85, 114, 142, 171, 199]
    assert lens_images(5, 8).tolist() == [0, 1, 2, 3, 4]


def test_what_a_training_will_take_is_told_beforehand(flags, monkeypatch, capsys):
    own = [*flags, "--category", "tile"]
    monkeypatch.setattr(training, "LARGE", 0)
    assert train.main(own) == 0
    lines = capsys.readouterr().out.splitlines()
    (told,) = [number for number, line in enumerate(lines) if "images of 64 x 64, 64 + 16 patches each" in line]
    assert "GB of memory, and 0 minutes until patches are chosen" in lines[told]
    assert told < next(number for number, line in enumerate(lines) if "kept" in line)
