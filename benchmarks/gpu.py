"""How fast an NVIDIA GPU judges a whole image, beside PatchCore, and beside the backbone alone.

    make gpu
    make gpu DATA_PATH=DATA FLAGS='--category bottle,cookie --center-crop false'

Random weights and random banks, which take the time that real ones do; banks as large as a category of 209 training
images has them, MVTec AD's bottle: 163,856 patches at stride 8. Columns:

- ms and FPS: one image, from a tensor on the card to its score and map on the CPU. The paper's protocol ends before the
  map; here all of it is one CUDA graph.
- end to end: from uint8 pixels on the CPU to the score.
- of 32: images a second, 32 at a time.
- backbone: the backbone alone as a CUDA graph, which the row cannot pass.

WEDGE-Net keeps all dimensions here; trained, its metric keeps fewer. PatchCore has WideResNet-50, as published, and is
searched by brute force in float32; anomalib's own PatchcoreModel, where it is installed, gets the same bank.

With a data set in the MVTec AD layout also what less precision costs: banks of efficientnet_lite0, trained in float32.

Writes ``benchmarks/results/gpu.csv`` and ``.png``, and ``gpu_auroc.csv``.
"""

import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import config
from benchmarks.common import RESULTS, Row, median_and_spread, print_table, write_csv
from models.backbone import Backbone, build_backbone
from models.condition import ConditionStream
from models.detector import Detector
from models.engine import PRECISIONS
from models.errors import InputError
from models.memory_bank import MemoryBank
from models.patchcore import PatchCore
from models.wedge_net import WedgeNet
from models.whitening import Affine
from utils.console import command, for_each
from utils.data.dataset import find_categories, test_samples
from utils.metrics import auroc
from utils.pipeline.checkpoint import build_net
from utils.pipeline.experiments import Variant, few_images, train_variant
from utils.pipeline.inference import score_samples
from utils.pipeline.timing import alternate, describe_machine, describe_versions
from utils.settings import Settings, SettingsParser

IMAGES, SIZE = 209, (224, 224)  # of training, and in pixels
RATIOS = (0.01, 0.1, 1.0)
CALLS = {1: 100, 32: 10}
BATCH = 32
BASELINE = "PatchCore 100 %"
Judge = Callable[[Tensor], Tensor]  # images (B, 3, H, W) on the card -> scores


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; the exit code."""
    settings, _ = SettingsParser(config, __doc__).read(argv)
    if settings.device.type != "cuda":
        raise InputError("this needs an NVIDIA GPU: --device cuda")
    print(describe_machine(settings.device))
    print(describe_versions("torch", "triton", "anomalib"))
    card = measure_card(settings.device)
    print("  ".join(f"{name}: {value:.4g}" for name, value in card.items()))
    rows = measure(settings)
    name = torch.cuda.get_device_name(settings.device)
    print_table(rows)
    write_csv(RESULTS / "gpu.csv", [{"card": name, **row} for row in rows])
    draw(RESULTS / "gpu.png", name, rows)
    print(f"written: {RESULTS / 'gpu.csv'} and gpu.png")
    if not settings.data_path.is_dir():
        print(f"no data in {settings.data_path}: AUROC by precision is not measured")
        return 0
    found: list[Row] = []
    code = for_each(find_categories(settings), lambda category: found.append(compare_precisions(settings, category)))
    if found:
        print_table(found)
        write_csv(RESULTS / "gpu_auroc.csv", [{"card": name, **row} for row in found])
    return code


def measure_card(device: torch.device) -> dict[str, float]:
    """What the card does at best: GB/s of a copy, and TFLOP/s of a large product in float32 and in float16."""
    source = torch.rand(1 << 28, device=device)
    copy = torch.empty_like(source)
    rates = {}
    seconds = median_and_spread(alternate({"": lambda: copy.copy_(source)}, 5, 2, device)[""])[0]
    rates["copy, GB/s"] = 2 * source.nbytes / seconds / 1e9
    for dtype in (torch.float32, torch.float16):
        left, right = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
        product = lambda left=left, right=right: left @ right  # noqa: E731
        seconds = median_and_spread(alternate({"": product}, 5, 2, device)[""])[0]
        rates[f"{str(dtype).removeprefix('torch.')} products, TFLOP/s"] = 2 * 8192**3 / seconds / 1e12
    return rates


def measure(settings: Settings) -> list[Row]:
    """A row for each detector, PatchCore with its whole bank first; its speed is what the others' are compared with."""
    rows: list[Row] = []
    for name, precision, detector, judge in detectors(settings.device):
        rows.append({"detector": name, "precision": precision, **measure_one(judge, detector, settings.device)})
        rows[-1]["times_patchcore"] = rows[-1]["fps"] / rows[0]["fps"]
        print(f"{name}, {precision}: {rows[-1]['fps']:.0f} FPS", flush=True)
        torch.cuda.empty_cache()
    return rows


