import numpy as np
import pytest
import pywt
import torch

from models.frequency import FrequencyGate, WaveletTransform, frequency_map, min_max


@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4", "bior2.2", "coif1", "dmey"])
@pytest.mark.parametrize("size", [(64, 64), (37, 50), (33, 21)])
def test_transform_equals_pywavelets(wavelet, size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    ours = WaveletTransform(wavelet)(images)
    low, details = pywt.dwt2(images.double().numpy(), wavelet, mode="symmetric")
    expected = np.stack([low, *details], axis=2)
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)


def test_transform_at_three_levels_equals_pywavelets():
    image = torch.rand(1, 1, 96, 80, generator=torch.Generator().manual_seed(1))
    transform, low = WaveletTransform("bior2.2"), image
    expected = pywt.wavedec2(image[0, 0].double().numpy(), "bior2.2", mode="symmetric", level=3)
    for details in expected[:0:-1]:
        bands = transform(low)
        low = bands[:, :, 0]
        np.testing.assert_allclose(bands[0, 0, 1:].numpy(), np.stack(details), atol=1e-5)
    np.testing.assert_allclose(low[0, 0].numpy(), expected[0], atol=1e-5)


def test_frequency_map_shows_where_the_detail_is():
    image = torch.full((1, 3, 32, 32), 0.5)
    image[:, :, 8:16:2, 8:16] = 1.0
    detail = frequency_map(WaveletTransform("haar")(image))[0]
    assert detail.shape == (16, 16)
    assert detail[4:8, 4:8].min() == 1
    detail[4:8, 4:8] = 0
    assert detail.max() == 0


def test_constant_map_has_no_nan():
    assert torch.equal(min_max(torch.full((2, 3, 3), 7.0)), torch.zeros(2, 3, 3))


def test_gate_is_drawn_from_its_seed_and_stays_between_0_and_1():
    images, layers = torch.rand(2, 3, 64, 64), (torch.ones(2, 4, 8, 8), torch.ones(2, 6, 4, 4))
    first, again, other = (FrequencyGate("haar", (4, 6), seed)(images, layers) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert not torch.allclose(first[0], other[0])
    assert first[1].shape == (2, 6, 4, 4)
    assert 0 < first[0].min() < first[0].max() < 1


def test_drawing_the_gate_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    FrequencyGate("haar", (4, 6), seed=0)
    assert torch.equal(torch.rand(1), expected)
