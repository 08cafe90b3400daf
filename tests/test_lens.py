"""The lens: against NumPy's least squares and the formula of optimal transport; what little data must not break."""

import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from models.calibration import through_held_out_lenses
from models.whitening import _RIDGE, Affine, ConditionMaps, fit_lens

DIM = 10


def pairs(count=4000, noise=0.4, seed=0, dim=DIM):
    """Patches (count, dim) as a condition shows them, and clean: mixed, moved, shrunk, noisy and bent a little."""
    rng = np.random.default_rng(seed)
    clean = rng.normal(size=(count, dim)) @ np.linalg.qr(rng.normal(size=(dim, dim)))[0] * np.geomspace(2, 0.5, dim) + 1
    corrupted = np.tanh(clean * 0.3) @ rng.normal(size=(dim, dim)) + noise * rng.normal(size=(count, dim)) + 3
    return torch.from_numpy(corrupted).float(), torch.from_numpy(clean).float()


def guesses(corrupted, clean):
    """Least squares (D, D) by NumPy: the ridge is rows of its own, beneath the patches less their mean."""
    x, y = (part.double().numpy() - part.double().numpy().mean(axis=0) for part in (corrupted, clean))
    ridge = np.sqrt(len(x) * _RIDGE * np.square(x).mean()) * np.eye(x.shape[1])
    return np.linalg.lstsq(np.vstack([x, ridge]), np.vstack([y, np.zeros_like(ridge)]), rcond=None)[0]


def covariance(patches):
    return np.cov(np.asarray(patches, np.float64).T, bias=True)


def test_it_is_least_squares_and_then_optimal_transport():
    corrupted, clean = pairs()
    guess = guesses(corrupted, clean)
    before, after = covariance(corrupted.double().numpy() @ guess), covariance(clean)
    floor = _RIDGE * np.trace(after) / DIM * np.eye(DIM)
    a, b = before + floor, after + floor
    root = sqrtm(a)
    transport = np.linalg.inv(root) @ sqrtm(root @ b @ root) @ np.linalg.inv(root)
    lens = fit_lens(corrupted, clean)
    np.testing.assert_allclose(lens.matrix, guess @ transport, atol=1e-4)
    offset = clean.double().mean(dim=0).numpy() - corrupted.double().mean(dim=0).numpy() @ guess @ transport
    np.testing.assert_allclose(lens.offset, offset, atol=1e-4)


def test_its_second_step_is_symmetric_and_positive():
    """So that it turns nothing: of the maps that restore the spread it moves patches least."""
    corrupted, clean = pairs()
    transport = np.linalg.solve(guesses(corrupted, clean), fit_lens(corrupted, clean).matrix.double().numpy())
    np.testing.assert_allclose(transport, transport.T, atol=1e-4)
    assert np.linalg.eigvalsh(transport).min() > 1 - 1e-3  # guesses lie too close together, in every direction


@pytest.mark.parametrize("noise", [0.01, 0.2, 0.8])
def test_mean_and_covariance_become_the_clean_ones(noise):
    corrupted, clean = pairs(noise=noise)
    seen = fit_lens(corrupted, clean)(corrupted)
    torch.testing.assert_close(seen.mean(dim=0), clean.mean(dim=0), atol=1e-4, rtol=0)
    np.testing.assert_allclose(covariance(seen), covariance(clean), atol=0.02 * covariance(clean).max())


def test_clean_patches_stay_where_they_are():
    _, clean = pairs()
    torch.testing.assert_close(fit_lens(clean, clean)(clean), clean, atol=1e-2, rtol=0)


def test_new_patches_are_brought_nearer_to_their_clean_ones_than_by_their_moments_alone():
    """A rotation has the same moments: only the least squares know which patch belongs to which."""
    corrupted, clean = pairs()
    unseen, wanted = corrupted[2000:], clean[2000:]
    error = (fit_lens(corrupted[:2000], clean[:2000])(unseen) - wanted).square().mean()
    shuffled = fit_lens(corrupted[:2000], clean[torch.randperm(2000, generator=torch.Generator().manual_seed(0))])
    assert error < 0.5 * (shuffled(unseen) - wanted).square().mean()


