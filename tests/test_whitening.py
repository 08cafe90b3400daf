"""The metric: against scikit-learn and the formula; what little data must not break; banks in half precision."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

import config
import evaluation
import train
from models.backbone import build_backbone
from models.wedge_net import WedgeNet
from models.whitening import fit_whitening
from utils.data.dataset import test_samples as samples_of
from utils.pipeline.checkpoint import build_net, load_detector
from utils.pipeline.inference import score_samples
from utils.settings import SettingsParser


def patches(count=600, dim=12, seed=0):
    """Correlated features whose channels differ a hundredfold in spread."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) * np.geomspace(1, 0.01, dim) + rng.normal(
        size=dim
    )
    return torch.from_numpy(mixed).float()


def test_without_shrinkage_it_is_scikit_learns_whitening():
    features = patches()
    ours = fit_whitening(features, shrinkage=0)(features)
    # scikit-learn divides by N - 1.
    theirs = PCA(whiten=True).fit(features.double().numpy()).transform(features.double().numpy()) * np.sqrt(600 / 599)
    signs = np.sign((ours.numpy() * theirs).sum(axis=0))
    np.testing.assert_allclose(ours.numpy() * signs, theirs, atol=2e-3)


@pytest.mark.parametrize("shrinkage", [0.03, 0.3, 3])
def test_distances_are_the_shrunk_mahalanobis_form(shrinkage):
    features = patches().double()
    mapped = fit_whitening(features.float(), shrinkage=shrinkage)(features.float()).double()
    covariance = torch.cov(features.T, correction=0)
    middle = torch.linalg.inv(covariance + shrinkage * covariance.trace() / 12 * torch.eye(12))
    difference = features[:50, None] - features[50:90]
    expected = torch.einsum("ijk,kl,ijl->ij", difference, middle, difference).sqrt()
    torch.testing.assert_close(torch.cdist(mapped[:50], mapped[50:90]), expected, rtol=1e-4, atol=1e-5)


def test_directions_of_largest_variance_are_kept():
    features = patches()
    whole, half = fit_whitening(features), fit_whitening(features, dim=6)
    assert half.dim == 6
    assert torch.equal(half.matrix, whole.matrix[:, :6])
    variances = (features @ torch.linalg.qr(whole.matrix).Q).var(dim=0)
    assert (variances.diff() < 0).all()


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_as_many_directions_as_hold_a_share_of_the_distances(share):
    features = patches()
    every, kept = fit_whitening(features), fit_whitening(features, dim=share)
    one_less = fit_whitening(features, dim=kept.dim - 1)
    whole, enough, short = (torch.pdist(m(features).double()).square().sum() for m in (every, kept, one_less))
    assert enough >= share * whole * (1 - 1e-5)
    assert short < share * whole
    assert fit_whitening(features, "euclidean", dim=share) is None


def test_patches_that_do_not_vary_keep_all_directions():
    assert fit_whitening(torch.ones(20, 12), dim=0.5).dim == 12


def test_euclidean_in_fewer_dimensions_is_a_rotation():
    features = patches()
    assert fit_whitening(features, "euclidean") is None
    assert fit_whitening(features, "euclidean", dim=12) is None
    turned = fit_whitening(features, "euclidean", dim=11)
    torch.testing.assert_close(turned.matrix.T @ turned.matrix, torch.eye(11), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "features",
    [
        patches(5),
        patches(1),
        torch.ones(20, 12),
        torch.cat([patches(100)[:, :6], torch.ones(100, 6)], dim=1),
        patches(9).repeat(7, 1),
    ],
    ids=["fewer than dimensions", "one", "all alike", "constant channels", "duplicated"],
)
def test_too_little_to_measure_by_is_no_matter(features):
    mapped = fit_whitening(features)(features)
    assert mapped.isfinite().all()
    if len(features) > 1:
        same = torch.cdist(features, features) < 1e-6
        assert (torch.cdist(mapped, mapped)[same] < 1e-2).all()


def test_duplicates_change_nothing():
    features = patches()
    torch.testing.assert_close(
        fit_whitening(features).matrix, fit_whitening(features.repeat(3, 1)).matrix, rtol=1e-3, atol=1e-4
    )


def test_features_are_mapped_in_their_own_memory(monkeypatch):
    monkeypatch.setattr("models.whitening._BLOCK", 12 * 7)  # blocks that do not divide the rows
    features = patches(20 * 30).view(20, 30, 12).contiguous()
    whitening = fit_whitening(features.flatten(0, 1), dim=5)
    expected, address = whitening(features), features.data_ptr()
    mapped = whitening.apply_in_place(features)
    assert mapped.data_ptr() == address
    torch.testing.assert_close(mapped, expected)


