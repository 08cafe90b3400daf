import pytest
import torch
import torch.nn.functional as F

from models.backbone import build_backbone
from models.calibration import held_out_scores
from models.condition import ConditionStream
from models.detector import Detector
from models.frequency import FrequencyGate
from models.memory_bank import MemoryBank
from models.scoring import AnomalyMap
from models.semantic import attention_mask
from models.wedge_net import WedgeNet, grid_size


@pytest.fixture(scope="module")
def backbone():
    return build_backbone("efficientnet_lite0")


def images(count, size=96):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize(
    ("stream", "semantic", "dim"),
    [("gate", True, 192), ("off", True, 192), ("gate", False, 152), ("condition", True, 192)],
)
def test_an_image_is_embedded_alike_in_any_batch(backbone, stream, semantic, dim):
    frequency = {
        "condition": lambda: ConditionStream("haar", ["clean", "noise10", "blur1"], True, (96, 96)),
        "gate": lambda: FrequencyGate("haar", backbone.channels, 42),
        "off": lambda: None,
    }[stream]()
    net = WedgeNet(backbone, frequency=frequency, use_semantic=semantic)
    batch = images(32)
    together = net.embed(batch).features
    assert together.shape == (32, 12 * 12, dim)
    assert net.dim == dim
    alone = torch.cat([net.embed(image[None]).features for image in batch[:6]])
    torch.testing.assert_close(alone, together[:6], atol=1e-5, rtol=1e-4)


def test_embedding_is_what_the_design_says(backbone):
    """Written out step by step with the stream off: normalise, weigh, put together, average 3 x 3 by hand."""
    net = WedgeNet(backbone, engine="torch")
    batch = images(2)
    layer2, layer3 = backbone(batch)
    layer3 = F.interpolate(layer3, size=layer2.shape[-2:], mode="bilinear")

    def unit(layer):
        return layer / layer.norm(dim=1, keepdim=True)

    activity = layer2.abs().mean(dim=1, keepdim=True)
    low, high = activity.amin(dim=(2, 3), keepdim=True), activity.amax(dim=(2, 3), keepdim=True)
    joined = torch.cat([unit(layer2), unit(layer3), unit(layer2) * (activity - low) / (high - low) * 2], dim=1)
    padded = F.pad(joined, (1, 1, 1, 1))
    height, width = joined.shape[-2:]
    average = sum(padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)) / 9
    torch.testing.assert_close(net.embed(batch).features, average.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [96, 100, 224])
def test_grid_is_the_embeddings(backbone, size):
    rows, columns = grid_size((size, size))
    assert WedgeNet(backbone).embed(images(1, size)).features.shape[1] == rows * columns


def test_attention_is_scaled_per_image():
    layer = torch.rand(2, 5, 4, 4)
    layer[1] *= 100
    mask = attention_mask(layer)
    assert mask.shape == (2, 1, 4, 4)
    torch.testing.assert_close(mask.amax(dim=(1, 2, 3)), torch.ones(2))
    torch.testing.assert_close(attention_mask(layer[:1]), mask[:1])


def test_seed_decides_the_gate(backbone):
    batch = images(1)
    gates = [FrequencyGate("haar", backbone.channels, seed) for seed in (1, 1, 2)]
    first, again, other = (WedgeNet(backbone, frequency=gate).embed(batch).features for gate in gates)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_an_image_in_memory_scores_nothing_and_a_spot_shows_where_it_is(backbone):
    net = WedgeNet(backbone)
    good = images(4) * 0.2 + 0.4
    detector = Detector(net, [MemoryBank(net.embed(good).features.flatten(0, 1))], (96, 96))
    bad = good[:1].clone()
    bad[:, :, 60:80, 10:30] = 0
    known, defect = detector.predict(good), detector.predict(bad)
    assert known.scores.max() < 1e-2 * defect.scores.min()
    place = defect.maps[0].argmax().item()
    assert 55 <= place // 96 <= 85
    assert 5 <= place % 96 <= 35


def test_held_out_scores_are_those_against_a_bank_of_the_other_folds():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(7, 16, 6, generator=generator)
    kept = torch.randperm(7 * 16, generator=generator)[:60].sort().values
    anomaly_map = AnomalyMap((4, 4), (32, 32))
    scores = held_out_scores(features, features.flatten(0, 1)[kept], kept // 16, anomaly_map)
    assert scores.shape == (7,)
    for image in range(7):  # 7 images in 10 folds: each is a fold of its own
        others = features.flatten(0, 1)[kept[kept // 16 != image]]
        distances = torch.cdist(features[image].double(), others.double()).amin(dim=1).float()
        assert scores[image].item() == pytest.approx(anomaly_map(distances.view(1, 4, 4)).max().item(), rel=1e-4)


def test_one_training_image_cannot_be_held_out():
    features = torch.rand(1, 16, 6)
    assert held_out_scores(features, features[0], torch.zeros(16).long(), AnomalyMap((4, 4), (32, 32))).shape == (0,)
