"""What the benchmarks reckon with; what they measure is not tested here: it depends on the machine."""

import pytest
import torch

import config
from benchmarks.peers import few_images
from benchmarks.scaling import PATCHES, exponent, measured, repeated
from utils.data.dataset import test_samples as samples_for_test
from utils.data.dataset import train_samples
from utils.settings import SettingsParser


def test_the_exponent_is_that_of_the_power_law():
    rows = [{"sweep": "a", "place": n, "milliseconds": 3 * n**1.5} for n in (1, 10, 100)]
    rows += [{"sweep": "b", "place": n, "milliseconds": 7 / n} for n in (1, 2)]
    assert exponent(rows, "a") == pytest.approx(1.5)
    assert exponent(rows, "b") == pytest.approx(-1)


def test_repeated_patches_begin_with_the_real_ones_and_are_never_the_same():
    patches = torch.rand(PATCHES, 4) + 0.5
    many = repeated(patches, 2 * PATCHES + 5)
    assert torch.equal(many[:PATCHES], patches) and len(many.unique(dim=0)) == len(many)
    again = many[PATCHES : 2 * PATCHES]
    assert ((again - patches).abs() < 0.2 * patches).all()


def test_time_and_peak_memory_are_those_of_the_call():
    seconds, megabytes = measured(lambda: torch.ones(20_000_000), repeats=3)
    assert seconds > 0
    assert megabytes is None or 60 < megabytes < 120  # 80 MB of ones


def test_fewer_training_images_and_the_same_test_images(flags):
    settings, _ = SettingsParser(config, None).read(flags)
    category = settings.category
    with few_images(settings, category, 2) as few:
        first, *_, last = (sample.path.name for sample in train_samples(settings, category))
        assert [sample.path.name for sample in train_samples(few, category)] == [first, last]
        names = [[(s.path.name, s.defect) for s in samples_for_test(each, category)] for each in (few, settings)]
        assert names[0] == names[1]
    assert not few.data_path.exists()
