"""remember.py: good parts that were called NG join a memory, and nothing else changes for the worse."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import SIZE, draw_part, make_category
from PIL import Image

import config
import predict
import remember
import train
from models.conformal import conformal_threshold
from models.memory_bank import MemoryBank
from utils.line.torch_model import TorchModel
from utils.pipeline.checkpoint import load_checkpoint
from utils.pipeline.remembering import defect_limit

RATE = 0.1


def draw_variant(rng):
    """A good part of another batch: a label that those of training lack."""
    pixels = draw_part(rng)
    pixels[8:24, 60:84] = 200
    return pixels


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A category's folder and its model, with three conditions and a threshold from 20 images."""
    root = tmp_path_factory.mktemp("remember")
    make_category(root / "data", "tile", 7, train=20, good=8, bad=8)
    pairs = {
        "data-path": root / "data",
        "save-dir": root / "out",
        "category": "tile",
        "backbone": "efficientnet_lite0",
        "image-size": SIZE,
        "center-crop": "false",
        "conditions": "clean,noise20,blur1",
        "num-workers": 0,
        "device": "cpu",
    }
    flags = [text for name, value in pairs.items() for text in (f"--{name}", str(value))]
    assert train.main(flags) == 0
    return root


@pytest.fixture
def model(trained, tmp_path, monkeypatch):
    """A copy of the model, which a test may change; the false-alarm rate is one that 20 images can vouch for."""
    monkeypatch.setattr(config, "FALSE_ALARM_RATE", RATE)
    shutil.copy(trained / "out/10pct/model_data_tile_10pct.pt", tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.fixture
def variants(tmp_path):
    """Ten pictures of the other batch, in a folder."""
    rng = np.random.default_rng(11)
    (tmp_path / "variants").mkdir()
    for number in range(10):
        Image.fromarray(draw_variant(rng)).save(tmp_path / f"variants/{number}.png")
    return tmp_path / "variants"


def scores(model, pictures):
    judge = TorchModel(model, config)
    return judge.predict(np.stack(pictures)).scores, judge.info.threshold


def pixels(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def error_of(arguments, capsys):
    assert remember.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    return error


def test_told_parts_are_ok_and_so_are_others_of_their_kind_and_defects_stay_ng(model, variants, trained, capsys):
    rng = np.random.default_rng(12)
    unseen = [draw_variant(rng) for _ in range(10)]
    defects, good = pixels(trained / "data/tile/test/spot"), pixels(trained / "data/tile/test/good")
    told = pixels(variants)
    before, threshold = scores(model, told)
    assert (before > threshold).all()
    found = scores(model, defects)[0] > threshold
    assert found.all()
    assert remember.main([str(model), str(variants), "--yes"]) == 0
    shown = capsys.readouterr().out
    assert "10 pictures remembered" in shown and "10 NG before, 0 NG now" in shown
    for pictures, wanted in ((told, 9), (unseen, 5)):
        after, new = scores(model, pictures)
        assert (after <= new).sum() >= wanted
    assert new <= threshold
    assert (scores(model, defects)[0] > new).sum() >= len(defects) - 1
    assert predict.main([str(model), str(variants)]) == 0
    assert "10 OK, 0 NG" in capsys.readouterr().err
    assert (scores(model, good)[0] <= new).mean() >= 0.5


def test_no_patch_lies_farther_and_no_good_part_turns_ng(model, variants, trained):
    """A score itself may rise: where the rest of the picture is known now, a defect stands out from it."""
    rng = np.random.default_rng(13)
    good = [*pixels(trained / "data/tile/test/good"), *pixels(variants)]
    others = [
        *pixels(trained / "data/tile/test/spot"),
        *(rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8) for _ in range(3)),
        np.clip(draw_part(rng) + rng.normal(0, 20, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8),
        np.full((SIZE, SIZE, 3), 128, np.uint8),
    ]

    def look():
        detector = TorchModel(model, config).detector
        images = torch.from_numpy(np.stack([*good, *others])).permute(0, 3, 1, 2) / 255
        return detector.distances(detector.net.look(images).features)

    before, (scored, threshold) = look(), scores(model, good)
    assert remember.main([str(model), str(variants), "--yes"]) == 0
    for old, new in zip(before, look(), strict=True):
        assert (new <= old * (1 + 2e-4)).all()  # distances are exact to 1e-4
        assert (new < 0.9 * old).float().mean() > 0.01
    after, new_threshold = scores(model, good)
    assert new_threshold <= threshold
    assert not ((after > new_threshold) & (scored <= threshold)).any()


def test_only_what_is_too_far_is_added_and_afterwards_nothing_is(model, variants):
    old, judge = load_checkpoint(model), TorchModel(model, config)
    assert remember.main([str(model), str(variants), "--yes"]) == 0
    new = load_checkpoint(model)
    threshold = conformal_threshold(old.calibration_scores.numpy(), RATE)
    seen = judge.detector.net.look(torch.from_numpy(np.stack(pixels(variants))).permute(0, 3, 1, 2) / 255)
    conditions = seen.reading.conditions
    for scale, (before, after) in enumerate(zip(old.memory_banks, new.memory_banks, strict=True)):
        added, features = new.remembered[0]["patches"][scale], seen.features[scale].flatten(0, 1)
        assert torch.equal(after[: len(before)], before)
        assert len(after) == len(before) + added
        reach = (threshold - old.offsets[conditions]) / 2 / old.scales[conditions, scale]
        reach = reach.repeat_interleave(len(features) // len(conditions))
        distances = MemoryBank(after).nearest(features)
        assert (distances <= reach * 1.002).all()  # stored in half precision
        if added:
            assert MemoryBank(before).nearest(after[len(before) :].float()).min() >= reach.min() * 0.998
    assert sum(new.remembered[0]["patches"]) > 0
    assert len(new.calibration_scores) == len(old.calibration_scores) + 10
    # Covered now: the same parts again, in other files, add hardly anything.
    for path in variants.iterdir():
        Image.open(path).save(path.with_suffix(".bmp"))
    assert remember.main([str(model), *map(str, variants.glob("*.bmp"))]) == 0
    assert load_checkpoint(model).remembered[1]["patches"] == [0, 0]


def test_the_log_says_what_was_added_and_when_and_undo_takes_it_back_step_by_step(model, variants, capsys):
    stages = [model.read_bytes()]
    for name in ("0.png", "1.png"):
        assert remember.main([str(model), str(variants / name), "--yes"]) == 0
        stages.append(model.read_bytes())
    log = load_checkpoint(model).remembered
    assert [entry["files"] for entry in log] == [[str(variants / "0.png")], [str(variants / "1.png")]]
    assert all(entry["when"].startswith("20") and len(entry["patches"]) == 2 for entry in log)
    assert all(entry["threshold_after"] <= entry["threshold_before"] for entry in log)
    for stage in (1, 0):
        assert remember.main([str(model), "--undo"]) == 0
        assert model.read_bytes() == stages[stage]
    assert "nothing to undo" in error_of([model, "--undo"], capsys)
    assert model.read_bytes() == stages[0]
    assert [path.name for path in model.parent.iterdir() if path.is_file()] == ["model.pt"]


def test_undo_without_the_old_file_is_one_line(model, variants, capsys):
    assert remember.main([str(model), str(variants), "--yes"]) == 0
    model.with_name("model.pt.undo0").unlink()
    before = model.read_bytes()
    capsys.readouterr()
    assert "not there any more" in error_of([model, "--undo"], capsys)
    assert model.read_bytes() == before


def test_a_picture_counts_once(model, variants, capsys):
    shutil.copy(variants / "0.png", variants / "copy.png")
    first, copy = str(variants / "0.png"), str(variants / "copy.png")
    assert remember.main([str(model), first, copy, "--yes"]) == 0
    assert "copy.png is remembered already" in capsys.readouterr().out
    before = model.read_bytes()
    assert remember.main([str(model), first]) == 0
    assert "0.png is remembered already" in capsys.readouterr().out
    assert model.read_bytes() == before


def test_what_looks_like_a_defect_takes_a_yes(model, trained, capsys):
    picture = trained / "data/tile/test/spot/000.png"
    before = model.read_bytes()
    checkpoint = load_checkpoint(model)
    score, threshold = scores(model, [np.asarray(Image.open(picture))])
    assert score[0] > defect_limit(checkpoint.calibration_scores) > threshold
    error = error_of([model, picture], capsys)
    assert "looks like a defect" in error and "--yes" in error and "000.png" in error
    assert model.read_bytes() == before
    assert not model.with_name("model.pt.undo0").exists()
    assert remember.main([str(model), str(picture), "--yes"]) == 0
    # One picture does not make the detector blind.
    assert conformal_threshold(load_checkpoint(model).calibration_scores.numpy(), RATE) <= threshold


def test_a_picture_of_another_camera_takes_a_yes(model, variants, capsys):
    before = model.read_bytes()
    Image.open(variants / "0.png").resize((160, 120)).save(variants / "wide.png")
    error = error_of([model, variants / "wide.png"], capsys)
    assert "160 x 120 pixels, training pictures 96 x 96: another camera?" in error
    assert model.read_bytes() == before
    assert remember.main([str(model), str(variants / "wide.png"), "--yes"]) == 0


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ([], "give pictures"),
        (["missing.png"], "missing.png cannot be read"),
        (["text.png"], "text.png cannot be read"),
        (["empty"], "holds no image"),
        (["variants/0.png", "text.png"], "text.png cannot be read"),
        (["variants/0.png", "--undo"], "or --undo"),
        (["--onnx"], "give pictures"),
    ],
)
def test_bad_pictures_are_one_line_and_nothing_is_lost(model, variants, inputs, reason, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    before = model.read_bytes()
    paths = [text if text.startswith("--") else tmp_path / text for text in inputs]
    assert reason in error_of([model, *paths], capsys)
    assert model.read_bytes() == before


def test_bad_models_are_one_line(model, variants, tmp_path, capsys):
    (tmp_path / "model.onnx").write_bytes(b"")
    assert "an exported model cannot learn" in error_of([tmp_path / "model.onnx", variants], capsys)
    assert "is missing" in error_of([tmp_path / "none.pt", variants], capsys)
    (tmp_path / "cut.pt").write_bytes(model.read_bytes()[:-100])
    assert "damaged" in error_of([tmp_path / "cut.pt", variants], capsys)


def test_a_full_disk_keeps_the_memory(model, variants, monkeypatch, capsys):
    before = model.read_bytes()

    def full(_contents, file):
        file.write(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(torch, "save", full)
    assert "is the disk full?" in error_of([model, variants, "--yes"], capsys)
    assert model.read_bytes() == before


def test_the_exported_model_is_written_again_on_request(model, variants, capsys):
    onnx = model.with_suffix(".onnx")
    assert remember.main([str(model), str(variants / "0.png"), "--yes"]) == 0
    assert str(onnx) not in capsys.readouterr().out
    assert remember.main([str(model), str(variants / "1.png"), "--yes", "--onnx"]) == 0
    assert "beside PyTorch on 1 images" in capsys.readouterr().out
    from utils.line.edge_model import OnnxModel

    pictures = pixels(variants)
    found = OnnxModel(onnx).predict(np.stack(pictures)).scores
    np.testing.assert_allclose(found, scores(model, pictures)[0], rtol=2e-4)
    assert remember.main([str(model), str(variants / "2.png"), "--yes"]) == 0
    assert "model.onnx is still as it was" in capsys.readouterr().out
