"""The exported model: the same answers as PyTorch, whatever the settings, and all it says about itself."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import config
import export_onnx
import train
from utils.data.image import read_image
from utils.line.edge_model import KEY, OnnxModel
from utils.line.torch_model import TorchModel
from utils.pipeline.checkpoint import load_checkpoint
from utils.settings import SettingsParser


@pytest.fixture(scope="module")
def pixels(line):
    """All test images as the network sees them."""
    geometry = OnnxModel(line.model).info.geometry
    return np.stack([geometry.apply(read_image(path)) for path in sorted(line.images.rglob("*.png"))])


def test_scores_and_maps_are_those_of_pytorch(line, pixels):
    noisy = np.clip(pixels + np.random.default_rng(0).normal(0, 25, pixels.shape), 0, 255).astype(np.uint8)
    for images in (pixels, noisy):
        found = OnnxModel(line.model).predict(images)
        wanted = TorchModel(line.checkpoint, config).predict(images)
        np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4)
        np.testing.assert_allclose(found.maps, wanted.maps, atol=1e-3)
        np.testing.assert_array_equal(found.conditions, wanted.conditions)
        np.testing.assert_array_equal(found.unfamiliar, wanted.unfamiliar)
        assert found.maps.shape == (8, 64, 64)
    assert not (OnnxModel(line.model).predict(pixels).conditions == found.conditions).any()


def test_an_image_scores_the_same_alone_and_in_a_batch(line, pixels):
    model = OnnxModel(line.model)
    alone = [model.predict(pixels[i : i + 1])[0][0] for i in range(len(pixels))]
    np.testing.assert_allclose(model.predict(pixels)[0], alone, rtol=1e-5)


def test_the_file_is_valid_and_self_contained(line, tmp_path):
    copy = tmp_path / "model.onnx"
    copy.write_bytes(line.model.read_bytes())
    onnx.checker.check_model(copy, full_check=True)
    session = onnxruntime.InferenceSession(copy)
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
        ("image", "tensor(uint8)", ["batch", 64, 64, 3])
    ]
    assert [output.name for output in session.get_outputs()] == ["score", "anomaly_map", "condition", "unfamiliar"]
    assert str(line.checkpoint.parent).encode() not in copy.read_bytes()  # nothing of the machine it was made on
    assert b"/models/" not in copy.read_bytes()


def test_the_description_is_that_of_the_checkpoint(line):
    info, checkpoint = OnnxModel(line.model).info, load_checkpoint(line.checkpoint)
    assert (info.category, info.fingerprint, info.false_alarm_rate) == ("tile", checkpoint.fingerprint, 0.05)
    assert info.settings == checkpoint.settings
    np.testing.assert_allclose(info.calibration_scores, checkpoint.calibration_scores)
    assert info.threshold == max(info.calibration_scores)  # of 20 scores at 0.05
    assert {"torch", "onnx", "onnxruntime", "numpy", "python"} == set(info.versions)


def test_smaller_models_are_compared_and_say_so(line, pixels, capsys):
    assert export_onnx.main([*line.flags, "--int8"]) == 0
    small = line.model.with_name("model_data_tile_10pct_int8.onnx")
    printed = capsys.readouterr().out
    assert small.name in printed and "verdict flips" in printed and "image AUROC" in printed
    assert small.stat().st_size < 0.7 * line.model.stat().st_size
    scores, wanted = (OnnxModel(path).predict(pixels)[0] for path in (small, line.model))
    assert np.corrcoef(scores, wanted)[0, 1] > 0.95


@pytest.mark.filterwarnings("ignore:.*random weights")
@pytest.mark.parametrize(
    "changes",
    [
        {"form": "paper", "use-semantic": "True", "wavelet-type": "db2"},
        {"use-semantic": "True", "conditions": "clean", "wavelet-type": "bior2.2", "image-size": "48,64"},
        {"backbone": "timm:test_efficientnet", "backbone-weights": "random", "center-crop": "False"},
    ],
)
def test_every_setting_of_the_embedding_is_exported(line, tmp_path, changes):
    flags = [*line.flags, "--save-dir", str(tmp_path)]
    flags += [text for name, value in changes.items() for text in (f"--{name}", value)]
    assert train.main(flags) == 0
    assert export_onnx.main(flags) == 0  # compares, and keeps nothing that differs


@pytest.fixture
def same_graph(line, monkeypatch):
    """The line's own graph again: not every test is about writing one."""
    monkeypatch.setattr(export_onnx, "detector_graph", lambda *_, **__: onnx.load(line.model))


