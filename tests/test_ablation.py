"""ablation.py and the memory benchmark: their rows, and that a variant is what the scripts make of it."""

import numpy as np
import pytest

import ablation
import config
import evaluation
import train
from benchmarks import memory
from utils.pictures.tables import read_csv
from utils.settings import SettingsParser


def test_rows_are_what_the_scripts_give(flags, tmp_path, capsys):
    """The first row as configured, another one with its settings changed: by ablation.py and by the scripts."""
    assert ablation.main([*flags, "--category", "tile", "--seeds", "1"]) == 0
    rows = read_csv(tmp_path / "out/ablation_10pct.csv")
    assert (tmp_path / "out/ablation_10pct.png").stat().st_size > 1000
    assert [row["variant"] for row in rows[:2]] == ["as configured", "the paper's own form"]
    assert {row["part"] for row in rows} >= {"frequency stream", "semantic stream", "metric", "layers", "image size"}
    assert all(0 <= row["image_auroc"] <= 1 and row["image_auroc_spread"] == 0 for row in rows)
    for variant, changes in {
        "as configured": [],
        "the paper's own form": ["--metric", "euclidean", "--embedding-dim", "None", "--bank-dtype", "float32"],
    }.items():
        mine = [*flags, *changes, "--save-dir", str(tmp_path / variant)]
        assert train.main(mine) == evaluation.main(mine) == 0
        (wanted,) = read_csv(tmp_path / variant / "final_evaluation_results.csv")
        found = next(row for row in rows if row["variant"] == variant)
        for name in ("image_auroc", "pixel_auroc", "aupro"):
            assert found[name] == pytest.approx(wanted[name], abs=1e-4), (variant, name)


def test_each_variant_changes_what_it_says():
    settings, _ = SettingsParser(config, None).read(["--backbone", "efficientnet_lite0"])
    variants = list(ablation.variants(settings))
    assert len(variants) == len(set(variants))
    base = variants[0]
    assert sum(variant.settings != base.settings or variant.layers != base.layers for variant in variants) >= 10
    larger = next(variant for variant in variants if variant.name == "320 px")
    assert (larger.settings.image_size, larger.settings.resize) == ((320, 320), round(256 * 320 / 224))


def test_several_categories_have_a_mean_and_one_that_fails_costs_no_other(flags, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablation, "variants", lambda settings: [ablation.Variant("", "as configured", settings)])
    next((data / "bolt/test/spot").glob("*.png")).write_bytes(b"no image")
    (data / "nut").symlink_to(data / "tile")
    assert ablation.main([*flags, "--category", "tile,bolt,nut", "--seeds", "2"]) == 1
    assert "bolt" in capsys.readouterr().err
    rows = read_csv(tmp_path / "out/ablation_10pct.csv")
    assert [row["category"] for row in rows] == ["tile", "nut", "mean"]
    assert rows[2]["image_auroc"] == pytest.approx(np.mean([row["image_auroc"] for row in rows[:2]]))


def test_memory_benchmark(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "RESULTS", tmp_path)
    monkeypatch.setattr(memory, "RATIOS", (0.1, 0.01))
    assert memory.main([*flags, "--category", "tile", "--seeds", "2"]) == 0
    rows = read_csv(tmp_path / "memory.csv")
    assert len(rows) == 8 and (tmp_path / "memory.png").stat().st_size > 1000
    for row in rows:
        assert row["lowest"] <= row["image_auroc"] <= row["highest"]
        width = 2 if "float16" in row["method"] or "configured" in row["method"] else 4
        assert row["bank_kb"] == row["vectors"] * row["dimensions"] * width / 1e3
