"""Categories of one, two and five training images: they train and score, and it is said what they cannot vouch for."""

import csv

import numpy as np
import pytest

import config
import evaluation
import predict
import train
from tests.conftest import make_category
from utils.data.dataset import test_samples as samples_for_test
from utils.pipeline.checkpoint import build_net, load_detector
from utils.pipeline.inference import score_samples
from utils.settings import SettingsParser


@pytest.fixture
def few(flags, tmp_path, request):
    """The flags of a category with so many training images, seen in three conditions."""
    make_category(tmp_path / "few", "tile", 3, train=request.param)
    return [*flags, "--data-path", str(tmp_path / "few"), "--conditions", "clean,noise20,blur1"]


@pytest.mark.parametrize(
    ("few", "count", "said"),
    [
        (1, 0, "no threshold can be set: training had too few images to hold any back"),
        (2, 2, "false-alarm rate 0.333, the smallest that 2 good parts can vouch for (0.01 asked, which takes 99)"),
        (5, 5, "false-alarm rate 0.167, the smallest that 5 good parts can vouch for (0.01 asked, which takes 99)"),
    ],
    indirect=["few"],
    ids=["1 image", "2 images", "5 images"],
)
@pytest.mark.parametrize("form", ["wedge", "paper"])
def test_they_train_and_score_and_say_what_they_cannot_vouch_for(few, count, said, form, tmp_path, capsys):
    few = [*few, "--form", form]
    assert train.main(few) == 0
    assert said in capsys.readouterr().out
    assert evaluation.main(few) == 0
    assert said in capsys.readouterr().out
    settings, _ = SettingsParser(config, None).read(few)
    detector, saved = load_detector(settings, "tile", 0.1, build_net(settings))
    assert len(saved.calibration_scores) == count and saved.calibration_scores.isfinite().all()
    assert saved.scales.isfinite().all() and (saved.scales > 0).all() and saved.offsets.isfinite().all()
    scored = score_samples([detector], samples_for_test(settings, "tile"), settings, "test")[0]
    assert np.isfinite(scored.scores).all() and np.isfinite(scored.maps).all()
    assert scored.scores[scored.labels == 1].mean() > scored.scores[scored.labels == 0].mean()
    with open(tmp_path / "out/final_evaluation_results.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert float(row["image_auroc"]) > 0.7
    assert (row["threshold"] == "") == (count == 0)


@pytest.mark.parametrize("few", [1], indirect=True)
def test_without_a_threshold_there_is_no_verdict_and_one_line_says_why(few, tmp_path, capsys):
    assert train.main(few) == 0
    capsys.readouterr()
    assert (
        predict.main([str(tmp_path / "out/10pct/model_data_tile_10pct.pt"), str(tmp_path / "few/tile/test/good")]) == 2
    )
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: no threshold can be set: training had too few images")
    assert len(error.splitlines()) == 1
