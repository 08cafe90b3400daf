"""Judge images with a trained model: score, p-value and OK or NG, a line for each.

    python predict.py model.onnx part.png folder/ "camera/*.jpg" --csv verdicts.csv --heatmaps overlays
    find . -name "*.png" | python predict.py model.onnx -
    python predict.py model.onnx folder/ --gallery page.html
    python predict.py model.onnx --watch camera --csv verdicts.csv

MODEL is a .onnx file of export_onnx.py, for which numpy, pillow and onnxruntime are enough, or a .pt file of train.py.
A part is NG if its score is above the threshold that the good parts of the training set gave for the false-alarm rate;
the p-value is how often a good part scores as high or higher. A picture whose light, focus or noise is like nothing in
training is judged all the same, and flagged. Tables say where the worst region above the threshold is: a box in pixels
of the image's own file, upright.

Exit code 0; with --fail-on-ng 1 if a part is NG or could not be judged; 2 for bad use, or if nothing could be judged.
"""

import csv
import json
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from models.threads import cores

import numpy as np
from PIL import Image

from models.conformal import conformal_threshold, describe_rate, p_values
from models.errors import InputError
from utils.console import Parser, check_writable, command, printable
from utils.data.ahead import ahead
from utils.data.image import picture_size, read_image
from utils.line.edge_model import Model, OnnxModel
from utils.line.gallery import Gallery, thumbnail
from utils.line.inputs import find_images
from utils.line.watch import follow
from utils.pictures.heatmap import overlay, overlay_path, save_overlay
from utils.regions import Region, worst_region

UNFAMILIAR = "unfamiliar"  # a condition like none that the model knows


@dataclass(frozen=True)
class Verdict:
    """One image's row. ``verdict`` is OK, NG or ERROR (unreadable: then the figures are None).

    ``condition`` is the one that the image was judged in, or UNFAMILIAR. ``regions`` of it are above the threshold;
    the worst one's box and ``area`` are in pixels of the file after its EXIF rotation, None where there is none.
    """

    file: str
    score: float | None
    p_value: float | None
    verdict: str
    milliseconds: float | None
    condition: str | None
    box_x: int | None = None
    box_y: int | None = None
    box_width: int | None = None
    box_height: int | None = None
    area: int | None = None
    regions: int | None = None


SIDE_BY_SIDE = 8  # pictures that are judged at once, at most: each takes some memory
HEADER = [field.name for field in fields(Verdict)]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Judge what the command line names; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a .onnx or .pt file")
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="images, folders, globs, or - for a list on stdin")
    parser.add_argument("--watch", type=Path, metavar="DIR", help="judge what a camera writes there, until Ctrl-C")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a table; with --watch go on with the one there")
    parser.add_argument("--jsonl", type=Path, metavar="FILE", help="write a JSON object for each image")
    parser.add_argument("--heatmaps", type=Path, metavar="DIR", help="write overlays with what was found outlined")
    parser.add_argument("--gallery", type=Path, metavar="PAGE.html", help="write a page of all images, worst first")
    parser.add_argument("--fail-on-ng", action="store_true", help="exit code 1 if a part is NG or cannot be judged")
    parser.add_argument("--false-alarm-rate", type=float, metavar="RATE", help="choose the threshold anew")
    options = parser.parse_args(argv)
    if bool(options.inputs) == bool(options.watch):
        raise InputError("give INPUT (images, folders, globs or -), or --watch DIR (--help lists every flag)")
    if options.watch and not options.csv:
        raise InputError("--watch needs --csv FILE: it is how a restart knows what has been judged")
    if options.watch and not options.watch.is_dir():
        raise InputError(f"--watch {options.watch} is not a folder")
    if options.watch and options.gallery:
        raise InputError("--gallery is a page of INPUT: --watch has no end at which it could be written")
    check_replaceable(options.csv, ",".join(HEADER))
    check_replaceable(options.jsonl, "{")
    paths = find_images(options.inputs)
    # Several files that are there already are judged side by side, each by one core, which takes less time in all than
    # one after the other by all cores. One that a camera has just written gets all of them.
    several = isinstance(paths, list) and len(paths) > 1 and options.model.suffix == ".onnx"
    threads = min(SIDE_BY_SIDE, cores()) if several else 0
    gallery = Gallery(options.gallery) if options.gallery else None
    model = load_model(options.model, threads=1 if several else 0)
    judge = Judge(model, options.false_alarm_rate, options.heatmaps, gallery is not None)
    if options.watch:
        outcomes = watch(judge, options.watch.resolve(), read_judged(options.csv))
    else:
        outcomes = ahead(judge, paths, threads, 2 * threads)

    tally = Tally()
    with ExitStack() as stack:
        results = Results(options.csv, options.jsonl, "a" if options.watch else "w", stack)
        try:
            for outcome in outcomes:
                tally.add(outcome)
                results.add(outcome.verdict, outcome.error)
                if gallery is not None:
                    gallery.add(asdict(outcome.verdict) | {"error": outcome.error}, outcome.size, outcome.card)
        except KeyboardInterrupt:
            if not options.watch:  # the tables would be written anew, not gone on with
                print("\ninterrupted: what was finished is kept", file=sys.stderr)
                return 130
        finally:
            print(tally, file=sys.stderr)
    if gallery is not None:
        gallery.write(f"{printable(judge.model.info.category)}: judged pictures", judge.described)
        print(f"{printable(str(options.gallery))}: {tally.counts.total()} images, worst first", file=sys.stderr)
    if tally.counts["ERROR"] == tally.counts.total() > 0 and not options.watch:
        return 2
    return int(options.fail_on_ng and tally.counts["NG"] + tally.counts["ERROR"] > 0)