def detectors(device: torch.device) -> Iterator[tuple[str, str, Detector | None, Judge]]:
    """Name, precision, detector (None for one of anomalib's) and what judges images, one after the other."""
    wide, narrow = random_backbone("wide_resnet50_2"), random_backbone("resnet50")
    for ratio in reversed(RATIOS):
        baseline = patchcore(wide, ratio, device)
        name = f"PatchCore {ratio * 100:g} %"
        yield name, "float32", baseline, as_judge(baseline)
        if name == BASELINE and (peer := anomalib_judge(wide, baseline.banks[0].vectors, device)):
            yield f"anomalib {BASELINE}", "float32", None, peer
    for precision in PRECISIONS:
        for ratio in RATIOS if precision == "float32" else RATIOS[:2]:
            detector = wedge_net(narrow, ratio, precision, device)
            yield f"WEDGE-Net {ratio * 100:g} %", precision, detector, as_judge(detector)


def as_judge(detector: Detector) -> Judge:
    """A detector as a plain function."""
    return lambda images: detector.predict(images).scores


def random_backbone(name: str) -> Backbone:
    """A backbone with random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are random is said above
        return build_backbone(name, "random")


def patchcore(backbone: Backbone, ratio: float, device: torch.device) -> Detector:
    """The baseline with a random bank."""
    net = PatchCore(backbone, device=device)
    count = round(IMAGES * net.patches(SIZE, 0) * ratio)
    return Detector(net, [MemoryBank(torch.randn(count, *net.dims, device=device))], SIZE)


def wedge_net(backbone: Backbone, ratio: float, precision: str, device: torch.device) -> Detector:
    """WEDGE-Net as the settings have it, all conditions and both scales, with random banks."""
    stream = ConditionStream(config.WAVELET_TYPE, [name.strip() for name in config.CONDITIONS.split(",")], True, SIZE)
    net = WedgeNet(backbone, frequency=stream, device=device, precision=precision)
    maps = [[Affine(torch.eye(dim), torch.zeros(dim)) for _ in net.conditions] for dim in net.raw_dims]
    net = net.with_maps(maps)
    banks = []
    for scale, dim in enumerate(net.dims):
        patches = IMAGES * net.patches(SIZE, scale)
        banks.append(MemoryBank(torch.randn(min(patches, round(2 * ratio * patches)), dim, device=device).half()))
    count = len(net.conditions)
    return Detector(net, banks, SIZE, torch.ones(count, len(banks)), torch.zeros(count))


def anomalib_judge(backbone: Backbone, bank: Tensor, device: torch.device) -> Judge | None:
    """anomalib's PatchcoreModel with the same bank; None where it is not installed."""
    try:
        from benchmarks.anomalib_models import Verdict, build_patchcore

        verdict = Verdict(build_patchcore(backbone, bank), backbone).to(device)
    except ImportError as error:
        print(f"anomalib is not measured: {error}")
        return None

    def judge(images: Tensor) -> Tensor:
        torch.backends.cudnn.allow_tf32 = False
        return verdict(images)[0].cpu()

    return judge


