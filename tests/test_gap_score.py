"""eval_gap_score.py as a user runs it."""

import csv
import shutil
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import config
import eval_gap_score
import train
from eval_gap_score import averages, improvement, kind, measure
from utils.data.dataset import test_samples
from utils.pipeline.checkpoint import build_net, load_detector
from utils.pipeline.inference import score_samples
from utils.settings import SettingsParser

test_samples.__test__ = False
COLUMNS = [
    "category", "kind", "ratio", "gap_off", "gap_on", "improvement_percent", "separation_off", "separation_on",
    "auroc_off", "auroc_on",
]  # fmt: skip


@pytest.fixture
def both(flags, tmp_path):
    """The flags with the folders of both kinds of bank, which are not made yet."""
    return [*flags, "--semanticoff-dir", str(tmp_path / "out"), "--semanticon-dir", str(tmp_path / "on")]


def train_both(flags, tmp_path, *more):
    assert train.main([*flags, *more]) == 0
    assert train.main([*flags, *more, "--use-semantic", "True", "--save-dir", str(tmp_path / "on")]) == 0


def read(tmp_path):
    with open(tmp_path / "on/result_gap_via_sem_onoff.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def scores(flags, semantic, folder):
    """Labels and scores of 'tile' from the public pieces."""
    settings = replace(SettingsParser(config, None).read(flags)[0], use_semantic=semantic, save_dir=folder)
    detector, _ = load_detector(settings, "tile", 0.1, build_net(settings))
    (scored,) = score_samples([detector], test_samples(settings, "tile"), settings, "test")
    return scored.labels, scored.scores.astype(float)


def test_figures_are_those_of_the_scores(both, tmp_path, capsys):
    train_both(both, tmp_path)
    assert eval_gap_score.main(both) == 0
    (row,) = read(tmp_path)
    assert list(row) == COLUMNS
    assert (row["category"], row["kind"], row["ratio"]) == ("tile", "texture", "0.1")
    gaps = {}
    for name, semantic, folder in (("off", False, tmp_path / "out"), ("on", True, tmp_path / "on")):
        labels, values = scores(both, semantic, folder)
        good, bad = values[labels == 0], values[labels == 1]
        gaps[name] = bad.mean() - good.mean()
        assert float(row[f"gap_{name}"]) == pytest.approx(gaps[name], rel=1e-4)
        assert float(row[f"separation_{name}"]) == pytest.approx(gaps[name] / np.std(good, ddof=1), rel=1e-4)
        assert float(row[f"auroc_{name}"]) == pytest.approx(roc_auc_score(labels, values))
    assert gaps["on"] != pytest.approx(gaps["off"], rel=1e-3)
    assert float(row["improvement_percent"]) == pytest.approx((gaps["on"] / gaps["off"] - 1) * 100, rel=1e-3)
    assert f"{gaps['on']:.4f}" in capsys.readouterr().out
    assert (tmp_path / "on/result_gap_via_sem_onoff.png").stat().st_size > 5_000


def test_all_categories_and_ratios_end_with_averages(both, data, tmp_path):
    (data / "bolt").rename(data / "screw")
    every = [*both, "--category", "all", "--sampling-ratio", "1,0.1"]
    train_both(every, tmp_path)
    assert eval_gap_score.main(every) == 0
    rows = read(tmp_path)
    names = [(row["category"], row["kind"], row["ratio"]) for row in rows]
    single = [("screw", "object"), ("tile", "texture")]
    kinds = [("mean", "texture"), ("mean", "object"), ("mean", "all")]
    assert names == [(*name, ratio) for group in (single, kinds) for ratio in ("1.0", "0.1") for name in group]
    mean = rows[-1]
    assert float(mean["gap_on"]) == pytest.approx(np.mean([float(row["gap_on"]) for row in rows[2:4]]))
    assert float(mean["improvement_percent"]) == pytest.approx(
        (float(mean["gap_on"]) / float(mean["gap_off"]) - 1) * 100
    )


def test_a_missing_bank_costs_its_category_only(both, tmp_path, capsys):
    train_both(both, tmp_path)
    assert train.main([*both, "--category", "bolt"]) == 0
    assert eval_gap_score.main([*both, "--category", "all"]) == 1
    error = capsys.readouterr().err
    assert f"error: bolt: memory bank {tmp_path / 'on/10pct/model_data_bolt_10pct.pt'} is missing" in error
    assert f"make it with train.py --use-semantic True --save-dir {tmp_path / 'on'}" in error
    assert error.splitlines()[-1] == "1 of 2 failed: bolt"
    assert [row["category"] for row in read(tmp_path)] == ["tile", "mean"]


def test_a_bank_of_the_other_kind_is_refused(both, tmp_path, capsys):
    assert train.main(both) == 0
    shutil.copytree(tmp_path / "out", tmp_path / "on")
    assert eval_gap_score.main(both) == 2
    assert "USE_SEMANTIC = False, the setting is True" in capsys.readouterr().err


def test_without_defects_the_figures_are_empty(both, data, tmp_path, capsys):
    train_both(both, tmp_path, "--category", "all")
    shutil.rmtree(data / "tile/test/spot")
    assert eval_gap_score.main([*both, "--category", "all"]) == 0
    tile, bolt, *_, mean = read(tmp_path)
    assert [tile[name] for name in COLUMNS[3:]] == [""] * 7
    assert mean["gap_on"] == bolt["gap_on"] != ""
    assert "[tile] score gap: undefined" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_said_before_the_work(both, tmp_path, capsys):
    (tmp_path / "on").write_text("a file, not a folder")
    assert eval_gap_score.main(both) == 2
    assert "SemanticON_DIR" in capsys.readouterr().err


def test_measure_by_hand():
    labels = np.array([0, 0, 1, 1])
    assert measure(labels, np.array([1.0, 3.0, 4.0, 8.0])) == {
        "gap": 4.0, "separation": pytest.approx(4 / 2**0.5), "auroc": 1.0
    }  # fmt: skip
    assert measure(labels, np.array([2.0, 2.0, 4.0, 4.0]))["separation"] is None  # no spread
    assert measure(np.array([0, 1]), np.array([2.0, 1.0])) == {"gap": -1.0, "separation": None, "auroc": 0.0}
    assert set(measure(np.array([0, 0]), np.array([2.0, 1.0])).values()) == {None}


def test_improvement_needs_a_positive_gap_to_grow_from():
    assert improvement({"gap_off": 0.2, "gap_on": 0.3}) == pytest.approx(50)
    assert improvement({"gap_off": 0.2, "gap_on": -0.1}) == pytest.approx(-150)
    for off, on in ((-0.1, 0.3), (0.0, 0.3), (None, 0.3), (0.2, None)):
        assert improvement({"gap_off": off, "gap_on": on}) is None


def test_kinds():
    assert [kind(name) for name in ("carpet", "hazelnut", "magnetic_tile")] == ["texture", "object", "other"]
    row = dict.fromkeys(COLUMNS, 1.0) | {"ratio": 0.1, "kind": "other"}
    assert [mean["kind"] for mean in averages([row, row])] == ["other"]  # 'all' would only say it again
