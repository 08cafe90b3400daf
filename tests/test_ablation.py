"""ablation.py: its rows, and that a variant is what the scripts make of it."""

import dataclasses

import numpy as np
import pytest

import ablation
import config
import evaluation
import train
from models.wedge_net import RECIPE
from utils.pictures.tables import read_csv
from utils.pipeline.experiments import Variant
from utils.settings import SettingsParser


def test_rows_are_what_the_scripts_give(flags, tmp_path, monkeypatch):
    """As configured, and in the paper's form: by ablation.py and by the scripts."""
    some = [("", Variant("as configured")), ("form", Variant("paper", {"form": "paper", "use_semantic": True}))]
    monkeypatch.setattr(ablation, "variants", lambda settings: some)
    assert ablation.main([*flags, "--category", "tile", "--seeds", "1", "--corruptions"]) == 0
    rows = read_csv(tmp_path / "out/ablation_10pct.csv")
    assert (tmp_path / "out/ablation_10pct.png").stat().st_size > 1000
    assert [row["variant"] for row in rows] == ["as configured", "paper"]
    for row, changes in zip(rows, ([], ["--form", "paper", "--use-semantic", "True"]), strict=True):
        assert row["image_auroc_spread"] == 0 and 0 <= row["noise_auroc"] <= 1 and 0 <= row["dark_false_alarms"] <= 1
        mine = [*flags, *changes, "--save-dir", str(tmp_path / row["variant"])]
        assert train.main(mine) == evaluation.main(mine) == 0
        (wanted,) = read_csv(tmp_path / row["variant"] / "final_evaluation_results.csv")
        for name in ("image_auroc", "pixel_auroc", "aupro", "bank_mb"):
            assert row[name] == pytest.approx(wanted[name], abs=1e-4), (row["variant"], name)


def test_each_variant_changes_one_thing():
    settings, _ = SettingsParser(config, None).read(["--backbone", "efficientnet_lite0"])
    variants = list(ablation.variants(settings))
    assert len({variant.name for _, variant in variants}) == len(variants) >= 10
    assert variants[0][1].apply(settings) == settings and variants[0][1].recipe == RECIPE
    for part, variant in variants[1:]:
        different = variant.apply(settings) != settings or variant.recipe != RECIPE or variant.patchcore
        assert part and different, variant.name
        changed = [
            field.name
            for field in dataclasses.fields(RECIPE)
            if getattr(variant.recipe, field.name) != getattr(RECIPE, field.name)
        ]
        assert len(changed) <= 1


def test_several_categories_have_a_mean_and_one_that_fails_costs_no_other(flags, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablation, "variants", lambda settings: [("", Variant("as configured"))])
    next((data / "bolt/test/spot").glob("*.png")).write_bytes(b"no image")
    (data / "nut").symlink_to(data / "tile")
    assert ablation.main([*flags, "--category", "tile,bolt,nut", "--seeds", "2"]) == 1
    assert "bolt" in capsys.readouterr().err
    rows = read_csv(tmp_path / "out/ablation_10pct.csv")
    assert [row["category"] for row in rows] == ["tile", "nut", "mean"]
    assert rows[2]["image_auroc"] == pytest.approx(np.mean([row["image_auroc"] for row in rows[:2]]))
