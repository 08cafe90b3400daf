"""eval_noise_robustness.py and eval_color_robustness.py as a user runs them."""

import csv
import shutil

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import config
import eval_color_robustness
import eval_noise_robustness
import train
import train_patchcore
from utils.data.corruptions import color_jitter, gaussian_noise
from utils.data.dataset import batches, test_samples
from utils.pipeline.checkpoint import build_net, load_checkpoint, load_detector
from utils.pipeline.patchcore import load_patchcore
from utils.settings import SettingsParser

test_samples.__test__ = False
COLUMNS = [
    "category", "ratio", "level", "wedge_net_auroc", "patchcore_auroc", "wedge_net_false_alarm_rate",
    "wedge_net_detection_rate", "patchcore_false_alarm_rate", "patchcore_detection_rate", "wedge_net_unfamiliar_rate",
]  # fmt: skip
RANGES = [f"{method}_auroc_{end}" for method in ("wedge_net", "patchcore") for end in ("min", "max")]


def read(folder, category="tile", ratio="10pct", name="full_noise_comparison_smoothed"):
    with open(folder / f"{name}_{category}_{ratio}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def expected(flags, corrupt):
    """The figures of both methods, each computed image by image from the public pieces."""
    settings, _ = SettingsParser(config, None).read(flags)
    detectors = {"wedge_net": load_detector(settings, "tile", 0.1, build_net(settings))[0]}
    detectors["patchcore"] = load_patchcore(settings, "tile")
    samples = test_samples(settings, "tile")
    labels = np.array([sample.label for sample in samples])
    images = torch.cat([batch.images for batch in batches(samples, settings)])
    names = [f"tile/test/{sample.defect}/{sample.path.name}" for sample in samples]
    figures = {}
    for method, detector in detectors.items():
        scores = torch.cat(
            [detector.predict(corrupt(images[i : i + 1], names[i : i + 1])).scores for i in range(len(names))]
        ).numpy()
        threshold = max(detector.calibration_scores.tolist())  # of eight scores nothing below 11 % can be asked
        figures[f"{method}_auroc"] = roc_auc_score(labels, scores)
        figures[f"{method}_false_alarm_rate"] = np.mean(scores[labels == 0] > threshold)
        figures[f"{method}_detection_rate"] = np.mean(scores[labels == 1] > threshold)
    return figures


def check(row, figures):
    for name, value in figures.items():
        assert float(row[name]) == pytest.approx(value, abs=1e-9), name


def test_noise_csv_holds_the_figures_of_the_scores(trained, patchcore_bank, tmp_path, capsys):
    assert eval_noise_robustness.main(trained) == 0
    table = read(tmp_path / "out")
    assert list(table[0]) == COLUMNS
    assert [float(row["level"]) for row in table] == [0, 10, 20, 30, 40]
    assert {(row["category"], row["ratio"]) for row in table} == {("tile", "0.1")}
    check(table[0], expected(trained, lambda images, names: images))
    check(table[2], expected(trained, lambda images, names: gaussian_noise(images, 20, names, 42)))
    assert table[0] != table[2]
    assert (tmp_path / "out/figure5_noise_robustness_tile_10pct.png").stat().st_size > 10_000
    shown = capsys.readouterr()
    assert "full_noise_comparison_smoothed_tile_10pct.csv" in shown.out and "PatchCore" not in shown.err


def test_colour_csv_holds_the_figures_of_the_scores(trained, patchcore_bank, tmp_path):
    assert eval_color_robustness.main(trained) == 0
    table = read(tmp_path / "out", name="final_color_comparison")
    assert list(table[0]) == COLUMNS
    assert [float(row["level"]) for row in table] == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    check(table[3], expected(trained, lambda images, names: color_jitter(images, 1.5)))
    assert (tmp_path / "out/figure6_color_robustness_tile_10pct.png").stat().st_size > 10_000


def test_batch_size_workers_and_place_do_not_matter_but_the_seed_does(trained, data, tmp_path):
    assert eval_noise_robustness.main(trained) == 0
    first = read(tmp_path / "out")
    shutil.move(data, tmp_path / "moved")
    moved = ["--data-path", str(tmp_path / "moved"), "--batch-size", "3", "--num-workers", "2"]
    assert eval_noise_robustness.main([*trained, *moved]) == 0
    assert read(tmp_path / "out") == first


def test_several_seeds_give_a_mean_and_a_range(trained, tmp_path):
    assert eval_noise_robustness.main([*trained, "--noise-seeds", "2"]) == 0
    several = read(tmp_path / "out")
    assert list(several[0]) == COLUMNS + RANGES
    single = []
    for seed in (42, 43):
        # What a bank was made with is saved, whatever the seed says, so only the noise differs.
        assert eval_noise_robustness.main([*trained, "--seed", str(seed)]) == 0
        single.append([float(row["wedge_net_auroc"]) for row in read(tmp_path / "out")])
    for column, function in {"": np.mean, "_min": np.min, "_max": np.max}.items():
        found = [float(row[f"wedge_net_auroc{column}"]) for row in several]
        assert found == pytest.approx(list(function(single, axis=0)))
    assert len({tuple(curve) for curve in single}) > 1
    assert len({curve[0] for curve in single}) == 1  # without noise there is nothing to draw


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_wrong_number_of_seeds_is_refused(flags, capsys, value):
    assert eval_noise_robustness.main([*flags, f"--noise-seeds={value}"]) == 2
    assert "--noise-seeds: must be a whole number of at least 1" in capsys.readouterr().err


def test_all_categories_and_several_ratios_without_patchcore(flags, tmp_path, capsys):
    every = [*flags, "--category", "all", "--sampling-ratio", "1, 0.01"]
    assert train.main(every) == 0
    assert eval_color_robustness.main([*every, "--levels", "0,1"]) == 0
    assert capsys.readouterr().err.count("PatchCore is left out for tile, bolt") == 1
    for category in ("tile", "bolt"):
        for ratio, number in {"100pct": "1.0", "1pct": "0.01"}.items():
            table = read(tmp_path / "out", category, ratio, "final_color_comparison")
            assert {row["ratio"] for row in table} == {number}
            assert all(row["patchcore_auroc"] == row["patchcore_detection_rate"] == "" for row in table)
            assert all(0 <= float(row["wedge_net_auroc"]) <= 1 for row in table)
            assert (tmp_path / f"out/figure6_color_robustness_{category}_{ratio}.png").exists()


def test_a_category_that_fails_does_not_cost_the_others(flags, tmp_path, capsys):
    bolt = [*flags, "--category", "bolt"]
    assert train.main(bolt) == train_patchcore.main(bolt) == 0
    assert eval_noise_robustness.main([*flags, "--category", "all", "--levels", "0,10"]) == 1
    error = capsys.readouterr().err
    assert "error: tile: memory bank" in error and "1 of 2 failed: tile" in error
    assert not (tmp_path / "out/full_noise_comparison_smoothed_tile_10pct.csv").exists()
    assert float(read(tmp_path / "out", "bolt")[0]["patchcore_auroc"]) >= 0


def test_an_unreadable_patchcore_bank_fails_the_comparison_but_keeps_our_curve(
    trained, patchcore_bank, tmp_path, capsys
):
    patchcore_bank.write_bytes(patchcore_bank.read_bytes()[:5000])
    assert eval_noise_robustness.main(trained) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith(f"error: memory bank {patchcore_bank} cannot be read")
    table = read(tmp_path / "out")
    assert [row["patchcore_auroc"] for row in table] == [""] * 5
    assert float(table[0]["wedge_net_auroc"]) > 0.5


def test_a_patchcore_bank_without_calibration_scores_has_auroc_alone(trained, patchcore_bank, tmp_path):
    torch.save({"memory_bank": load_checkpoint(patchcore_bank).memory_banks[0]}, patchcore_bank)
    assert eval_noise_robustness.main(trained) == 0
    for row in read(tmp_path / "out"):
        assert 0 <= float(row["patchcore_auroc"]) <= 1
        assert row["patchcore_false_alarm_rate"] == row["patchcore_detection_rate"] == ""


@pytest.mark.parametrize("missing", ["good", "spot"])
def test_an_undefined_auroc_is_said_and_left_empty(trained, data, tmp_path, capsys, missing):
    shutil.rmtree(data / "tile/test" / missing)
    assert eval_noise_robustness.main(trained) == 0
    assert "[tile] image-level AUROC: undefined" in capsys.readouterr().out
    empty, full = ("false_alarm", "detection") if missing == "good" else ("detection", "false_alarm")
    for row in read(tmp_path / "out"):
        assert row["wedge_net_auroc"] == row[f"wedge_net_{empty}_rate"] == ""
        assert 0 <= float(row[f"wedge_net_{full}_rate"]) <= 1


def test_a_save_dir_that_cannot_be_written_is_one_line(flags, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    assert eval_color_robustness.main([*flags, "--save-dir", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "SAVE_DIR" in error[0] and "cannot be written" in error[0]