def test_the_map_is_the_same_again_and_whatever_the_blocks(monkeypatch):
    features = patches()
    first = fit_whitening(features)
    assert torch.equal(first.matrix, fit_whitening(features).matrix)
    monkeypatch.setattr("models.whitening._BLOCK", 12 * 50)
    torch.testing.assert_close(first.matrix, fit_whitening(features).matrix, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def net():
    return WedgeNet(build_backbone("efficientnet_lite0"))


def images(count):
    return torch.rand(count, 3, 96, 96, generator=torch.Generator().manual_seed(count))


def test_an_embedding_is_mapped_last_and_alike_in_any_batch(net):
    batch = images(8)
    raw = net.embed(batch).features
    whitening = fit_whitening(raw.flatten(0, 1), dim=50)
    mapped = net.with_whitening([whitening]).embed(batch).features
    torch.testing.assert_close(mapped, (raw - whitening.mean) @ whitening.matrix)
    assert not net.whitening
    alone = torch.cat([net.with_whitening([whitening]).embed(image[None]).features for image in batch])
    torch.testing.assert_close(alone, mapped, atol=1e-3, rtol=1e-3)


def test_a_state_brings_the_network_back(net):
    batch = images(2)
    whitened = net.with_whitening([fit_whitening(net.embed(batch).features.flatten(0, 1), dim=40)])
    again = net.with_state(whitened.state())
    assert again.dim == 40
    assert torch.equal(again.embed(batch).features, whitened.embed(batch).features)
    assert net.with_state(whitened.state()) is again  # so that an image is embedded once for all banks of a category
    assert net.with_state(net.state()) is net
    assert not net.whitening


def loaded(flags):
    """The settings of a command line, and the detector that it stands for."""
    settings, _ = SettingsParser(config, None).read(flags)
    return settings, load_detector(settings, "tile", 0.1, build_net(settings))[0]


@pytest.mark.parametrize("metric", ["whitened", "euclidean"])
def test_a_bank_takes_half_the_bytes_in_float16_and_scores_alike(flags, tmp_path, metric):
    found = {}
    for dtype in ("float32", "float16"):
        mine = [*flags, "--metric", metric, "--bank-dtype", dtype, "--save-dir", str(tmp_path / dtype)]
        assert train.main(mine) == 0
        settings, detector = loaded(mine)
        assert detector.banks[0].vectors.dtype == getattr(torch, dtype)
        found[dtype] = score_samples([detector], samples_of(settings, "tile"), settings, "test")[0].scores
    np.testing.assert_allclose(found["float16"], found["float32"], rtol=1e-3)


def test_a_bank_has_the_dimensions_that_are_asked_for(flags, tmp_path):
    mine = [*flags, "--embedding-dim", "40"]
    assert train.main(mine) == 0
    settings, detector = loaded(mine)
    assert detector.banks[0].dim == detector.net.dim == 40
    together, alone = (
        score_samples([detector], samples_of(settings, "tile")[:count], settings, "test")[0].scores for count in (8, 1)
    )
    np.testing.assert_allclose(alone, together[:1], rtol=1e-4)


def test_all_conditions_have_the_dimensions_that_clean_needs(flags, tmp_path):
    mine = [*flags, "--embedding-dim", "0.9", "--frequency-stream", "condition", "--conditions", "clean, noise20"]
    assert train.main(mine) == 0
    settings, detector = loaded(mine)
    assert {bank.dim for bank in detector.banks} == {detector.net.dim}
    assert 9 < detector.net.dim < 192
    samples = samples_of(settings, "tile")
    together, alone = (score_samples([detector], samples[:count], settings, "test")[0].scores for count in (8, 1))
    np.testing.assert_allclose(alone, together[:1], rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--whitening-shrinkage", "0"), "WHITENING_SHRINKAGE is 0; it must be a finite number above 0"),
        (("--whitening-shrinkage", "-1"), "WHITENING_SHRINKAGE is -1"),
        (("--whitening-shrinkage", "1e999"), "WHITENING_SHRINKAGE is inf"),
        (("--whitening-shrinkage", "nan"), "WHITENING_SHRINKAGE is 'nan'"),
        (("--embedding-dim", "0"), "EMBEDDING_DIM is 0; it must be None, a whole number of at least 1, or a share"),
        (("--embedding-dim", "1.5"), "EMBEDDING_DIM is 1.5; it must be None, a whole number of at least 1, or a share"),
        (("--embedding-dim", "193"), "EMBEDDING_DIM is 193; efficientnet_lite0 gives 192 dimensions"),
        (("--metric", "cosine"), "METRIC is 'cosine'; it must be one of whitened, euclidean"),
        (("--bank-dtype", "int8"), "BANK_DTYPE is 'int8'"),
    ],
)
def test_a_wrong_setting_is_named(flags, capsys, wrong, message):
    assert train.main([*flags, *wrong]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (("--metric", "euclidean"), "METRIC = 'whitened', the setting is 'euclidean'"),
        (("--whitening-shrinkage", "2"), "WHITENING_SHRINKAGE"),
        (("--embedding-dim", "9"), "EMBEDDING_DIM = None, the setting is 9"),
    ],
)
def test_a_bank_of_another_metric_is_refused(flags, capsys, other, message):
    mine = [*flags, "--metric", "whitened", "--embedding-dim", "None"]
    assert train.main(mine) == 0
    for script in (evaluation, train):
        assert script.main([*mine, *other]) in (1, 2)
        assert message in capsys.readouterr().err


def test_training_does_not_replace_a_bank_of_another_precision(flags, capsys):
    assert train.main([*flags, "--bank-dtype", "float32"]) == 0
    assert train.main([*flags, "--bank-dtype", "float16"]) in (1, 2)
    assert "it is stored in float32" in capsys.readouterr().err
