import csv
import dataclasses

import pytest
import torch

import ablation_frequency
import eval_blur_robustness
import evaluation
import train
from ablation_frequency import shrink
from tests.test_robustness import COLUMNS, check, expected, read, save_patchcore
from utils.data.corruptions import gaussian_blur
from utils.pipeline.robustness import BLUR, COLOUR, DARK, NOISE


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def few_levels(monkeypatch):
    levels = {"noise": (NOISE, 20), "blur": (BLUR, 2), "colour": (COLOUR, 1), "dark": (DARK, 0.5)}
    short = {name: (dataclasses.replace(corruption, levels=(own,)), own) for name, (corruption, own) in levels.items()}
    monkeypatch.setattr(ablation_frequency, "CORRUPTIONS", short)


def test_rows_are_what_the_scripts_give(flags, tmp_path, few_levels, capsys):
    own = [*flags, "--category", "all", "--conditions", "clean,noise20"]
    assert ablation_frequency.main(own) == 0
    rows = table(tmp_path / "out/ablation_frequency_10pct.csv")
    names = [
        "PatchCore", "off", "shrinkage", "gate", "light alone", "conditions alone", "both", "both, equal memory",
        "both, semantic off",
    ]  # fmt: skip
    assert list(dict.fromkeys(row["variant"] for row in rows)) == names
    assert len(rows) == 3 * 9 * 8  # two categories and their mean, variants, levels
    summary = {
        (row["category"], row["variant"]): row for row in table(tmp_path / "out/ablation_frequency_10pct_summary.csv")
    }
    assert not list((tmp_path / "out").glob(".ablation*"))
    for stream, name in {"off": "off", "condition": "both"}.items():
        again = [*own, "--frequency-stream", stream, "--save-dir", str(tmp_path / stream)]
        assert train.main(again) == evaluation.main(again) == 0
        (result,) = (
            row for row in table(tmp_path / stream / "final_evaluation_results.csv") if row["category"] == "bolt"
        )
        assert float(summary["bolt", name]["clean_auroc"]) == pytest.approx(float(result["image_auroc"]))
        assert float(summary["bolt", name]["bank_mb"]) == pytest.approx(float(result["bank_mb"]))
    of_levels = [float(row["auroc"]) for row in rows if (row["category"], row["variant"]) == ("bolt", "both")]
    assert float(summary["bolt", "both"]["noise_auroc"]) == pytest.approx(sum(of_levels[:2]) / 2)
    one, two = (float(summary[name, "both"]["noise_auroc"]) for name in ("bolt", "tile"))
    assert float(summary["mean", "both"]["noise_auroc"]) == pytest.approx((one + two) / 2)
    for row in summary.values():
        assert float(row["fps"]) > 0 and float(row["train_s"]) > 0
    assert float(summary["bolt", "both, equal memory"]["bank_mb"]) <= float(summary["bolt", "PatchCore"]["bank_mb"])
    assert (tmp_path / "out/ablation_frequency_10pct.png").stat().st_size > 10_000
    assert "mean of 2 categories" in capsys.readouterr().out


def test_shrinkage_takes_noise_out_and_leaves_a_clean_picture():
    size = 64
    ramp = torch.linspace(0.2, 0.8, size).expand(1, 3, size, size)
    noisy = (ramp + 0.05 * torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    for wavelet in ("haar", "sym4"):
        assert (shrink(noisy, wavelet) - ramp).square().mean() < 0.2 * (noisy - ramp).square().mean()
        assert (shrink(ramp, wavelet) - ramp).abs().max() < 0.02
        assert shrink(noisy[..., :61, :63], wavelet).shape == (1, 3, 61, 63)


def test_one_category_has_no_mean_and_undefined_stays_empty(flags, data, tmp_path, few_levels):
    for path in (data / "tile/test/good").iterdir():
        path.unlink()
    assert ablation_frequency.main([*flags, "--conditions", "clean"]) == 0
    rows = table(tmp_path / "out/ablation_frequency_10pct_summary.csv")
    assert {row["category"] for row in rows} == {"tile"}
    assert {row["clean_auroc"] for row in rows} == {row["blur_false_alarm_rate"] for row in rows} == {""}


def test_blur_csv_holds_the_figures_of_the_scores(flags, tmp_path):
    own = [*flags, "--frequency-stream", "condition", "--conditions", "clean,blur2"]
    assert train.main(own) == 0
    save_patchcore(own, "tile")
    assert eval_blur_robustness.main([*own, "--levels", "2,0"]) == 0
    rows = read(tmp_path / "out", name="full_blur_comparison")
    assert list(rows[0]) == COLUMNS
    assert [float(row["level"]) for row in rows] == [0, 2]
    check(rows[1], expected(own, lambda images, names: gaussian_blur(images, 2)))
    assert float(rows[0]["wedge_net_unfamiliar_rate"]) <= 0.5
    assert (tmp_path / "out/figure_blur_robustness_tile_10pct.png").stat().st_size > 10_000


@pytest.mark.parametrize("levels", ["", "a", "-1", "0,inf", "300"])
def test_levels_must_be_numbers(flags, capsys, levels):
    assert eval_blur_robustness.main([*flags, "--levels", levels]) == 2
    assert "--levels: must be numbers from 0 to 255" in capsys.readouterr().err


def test_evaluation_tells_each_images_condition(flags, tmp_path, capsys):
    own = [*flags, "--frequency-stream", "condition", "--conditions", "clean,noise20"]
    assert train.main(own) == evaluation.main(own) == 0
    rows = table(tmp_path / "out/conditions_tile.csv")
    assert [row["file"] for row in rows[::4]] == ["tile/test/good/000.png", "tile/test/spot/000.png"]
    assert {row["condition"] for row in rows} == {"clean"}
    assert f"{len(rows)} clean" in capsys.readouterr().out
    assert (tmp_path / "out/conditions_tile.png").stat().st_size > 10_000
