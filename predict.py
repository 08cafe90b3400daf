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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from PIL import Image

from models.conformal import conformal_threshold, describe_rate, p_values
from models.errors import InputError
from utils.console import Parser, check_writable, command, printable
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


AHEAD = 2  # images that are decoded before their turn
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
    paths = find_images(options.inputs)
    gallery = Gallery(options.gallery) if options.gallery else None
    judge = Judge(load_model(options.model), options.false_alarm_rate, options.heatmaps, gallery)
    judged = read_judged(options.csv) if options.watch else set()

    counts: Counter[str] = Counter()
    unfamiliar = 0
    times: list[float] = []
    with ExitStack() as stack:
        mode = "a" if options.watch else "w"
        results = Results(options.csv, options.jsonl, mode, stack)
        verdicts = watch(judge, options.watch.resolve(), judged) if options.watch else judge.each(paths)
        try:
            for verdict, error in verdicts:
                counts[verdict.verdict] += 1
                unfamiliar += verdict.condition == UNFAMILIAR
                times += [verdict.milliseconds] if verdict.milliseconds is not None else []
                results.add(verdict, error)
        except KeyboardInterrupt:
            if not options.watch:
                raise
        finally:
            print(summary(counts, unfamiliar, times), file=sys.stderr)
    if gallery is not None:
        gallery.write(f"{printable(judge.model.info.category)}: judged pictures", judge.described)
        print(f"{printable(str(options.gallery))}: {counts.total()} images, worst first", file=sys.stderr)
    if counts["ERROR"] and not times and not options.watch:
        return 2
    return int(options.fail_on_ng and counts["NG"] + counts["ERROR"] > 0)


def load_model(path: Path) -> Model:
    """The model in a file; only a .pt file needs torch."""
    if path.suffix == ".onnx":
        return OnnxModel(path)
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


class Picture(NamedTuple):
    """An image's file, read: its ``pixels`` (H, W, 3) as the model sees them, the ``size`` (width, height) that it
    has in the file, the ``seconds`` that it took; or the ``error`` that it met."""

    path: Path
    image: Image.Image | None
    pixels: np.ndarray | None
    size: tuple[int, int] | None
    error: str | None
    seconds: float


class Judge:
    """From an image's file to its verdict."""

    def __init__(self, model: Model, rate: float | None, heatmaps: Path | None, gallery: Gallery | None):
        self.model, self.heatmaps, self.gallery, self.other_depths = model, heatmaps, gallery, 0
        self.calibration, self.inside = np.asarray(model.info.calibration_scores), model.info.inside
        rate = model.info.false_alarm_rate if rate is None else rate
        self.threshold = conformal_threshold(self.calibration, rate)
        if heatmaps is not None:
            check_writable(heatmaps, "--heatmaps")
        self.described = f"threshold {self.threshold:.4f}: {describe_rate(self.calibration, rate)}"
        print(f"[{printable(model.info.category)}] {self.described}", file=sys.stderr)

    def __call__(self, path: Path) -> tuple[Verdict, str | None]:
        """The verdict on one image, and why there is none if it cannot be read."""
        return self.judge(self.read(path))

    def each(self, paths: Iterable[Path]) -> Iterator[tuple[Verdict, str | None]]:
        """Verdicts on images in their order; of files that are known beforehand, the next is decoded meanwhile."""
        if not isinstance(paths, list):
            yield from map(self, paths)
            return
        with ThreadPoolExecutor(1) as reader:
            waiting: deque[Future[Picture]] = deque()
            for path in paths:
                waiting.append(reader.submit(self.read, path))
                if len(waiting) > AHEAD:
                    yield self.judge(waiting.popleft().result())
            while waiting:
                yield self.judge(waiting.popleft().result())

    def read(self, path: Path) -> Picture:
        """An image's file, decoded for the model; may run beside :meth:`judge`."""
        start = time.perf_counter()
        info = self.model.info
        try:
            image = read_image(path, info.bit_depth, self.tell_depth, info.geometry)
            read = Picture(path, image, info.geometry.apply(image), picture_size(path), None, 0.0)
        except (InputError, MemoryError) as error:
            read = Picture(path, None, None, None, printable(str(error)), 0.0)
        return read._replace(seconds=time.perf_counter() - start)

    def judge(self, picture: Picture) -> tuple[Verdict, str | None]:
        """The verdict on an image that has been read, and why there is none if it could not be."""
        start = time.perf_counter()
        path, image, pixels, size, error, seconds = picture
        if error is not None:
            verdict = Verdict(printable(str(path)), None, None, "ERROR", None, None)
            if self.gallery is not None:
                self.gallery.add(asdict(verdict) | {"error": error}, None, None)
            return verdict, error
        geometry = self.model.info.geometry
        scores, maps, conditions, unfamiliar = self.model.predict(np.stack([pixels]))
        region = worst_region(maps[0], self.threshold)
        milliseconds = (seconds + time.perf_counter() - start) * 1e3
        score = float(scores[0])
        verdict = Verdict(
            file=printable(str(path)),
            score=score,
            p_value=float(p_values(self.calibration, scores)[0]),
            verdict="NG" if score > self.threshold else "OK",
            milliseconds=round(milliseconds, 2),
            condition=UNFAMILIAR if unfamiliar[0] else self.model.info.conditions[conditions[0]],
            **_where(region and region.in_file(*geometry.in_file(size), size)),
        )
        if self.heatmaps is not None or self.gallery is not None:
            drawn = overlay(pixels, maps[0], self.threshold, self.inside)
            if self.heatmaps is not None:
                save_overlay(overlay_path(self.heatmaps, path), drawn)
            if self.gallery is not None:
                self.gallery.add(asdict(verdict), size, thumbnail(image, drawn, geometry, maps[0].shape))
        return verdict, None

    def tell_depth(self, message: str) -> None:
        """Say it of the first image that has another bit depth, and count the others."""
        self.other_depths += 1
        if self.other_depths == 1:
            print(f"warning: {printable(message)}; others like it are not named", file=sys.stderr)


def _where(region: Region | None) -> dict[str, int]:
    """A verdict's fields for the worst region, in the file's pixels."""
    if region is None:
        return {"regions": 0}
    x, y, width, height, area, regions = region
    return {"box_x": x, "box_y": y, "box_width": width, "box_height": height, "area": area, "regions": regions}


def watch(judge: Judge, folder: Path, judged: set[str]) -> Iterator[tuple[Verdict, str | None]]:
    """Verdicts on what appears in a folder; a file that cannot be read may be half-written, and gets another try."""
    for arrival in follow(folder, lambda path: printable(str(path)) in judged):
        if arrival is None:
            continue
        verdict, error = judge(arrival.path)
        arrival.done = error is None
        if arrival.done or (arrival.last_try and arrival.path.exists()):
            yield verdict, error


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


def summary(counts: Counter[str], unfamiliar: int, times: Sequence[float]) -> str:
    """One line at the end."""
    line = f"{counts.total()} images: {counts['OK']} OK, {counts['NG']} NG, {counts['ERROR']} unreadable"
    line += f", {unfamiliar} unlike anything in training" if unfamiliar else ""
    return line + (f"; median {statistics.median(times):.1f} ms" if times else "")


if __name__ == "__main__":
    sys.exit(main())
