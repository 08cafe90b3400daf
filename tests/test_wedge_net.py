"""The embedding: both forms written out by hand, alike in any batch; what a checkpoint brings back; a spot found."""

import pytest
import torch
import torch.nn.functional as F

from models.backbone import build_backbone
from models.condition import ConditionStream
from models.detector import Detector
from models.errors import InputError
from models.frequency import FrequencyGate
from models.memory_bank import MemoryBank
from models.semantic import attention_mask
from models.wedge_net import Recipe, WedgeNet, grid_size
from models.whitening import Affine, fit_whitening

CONDITIONS = ["clean", "noise10", "blur1"]


@pytest.fixture(scope="module")
def backbone():
    return build_backbone("efficientnet_lite0")


def images(count, size=96):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def with_lenses(net, dims=(12, 20)):
    """The network with three conditions and, for each scale, maps for them that differ."""
    generator = torch.Generator().manual_seed(0)
    maps = [
        [
            Affine(torch.randn(raw, dim, generator=generator), torch.randn(dim, generator=generator)).rounded()
            for _ in CONDITIONS
        ]
        for raw, dim in zip(net.raw_dims, dims, strict=True)
    ]
    return net.with_maps(maps)


def conditioned(backbone):
    """A network that puts the i-th of every three images in the i-th condition."""
    stream = ConditionStream("haar", CONDITIONS, True, (96, 96))
    net = WedgeNet(backbone, frequency=stream)
    known = stream.measure(images(3))[1]
    around = known[:, None] + 1e-3 * torch.randn(3, 4, 1, generator=torch.Generator().manual_seed(0))
    stream.fit_conditions(around)
    return with_lenses(net)


@pytest.mark.parametrize(
    ("form", "stream", "semantic", "shapes"),
    [
        ("wedge", "conditions", False, [(144, 12), (36, 20)]),
        ("wedge", None, True, [(144, 40), (36, 112)]),
        ("paper", "gate", True, [(144, 192)]),
        ("paper", None, False, [(144, 152)]),
    ],
)
def test_an_image_is_embedded_alike_in_any_batch(backbone, form, stream, semantic, shapes):
    if stream == "conditions":
        net = conditioned(backbone)
    else:
        frequency = FrequencyGate("haar", backbone.channels, 42) if stream == "gate" else None
        net = WedgeNet(backbone, form=form, frequency=frequency, use_semantic=semantic)
    batch = torch.cat([images(3)] * 10 + [images(2)])
    together = net.look(batch)
    assert [tuple(scale.shape) for scale in together.features] == [(32, *shape) for shape in shapes]
    assert net.dims == tuple(dim for _, dim in shapes)
    assert [rows * columns for rows, columns in net.grids((96, 96))] == [places for places, _ in shapes]
    alone = [net.embed(image[None]) for image in batch[-6:]]
    for scale, parts in zip(together.features, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts), scale[-6:], atol=1e-5 * scale.abs().max().item(), rtol=1e-4)
    if stream == "conditions":
        assert together.reading.conditions[:6].tolist() == [0, 1, 2] * 2


def by_hand(layer):
    """Mean over 3 x 3 places, those beyond the edge counting as zero; patches row by row."""
    padded = F.pad(layer, (1, 1, 1, 1))
    height, width = layer.shape[-2:]
    average = sum(padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)) / 9
    return average.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("layers", "centring", "semantic"),
    [((2, 3), 0.7, False), ((2, 3), 0.0, True), ((2,), 0.7, True), ((3,), 1.0, False)],
)
def test_form_wedge_is_what_its_recipe_says(backbone, layers, centring, semantic):
    """Each layer on its own grid with its own lengths; of layer 3 a share of the image's mean is taken away."""
    net = WedgeNet(backbone, use_semantic=semantic, recipe=Recipe(layers=layers, centring=centring), engine="torch")
    batch = images(2, 104)
    layer2, layer3 = backbone(batch)
    if semantic:
        activity = layer2.abs().mean(dim=1, keepdim=True)
        low, high = activity.amin(dim=(2, 3), keepdim=True), activity.amax(dim=(2, 3), keepdim=True)
        layer2 = layer2 * ((activity - low) / (high - low) + 0.5)
    layer3 = layer3 - centring * layer3.mean(dim=(2, 3), keepdim=True)
    expected = [by_hand({2: layer2, 3: layer3}[layer]) for layer in layers]
    assert [scale.shape[1] for scale in expected] == [{2: 13 * 13, 3: 7 * 7}[layer] for layer in layers]
    for found, wanted in zip(net.embed(batch), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5 * wanted.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("semantic", [True, False])
@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_form_paper_is_the_papers_to_the_bit(backbone, semantic, engine):
    """The gate weighs both layers, each is L2-normalised, layer 2 appended by attention, twice; 3 x 3 averages."""
    gate = FrequencyGate("haar", backbone.channels, 42)
    net = WedgeNet(backbone, form="paper", frequency=gate, use_semantic=semantic, engine=engine)
    batch = images(2)
    layers = net.backbone(batch)
    structure = gate.transform(batch)[:, :, 0] / 2
    torch.testing.assert_close(structure, F.avg_pool2d(batch, 2))
    gated = [
        layer * torch.sigmoid(convolution(F.interpolate(structure, layer.shape[-2:], mode="area")))
        for convolution, layer in zip(gate.convolutions, layers, strict=True)
    ]
    parts = [gated[0], F.interpolate(gated[1], size=layers[0].shape[-2:], mode="bilinear")]
    parts = [part / part.norm(dim=1, keepdim=True).clamp_min(1e-12) for part in parts]
    if semantic:
        activity = layers[0].abs().mean(dim=1, keepdim=True)
        low, high = activity.amin(dim=(2, 3), keepdim=True), activity.amax(dim=(2, 3), keepdim=True)
        unit = layers[0] / layers[0].norm(dim=1, keepdim=True).clamp_min(1e-12)
        parts.append(unit * ((activity - low) / (high - low)) * 2)
    expected = F.avg_pool2d(torch.cat(parts, dim=1), 3, stride=1, padding=1).flatten(2).transpose(1, 2)
    (found,) = net.embed(batch)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [(96, 96), (100, 60)])