@pytest.mark.parametrize("scale", [1, 1e-4], ids=["", "tiny"])
@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: (x[:6], y[:6]),
        lambda x, y: (x[:1], y[:1]),
        lambda x, y: (torch.ones_like(x), y),
        lambda x, y: (x, torch.ones_like(y)),
        lambda x, y: (torch.ones_like(x), torch.ones_like(y)),
        lambda x, y: (x * (torch.arange(DIM) < 4), y),
        lambda x, y: (x, y * (torch.arange(DIM) < 4)),
        lambda x, y: (x[:4].repeat(9, 1), y[:4].repeat(9, 1)),
    ],
    ids=[
        "fewer patches than dimensions",
        "one patch",
        "a picture that shows nothing",
        "clean ones all alike",
        "both all alike",
        "constant channels",
        "constant clean channels",
        "duplicates",
    ],
)
def test_a_degenerate_condition_neither_breaks_nor_throws_new_patches_far_away(make, scale):
    """New patches end up within the clean ones' range, give or take what few patches cannot tell."""
    whole, new = pairs()[0], pairs(seed=1)[0]
    corrupted, clean = make(*(part * scale for part in pairs()))
    lens = fit_lens(corrupted, clean).rounded()
    seen = lens(new * scale)
    assert lens.matrix.isfinite().all() and seen.isfinite().all()
    apart = (seen - clean.mean(dim=0)).square().mean().sqrt()
    spread = (clean - clean.mean(dim=0)).square().mean().sqrt()
    away = ((new - corrupted.mean(dim=0) / scale).square().mean() / whole.var(dim=0).mean()).sqrt()
    assert apart <= 10 * spread * away + 1e-3 * scale


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_each_training_image_is_seen_through_a_lens_that_was_made_without_it(count):
    corrupted, clean = (part.view(count, 40, DIM) for part in pairs(count * 40))
    seen = through_held_out_lenses(corrupted, clean)
    bounds = [-(-count * fold // min(4, count)) for fold in range(min(4, count) + 1)]
    for start, stop in itertools.pairwise(bounds):
        others = [place for place in range(count) if not start <= place < stop] or [0]
        lens = fit_lens(corrupted[others].flatten(0, 1), clean[others].flatten(0, 1))
        torch.testing.assert_close(seen[start:stop], lens(corrupted[start:stop]))


def test_so_seen_training_images_lie_no_nearer_than_new_ones():
    """Of few images a lens remembers more than it has learnt: through it they lie much nearer than new ones do."""
    corrupted, clean = (part.view(-1, 5, 30) for part in pairs(2000, dim=30))
    lens = fit_lens(corrupted[:20].flatten(0, 1), clean[:20].flatten(0, 1))

    def error(seen, wanted):
        return (seen - wanted).square().mean().sqrt().item()

    new = error(lens(corrupted[20:]), clean[20:])
    assert error(lens(corrupted[:20]), clean[:20]) < 0.8 * new
    assert 0.95 * new < error(through_held_out_lenses(corrupted[:20], clean[:20]), clean[:20]) < 1.15 * new


def test_maps_in_a_row_are_one_map():
    corrupted, clean = pairs()
    first, second = fit_lens(corrupted, clean), fit_lens(clean, corrupted)
    torch.testing.assert_close(first.then(second)(corrupted), second(first(corrupted)), atol=1e-4, rtol=1e-4)


def test_rounding_loses_what_half_precision_does_and_is_done_once():
    lens = fit_lens(*pairs())
    rounded = lens.rounded()
    assert torch.equal(rounded.matrix, rounded.matrix.half().float())
    assert all(map(torch.equal, rounded, rounded.rounded()))
    torch.testing.assert_close(rounded.matrix, lens.matrix, rtol=1e-3, atol=1e-5)


def test_each_image_goes_through_the_map_of_its_own_condition():
    generator = torch.Generator().manual_seed(0)
    maps = [Affine(torch.randn(6, 4, generator=generator), torch.randn(4, generator=generator)) for _ in range(3)]
    features = torch.randn(5, 7, 6, generator=generator)
    conditions = torch.tensor([2, 0, 1, 1, 2])
    together = ConditionMaps(maps)
    expected = torch.stack([maps[condition](own) for condition, own in zip(conditions, features, strict=True)])
    torch.testing.assert_close(together(features, conditions), expected)
    torch.testing.assert_close(together(features), maps[0](features))
