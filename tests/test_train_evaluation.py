"""train.py and evaluation.py as a user runs them."""

import csv
import itertools
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import config
import evaluation
import train
from utils.data.dataset import test_samples
from utils.pipeline.checkpoint import FORMAT, build_net, load_checkpoint, load_detector
from utils.pipeline.inference import score_samples
from utils.settings import SettingsParser

test_samples.__test__ = False
ROOT = Path(train.__file__).parent


def run(script, flags, *more, env=None, **options):
    """Run a script in a process of its own."""
    command = [sys.executable, str(ROOT / script), *flags, *more]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}), check=False, **options)


def bank(tmp_path, ratio="10pct", category="tile"):
    return tmp_path / "out" / ratio / f"model_data_{category}_{ratio}.pt"


def rows(tmp_path):
    with open(tmp_path / "out/final_evaluation_results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def scores_of(flags):
    settings, _ = SettingsParser(config, None).read(flags)
    net = build_net(settings)
    detector, _ = load_detector(settings, "tile", 0.1, net)
    return score_samples([detector], test_samples(settings, "tile"), settings, "test")[0]


def test_all_categories_and_ratios(flags, tmp_path, capsys):
    every = [*flags, "--category", "all", "--sampling-ratio", "all"]
    assert train.main(every) == 0
    assert evaluation.main(every) == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"^\[tile\] Image-level AUROC: [01]\.\d{4}", shown, re.M)) == 3
    assert len(re.findall(r"^\[mean of 2\] Image-level AUROC", shown, re.M)) == 3

    table = rows(tmp_path)
    assert [row["category"] for row in table] == ["tile", "bolt"] * 3 + ["mean"] * 3
    assert [row["ratio"] for row in table] == ["1.0"] * 2 + ["0.1"] * 2 + ["0.01"] * 2 + ["1.0", "0.1", "0.01"]
    assert [int(row["bank_vectors"]) for row in table[::2][:3]] == [8 * (64 + 16), 102 + 25, 10 + 2]
    assert (tmp_path / "out/final_evaluation_results.png").stat().st_size > 10_000
    mean = [np.mean([float(row["image_auroc"]) for row in table[:2]])]
    assert float(table[6]["image_auroc"]) == pytest.approx(mean[0])


@pytest.mark.parametrize(("size", "told"), [((96, 96), None), ((192, 96), "62%")])
def test_edges_that_are_not_looked_at_are_told(flags, data, capsys, size, told):
    for path in (data / "tile/train/good").iterdir():
        Image.open(path).resize(size).save(path)
    crop = ["--center-crop", "true", "--image-size", "64", "--resize", "73"]
    assert train.main([*flags, *crop]) == 0
    shown = capsys.readouterr().out
    assert "CENTER_CROP leaves" not in shown if told is None else f"[tile] CENTER_CROP leaves {told} of" in shown


def test_csv_holds_the_figures_of_the_scores(trained, tmp_path):
    assert evaluation.main(trained) == 0
    scored = scores_of(trained)
    row = rows(tmp_path)[0]
    assert float(row["image_auroc"]) == pytest.approx(roc_auc_score(scored.labels, scored.scores))
    assert float(row["pixel_auroc"]) == pytest.approx(roc_auc_score(scored.masks.ravel(), scored.maps.ravel()))
    assert float(row["image_auroc"]) > 0.8  # dark squares on stripes are not hard
    assert float(row["pixel_auroc"]) > 0.8


