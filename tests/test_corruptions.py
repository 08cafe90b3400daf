"""Noise and colour jitter against independent references, and what they must not depend on."""

import colorsys
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from utils.data.corruptions import color_jitter, darken, gaussian_noise

NAMES = ["good/000.png", "good/001.png", "spot/000.png"]


@pytest.fixture
def images():
    return torch.rand(3, 3, 48, 56, generator=torch.Generator().manual_seed(0))


def test_noise_has_the_asked_spread_and_no_structure():
    grey = torch.full((2, 3, 128, 128), 0.5)
    for sigma in (10, 40):
        noise = (gaussian_noise(grey, sigma, NAMES[:2], 0) - grey) * 255
        assert noise.std().item() == pytest.approx(sigma, rel=0.02)
        assert abs(noise.mean().item()) < sigma * 0.02
        flat = noise.reshape(6, -1)  # the channels of both images
        correlation = torch.corrcoef(flat) - torch.eye(6)
        assert correlation.abs().max() < 0.05


def test_darkness_is_a_share_of_the_light_in_whole_grey_levels(images):
    assert darken(images, 0) is images
    darker = darken(images, 0.6) * 255
    torch.testing.assert_close(darker, darker.round(), atol=1e-3, rtol=0)
    assert (darker - images * 255 * 0.4).abs().max() <= 0.5 + 1e-3


def test_noise_depends_on_name_level_and_seed_only(images):
    whole = gaussian_noise(images, 20, NAMES, 5)
    one_by_one = [gaussian_noise(images[i : i + 1], 20, NAMES[i : i + 1], 5) for i in range(3)]
    assert torch.equal(whole, torch.cat(one_by_one))
    turned = gaussian_noise(images.flip(0), 20.0, NAMES[::-1], 5).flip(0)
    assert torch.equal(whole, turned)
    same = images[:1].expand(2, -1, -1, -1)
    assert not torch.equal(*gaussian_noise(same, 20, NAMES[:2], 5))
    assert not torch.equal(whole, gaussian_noise(images, 20, NAMES, 6))
    # Another level is another draw, not the same one scaled.
    grey = torch.full((1, 3, 64, 64), 0.5)
    ten, twenty = ((gaussian_noise(grey, sigma, NAMES[:1], 5) - grey).flatten() for sigma in (10, 20))
    assert torch.corrcoef(torch.stack([ten, twenty]))[0, 1].abs() < 0.05


def test_noise_is_the_same_in_another_process_and_leaves_the_global_generator_alone(images):
    code = (
        "import torch; from utils.data.corruptions import gaussian_noise;"
        "torch.rand(7); print(gaussian_noise(torch.full((1, 3, 8, 8), 0.5), 30, ['a/b.png'], 1).sum().item())"
    )
    root = Path(__file__).parent.parent
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    before = torch.random.get_rng_state()
    here = gaussian_noise(torch.full((1, 3, 8, 8), 0.5), 30, ["a/b.png"], 1).sum().item()
    assert float(shown) == here
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("level", [0.5, 3.0, 40.0])
def test_results_are_pixels_and_the_input_is_untouched(images, level):
    before = images.clone()
    for result in (gaussian_noise(images, level, NAMES, 0), color_jitter(images, level)):
        assert result.dtype == torch.float32 and result.shape == images.shape
        assert result.min() >= 0 and result.max() <= 1
        assert not torch.equal(result, images)
    assert torch.equal(images, before)


def test_level_zero_leaves_every_bit(images):
    assert torch.equal(gaussian_noise(images, 0, NAMES, 0), images)
    assert torch.equal(color_jitter(images, 0.0), images)


@pytest.mark.parametrize("factor", [0.5, 2.0, 3.0])
def test_colour_jitter_follows_pillow_and_colorsys(factor):
    rng = np.random.default_rng(0)
    pixels = rng.integers(40, 120, (12, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = ImageEnhance.Brightness(image).enhance(1 + 0.3 * factor)
    image = ImageEnhance.Contrast(image).enhance(1 + 0.5 * factor)
    image = ImageEnhance.Color(image).enhance(1 + 0.5 * factor)
    hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in np.asarray(image).reshape(-1, 3) / 255]
    expected = np.array([colorsys.hsv_to_rgb((h + min(0.1 * factor, 0.5)) % 1, s, v) for h, s, v in hsv])
    jittered = color_jitter(torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)[None], factor)
    found = jittered[0].permute(1, 2, 0).reshape(-1, 3).numpy()
    # Pillow rounds to 8 bits after each step, and the next one magnifies that.
    assert np.abs(found - expected).mean() < 2 / 255
    assert np.quantile(np.abs(found - expected), 0.95) < 8 / 255


def test_hue_turns_no_further_than_half_the_circle():
    red = torch.tensor([0.2, 0.05, 0.05]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    hues = [colorsys.rgb_to_hsv(*color_jitter(red, factor)[0, :, 0, 0].tolist())[0] for factor in (2.0, 5.0, 9.0)]
    assert hues == pytest.approx([0.2, 0.5, 0.5], abs=1e-3)


def test_colour_jitter_of_an_image_does_not_depend_on_its_batch(images):
    whole = color_jitter(images, 1.5)
    for i in range(3):
        torch.testing.assert_close(color_jitter(images[i : i + 1], 1.5)[0], whole[i], rtol=0, atol=1e-6)