def test_grids_are_the_embeddings(backbone, size):
    batch = torch.rand(1, 3, *size)
    assert grid_size(size) == (-(-size[0] // 8), -(-size[1] // 8))
    for form in ("wedge", "paper"):
        net = WedgeNet(backbone, form=form)
        assert [rows * columns for rows, columns in net.grids(size)] == [own.shape[1] for own in net.embed(batch)]


def test_attention_is_scaled_per_image():
    layer = torch.rand(2, 5, 4, 4)
    layer[1] *= 100
    mask = attention_mask(layer)
    assert mask.shape == (2, 1, 4, 4)
    torch.testing.assert_close(mask.amax(dim=(1, 2, 3)), torch.ones(2))
    torch.testing.assert_close(attention_mask(layer[:1]), mask[:1])


def test_metric_and_lenses_come_last_and_by_the_condition_of_each_image(backbone):
    net, batch = conditioned(backbone), images(3)
    raw = net.with_maps([]).embed(batch)
    for own, scale, maps in zip(net.embed(batch), raw, net.maps, strict=True):
        for condition in range(3):
            expected = scale[condition] @ maps.matrices[condition] + maps.offsets[condition]
            torch.testing.assert_close(own[condition], expected, atol=1e-3, rtol=1e-3)
    known = net.look(batch, condition=2)
    assert known.reading.conditions.tolist() == [2, 2, 2]
    assert torch.equal(known.features[0][2], net.embed(batch)[0][2])


def test_a_state_brings_the_network_back(backbone):
    whitened, batch = conditioned(backbone), images(3)
    fresh = WedgeNet(backbone, frequency=ConditionStream("haar", CONDITIONS, True, (96, 96)))
    again = fresh.with_state(whitened.state())
    assert again.dims == (12, 20)
    assert all(map(torch.equal, again.embed(batch), whitened.embed(batch)))
    assert fresh.with_state(whitened.state()) is again  # so that an image is embedded once for all banks of a category
    assert fresh.with_state(fresh.state()) is fresh
    assert not fresh.maps


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: without(state, "maps.1.matrices"),
        lambda state: without(state, "maps.0.offsets"),
        lambda state: without(state, "stream.means"),
        lambda state: state | {"maps.2.matrices": state["maps.1.matrices"], "maps.2.offsets": state["maps.1.offsets"]},
        lambda state: state | {"maps.0.matrices": state["maps.0.matrices"][:2]},
        lambda state: state | {name: state[name][:2] for name in ("maps.0.matrices", "maps.0.offsets")},
        lambda state: state | {"maps.0.matrices": state["maps.0.matrices"][:, :9]},
        lambda state: state | {"maps.0.matrices": state["maps.0.matrices"][..., :9]},
        lambda state: state | {"maps.0.matrices": torch.tensor(1.0)},
        lambda state: state | {"maps.0.offsets": torch.zeros(3)},
        lambda state: state | {"maps.0.matrices": "none"},
    ],
)
def test_a_state_that_does_not_fit_is_refused(backbone, damage):
    net = conditioned(backbone)
    with pytest.raises(InputError, match="does not fit the network"):
        net.with_state(damage(net.state()))


def test_an_image_in_memory_scores_nothing_and_a_spot_shows_where_it_is(backbone):
    good = images(4) * 0.2 + 0.4
    net = WedgeNet(backbone)
    net = net.with_maps([[fit_whitening(scale.flatten(0, 1)).rounded()] for scale in net.embed(good)])
    detector = Detector(net, [MemoryBank(scale.flatten(0, 1).half()) for scale in net.embed(good)], (96, 96))
    bad = good[:1].clone()
    bad[:, :, 60:80, 10:30] = 0
    known, defect = detector.predict(good), detector.predict(bad)
    assert known.scores.max() < 1e-2 * defect.scores.min()
    place = defect.maps[0].argmax().item()
    assert 55 <= place // 96 <= 85
    assert 5 <= place % 96 <= 35
