"""benchmark_fps.py as a user runs it."""

import csv
import shutil

import numpy as np
import pytest
import torch

import benchmark_fps
import config
import evaluation
import train
import train_patchcore
from benchmark_fps import PATCHCORE, WEDGE_NET, compare, load_pixels, timed_calls
from utils.data.dataset import test_samples
from utils.pipeline.checkpoint import build_net, load_detector
from utils.pipeline.inference import score_samples
from utils.settings import SettingsParser

test_samples.__test__ = False
COLUMNS = [
    "category", "model", "ratio", "categories", "image_auroc", "bank_vectors", "bank_mb", "p50_ms", "p95_ms", "fps",
    "speed_up", "end_to_end_p50_ms", "end_to_end_p95_ms", "end_to_end_fps", "backbone_p50_ms", "backbone_p95_ms",
    "backbone_fps", "calls", "backbone", "engine", "one_graph", "dtype", "bank_dtype", "device", "machine", "versions",
]  # fmt: skip


def read(tmp_path, ratio="10pct", name="benchmark_fps_results"):
    with open(tmp_path / "out" / f"{name}_{ratio}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def number(row, name):
    return float(row[name])


def test_every_bank_of_every_category_has_a_row(flags, tmp_path, capsys):
    every = [*flags, "--category", "all", "--sampling-ratio", "all"]
    assert train.main(every) == evaluation.main(every) == 0
    assert train_patchcore.main([*every, "--sampling-ratio", "1"]) == 0
    capsys.readouterr()
    assert benchmark_fps.main([*every, "--calls", "3"]) == 0
    shown = capsys.readouterr()

    rows = read(tmp_path, "100pct")
    models = [("PatchCore", "1.0"), ("WEDGE-Net", "1.0"), ("WEDGE-Net", "0.1"), ("WEDGE-Net", "0.01")]
    assert list(rows[0]) == COLUMNS
    assert [(row["category"], row["model"], row["ratio"]) for row in rows] == [
        *((category, *model) for model in models for category in ("tile", "bolt")),
        *(("mean", *model) for model in models),
    ]
    for row in rows:
        for kind in ("", "end_to_end_", "backbone_"):
            assert 0 < number(row, f"{kind}p50_ms") <= number(row, f"{kind}p95_ms")
            assert number(row, f"{kind}fps") == pytest.approx(1000 / number(row, f"{kind}p50_ms"))
        assert (row["calls"], row["device"], row["dtype"]) == ("3", "cpu", "float32")
        assert row["bank_dtype"] == ("float32" if row["model"] == "PatchCore" else "float16")
        assert row["backbone"] == "efficientnet_lite0"
        assert f"torch {torch.__version__.split('+')[0]}" in row["versions"]
        assert row["machine"] in shown.out
    # The bound is of the engine, whichever bank is asked.
    assert (
        len({row["backbone_p50_ms"] for row in rows if (row["category"], row["model"]) == ("tile", "WEDGE-Net")}) == 1
    )

    # The same scores as evaluation.py's, in the same banks.
    with open(tmp_path / "out/final_evaluation_results.csv", newline="", encoding="utf-8") as file:
        evaluated = {(row["category"], row["ratio"]): row for row in csv.DictReader(file)}
    for row in rows:
        if row["model"] == "WEDGE-Net":
            other = evaluated[row["category"], row["ratio"]]
            assert number(row, "image_auroc") == pytest.approx(number(other, "image_auroc"))
            assert number(row, "bank_mb") == pytest.approx(number(other, "bank_mb"))

    # Means are of the categories; speed-up is against PatchCore, here and in the mean.
    for mean, (tile, bolt) in zip(rows[8:], zip(rows[:8:2], rows[1:8:2], strict=True), strict=True):
        for name in ("image_auroc", "bank_mb", "p50_ms", "end_to_end_p95_ms", "backbone_p50_ms"):
            assert number(mean, name) == pytest.approx((number(tile, name) + number(bolt, name)) / 2)
        assert mean["categories"] == "2"
        assert number(mean, "speed_up") == pytest.approx(number(rows[8], "p50_ms") / number(mean, "p50_ms"))
        assert number(tile, "speed_up") == pytest.approx(number(rows[0], "p50_ms") / number(tile, "p50_ms"))
    assert (tmp_path / "out/benchmark_fps_results_100pct.png").stat().st_size > 10_000
    assert "no memory bank" not in shown.err


def test_a_bank_that_is_missing_is_named_and_the_first_row_is_the_measure(flags, tmp_path, capsys):
    assert train.main([*flags, "--sampling-ratio", "0.1,0.05"]) == 0
    assert benchmark_fps.main([*flags, "--calls", "2", "--sampling-ratio", "0.05"]) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if "no memory bank" in line)
    assert "PatchCore, WEDGE-Net 100 %, WEDGE-Net 1 %" in line
    rows = read(tmp_path, "5pct")
    assert [(row["category"], row["ratio"]) for row in rows] == [("tile", "0.1"), ("tile", "0.05")]
    assert number(rows[0], "speed_up") == 1


