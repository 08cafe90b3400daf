"""The baseline: its embedding and scores, the files it reads, and train_patchcore.py as a user runs it."""

import builtins
import enum
import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torchvision.transforms import v2

import config
import train_patchcore
from benchmarks import patchcore_parity
from models.backbone import IMAGENET_MEAN, IMAGENET_STD, build_backbone
from models.detector import Detector
from models.errors import InputError
from models.memory_bank import MemoryBank
from models.patchcore import PatchCore
from utils.data.dataset import test_samples
from utils.pipeline.checkpoint import load_checkpoint
from utils.pipeline.inference import score_samples
from utils.pipeline.patchcore import build_patchcore, find_patchcore, load_patchcore, patchcore_path
from utils.settings import SettingsParser

test_samples.__test__ = False
DIM = 152  # of efficientnet_lite0


class Precision(str, enum.Enum):
    """As anomalib has one among the settings in its checkpoints."""

    FLOAT32 = "float32"


def settings_of(flags, *more):
    return SettingsParser(config, None).read([*flags, *more])[0]


@pytest.fixture
def settings(flags):
    """Settings with an empty PatchCore_DIR."""
    settings = settings_of(flags)
    settings.patchcore_dir.mkdir()
    return settings


@pytest.fixture(scope="module")
def backbone():
    return build_backbone("efficientnet_lite0")


def random(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape)))


def neighbourhood(layer):
    """The mean over 3 x 3 places, those beyond the edge counting as zero."""
    padded = F.pad(layer, (1, 1, 1, 1))
    height, width = layer.shape[-2:]
    return sum(padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)) / 9


