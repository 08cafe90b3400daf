"""The metric: against scikit-learn and the formula; what little data must not break."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from models.whitening import fit_whitening


def patches(count=600, dim=12, seed=0):
    """Correlated features whose channels differ a hundredfold in spread."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) * np.geomspace(1, 0.01, dim) + rng.normal(
        size=dim
    )
    return torch.from_numpy(mixed).float()


def test_without_shrinkage_it_is_scikit_learns_whitening():
    features = patches()
    ours = fit_whitening(features, shrinkage=0, kept=1)(features)
    # scikit-learn divides by N - 1.
    theirs = PCA(whiten=True).fit(features.double().numpy()).transform(features.double().numpy()) * np.sqrt(600 / 599)
    signs = np.sign((ours.numpy() * theirs).sum(axis=0))
    np.testing.assert_allclose(ours.numpy() * signs, theirs, atol=2e-3)


@pytest.mark.parametrize("shrinkage", [0.03, 0.3, 3])
def test_distances_are_the_shrunk_mahalanobis_form(shrinkage):
    features = patches().double()
    mapped = fit_whitening(features.float(), shrinkage, kept=1)(features.float()).double()
    covariance = torch.cov(features.T, correction=0)
    middle = torch.linalg.inv(covariance + shrinkage * covariance.trace() / 12 * torch.eye(12))
    difference = features[:50, None] - features[50:90]
    expected = torch.einsum("ijk,kl,ijl->ij", difference, middle, difference).sqrt()
    torch.testing.assert_close(torch.cdist(mapped[:50], mapped[50:90]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_directions_of_largest_variance_are_kept_and_as_many_as_hold_a_share_of_the_distances(share):
    features = patches()
    whole, kept = fit_whitening(features, kept=1), fit_whitening(features, kept=share)
    dim = len(kept.offset)
    assert torch.equal(kept.matrix, whole.matrix[:, :dim])
    variances = (features @ torch.linalg.qr(whole.matrix).Q).var(dim=0)
    assert (variances.diff() < 0).all()
    squared = whole(features).double().var(dim=0).cumsum(dim=0)
    assert squared[dim - 2] < share * squared[-1] <= squared[dim - 1] * (1 + 1e-5)


@pytest.mark.parametrize("noise", [0, 1e-6], ids=["at all", "but for rounding"])
def test_patches_that_do_not_vary_are_compared_as_they_are(noise):
    whitening = fit_whitening(torch.ones(20, 12) + noise * patches(20), kept=0.5)
    torch.testing.assert_close(torch.pdist(whitening(patches(50))), torch.pdist(patches(50)))


@pytest.mark.parametrize(
    "features",
    [
        patches(5),
        patches(1),
        torch.ones(20, 12),
        torch.cat([patches(100)[:, :6], torch.ones(100, 6)], dim=1),
        patches(9).repeat(7, 1),
        patches() * 1e-7,
        patches() * 1e6,
    ],
    ids=["fewer than dimensions", "one", "all alike", "constant channels", "duplicated", "tiny", "huge"],
)
def test_too_little_to_measure_by_is_no_matter(features):
    whitening = fit_whitening(features)
    for mapped in (whitening(features), whitening.rounded()(features)):
        assert mapped.isfinite().all()
        if len(features) > 1:
            same = torch.cdist(features, features) == 0
            assert (torch.cdist(mapped, mapped)[same] < 1e-2).all()


def test_duplicates_change_nothing():
    features = patches()
    torch.testing.assert_close(
        fit_whitening(features).matrix, fit_whitening(features.repeat(3, 1)).matrix, rtol=1e-3, atol=1e-4
    )


def test_features_are_mapped_in_their_own_memory(monkeypatch):
    monkeypatch.setattr("models.whitening._BLOCK", 12 * 7)  # blocks that do not divide the rows
    features = patches(20 * 30).view(20, 30, 12).contiguous()
    whitening = fit_whitening(features.flatten(0, 1), kept=0.8)
    expected, address = whitening(features), features.data_ptr()
    mapped = whitening.apply_in_place(features)
    assert mapped.data_ptr() == address
    assert mapped.shape[2] < 12
    torch.testing.assert_close(mapped, expected)


def test_the_map_is_the_same_again_and_whatever_the_blocks(monkeypatch):
    features = patches()
    first = fit_whitening(features)
    assert torch.equal(first.matrix, fit_whitening(features).matrix)
    monkeypatch.setattr("models.whitening._BLOCK", 12 * 50)
    torch.testing.assert_close(first.matrix, fit_whitening(features).matrix, rtol=1e-4, atol=1e-4)
