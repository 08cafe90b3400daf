"""What the benchmarks reckon with; what they measure is not tested here: it depends on the machine."""

import pytest
import torch

import config
from benchmarks import good_parts, peers
from benchmarks.peers import few_images
from benchmarks.scaling import PATCHES, exponent, measured, repeated
from tests.conftest import make_category, small_flags
from utils.data.dataset import test_samples as samples_for_test
from utils.data.dataset import train_samples
from utils.pictures.tables import read_csv
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


def test_only_detectors_that_there_are_can_be_left_out(flags, capsys):
    for without, message in (("WEDGE-Net", "there are WEDGE-Net 1%"), (", ".join(peers.DETECTORS), "every detector")):
        assert peers.main([*flags, "--without", without]) == 2
        assert message in capsys.readouterr().err


def test_good_parts_are_measured_once_and_odd_ones_named(tmp_path, monkeypatch, capsys):
    make_category(tmp_path / "data", "tile", 5, train=20, good=6, bad=6)
    table = tmp_path / "good_parts.csv"
    own = [*small_flags(tmp_path), "--category", "tile", "--draws", "1", "--out", str(table)]
    assert good_parts.main(own) == 0
    (row,) = read_csv(table)
    assert row["good"] == 20 and row["mixed_in"] == 1 and row["found"] == 1
    assert row["clean_auroc"] == row["left_out_auroc"] == 1
    assert row["kept_at_1"] == pytest.approx(1 / 21) and row["kept_at_5"] == 0.05
    assert not list((tmp_path / "data/tile/train").rglob("mixed_*"))
    shown = capsys.readouterr().out
    assert "5 % defective pictures among the training pictures" in shown
    monkeypatch.setattr(good_parts, "measure", None)
    assert good_parts.main(own) == 0
    assert [*read_csv(table)] == [row]


def test_another_light_and_a_nearer_camera_are_as_said():
    image = torch.full((1, 3, 40, 60), 0.5)
    light = good_parts.shade(image)[0, 0, 0]
    assert light[0] == pytest.approx(0.35) and light[-1] == pytest.approx(0.6)
    square = torch.zeros(1, 1, 100, 100)
    square[:, :, 30:70, 30:70] = 1
    assert good_parts.nearer(square).mean() == pytest.approx((40 / 95) ** 2, rel=0.05)
