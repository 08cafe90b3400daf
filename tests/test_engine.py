"""Engines: each gives the feature maps of the plain backbone, whatever the batch and the size of the images."""

import copy
import sys
import warnings

import pytest
import torch
from torch import nn

from models.backbone import BACKBONES, build_backbone
from models.engine import make_engine
from models.errors import InputError
from models.onnx_graph import written_graph
from models.tracing import FusedConv, UnknownLayer, fold_batch_norms, fuse_relu

CPU = torch.device("cpu")


def random_backbone(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_backbone(name, "random")


@pytest.fixture(scope="module")
def lite():
    return build_backbone("efficientnet_lite0")


def assert_same(found, expected, tolerance=1e-4):
    """Within ``tolerance`` of the largest feature of each map."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("kind", ["onnxruntime", "torch"])
@pytest.mark.parametrize("size", [(224, 224), (160, 160), (97, 200)])
def test_engines_agree_with_the_backbone_at_every_batch_and_size(lite, kind, size):
    engine = make_engine(lite, CPU, kind)
    for batch in (1, 3, 32):
        images = torch.rand(batch, 3, *size)
        assert_same(engine(images), lite(images))


@pytest.mark.parametrize("kind", ["onnxruntime", "torch"])
@pytest.mark.parametrize("name", [*BACKBONES, "timm:resnet18", "timm:test_efficientnet"])
def test_every_backbone_runs_on_both_engines(name, kind):
    backbone = random_backbone(name)
    for layer in backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):  # as they are made, folding them changes nothing
            for tensor in (layer.running_mean, layer.running_var, layer.weight.data, layer.bias.data):
                tensor.uniform_(0.5, 1.5)
    images = torch.rand(2, 3, 64, 64)
    assert_same(make_engine(backbone, CPU, kind)(images), backbone(images))


@pytest.mark.parametrize("kind", ["onnxruntime", "torch"])
def test_an_image_alone_gives_what_it_gives_in_a_batch(lite, kind):
    engine = make_engine(lite, CPU, kind)
    images = torch.rand(32, 3, 224, 224)
    together = engine(images)
    for i in (0, 31):
        assert_same(engine(images[i : i + 1]), [features[i : i + 1] for features in together], 1e-5)


@pytest.mark.parametrize("kind", ["onnxruntime", "torch"])
def test_images_may_lie_in_memory_in_any_way(lite, kind):
    engine = make_engine(lite, CPU, kind)
    images = torch.rand(2, 3, 80, 64).transpose(2, 3)
    before = images.clone()
    assert_same(engine(images), lite(images.contiguous()))
    assert torch.equal(images, before)


@pytest.mark.parametrize("kind", ["onnxruntime", "torch"])
def test_a_later_call_leaves_earlier_feature_maps_alone(lite, kind):
    engine = make_engine(lite, CPU, kind)
    first = engine(torch.rand(1, 3, 64, 64))
    kept = [features.clone() for features in first]
    engine(torch.rand(1, 3, 64, 64))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_making_an_engine_leaves_the_backbone_as_it_is(lite):
    images = torch.rand(1, 3, 64, 64)
    before = lite(images)
    make_engine(lite, CPU, "torch"), make_engine(lite, CPU, "onnxruntime")
    assert all(torch.equal(a, b) for a, b in zip(lite(images), before, strict=True))
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in lite.modules()) == 33


def test_no_batch_norm_is_left_to_run(lite):
    for backbone in (lite, random_backbone("resnext50_32x4d"), random_backbone("timm:test_efficientnet")):
        folded = make_engine(backbone, CPU, "torch").backbone
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())


@pytest.mark.parametrize(
    ("name", "fused"),
    [("resnet18", 13), ("resnet50", 40), ("resnext50_32x4d", 40), ("efficientnet_lite0", 0), ("timm:test_resnet", 10)],
)
def test_relus_are_fused_and_nothing_else_changes(name, fused):
    backbone = fold_batch_norms(random_backbone(name))
    network = fuse_relu(copy.deepcopy(backbone))
    assert sum(isinstance(layer, FusedConv) for layer in network.modules()) == fused
    images = torch.rand(2, 3, 64, 96)
    for found, wanted in zip(network(images), backbone(images), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_lite0"])
def test_on_a_gpu_the_maps_are_those_of_the_cpu(name):
    backbone = random_backbone(name)
    images = torch.rand(2, 3, 64, 96)
    for found, wanted in zip(make_engine(backbone, torch.device("cuda"))(images), backbone(images), strict=True):
        assert (found.cpu() - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("precision", "least"), [("tf32", 1e-5), ("bfloat16", 1e-4), ("float16", 1e-5)])
def test_on_a_gpu_less_precision_stays_near_and_comes_back_as_float32(lite, precision, least):
    images = torch.rand(1, 3, 64, 64)
    exact, found = (make_engine(lite, torch.device("cuda"), precision=each)(images) for each in ("float32", precision))
    for a, b, wanted in zip(found, exact, lite(images), strict=True):
        assert a.dtype == torch.float32
        assert least < (a - b).norm() / b.norm() < 0.1
        assert (b.cpu() - wanted).norm() / wanted.norm() < 1e-5  # no TF32 where it is not asked for


def test_auto_is_onnxruntime_on_a_cpu_and_torch_without_it(lite, monkeypatch):
    assert make_engine(lite, CPU).name == "onnxruntime"
    for package in ("onnxruntime", "onnx"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            assert make_engine(lite, CPU).name == "torch"
            with pytest.raises(InputError, match=f"pip install {package}"):
                make_engine(lite, CPU, "onnxruntime")


def test_what_cannot_run_is_refused(lite):
    with pytest.raises(InputError, match="'openvino' is unknown; choose one of auto, torch, onnxruntime"):
        make_engine(lite, CPU, "openvino")
    with pytest.raises(InputError, match="for the CPU, not cuda"):
        make_engine(lite, torch.device("cuda"), "onnxruntime")
    with pytest.raises(InputError, match="PRECISION = 'bfloat16' is for NVIDIA GPUs, not DEVICE = 'cpu'"):
        make_engine(lite, CPU, precision="bfloat16")


class Doubled(nn.Module):
    def forward(self, images):
        return images + images


class Halved(nn.Module):
    def forward(self, images):
        return images / 2


class Standardised(nn.Conv2d):
    """Its weights are not what it multiplies by."""

    def forward(self, images):
        return nn.functional.conv2d(images, self.weight - self.weight.mean(), self.bias, padding=1)


class Parting(nn.Module):
    """The layers stand in the order of a convolution and its batch norm, and are used in another way."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, images):
        features = self.convolution(images)
        return self.norm(features) + features


class Deciding(nn.Module):
    def forward(self, images):
        return images if images.sum() > 0 else -images


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (nn.Sequential(nn.GELU()), "GELU"),
        (nn.Sequential(nn.MaxPool2d(2, ceil_mode=True)), "MaxPool2d"),
        (nn.Sequential(nn.Conv2d(3, 3, 3, padding="same")), "Conv2d"),
        (nn.Sequential(Doubled()), "add"),
        (nn.Sequential(Halved()), "truediv"),
        (nn.Sequential(Deciding()), "cannot be traced"),
        (Parting().eval(), "BatchNorm2d"),
    ],
)
def test_what_has_no_onnx_operator_is_named(network, named):
    with pytest.raises(UnknownLayer, match=named):
        written_graph(network)


