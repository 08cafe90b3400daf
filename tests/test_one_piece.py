"""The whole detector as one graph: what it gives is what torch gives, whatever the form, the size and the batch."""

import dataclasses
import sys
import time

import onnx
import onnxruntime
import pytest
import torch

from models.backbone import build_backbone
from models.condition import ConditionStream
from models.detector import Detector, predict_together
from models.engine import OnnxEngine
from models.errors import InputError
from models.frequency import FrequencyGate
from models.memory_bank import MemoryBank
from models.onnx_detector import AT_ONCE, TILE, OnePiece, detector_graph, memory_graph
from models.onnx_graph import trunk_graph
from models.patchcore import PatchCore
from models.wedge_net import RECIPE, WedgeNet
from models.whitening import Affine

CONDITIONS = ("clean", "noise20", "blur1", "colour0.5")
PLAIN = {
    "form": "wedge",
    "wavelet": "haar",
    "conditions": CONDITIONS,
    "recipe": RECIPE,
    "use_semantic": False,
    "region": False,
}
FORMS = {
    "wedge": {},
    "wedge, one condition": {"conditions": ("clean",)},
    "wedge, semantic": {"use_semantic": True},
    "wedge, bior2.2": {"wavelet": "bior2.2"},
    "wedge, light as it is": {"recipe": dataclasses.replace(RECIPE, align_light=False)},
    "wedge, layer 3": {"recipe": dataclasses.replace(RECIPE, layers=(3,))},
    "wedge, no stream": {"wavelet": None},
    "paper": {"form": "paper"},
    "paper, semantic, db2": {"form": "paper", "use_semantic": True, "wavelet": "db2"},
    "paper, no gate": {"form": "paper", "wavelet": None},
    "patchcore": {"form": "patchcore"},
    "wedge, region": {"region": True},
    "wedge, db2, region": {"region": True, "wavelet": "db2"},
    "paper, region": {"form": "paper", "region": True},
    "patchcore, region": {"form": "patchcore", "region": True},
}


@pytest.fixture(scope="module")
def lite():
    return build_backbone("efficientnet_lite0")


