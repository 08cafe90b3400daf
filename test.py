"""Show what WEDGE-Net sees: one picture for each defective test image (Figure 3).

    python test.py
    python test.py --category all --limit 5

Six columns: input, ground truth, frequency map, semantic map, anomaly score, overlay with the defect's outline. The
semantic map is what USE_SEMANTIC weighs patches by; without it the map is shown all the same, and so labelled. One
colour scale for all images of a category; the title tells the condition that the image was judged in, and a dashed line
the region of interest if there is one. Writes
SAVE_DIR/10pct/results/tile/<defect>_<image>.png. Settings are in config.py.
"""

import sys
from collections.abc import Iterator, Sequence

import config
from models.errors import InputError
from models.frequency import WaveletTransform, frequency_map
from models.semantic import attention_mask
from models.wedge_net import WedgeNet
from utils.console import check_writable, command, for_each, progress
from utils.data.dataset import Sample, batches, evenly, find_categories, test_samples
from utils.metrics import training_threshold
from utils.pictures.panels import Streams, colour_scale, draw_result
from utils.pipeline.checkpoint import build_net, load_detector
from utils.pipeline.cluster import workers
from utils.pipeline.inference import at_depth_of, score_samples
from utils.settings import Settings, SettingsParser, positive, ratio_name


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Draw every category and ratio that the settings ask for; returns the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="draw N images of each category, spread over its defects"
    )
    settings, options = parser.read(argv)
    categories = find_categories(settings)
    check_writable(settings.save_dir, "SAVE_DIR")
    net = build_net(settings)
    with workers(settings, net) as run:
        return for_each(categories, lambda category: draw_category(settings, category, net, options.limit), run=run)


def draw_category(settings: Settings, category: str, net: WedgeNet, limit: int | None = None) -> None:
    """Score all test images, for the colour scale, and draw the defective ones, or ``limit`` of them."""
    samples = test_samples(settings, category)
    defective = [index for index, sample in enumerate(samples) if sample.label]
    if not defective:
        raise InputError(f"{category} has no defective test image to draw")
    chosen = evenly(defective, limit or len(defective))
    detectors = [load_detector(settings, category, ratio, net)[0] for ratio in settings.sampling_ratio]
    scored = score_samples(detectors, samples, settings, category)
    rate = settings.false_alarm_rate
    thresholds = [training_threshold(detector.calibration_scores.numpy(), rate) for detector in detectors]
    scales = [colour_scale(result.maps, threshold) for result, threshold in zip(scored, thresholds, strict=True)]
    folders = [settings.save_dir / ratio_name(ratio) / "results" / category for ratio in settings.sampling_ratio]

    views = see(detectors[0].net, [samples[index] for index in chosen], at_depth_of(detectors, settings))
    for index, streams in zip(progress(chosen, f"{category}: pictures"), views, strict=True):
        sample = samples[index]
        name = f"{category}/{sample.defect}/{sample.path.name}"
        for folder, result, scale, threshold in zip(folders, scored, scales, thresholds, strict=True):
            file = folder / f"{sample.defect}_{sample.path.stem}.png"
            draw_result(file, name, streams, result.maps[index], scale, float(result.scores[index]), threshold)
    for folder in folders:
        print(f"[{category}] {len(chosen)} pictures: {folder}")


def see(net: WedgeNet, samples: Sequence[Sample], settings: Settings) -> Iterator[Streams]:
    """For each sample the image, its mask (None if there is none) and what the two streams see in it."""
    transform = WaveletTransform(settings.wavelet_type).to(net.device)
    for batch in batches(samples, settings):
        images, reading = net.prepare(batch.images.to(net.device))
        frequency = frequency_map(transform(images)).cpu().numpy()
        semantic = attention_mask(net.backbone(images)[0])[:, 0].cpu().numpy()
        for place, sample in enumerate(batch.samples):
            yield Streams(
                image=batch.images[place].permute(1, 2, 0).numpy(),
                mask=None if sample.mask is None else batch.masks[place].numpy(),
                frequency=frequency[place],
                semantic=semantic[place],
                semantic_counts=settings.use_semantic,
                region=None if net.region is None else net.region.inside.cpu().numpy() > 0,
                condition=None if reading is None else net.conditions[reading.conditions[place]].name,
            )


if __name__ == "__main__":
    sys.exit(main())