def check_replaceable(table: Path | None, start: str) -> None:
    """Raise :class:`InputError` if a file is there that does not start as a table of verdicts does."""
    if table is not None and table.is_file():
        with open(table, "rb") as file:
            found = file.read(len(start))
        if found and found != start.encode():
            raise InputError(f"{table} is there and no table of verdicts: choose another file")


def load_model(path: Path, threads: int = 0) -> Model:
    """The model in a file; only a .pt file needs torch. ``threads`` of a .onnx for one picture, 0: one a core."""
    if path.suffix == ".onnx":
        return OnnxModel(path, threads)
    if path.suffix == ".pt":
        try:
            import config
            from utils.line.torch_model import TorchModel
        except ImportError as error:
            raise InputError(
                f"{path} needs {error.name}, which is not installed: export_onnx.py makes a .onnx"
            ) from None
        return TorchModel(path, config)
    raise InputError(f"MODEL {path} is neither a .onnx file (export_onnx.py) nor a .pt file (train.py)")


class Outcome(NamedTuple):
    """What is said of an image: its ``verdict``; the ``error``, if it could not be read; a ``note`` on its bit depth.

    For the gallery its file's ``size`` (width, height) and its ``card``, a thumbnail; None where there is none.
    """

    verdict: Verdict
    error: str | None = None
    note: str | None = None
    size: tuple[int, int] | None = None
    card: Image.Image | None = None


class Judge:
    """From an image's file to its verdict. Several threads may ask it at once if they may ask the model.

    Args:
        rate: of false alarms; None for the one that the model was trained for.
        heatmaps: a folder for overlays.
        cards: whether thumbnails are made.
    """

    def __init__(self, model: Model, rate: float | None, heatmaps: Path | None, cards: bool):
        self.model, self.heatmaps, self.cards = model, heatmaps, cards
        self.calibration, self.inside = np.asarray(model.info.calibration_scores), model.info.inside
        rate = model.info.false_alarm_rate if rate is None else rate
        self.threshold = conformal_threshold(self.calibration, rate)
        if heatmaps is not None:
            check_writable(heatmaps, "--heatmaps")
        self.described = f"threshold {self.threshold:.4f}: {describe_rate(self.calibration, rate)}"
        print(f"[{printable(model.info.category)}] {self.described}", file=sys.stderr)

    def __call__(self, path: Path) -> Outcome:
        """The verdict on one image."""
        start, notes = time.perf_counter(), list[str]()
        info = self.model.info
        try:
            image = read_image(path, info.bit_depth, notes.append, info.geometry)
            pixels, size = info.geometry.apply(image), picture_size(path)
        except (InputError, MemoryError) as error:
            return Outcome(Verdict(printable(str(path)), None, None, "ERROR", None, None), printable(str(error)))
        scores, maps, conditions, unfamiliar = self.model.predict(np.stack([pixels]))
        region = worst_region(maps[0], self.threshold)
        milliseconds = (time.perf_counter() - start) * 1e3
        score = float(scores[0])
        verdict = Verdict(
            file=printable(str(path)),
            score=score,
            p_value=float(p_values(self.calibration, scores)[0]),
            verdict="NG" if score > self.threshold else "OK",
            milliseconds=round(milliseconds, 2),
            condition=UNFAMILIAR if unfamiliar[0] else info.conditions[conditions[0]],
            **_where(region and region.in_file(*info.geometry.in_file(size), size)),
        )
        card = None
        if self.heatmaps is not None or self.cards:
            drawn = overlay(pixels, maps[0], self.threshold, self.inside)
            if self.heatmaps is not None:
                save_overlay(overlay_path(self.heatmaps, path), drawn)
            if self.cards:
                card = thumbnail(image, drawn, info.geometry, maps[0].shape)
        return Outcome(verdict, None, next(iter(notes), None), size, card)