def test_a_category_without_a_bank_does_not_cost_the_others(trained, tmp_path, capsys):
    assert benchmark_fps.main([*trained, "--category", "all", "--calls", "2"]) == 1
    error = capsys.readouterr().err
    assert "error: bolt: bolt has no memory bank in SAVE_DIR" in error
    assert error.splitlines()[-1] == "1 of 2 failed: bolt"
    assert [row["category"] for row in read(tmp_path)] == ["tile", "mean"]
    assert benchmark_fps.main([*trained, "--category", "bolt", "--calls", "2"]) == 2


def test_a_baseline_of_another_backbone_tells_its_own(trained, tmp_path):
    """As where the settings have changed since train_patchcore.py ran."""
    assert train_patchcore.main([*trained, "--patchcore-backbone", "efficientnet_lite1"]) == 0
    assert benchmark_fps.main([*trained, "--calls", "2"]) == 0
    assert [(row["model"], row["backbone"]) for row in read(tmp_path)] == [
        (PATCHCORE, "efficientnet_lite1"), (WEDGE_NET, "efficientnet_lite0")
    ]  # fmt: skip


def test_an_unreadable_bank_is_one_line(trained, tmp_path, capsys):
    (tmp_path / "out/10pct/model_data_tile_10pct.pt").write_bytes(b"no checkpoint")
    assert benchmark_fps.main([*trained, "--calls", "2"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "model_data_tile_10pct.pt cannot be read" in line


def test_auroc_that_is_undefined_is_an_empty_cell(trained, data, tmp_path):
    shutil.rmtree(data / "tile/test/good")
    assert benchmark_fps.main([*trained, "--calls", "2"]) == 0
    (row,) = read(tmp_path)
    assert row["image_auroc"] == ""
    assert number(row, "fps") > 0


@pytest.mark.parametrize("calls", ["0", "-1", "many"])
def test_calls_must_be_a_count(flags, calls, capsys):
    assert benchmark_fps.main([*flags, "--calls", calls]) == 2
    assert "--calls" in capsys.readouterr().err


def test_end_to_end_is_from_pixels_to_the_score_of_evaluation(trained):
    settings, _ = SettingsParser(config, None).read(trained)
    detector, _ = load_detector(settings, "tile", 0.1, build_net(settings))
    samples = test_samples(settings, "tile")
    (scored,) = score_samples([detector], samples, settings, "test")

    pixels = load_pixels(settings, samples, limit=3)
    assert [array.dtype for array in pixels] == [torch.uint8] * 3
    assert pixels[0].shape == (64, 64, 3)
    bound, search, end_to_end = timed_calls(detector, pixels)
    expected = [scored.scores[place] for place in (0, 4, 7)] * 2  # the first, the last, one between; then over again
    np.testing.assert_allclose([end_to_end() for _ in expected], expected, rtol=1e-4)
    found = search()
    assert found.scores.shape == (1,) and found.maps.shape == (1, 64, 64)
    layer2, layer3 = bound()
    assert layer2.shape[-2:] == (8, 8)
    assert layer3.shape[-2:] == (4, 4)


def test_speed_up_counts_only_categories_that_have_both():
    def row(category, model, ratio, milliseconds):
        times = {f"{kind}p50_ms": milliseconds for kind in ("", "end_to_end_", "backbone_")}
        rates = {f"{kind}fps": 1000 / milliseconds for kind in ("", "end_to_end_", "backbone_")}
        return {"category": category, "model": model, "ratio": ratio, "image_auroc": None} | times | rates

    rows = [
        row("tile", WEDGE_NET, 0.1, 10.0),
        row("wood", WEDGE_NET, 0.1, 1000.0),  # slow, and without anything to compare with
        row("tile", PATCHCORE, 1.0, 50.0),
    ]
    single, means = compare(rows)
    assert [(r["category"], r["model"], r["speed_up"]) for r in single] == [
        ("tile", PATCHCORE, 1), ("tile", WEDGE_NET, 5), ("wood", WEDGE_NET, None)
    ]  # fmt: skip
    assert [(r["model"], r["categories"], r["speed_up"]) for r in means] == [(PATCHCORE, 1, 1), (WEDGE_NET, 2, 5)]
    assert means[1]["p50_ms"] == 505
    assert means[1]["fps"] == pytest.approx(1000 / 505)
    assert means[1]["image_auroc"] is None