@pytest.mark.parametrize("size", [96, 100])
def test_embedding_is_both_layers_averaged_and_put_together(backbone, size):
    net = PatchCore(backbone)
    images = random(2, 3, size, size)
    layer2, layer3 = (neighbourhood(layer) for layer in backbone(images))
    layer3 = F.interpolate(layer3, size=layer2.shape[-2:], mode="bilinear")
    expected = torch.cat([layer2, layer3], dim=1).permute(0, 2, 3, 1).flatten(1, 2)
    assert net.dims == (expected.shape[2],) == (DIM,)
    (found,) = net.embed(images)
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("size", [64, 100])
def test_score_is_the_largest_distance_and_the_map_repeats_smooths_and_mirrors(backbone, size):
    """As anomalib does it: nearest neighbours, then a 33 x 33 Gaussian on a map that is mirrored at its edge."""
    net = PatchCore(backbone)
    images, bank = random(3, 3, size, size), net.embed(random(1, 3, size, size) * 0.8)[0][0]
    cells = -(-size // 8)
    distances = torch.cdist(net.embed(images)[0], bank).amin(dim=2).view(3, 1, cells, cells).double()
    weights = torch.exp(-(torch.arange(-16.0, 17) ** 2) / 32).double()
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    padded = F.pad(F.interpolate(distances, size=(size, size)), (16, 16, 16, 16), mode="reflect")
    expected = F.conv2d(padded, kernel[None, None])[:, 0]
    scores, maps, *_ = Detector(net, [MemoryBank(bank)], (size, size)).predict(images)
    np.testing.assert_allclose(scores, distances.amax(dim=(1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(maps, expected, rtol=1e-4)


def legacy(contents, path):
    torch.save(contents, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("write", "wrap"),
    [
        (torch.save, lambda bank: {"memory_bank": bank}),
        (torch.save, lambda bank: {"memory_bank": bank, "precision": Precision.FLOAT32}),
        (torch.save, lambda bank: bank),
        (torch.save, lambda bank: bank.half()),
        (torch.save, lambda bank: bank.double()),
        (legacy, lambda bank: bank),
    ],
    ids=["dict", "dict with an object", "tensor", "float16", "float64", "before zip files"],
)
def test_banks_of_others_give_the_distances_to_their_vectors(settings, write, wrap):
    bank, images = random(50, DIM) * 10, random(2, 3, 64, 64)
    write(wrap(bank), patchcore_path(settings, "tile", 1.0))
    detector = load_patchcore(settings, "tile")
    (patches,) = build_patchcore(settings).embed(images)
    expected = torch.cdist(patches, bank).amin(dim=2).amax(dim=1)
    torch.testing.assert_close(detector.predict(images).scores, expected, atol=0, rtol=1e-3)
    assert len(detector.calibration_scores) == 0


def lightning(bank, backbone):
    """What anomalib 2 writes: the bank, timm's network, and settings as objects."""
    prefix = "model.feature_extractor.feature_extractor."
    names = [name if backbone.name == "efficientnet_lite0" else name.split(".", 2)[2] for name in backbone.state_dict()]
    network = dict(zip(names, backbone.state_dict().values(), strict=True))
    return {
        "epoch": 0,
        "state_dict": {
            "_is_fitted": torch.tensor(True),
            "model.memory_bank": bank,
            "model.anomaly_map_generator.blur.kernel": torch.rand(1, 1, 33, 33),
        }
        | {prefix + name: value for name, value in network.items()},
        "hyper_parameters": {"layers": ("layer2", "layer3"), "precision": Precision.FLOAT32, "root": Path("results")},
        "transform": v2.Compose([v2.Resize((64, 64), antialias=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]),
    }


@pytest.mark.filterwarnings("ignore:.*random weights")
@pytest.mark.parametrize("suffix", [".ckpt", ".pt"])
def test_an_anomalib_checkpoint_brings_its_own_weights(settings, suffix):
    own = build_backbone("efficientnet_lite0", "random")
    bank, images = random(50, DIM), random(2, 3, 64, 64)
    torch.save(lightning(bank, own), patchcore_path(settings, "tile", 1.0).with_suffix(suffix))
    detector = load_patchcore(settings, "tile")
    assert detector.net.fingerprint == own.fingerprint != build_patchcore(settings).fingerprint
    own.mean, own.std = (torch.tensor(figure).view(1, 3, 1, 1) for figure in (IMAGENET_MEAN, IMAGENET_STD))
    expected = torch.cdist(PatchCore(own).embed(images)[0], bank).amin(dim=2).amax(dim=1)
    torch.testing.assert_close(detector.predict(images).scores, expected, atol=0, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_a_checkpoint_of_another_network_with_as_many_channels_is_refused(flags, settings):
    torch.save(lightning(random(5, 384), build_backbone("resnet18", "random")), patchcore_path(settings, "tile", 1.0))
    with pytest.raises(InputError, match=r"model_data_tile\.pt does not fit PATCHCORE_BACKBONE = 'resnet34'"):
        load_patchcore(settings_of(flags, "--patchcore-backbone", "resnet34"), "tile")


class Calls:
    """Unpickled, it calls a function: what a malicious file does."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, legacy, lambda contents, path: path.write_bytes(pickle.dumps(contents))])
def test_nothing_in_a_file_is_executed(settings, tmp_path, write):
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w')"
    for malice in [
        Calls(builtins.exec, code),
        Calls(os.system, f"touch {mark}"),
        Calls(subprocess.call, ["touch", str(mark)]),
        Calls(Path.touch, mark),
    ]:
        pickle.loads(pickle.dumps(malice))  # it does work
        assert mark.exists()
        mark.unlink()
        write({"memory_bank": random(5, DIM), "extra": malice}, patchcore_path(settings, "tile", 1.0))
        try:
            load_patchcore(settings, "tile")
        except InputError as error:
            assert "model_data_tile.pt cannot be read" in str(error)
        assert not mark.exists()


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (random(5, 1024), "its vectors have 1024 dimensions, layers 2 and 3 of efficientnet_lite0 give 152"),
        ({"memory_bank": random(5, 1536)}, "its vectors have 1536 dimensions"),
        ({"state_dict": {"model.memory_bank": random(5, 384)}}, "its vectors have 384 dimensions"),
        ({"state_dict": {"weight": random(5, DIM)}}, "holds no PatchCore memory bank"),
        ({"bank": random(5, DIM)}, "holds no PatchCore memory bank"),
        (torch.zeros(5, DIM, dtype=torch.long), "holds no PatchCore memory bank"),
        (torch.empty(0), "holds no PatchCore memory bank"),
        (torch.full((5, DIM), torch.nan), "cannot be used: the memory bank holds NaN"),
        (torch.zeros(0, DIM), "cannot be used: a memory bank must be a non-empty"),
        ({"format": 99}, "newer"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(settings, contents, reason):
    path = patchcore_path(settings, "tile", 1.0)
    torch.save(contents, path)
    with pytest.raises(InputError, match=r"model_data_tile\.pt") as error:
        load_patchcore(settings, "tile")
    assert reason in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("damage", [lambda data: data[:-500], lambda data: b"", lambda data: b"no file of torch's"])
def test_a_damaged_file_is_refused_by_name(settings, damage):
    path = patchcore_path(settings, "tile", 1.0)
    torch.save(random(50, DIM), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"model_data_tile\.pt cannot be read, it is damaged or no checkpoint"):
        load_patchcore(settings, "tile")


def test_the_largest_bank_is_taken(settings):
    def put(*names):
        for name in names:
            (settings.patchcore_dir / name).touch()

    def found(category="tile"):
        path, ratio = find_patchcore(settings, category)
        return path.name, ratio

    assert find_patchcore(settings, "tile") is None
    assert load_patchcore(settings, "tile") is None
    put("model_data_tile_small_100pct.pt", "model_data_tile_10pct.txt", "model_data_tile_10.pt", "model_data_bolt.pt")
    assert find_patchcore(settings, "tile") is None
    put("model_data_tile_2_5pct.pt")
    assert found() == ("model_data_tile_2_5pct.pt", 0.025)
    put("model_data_tile_10pct.ckpt")
    assert found() == ("model_data_tile_10pct.ckpt", 0.1)
    put("model_data_tile_10pct.pt")
    assert found() == ("model_data_tile_10pct.pt", 0.1)
    put("model_data_tile.ckpt")
    assert found() == ("model_data_tile.ckpt", 1.0)
    assert found("tile_small") == ("model_data_tile_small_100pct.pt", 1.0)


def test_one_network_serves_all_categories(settings):
    assert build_patchcore(settings) is build_patchcore(settings)


def test_train_all_categories_and_ratios(flags, capsys):
    assert train_patchcore.main([*flags, "--category", "all", "--sampling-ratio", "all"]) == 0
    settings = settings_of(flags)
    files = [f"model_data_{category}{part}.pt" for category in ("bolt", "tile") for part in ("", "_10pct", "_1pct")]
    assert sorted(path.name for path in settings.patchcore_dir.iterdir()) == sorted(files)
    whole, tenth, hundredth = (
        load_checkpoint(patchcore_path(settings, "tile", ratio)).memory_banks[0] for ratio in (1, 0.1, 0.01)
    )
    assert [bank.shape for bank in (whole, tenth, hundredth)] == [(8 * 64, DIM), (51, DIM), (5, DIM)]
    for small, large in ((tenth, whole), (hundredth, tenth)):
        assert torch.cdist(small.double(), large.double()).amin(dim=1).max() < 1e-4
    assert f"{DIM} dimensions a patch" in capsys.readouterr().out
    assert len(load_patchcore(settings, "tile").banks[0]) == 8 * 64


def test_trained_on_good_parts_it_finds_the_bad_ones(flags):
    assert train_patchcore.main(flags) == 0
    settings = settings_of(flags)
    detector = load_patchcore(settings, "tile")
    scored = score_samples([detector], test_samples(settings, "tile"), settings, "test")[0]
    assert roc_auc_score(scored.labels, scored.scores) > 0.8
    assert roc_auc_score(scored.masks.ravel(), scored.maps.ravel()) > 0.8
    assert len(detector.calibration_scores) == 8
    assert detector.calibration_scores.max() < scored.scores[scored.labels == 1].mean()


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_what_fits_is_skipped_and_what_does_not_is_kept(flags, capsys):
    assert train_patchcore.main(flags) == 0
    settings = settings_of(flags)
    path = patchcore_path(settings, "tile", 0.1)
    before = path.read_bytes()
    capsys.readouterr()
    wedge_net_only = ("--wavelet-type", "db2", "--backbone", "resnet18")
    for more in ((), wedge_net_only):
        assert train_patchcore.main([*flags, *more]) == 0
        assert "skipped (--overwrite" in capsys.readouterr().out
    for more, reason in {
        ("--patchcore-backbone", "resnet18", "--patchcore-weights", "random"): "PATCHCORE_BACKBONE = 'efficientnet_li",
        ("--patchcore-weights", "random"): "other backbone weights",
        ("--image-size", "72"): "IMAGE_SIZE = 64, the setting is 72",
        ("--center-crop", "false"): "CENTER_CROP = True",
        ("--seed", "1"): "SEED 42",
    }.items():
        assert train_patchcore.main([*flags, *more]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert reason in error
        assert "--overwrite" in error
        assert "PatchCore_DIR" in error
        # A bank tells the backbone that it was made with.
        if more[0] not in ("--seed", "--patchcore-backbone"):
            with pytest.raises(InputError, match="does not fit"):
                load_patchcore(settings_of(flags, *more), "tile")
    assert path.read_bytes() == before
    assert train_patchcore.main([*flags, "--seed", "1", "--overwrite"]) == 0
    assert load_checkpoint(path).seed == 1


def test_another_programs_bank_is_not_replaced(flags, settings, capsys):
    path = patchcore_path(settings, "tile", 0.1)
    torch.save(random(5, DIM), path)
    assert train_patchcore.main(flags) == 2
    assert str(path) in capsys.readouterr().err
    assert len(load_patchcore(settings, "tile").banks[0]) == 5
    assert train_patchcore.main([*flags, "--overwrite"]) == 0
    assert len(load_patchcore(settings, "tile").banks[0]) == 51


def test_bad_use_is_one_line_and_exit_code_2(flags, tmp_path, capsys):
    (tmp_path / "file").touch()
    for more, reason in {
        ("--patchcore-dir", str(tmp_path / "file/banks")): "PatchCore_DIR",
        ("--patchcore-backbone", "vgg16"): "PATCHCORE_BACKBONE",
        ("--patchcore-weights", "nowhere.pth"): "PATCHCORE_WEIGHTS: cannot read nowhere.pth",
        ("--category", "nut"): "there are: bolt, tile",
    }.items():
        assert train_patchcore.main([*flags, *more]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert len(error.strip().splitlines()) == 1


def test_parity_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert patchcore_parity.main() == 2
    assert "install anomalib to run this" in capsys.readouterr().err
