"""Training pictures that the others do not vouch for: for a person to look at before all else.

Every training picture was scored against the memory of the others. Good parts' scores have a spread of their own; what
lies far beyond it is a part of another kind, a defect, another light. Nothing is left out by itself.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from models.conformal import conformal_threshold, describe_rate
from models.detector import combine, make_maps
from utils.console import printable
from utils.data.dataset import same_bytes
from utils.data.image import Geometry, read_image
from utils.data.names import images, subfolder
from utils.pictures.panels import Framed, draw_framed
from utils.pictures.tables import write_csv
from utils.pipeline.training import Trained
from utils.regions import Region, worst_region
from utils.settings import Settings, ratio_name

GOOD_AMONG = 0.5  # of the pictures that are named, at most so many are to be expected to be good
FEWEST = 8  # pictures whose spread says something
SHOWN = 24  # pictures that are drawn, at most
NAMED = 5  # files that a line names, at most
_SIDE = 480  # pixels of a drawn picture's longer side
COLUMNS = ("file", "score", "limit", "box_x", "box_y", "box_width", "box_height")


def odd_path(save_dir: Path, category: str, ratio: float) -> Path:
    """SAVE_DIR/10pct/odd_images_tile_10pct.csv; the picture beside it ends in .png."""
    return save_dir / ratio_name(ratio) / f"odd_images_{category}_{ratio_name(ratio)}.csv"


def odd_limit(scores: np.ndarray) -> float:
    """The highest score that the spread of the pictures' own (n,) allows; infinite for fewer than ``FEWEST``.

    A score is the highest of many places, and has a Gumbel distribution (Gumbel, 1958). It is fitted to quartiles,
    which a quarter of odd pictures does not move far, and tells how likely a good picture scores so high. The limit is
    where no more than ``GOOD_AMONG`` of those above it are to be expected (Benjamini and Hochberg, 1995): many odd
    pictures lower it, where there are none it is high.
    """
    count = len(scores)
    if count < FEWEST:
        return float("inf")
    values = np.sort(np.asarray(scores, np.float64))[::-1]
    lower, middle, upper = np.quantile(values, (0.25, 0.5, 0.75))
    width = max((upper - lower) / np.log(np.log(4) / np.log(4 / 3)), 1e-9)
    place = middle + width * np.log(np.log(2))
    with np.errstate(over="ignore"):  # of what lies far below all others
        likely = -np.expm1(-np.exp((place - values) / width))
    named = np.flatnonzero(likely <= GOOD_AMONG * np.arange(1, count + 1) / count).max(initial=0) + 1
    return float(place - width * np.log(-np.log1p(-GOOD_AMONG * named / count)))


def find_odd(trained: Trained) -> tuple[np.ndarray, float, np.ndarray]:
    """The scores (n,) of the pictures that were looked at, their limit, and the numbers of those above, worst first."""
    scores = trained.calibration.scores.numpy().astype(np.float64)
    limit = odd_limit(scores)
    return scores, limit, np.argsort(-scores)[: int((scores > limit).sum())]


def name_odd_images(trained: Trained, settings: Settings, category: str) -> None:
    """Say which training pictures are odd, and write them as a table and as one picture, their worst place outlined."""
    checkpoint, calibration = trained.checkpoint, trained.calibration
    scores, limit, odd = find_odd(trained)
    maps = make_maps(trained.net, settings.image_size)
    geometry = Geometry(settings.image_size, settings.resize, settings.center_crop)
    rows, pictures = [], []
    for number in odd:
        path = trained.samples[calibration.images[number]].path
        distances = [scale[[number]] for scale in calibration.distances]
        anomaly_map = combine(distances, checkpoint.scales, checkpoint.offsets, maps)[1][0].numpy()
        image = read_image(path, checkpoint.settings["BIT_DEPTH"])
        # Halfway between limit and peak: smoothed as maps are, all above the limit is more than the place itself.
        peak = float(anomaly_map.max())
        region = worst_region(anomaly_map, min((limit + peak) / 2, peak * (1 - 1e-6)))
        region = region.in_file(*geometry.in_file(image.size), image.size)
        rows.append(dict(zip(COLUMNS, (printable(path.name), float(scores[number]), limit, *region[:4]), strict=True)))
        if len(pictures) < SHOWN:
            pictures.append(_framed(image, region, f"{printable(path.name)}\n{scores[number]:.4g}"))
    table = odd_path(settings.save_dir, category, checkpoint.sampling_ratio)
    write_csv(table, rows, COLUMNS)
    drawn = table.with_suffix(".png")
    if pictures:
        draw_framed(drawn, f"{category}: {len(pictures)} of {len(rows)} above {limit:.4g}", pictures)
    else:
        drawn.unlink(missing_ok=True)
    print(f"[{category}] {describe(trained, rows, scores, limit, settings.false_alarm_rate, table)}")


def describe(trained: Trained, rows: Sequence[dict], scores: np.ndarray, limit: float, rate: float, table: Path) -> str:
    """One line: which pictures, where to look at them, and what they do to the threshold."""
    if len(scores) < FEWEST:
        return f"{len(scores)} training pictures are too few to tell whether one of them is odd"
    looked_at = f" of the {len(scores)} that were looked at" if len(scores) < len(trained.samples) else ""
    if not rows:
        return f"no training picture{looked_at} is unlike the others"
    names = ", ".join(row["file"] for row in rows[:NAMED]) + (
        f" and {more} more" if (more := len(rows) - NAMED) > 0 else ""
    )
    which = "1 training picture" if len(rows) == 1 else f"{len(rows)} training pictures"
    now, then = (conformal_threshold(some, rate) for some in (scores, scores[scores <= limit]))
    return (
        f"look at these first: {which}{looked_at} unlike the others, {names}: {table} and .png; --without FILE... "
        f"leaves them out, and the threshold falls from {now:.4g} to about {then:.4g}"
    )


def tell_threshold(trained: Trained, settings: Settings, category: str) -> None:
    """Say the threshold of a new memory, and how it differs from that of one which other pictures made."""
    scores, rate = trained.calibration.scores.numpy(), settings.false_alarm_rate
    if not len(scores):
        print(f"[{category}] {describe_rate(scores, rate)}")
        return
    now = conformal_threshold(scores, rate)
    line = f"[{category}] threshold {now:.4g}: {describe_rate(scores, rate)}"
    before = trained.before
    differ = before is not None and before.training_digest != trained.checkpoint.training_digest
    if differ and len(before.calibration_scores):
        then = conformal_threshold(before.calibration_scores.numpy(), rate)
        change = f"{abs(now - then) / max(then, 1e-12):.0%} {'below' if now < then else 'above'}"
        line += f"; {change} the {then:.4g} of before, from {before.training_images} pictures"
    print(line)


def tell_twins(trained: Trained, settings: Settings, category: str) -> None:
    """Say how many pictures are in training more than once, or in training and test: byte for byte."""
    train = [sample.path for sample in trained.samples]
    folder = subfolder(settings.data_path / category, "test")
    test = [image for defect in sorted(folder.glob("*")) if defect.is_dir() for image in images(defect)]
    twice, both = [], []
    for twins in same_bytes([*train, *test]):
        learnt = [path for path in twins if path in train]
        tested = [path for path in twins if path in test]
        twice += [(learnt[0], path) for path in learnt[1:]]
        both += [(learnt[0], path) for path in tested if learnt]
    found = [
        f"{where}: {len(pairs)} ({' = '.join(printable('/'.join(path.parts[-2:])) for path in pairs[0])}"
        f"{', ...' if len(pairs) > 1 else ''})"
        for pairs, where in ((twice, "training files that repeat another"), (both, "test files that are in training"))
        if pairs
    ]
    if found:
        print(f"[{category}] the same picture under two names: {'; '.join(found)}")


def _framed(image: Image.Image, region: Region, title: str) -> Framed:
    scale = min(1.0, _SIDE / max(image.size))
    small = image.resize([max(1, round(side * scale)) for side in image.size])
    return Framed(np.asarray(small), tuple(round(side * scale) for side in region[:4]), title)