def test_without_test_images_training_images_are_compared(line, same_graph, tmp_path, capsys):
    data = tmp_path / "data/tile/train/good"
    data.mkdir(parents=True)
    for path in sorted((line.images.parent / "train/good").iterdir()):
        (data / path.name).write_bytes(path.read_bytes())
    assert export_onnx.main([*line.flags, "--data-path", str(tmp_path / "data")]) == 0
    printed = capsys.readouterr().out
    assert "on 20 images" in printed and "AUROC" not in printed


def test_a_bank_in_half_precision_stays_so(line):
    banks = load_checkpoint(line.checkpoint).memory_banks
    assert {bank.dtype for bank in banks} == {torch.float16}
    halves = [each for each in onnx.load(line.model).graph.initializer if each.data_type == onnx.TensorProto.FLOAT16]
    assert [tuple(each.dims) for each in halves] == [tuple(bank.shape) for bank in banks]


def test_a_bank_too_large_for_one_file_is_refused(line, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("models.onnx_detector.LARGEST", 1000)
    before = line.model.read_bytes()
    assert export_onnx.main(line.flags) == 2
    assert "does not fit in one ONNX file" in capsys.readouterr().err
    assert line.model.read_bytes() == before


def test_a_model_that_differs_from_pytorch_is_not_kept(line, same_graph, monkeypatch):
    before = line.model.read_bytes()
    monkeypatch.setattr("export_onnx.TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="is not kept"):
        export_onnx.main(line.flags)
    assert line.model.read_bytes() == before
    assert json.loads(onnx.load(line.model).metadata_props[0].value)["format"] == 1
    assert onnx.load(line.model).metadata_props[0].key == KEY


@pytest.mark.parametrize(
    ("found", "wanted", "difference"),
    [(0.002, 0.0005, 2e-7), (0.0, 0.0, 0.0), (3.003, 3.0, 1e-3), (9.0, 9.0009, 1e-4), (2.0, -2.0, 8 / 9)],
)
def test_a_difference_counts_on_the_scale_of_good_parts(line, found, wanted, difference):
    """A part that is in the memory has a score of nothing but rounding, which no two programs do alike."""
    settings, _ = SettingsParser(config, "").read(line.flags)
    samples = export_onnx.comparison_samples(settings, "tile")[:1]
    maps = torch.zeros(1, 64, 64)
    info = SimpleNamespace(threshold=5.0, calibration_scores=[2.0, 3.0, 4.0])
    model = SimpleNamespace(predict=lambda _: SimpleNamespace(scores=[found], maps=maps.numpy()), info=info)
    net = SimpleNamespace(look=lambda images: images)
    prediction = SimpleNamespace(scores=torch.tensor([wanted]), maps=maps)
    detector = SimpleNamespace(net=net, predict_embedding=lambda _: prediction, banks=[], scales=[[]])
    compared = export_onnx.compare(detector, model, samples, settings, "tile")
    assert compared.score_difference == pytest.approx(difference, rel=0.05, abs=1e-9)


@pytest.mark.parametrize("form", ["wedge", "paper"])
def test_training_images_that_are_all_one_picture_are_exported(flags, tmp_path, form, capsys):
    """Their scores are nothing but rounding: no two programs agree on it."""
    pictures = sorted((tmp_path / "data/tile/train/good").iterdir())
    for path in pictures[1:]:
        path.write_bytes(pictures[0].read_bytes())
    shutil.rmtree(tmp_path / "data/tile/test")
    own = [*flags, "--category", "tile", "--form", form]
    assert train.main(own) == 0
    assert "training files that repeat another: 7" in capsys.readouterr().out
    assert export_onnx.main(own) == 0