@torch.inference_mode()
def measure_one(judge: Judge, detector: Detector | None, device: torch.device) -> Row:
    """Speeds of one detector; of another project's, the backbone alone is not timed."""
    images = {batch: torch.rand(batch, 3, *SIZE, device=device) for batch in CALLS}
    pixels = torch.randint(0, 256, (*SIZE, 3), dtype=torch.uint8)
    calls: dict[str, Callable[[], object]] = {
        "one": lambda: judge(images[1]),
        "end to end": lambda: judge(pixels.to(device).permute(2, 0, 1)[None].float().div_(255)).item(),
    }
    if detector is not None:
        from models.cuda_detector import record

        net = detector.net
        # Next to nothing of the result is brought back.
        bound = record(lambda images: [net.backbone(images)[1][:, :1, :1, :1]], images[1])
        calls["backbone"] = lambda: bound(images[1])
    seconds = alternate(calls, CALLS[1], 5, device)
    many = alternate({"many": lambda: judge(images[BATCH])}, CALLS[BATCH], 2, device)["many"]
    one, p95 = median_and_spread(seconds["one"])[0], sorted(seconds["one"])[int(0.95 * CALLS[1])]
    alone = median_and_spread(seconds["backbone"])[0] if detector is not None else float("nan")
    return {
        "vectors": detector.bank_vectors if detector is not None else "same",
        "mb": detector.bank_bytes / 1e6 if detector is not None else "same",
        "ms": one * 1e3,
        "p95_ms": p95 * 1e3,
        "fps": 1 / one,
        "end_to_end_fps": 1 / median_and_spread(seconds["end to end"])[0],
        "of_32_per_s": BATCH / median_and_spread(many)[0],
        "backbone_ms": alone * 1e3,
        "share_of_backbone": alone / one,
    }


def draw(path: Path, card: str, rows: Sequence[Row]) -> None:
    """Save how many images a second each row judges, one at a time, and where its backbone alone would stand."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.36 * len(rows)))
    colours = {name: f"C{number}" for number, name in enumerate(("anomalib", "PatchCore", "WEDGE-Net"))}
    names = [f"{row['detector']}, {row['precision']}: {row['fps']:.0f}" for row in rows]
    axes.barh(names, [row["fps"] for row in rows], color=[colours[name.split()[0]] for name in names])
    bounds = [1e3 / row["backbone_ms"] for row in rows]
    axes.scatter(bounds, names, marker="|", s=160, color="black", zorder=3, label="its backbone alone")
    axes.set(xlabel="images per second, one at a time", title=card)
    axes.legend(loc="upper right")
    axes.invert_yaxis()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def compare_precisions(settings: Settings, category: str) -> Row:
    """Image AUROC of one bank by the precision that it is used with."""
    settings = dataclasses.replace(settings, backbone="efficientnet_lite0", backbone_weights=None, precision="float32")
    row: Row = {"category": category, "ratio": settings.sampling_ratio[0]}
    with few_images(settings, category, None) as own:
        own = dataclasses.replace(own, sampling_ratio=own.sampling_ratio[:1])
        exact, row["train_s"] = train_variant(Variant("WEDGE-Net"), own, category)
        samples = test_samples(own, category)
        for precision in PRECISIONS:
            net = build_net(dataclasses.replace(own, precision=precision)).with_state(exact.net.state())
            detector = Detector(net, exact.banks, exact.image_size, exact.scales, exact.offsets)
            (scored,) = score_samples([detector], samples, own, f"{category}, {precision}")
            row[precision] = auroc(scored.labels, scored.scores)
    return row


if __name__ == "__main__":
    sys.exit(main())