def test_two_processes_and_another_place_give_the_same_scores(flags, tmp_path):
    assert train.main(flags) == 0
    first = scores_of(flags)
    shutil.move(tmp_path / "out", tmp_path / "kept")
    assert run("train.py", flags, env={"PYTHONHASHSEED": "7"}).returncode == 0
    again = scores_of(flags)
    np.testing.assert_array_equal(first.scores, again.scores)
    one = load_checkpoint(bank(tmp_path))
    shutil.rmtree(tmp_path / "out")
    shutil.move(tmp_path / "kept", tmp_path / "out")
    other = load_checkpoint(bank(tmp_path))
    assert all(map(torch.equal, one.memory_banks, other.memory_banks))
    for name in ("scales", "offsets", "calibration_scores"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    np.testing.assert_array_equal(scores_of(flags).scores, first.scores)
    batch_of_one = scores_of([*flags, "--batch-size", "1"])
    np.testing.assert_allclose(batch_of_one.scores, first.scores, rtol=1e-4)


def test_a_saved_gate_is_used_whatever_the_seed_says(flags):
    paper = [*flags, "--form", "paper"]
    assert train.main(paper) == 0
    first = scores_of(paper)
    other = scores_of([*paper, "--seed", "9"])
    np.testing.assert_array_equal(first.scores, other.scores)


def test_each_bank_is_asked_with_the_gate_it_was_made_with(flags, tmp_path):
    """Two ratios trained with different seeds, evaluated together."""
    paper = [*flags, "--form", "paper"]
    assert train.main(paper) == 0
    assert train.main([*paper, "--sampling-ratio", "0.2", "--seed", "1"]) == 0
    assert evaluation.main(paper) == 0
    alone = rows(tmp_path)[0]["image_auroc"], rows(tmp_path)[0]["f1_threshold"]
    assert evaluation.main([*paper, "--sampling-ratio", "0.2, 0.1"]) == 0
    together = rows(tmp_path)[1]
    assert together["ratio"] == "0.1"
    assert (together["image_auroc"], together["f1_threshold"]) == alone


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_what_fits_is_skipped_and_what_does_not_is_kept(trained, tmp_path, capsys):
    before = bank(tmp_path).read_bytes()
    assert train.main(trained) == 0
    assert "skipped (--overwrite" in capsys.readouterr().out
    for more, reason in {
        ("--form", "paper"): "FORM = 'wedge', the setting is 'paper'",
        ("--use-semantic", "true"): "USE_SEMANTIC = False, the setting is True",
        ("--conditions", "clean,blur1"): "CONDITIONS = 'clean', the setting is 'clean,blur1'",
        ("--wavelet-type", "db2"): "WAVELET_TYPE = 'haar', the setting is 'db2'",
        ("--backbone", "resnet18", "--backbone-weights", "random"): "BACKBONE = 'efficientnet_lite0'",
        ("--backbone-weights", "random"): "other backbone weights",
        ("--sampling-method", "random"): "coreset sampling",
        ("--seed", "1"): "SEED 42",
    }.items():
        assert train.main([*trained, *more]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert reason in error
        assert "--overwrite" in error
        assert bank(tmp_path).read_bytes() == before
    assert train.main([*trained, "--seed", "1", "--overwrite"]) == 0
    assert load_checkpoint(bank(tmp_path)).seed == 1


def test_new_training_images_are_noticed(trained, data, capsys):
    (data / "tile/train/good/007.png").unlink()
    assert train.main(trained) == 2
    assert "8 other training images" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*random weights")
@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--form", "paper"), "FORM = 'wedge', the setting is 'paper'"),
        (("--use-semantic", "true"), "USE_SEMANTIC = False, the setting is True"),
        (("--wavelet-type", "db2"), "WAVELET_TYPE = 'haar', the setting is 'db2'"),
        (("--backbone", "resnet18", "--backbone-weights", "random"), "BACKBONE = 'efficientnet_lite0'"),
        (("--backbone-weights", "random"), "other backbone weights"),
        (("--image-size", "72"), "IMAGE_SIZE = 64, the setting is 72"),
        (("--sampling-ratio", "0.5"), "50pct.pt is missing"),
    ],
)
def test_evaluation_refuses_a_bank_that_does_not_fit(trained, more, reason, tmp_path, capsys):
    (tmp_path / "out/final_evaluation_results.csv").write_text("of yesterday")
    assert evaluation.main([*trained, *more]) == 2
    assert reason in capsys.readouterr().err.strip().splitlines()[-1]
    assert (tmp_path / "out/final_evaluation_results.csv").read_text() == "of yesterday"


def save(path, contents):
    torch.save(contents, path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-500]), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: save(path, {"memory_bank": torch.rand(3, 4)}), "no format version"),
        (lambda path: save(path, {"format": 99}), "newer"),
        (
            lambda path: save(path, {"format": FORMAT - 1}),
            "older version of this program: train it again",
        ),
        (lambda path: save(path, {"format": FORMAT}), "lacks"),
        (lambda path: save(path, Path("code")), "damaged or no checkpoint"),
    ],
)
@pytest.mark.parametrize("script", [train, evaluation])
def test_a_damaged_bank_is_one_line(trained, tmp_path, capsys, damage, reason, script):
    path = bank(tmp_path)
    damage(path)
    before = path.read_bytes()
    assert script.main(trained) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert len(error.strip().splitlines()) == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize("script", [train, evaluation])