def _where(region: Region | None) -> dict[str, int]:
    """A verdict's fields for the worst region, in the file's pixels."""
    if region is None:
        return {"regions": 0}
    x, y, width, height, area, regions = region
    return {"box_x": x, "box_y": y, "box_width": width, "box_height": height, "area": area, "regions": regions}


def watch(judge: Judge, folder: Path, judged: set[str]) -> Iterator[Outcome]:
    """What is said of files that appear in a folder; one that cannot be read may be half-written: it is tried again."""
    for arrival in follow(folder, lambda path: printable(str(path)) in judged):
        if arrival is None:
            continue
        outcome = judge(arrival.path)
        arrival.done = outcome.error is None
        if arrival.done or (arrival.last_try and arrival.path.exists()):
            yield outcome


class Results:
    """Where verdicts go: one line on the console, a row in each file, written out at once."""

    def __init__(self, table: Path | None, lines: Path | None, mode: str, stack: ExitStack):
        self.table, self.lines = (
            None if path is None else stack.enter_context(_open(path, mode)) for path in (table, lines)
        )
        self.rows = None if self.table is None else csv.DictWriter(self.table, HEADER)
        if self.table is not None and self.table.tell() == 0:
            self.rows.writeheader()

    def add(self, verdict: Verdict, error: str | None) -> None:
        """Write one verdict."""
        row: dict[str, Any] = asdict(verdict)
        if self.rows is not None:
            self.rows.writerow(row)
            self.table.flush()
        if self.lines is not None:
            self.lines.write(json.dumps(row | {"error": error}) + "\n")
            self.lines.flush()
        # The line comes last: who sees it, and then ends the program, finds the row in the files.
        if error is None:
            print(
                f"{verdict.file}  {verdict.score:.4f}  p {verdict.p_value:.4f}  {verdict.verdict}  "
                f"{verdict.milliseconds:.1f} ms{'' if verdict.condition == 'clean' else '  ' + verdict.condition}",
                flush=True,
            )
            if verdict.condition == UNFAMILIAR:
                print(
                    f"warning: {verdict.file}: light, focus or noise unlike anything in training: check the camera",
                    file=sys.stderr,
                )
        else:
            print(f"error: {error}", file=sys.stderr)


def _open(path: Path, mode: str) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, mode, newline="", encoding="utf-8")


def read_judged(table: Path) -> set[str]:
    """The files that a table of verdicts names; a last row that is cut off (a power failure) is removed from it.

    Raises :class:`InputError` if the file is another kind of table, which is left as it is.
    """
    if not table.exists() or table.stat().st_size == 0:
        return set()
    text = table.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]  # no cell holds a line break
    rows = list(csv.reader(whole.decode("utf-8", "replace").splitlines()))
    if rows[:1] != [HEADER]:
        raise InputError(f"--csv {table} is there and no table of verdicts: choose another file")
    if whole != text:
        with open(table, "r+b") as file:
            file.truncate(len(whole))
    return {row[0] for row in rows[1:] if row}


class Tally:
    """What came of all images so far, and as text one line on it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.unfamiliar, self.told = 0, False
        self.start, self.times = time.perf_counter(), deque[float](maxlen=10_000)

    def add(self, outcome: Outcome) -> None:
        """Count an image; say it of the first one that has another bit depth."""
        verdict = outcome.verdict
        self.counts[verdict.verdict] += 1
        self.unfamiliar += verdict.condition == UNFAMILIAR
        if verdict.milliseconds is not None:
            self.times.append(verdict.milliseconds)
        if outcome.note is not None and not self.told:
            print(f"warning: {printable(outcome.note)}; others like it are not named", file=sys.stderr)
            self.told = True

    def __str__(self) -> str:
        counts, seconds = self.counts, time.perf_counter() - self.start
        line = f"{counts.total()} images: {counts['OK']} OK, {counts['NG']} NG, {counts['ERROR']} unreadable"
        line += f", {self.unfamiliar} unlike anything in training" if self.unfamiliar else ""
        return line + (f"; {seconds:.1f} s, median {statistics.median(self.times):.1f} ms" if self.times else "")


if __name__ == "__main__":
    sys.exit(main())
