"""What each false-alarm rate buys: evaluation.py's second table, and how many pictures a rate takes."""

import csv
import itertools

import numpy as np
import pytest
from conftest import make_category

import evaluation
import make_report
import train
from models.conformal import conformal_threshold, describe_rate, scores_needed, smallest_rate
from utils.metrics import RATES, rates_bought

COLUMNS = [
    "category", "ratio", "asked_rate", "kept_rate", "threshold", "false_alarm_rate", "detection_rate",
    "training_pictures", "pictures_needed",
]  # fmt: skip


@pytest.mark.parametrize(("rate", "needed"), [(0.01, 99), (0.02, 49), (0.05, 19), (0.1, 9), (0.4, 2), (0.03, 33)])
def test_as_many_pictures_as_a_rate_takes_can_vouch_for_it_and_one_less_cannot(rate, needed):
    assert scores_needed(rate) == needed
    assert smallest_rate(np.zeros(needed)) <= rate + 1e-12
    assert smallest_rate(np.zeros(needed - 1)) > rate
    assert f"takes {needed}" not in describe_rate(np.zeros(needed), rate)
    assert f"takes {needed}" in describe_rate(np.zeros(needed - 1), rate)


def test_each_rate_has_the_figures_of_its_threshold():
    rng = np.random.default_rng(0)
    calibration, good, bad = rng.normal(0, 1, 60), rng.normal(0, 1, 200), rng.normal(2, 1, 100)
    labels, scores = np.repeat([0, 1], [200, 100]), np.concatenate([good, bad])
    rows = rates_bought(labels, scores, calibration)
    assert [row["asked_rate"] for row in rows] == list(RATES)
    for row in rows:
        assert row["threshold"] == conformal_threshold(calibration, row["asked_rate"])
        assert row["false_alarm_rate"] == (good > row["threshold"]).mean()
        assert row["detection_rate"] == (bad > row["threshold"]).mean()
        assert row["kept_rate"] == max(row["asked_rate"], 1 / 61)
        assert row["training_pictures"] == 60
    assert [row["pictures_needed"] for row in rows] == [99, 49, 19, 9, 4]
    for name in ("false_alarm_rate", "detection_rate"):
        assert all(one[name] <= other[name] for one, other in itertools.pairwise(rows))


def test_what_is_not_there_is_empty():
    rows = rates_bought(np.zeros(5), np.arange(5.0), np.arange(10.0))
    assert all(row["detection_rate"] is None for row in rows)


@pytest.fixture
def small(tmp_path):
    make_category(tmp_path / "data", "tile", 0)
    make_category(tmp_path / "data", "bolt", 1)
    pairs = {
        "data-path": tmp_path / "data",
        "save-dir": tmp_path / "out",
        "backbone": "efficientnet_lite0",
        "image-size": 64,
        "resize": 72,
        "conditions": "clean",
        "num-workers": 0,
        "device": "cpu",
    }
    return [text for name, value in pairs.items() for text in (f"--{name}", str(value))]


def rows(tmp_path):
    with open(tmp_path / "out/false_alarm_rates.csv", newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        found = list(reader)
    assert reader.fieldnames == COLUMNS
    return found


def test_evaluation_writes_table_and_curve_and_says_how_many_it_takes(small, tmp_path, capsys):
    assert train.main(small) == 0
    assert evaluation.main(small) == 0
    shown = capsys.readouterr().out
    assert "the smallest that 8 good parts can vouch for (0.01 asked, which takes 99): good parts called" in shown
    assert "what each false-alarm rate buys" in shown
    table = rows(tmp_path)
    assert [float(row["asked_rate"]) for row in table] == list(RATES)
    assert [float(row["kept_rate"]) for row in table] == pytest.approx([1 / 9, 1 / 9, 1 / 9, 1 / 9, 0.2])
    assert (tmp_path / "out/false_alarm_rates.png").stat().st_size > 10_000
    assert make_report.main(small) == 0
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "What each false-alarm rate buys" in page.split('id="detection"')[1].split("</section>")[0]


def test_several_categories_and_ratios_have_means(small, tmp_path):
    every = [*small, "--category", "all", "--sampling-ratio", "0.1, 0.01"]
    assert train.main(every) == evaluation.main(every) == 0
    table = rows(tmp_path)
    assert [row["category"] for row in table] == (["tile"] * 5 + ["bolt"] * 5) * 2 + ["mean"] * 10
    found = [float(row["detection_rate"]) for row in table if row["ratio"] == "0.1" and row["asked_rate"] == "0.2"]
    assert found[2] == pytest.approx(np.mean(found[:2]))