@pytest.mark.parametrize(
    "network",
    [Parting(), nn.Sequential(Standardised(3, 3, 3), nn.BatchNorm2d(3)), nn.Sequential(Deciding(), nn.BatchNorm2d(3))],
)
def test_a_batch_norm_is_folded_only_where_that_changes_nothing(network):
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(0.5, 1.5)
    images = torch.rand(2, 3, 8, 8)
    expected = network.eval()(images)
    torch.testing.assert_close(fold_batch_norms(network)(images), expected)


def test_a_network_with_unknown_layers_is_exported_once_for_each_size():
    backbone = random_backbone("timm:test_convnext")
    engine = make_engine(backbone, CPU)
    assert engine.name == "onnxruntime"
    for batch in (1, 6):
        images = torch.rand(batch, 3, 48, 64)
        assert_same(engine(images), backbone(images))
    assert list(engine.of_size) == [(48, 64)]


def test_an_export_that_fails_or_differs_is_not_used(monkeypatch):
    engine, images = make_engine(random_backbone("timm:test_resnet"), CPU), torch.rand(1, 3, 64, 64)
    refusal = "timm:test_resnet cannot run in onnxruntime: set ENGINE = 'torch'"
    with monkeypatch.context() as failing:
        failing.setattr("models.onnx_graph.trunk_graph", lambda *_: written_graph(nn.Sequential(nn.GELU())))
        with pytest.raises(InputError, match=rf"{refusal} \(no ONNX operator is known for GELU"):
            engine(images)
    monkeypatch.setattr("models.engine.TOLERANCE", 0.0)
    with pytest.raises(InputError, match=rf"{refusal} \(its maps would differ by"):
        engine(images)


@pytest.mark.parametrize("kind", ["onnxruntime", "torch"])
def test_maps_of_an_unexpected_size_are_refused(kind):
    engine = make_engine(random_backbone("timm:vgg11"), CPU, kind)  # rounds down
    with pytest.raises(InputError, match="timm:vgg11 needs an IMAGE_SIZE that is a multiple of 16"):
        engine(torch.rand(1, 3, 72, 64 + 7))