@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--data-path", "nowhere"), "prepare_data.py"),
        (("--category", "nut"), "there are: bolt, tile"),
        (("--save-dir", "{file}/out"), "cannot be written"),
        (("--sampling-ratio", "0"), "SAMPLING_RATIO"),
        (("--no-such", "nowhere"), "--no-such"),
    ],
)
def test_bad_use_is_one_line_and_exit_code_2(script, more, reason, flags, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert script.main([*flags, more[0], more[1].format(file=tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "more", "reason"),
    [("train.py", "--no-such", "--no-such"), ("evaluation.py", "--data-path", "prepare_data.py")],
)
def test_so_it_is_for_the_program(script, more, reason, flags):
    result = run(script, [*flags, more, "nowhere"])
    assert result.returncode == 2, result.stderr
    assert reason in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_one_broken_category_does_not_cost_the_others(flags, data, tmp_path, capsys):
    (data / "bolt/train/good/003.png").write_bytes(b"")
    both = [*flags, "--category", "all"]
    assert train.main(both) == 1
    error = capsys.readouterr().err
    assert "003.png" in error
    assert "1 of 2 failed: bolt" in error
    assert bank(tmp_path).exists()
    assert evaluation.main(both) == 1
    assert [row["category"] for row in rows(tmp_path)] == ["tile", "mean"]


def test_no_defective_test_image_leaves_cells_empty(trained, data, tmp_path, capsys):
    shutil.rmtree(data / "tile/test/spot")
    assert evaluation.main(trained) == 0
    assert "AUROC: undefined" in capsys.readouterr().out
    assert rows(tmp_path)[0]["image_auroc"] == ""


def test_a_tiny_ratio_keeps_one_vector_and_says_so(flags, tmp_path, capsys):
    tiny = [*flags, "--sampling-ratio", "0.0001"]
    assert train.main(tiny) == 0
    assert "keeping 1" in capsys.readouterr().err
    assert [len(vectors) for vectors in load_checkpoint(bank(tmp_path, "0_01pct")).memory_banks] == [1, 1]
    assert evaluation.main(tiny) == 0


def test_random_sampling(flags, tmp_path):
    assert train.main([*flags, "--sampling-method", "random"]) == 0
    saved = load_checkpoint(bank(tmp_path))
    assert saved.sampling_method == "random"
    assert [len(vectors.unique(dim=0)) for vectors in saved.memory_banks] == [102, 25]


def test_smaller_banks_are_part_of_larger_ones(flags, tmp_path):
    """Where patches themselves are remembered."""
    assert train.main([*flags, "--form", "paper", "--sampling-ratio", "all"]) == 0
    banks = [load_checkpoint(bank(tmp_path, name)).memory_banks for name in ("1pct", "10pct", "100pct")]
    for pair in itertools.pairwise(banks):
        for small, large in zip(*pair, strict=True):
            assert torch.cdist(small.double(), large.double()).amin(dim=1).max() < 1e-5


def test_an_interrupt_while_saving_leaves_no_file_and_a_rerun_completes(flags, tmp_path, monkeypatch, capsys):
    real = torch.save

    def interrupted(contents, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    assert train.main(flags) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
    monkeypatch.setattr(torch, "save", real)
    assert train.main(flags) == 0
    assert evaluation.main(flags) == 0


def test_a_full_disk_keeps_the_old_bank(flags, tmp_path):
    """No file may grow over 40 kB: the kernel refuses the write as it does on a full disk."""
    assert train.main([*flags, "--sampling-ratio", "0.01"]) == 0
    old = bank(tmp_path, "1pct")
    before = old.read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    result = run("train.py", flags, "--sampling-ratio", "1, 0.01", "--overwrite", preexec_fn=limit)
    assert result.returncode == 2, result.stderr
    assert "is the disk full?" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert old.read_bytes() == before
    there = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [path for path in there if not path.name.startswith("odd_images")] == [old]


def test_out_of_memory_says_what_to_lower(flags, monkeypatch, capsys):
    def exhausted(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("utils.pipeline.shards.extract_features", exhausted)
    assert train.main(flags) == 2
    assert "BATCH_SIZE" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_bank_gives_the_scores_that_it_gives_on_a_cpu(flags):
    cpu, gpu = [*flags, "--device", "cpu"], [*flags, "--device", "cuda"]
    assert train.main(cpu) == 0
    wanted, found = scores_of(cpu), scores_of(gpu)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-3)
    np.testing.assert_allclose(found.maps, wanted.maps, rtol=1e-2, atol=1e-3)
    assert train.main([*gpu, "--overwrite"]) == 0
    assert evaluation.main(gpu) == 0
    assert roc_auc_score(wanted.labels, scores_of(gpu).scores) > 0.8


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_where_there_is_none(flags, capsys):
    assert train.main([*flags, "--device", "cuda"]) == 2
    assert "DEVICE" in capsys.readouterr().err


def test_real_images(magnetic_tile, tmp_path):
    """magnetic_tile, every tenth training image, every fourth for the test; of all for the test 0.84 was measured."""
    root = tmp_path / "real"
    for part, step in (("train", 10), ("test", 4), ("ground_truth", 1)):
        for folder in (magnetic_tile / part).iterdir():
            for source in sorted(folder.iterdir())[::step]:
                target = root / "magnetic_tile" / source.relative_to(magnetic_tile)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(source)
    real = ["--data-path", str(root), "--category", "magnetic_tile", "--backbone", "efficientnet_lite0"]
    real += ["--save-dir", str(tmp_path / "out"), "--center-crop", "false", "--device", "cpu"]
    real += ["--sampling-ratio", "0.01", "--conditions", "clean"]  # of all ten it takes three times as long
    assert train.main(real) == 0
    assert evaluation.main(real) == 0
    row = rows(tmp_path)[0]
    assert (int(row["test_good"]), int(row["test_defective"])) == (48, 100)
    assert float(row["image_auroc"]) > 0.8
    assert float(row["pixel_auroc"]) > 0.7