def pictures(count, size, seed=0):
    """Smooth pictures, each other one noisy, so that they are in several conditions."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    images[::2] += 0.08 * torch.randn(images[::2].shape, generator=generator)
    images[::3] *= 0.7
    return images.clamp(0, 1)


def fitted_stream(wavelet, conditions, align_light, size):
    """A stream whose conditions lie around what pictures with more and more noise look like."""
    stream = ConditionStream(wavelet, conditions, align_light, size)
    images, count = pictures(9, size, 1), len(stream.conditions)
    stream.fit_light(stream.measure_light(images))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    statistics = torch.stack([stream.measure((images + 0.03 * k * noise).clamp(0, 1))[1] for k in range(count)])
    stream.fit_conditions(statistics)
    return stream


def make_detectors(backbone, size, engine, banks=(300,), device="cpu", **changes):
    """A detector for each size of bank, all of one network; the same ones for each engine."""
    choice, generator = PLAIN | changes, torch.Generator().manual_seed(3)
    if choice["form"] == "patchcore":
        net = PatchCore(backbone, engine=engine, device=device)
    else:
        stream = None
        if choice["wavelet"] is not None and choice["form"] == "paper":
            stream = FrequencyGate(choice["wavelet"], backbone.channels, 0)
        elif choice["wavelet"] is not None:
            stream = fitted_stream(choice["wavelet"], choice["conditions"], choice["recipe"].align_light, size)
        net = WedgeNet(
            backbone,
            form=choice["form"],
            frequency=stream,
            use_semantic=choice["use_semantic"],
            recipe=choice["recipe"],
            engine=engine,
            device=device,
        )
        if choice["form"] == "wedge":
            net = net.with_maps(
                [
                    [
                        Affine(
                            torch.randn(dim, dim - 2, generator=generator) / dim**0.5, torch.full((dim - 2,), float(k))
                        )
                        for k in range(len(net.conditions))
                    ]
                    for dim in net.raw_dims
                ]
            )
    if choice["region"]:
        inside = torch.zeros(size)
        inside[10:50, 20:] = 1
        net = net.with_region(inside)
    features = net.embed(pictures(6, size, 4))
    count = len(net.conditions)
    scales = torch.rand(count, len(features), generator=generator) + 0.5
    offsets = torch.rand(count, generator=generator)
    if choice["form"] != "wedge":
        scales, offsets = None, None

    def some(patches, bank):
        return patches[torch.randint(len(patches), (bank,), generator=torch.Generator().manual_seed(bank))].half()

    return [
        Detector(net, [MemoryBank(some(own.flatten(0, 1), bank)) for own in features], size, scales, offsets)
        for bank in banks
    ]


def assert_same(found, wanted):
    torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.maps, wanted.maps, rtol=1e-3, atol=1e-3)
    for name in ("conditions", "unfamiliar"):
        a, b = getattr(found, name), getattr(wanted, name)
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b))
    if wanted.statistics is not None:
        torch.testing.assert_close(found.statistics, wanted.statistics, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(64, 64), (72, 104)])
def test_the_graph_gives_what_torch_gives(lite, form, size):
    (graph,) = make_detectors(lite, size, "onnxruntime", **FORMS[form])
    (torch_only,) = make_detectors(lite, size, "torch", **FORMS[form])
    assert graph.one_piece and not torch_only.one_piece
    images = pictures(3, size, 5)
    assert_same(graph.predict(images), torch_only.predict(images))


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_whatever_the_batch(lite, batch):
    size = (64, 64)
    (graph,), (torch_only,) = (make_detectors(lite, size, engine) for engine in ("onnxruntime", "torch"))
    images = pictures(32, size, 6)
    wanted = torch_only.predict(images)
    found = graph.predict(images[:batch])
    assert_same(found, type(wanted)(*(part[:batch] for part in wanted)))
    assert len(wanted.conditions.unique()) > 1  # a lens other than the clean one was looked through


def test_an_image_alone_gives_what_it_gives_in_a_batch(lite):
    (detector,) = make_detectors(lite, (64, 64), "onnxruntime")
    images = pictures(AT_ONCE + 1, (64, 64), 7)
    alone = torch.cat([detector.predict(image[None]).scores for image in images])
    torch.testing.assert_close(detector.predict(images).scores, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 5, TILE, 2 * TILE + 7])
def test_the_nearest_is_found_in_every_tile(lite, count):
    (graph,), (torch_only,) = (
        make_detectors(lite, (64, 64), engine, banks=(count,)) for engine in ("onnxruntime", "torch")
    )
    images = pictures(2, (64, 64), 8)
    assert_same(graph.predict(images), torch_only.predict(images))


def test_detectors_of_one_network_are_one_graph(lite):
    detectors = make_detectors(lite, (64, 64), "onnxruntime", banks=(50, 300, 7))
    other = make_detectors(lite, (64, 64), "torch", form="patchcore")[0]
    images = pictures(3, (64, 64), 9)
    together = predict_together([detectors[0], other, *detectors[1:]], images)
    for detector, found in zip([detectors[0], other, *detectors[1:]], together, strict=True):
        assert_same(found, detector.predict(images))
    assert [len(key) for key in detectors[0].pieces] == [3, 1]
    runs = detectors[0].pieces[tuple(detectors)].session
    assert sum(output.name.startswith("score") for output in runs.get_outputs()) == 3


def test_a_graph_is_written_in_no_time_and_valid(lite):
    (detector,) = make_detectors(lite, (64, 64), "onnxruntime", banks=(5000,))
    trunk = detector.net.backbone.trunk((64, 64))
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        graph = memory_graph([detector], trunk)
        best = min(best, time.process_time() - start)
    assert best < 0.5
    onnx.checker.check_model(graph, full_check=True)
    onnx.checker.check_model(detector_graph(detector), full_check=True)


def test_a_file_and_the_graph_in_memory_agree(lite):
    (detector,) = make_detectors(lite, (64, 64), "onnxruntime")
    pixels = (pictures(3, (64, 64), 10) * 255).round().to(torch.uint8)
    session = onnxruntime.InferenceSession(detector_graph(detector).SerializeToString())
    names = [output.name for output in session.get_outputs()]
    assert names == ["score", "anomaly_map", "condition", "unfamiliar"]
    scores = session.run(["score"], {"image": pixels.permute(0, 2, 3, 1).numpy()})[0]
    found = detector.predict(pixels.float() / 255).scores
    torch.testing.assert_close(torch.from_numpy(scores), found, rtol=1e-5, atol=1e-6)


def test_networks_that_torch_exports_are_one_piece_too():
    with pytest.warns(UserWarning, match="random weights"):
        backbone = build_backbone("timm:test_convnext", "random")
    (graph,), (torch_only,) = (make_detectors(backbone, (64, 64), engine) for engine in ("onnxruntime", "torch"))
    images = pictures(3, (64, 64), 11)
    assert_same(graph.predict(images), torch_only.predict(images))


def test_threads_are_those_of_torch(lite):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        (detector,) = make_detectors(lite, (64, 64), "onnxruntime")
        detector.predict(pictures(1, (64, 64)))
        (piece,) = detector.pieces.values()
        assert piece.session.get_session_options().intra_op_num_threads == 1
    finally:
        torch.set_num_threads(threads)


def test_large_banks_and_those_better_pruned_stay_with_torch(lite, monkeypatch):
    (detector,) = make_detectors(lite, (64, 64), "onnxruntime")
    assert detector.one_piece
    with monkeypatch.context() as small:
        small.setattr("models.detector.LARGEST_GRAPH", 1000)
        assert not detector.one_piece
        wanted = detector.predict(pictures(2, (64, 64)))
        assert not detector.pieces
    assert_same(detector.predict(pictures(2, (64, 64))), wanted)
    # Many dimensions, few of which vary: nearly all of the product is saved.
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(4000, 16, generator=generator) @ torch.randn(16, 1024, generator=generator)
    bank = MemoryBank(flat + 0.01 * torch.randn(flat.shape, generator=generator))
    assert bank.pruned
    detector.banks[0] = bank
    assert not detector.one_piece


def test_a_score_that_is_not_finite_is_refused(lite):
    (detector,) = make_detectors(lite, (64, 64), "onnxruntime")
    images = pictures(2, (64, 64))
    images[1, 0, 20, 20] = torch.nan
    with pytest.raises(InputError, match="a score is not finite"):
        detector.predict(images)


def test_maps_of_an_unexpected_size_are_refused():
    with pytest.warns(UserWarning, match="random weights"):
        backbone = build_backbone("timm:vgg11", "random")  # rounds down
    net = PatchCore(backbone, engine="onnxruntime")
    detector = Detector(net, [MemoryBank(torch.rand(5, sum(backbone.channels)))], (72, 72))
    with pytest.raises(InputError, match="timm:vgg11 needs an IMAGE_SIZE that is a multiple of 16"):
        detector.predict(torch.rand(1, 3, 72, 72))


def test_without_the_runtime_torch_scores_and_asking_for_it_is_one_clear_line(lite, monkeypatch):
    for package in ("onnxruntime", "onnx"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            (detector,) = make_detectors(lite, (64, 64), "auto")
            assert not detector.one_piece and detector.predict(pictures(1, (64, 64))).scores.isfinite().all()
            with pytest.raises(InputError, match=f"needs: pip install {package}"):
                make_detectors(lite, (64, 64), "onnxruntime")


def test_a_trunk_takes_normalised_images(lite):
    engine = OnnxEngine(lite)
    session = engine.session(onnx.helper.make_model(trunk_graph(engine.backbone, (64, 64)), ir_version=8))
    images = pictures(1, (64, 64))
    normalised = ((images - lite.mean) / lite.std).numpy()
    found = session.run(None, {session.get_inputs()[0].name: normalised})
    for layer, wanted in zip(found, engine(images), strict=True):
        torch.testing.assert_close(torch.from_numpy(layer), wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


def test_a_piece_can_be_made_by_itself(lite):
    (detector,) = make_detectors(lite, (64, 64), "onnxruntime")
    images = pictures(1, (64, 64))
    assert_same(OnePiece([detector])(images)[0], detector.predict(images))


@pytest.mark.parametrize("form", ["wedge", "paper", "patchcore", "wedge, region"])
def test_what_a_gpu_records_gives_what_torch_gives(lite, form, monkeypatch):
    """The same steps on the CPU; the kernel that searches has a test of its own."""
    pytest.importorskip("triton")
    monkeypatch.setattr("models.cuda_detector.Table", lambda bank: bank)
    monkeypatch.setattr("models.cuda_detector.GRAPH_IMAGES", 0)
    from models.cuda_detector import CudaPiece

    detectors = make_detectors(lite, (64, 64), "torch", banks=(300, 130), **FORMS[form])
    images = pictures(3, (64, 64), 13)
    for detector, found in zip(detectors, CudaPiece(detectors)(images), strict=True):
        assert_same(found, detector.predict(images))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu_it_gives_what_torch_gives_on_a_cpu(lite, form):
    wanted = make_detectors(lite, (72, 104), "torch", banks=(300, 2000), **FORMS[form])
    network = make_detectors(lite, (72, 104), "torch", device="cuda", **FORMS[form])[0].net
    found = [Detector(network, each.banks, each.image_size, each.scales, each.offsets) for each in wanted]
    for count in (1, 3, 33, 1, 5):  # recorded for two sizes, not recorded, played again, recorded
        images = pictures(count, (72, 104), count)
        for own, each in zip(predict_together(found, images), wanted, strict=True):
            assert_same(own, each.predict(images))
    (piece,) = found[0].pieces.values()
    assert sorted(shape[0] for shape in piece.graphs) == [1, 3, 5]
    bad = pictures(1, (72, 104))
    bad[0, 0, 40, 40] = torch.nan
    with pytest.raises(InputError, match="a score is not finite"):
        found[0].predict(bad)
