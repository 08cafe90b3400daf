"""benchmarks/real.py: its rows are what the scripts give, and what is measured is not measured again."""

import numpy as np
import pytest

import evaluation
import make_report
import train
from benchmarks import real
from utils.pictures.tables import format_cell, read_csv


def test_rows_are_those_of_the_scripts_and_are_not_measured_again(flags, tmp_path, monkeypatch, capsys):
    mine = [*flags, "--category", "tile,bolt", "--methods", "WEDGE-Net, PatchCore", "--seeds", "2", "--images", "5,all"]
    assert real.main(mine) == 0
    rows = read_csv(tmp_path / "out/real.csv")
    assert len(rows) == 2 * 2 * 2 * 2  # categories, methods, seeds, numbers of images
    again = [*flags, "--save-dir", str(tmp_path / "again")]
    assert train.main(again) == evaluation.main(again) == 0
    (wanted,) = read_csv(tmp_path / "again/final_evaluation_results.csv")
    first = next(row for row in rows if (row["category"], row["method"], row["images"]) == ("tile", "WEDGE-Net", "all"))
    for name, own in (("image_auroc", "image_auroc"), ("aupro", "aupro"), ("bank_mb", "mb")):
        assert first[own] == pytest.approx(wanted[name], rel=1e-6)

    summary = read_csv(tmp_path / "out/real_summary.csv")
    assert len(summary) == 2 * 2 * 3  # numbers of images, methods, categories and their mean
    mean = next(row for row in summary if (row["category"], row["method"], row["images"]) == ("mean", "PatchCore", 5))
    own = [row["image_auroc"] for row in rows if (row["method"], row["images"]) == ("PatchCore", 5)]
    assert len(own) == 4 and mean["image_auroc"] == pytest.approx(np.mean(own))

    monkeypatch.setattr(real, "train_variant", None)  # nothing is left to be trained
    assert real.main(mine) == 0
    assert read_csv(tmp_path / "out/real.csv") == rows
    assert make_report.main([*flags, "--category", "tile,bolt"]) == 0
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert format_cell("image_auroc", mean["image_auroc"]) in page
    assert "The means by the number of training pictures." in page  # under its picture
    capsys.readouterr()


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (["--methods", "PaDiM"], "--methods 'PaDiM' is unknown"),
        (["--images", "10,none"], "must be numbers or 'all', such as 10,40,all, not '10,none'"),
        (["--out", "/proc/none/real.csv"], "/proc/none"),
    ],
)
def test_bad_use_is_one_line(flags, capsys, bad, told):
    try:
        code = real.main([*flags, *bad])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
