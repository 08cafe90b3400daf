"""Let good parts that were called NG join a memory: in seconds, without the training pictures.

    python remember.py WEDGE-Net/10pct/model_data_tile_10pct.pt false_alarms/
    python remember.py WEDGE-Net/10pct/model_data_tile_10pct.pt --undo

MODEL is a .pt file of train.py. Patches of these pictures that lie too far from the memory for an OK are added to it.
Nothing of any picture is farther from it than before, and the threshold, for which these pictures count too, does not
rise. The old file is kept beside the new one: --undo brings it back, once for each time that pictures were added. A log
in the file says what was added and when. --onnx writes the model of export_onnx.py again.

A picture that looks like a defect rather than like another kind of good part, or that is of another size than all in
training, is named, and nothing is done without --yes.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import models.threads  # noqa: F401 - before torch

import torch

import config
from models.conformal import conformal_threshold, describe_rate
from models.detector import Detector
from models.errors import InputError
from models.wedge_net import Embedding
from utils.atomic import atomic_file
from utils.console import Parser, command, printable
from utils.data.dataset import GOOD, Sample, as_images
from utils.data.image import Geometry, picture_size, read_image
from utils.line.inputs import find_images
from utils.line.torch_model import TorchModel
from utils.pipeline.checkpoint import build_net, load_checkpoint, make_detector, save_checkpoint
from utils.pipeline.remembering import defect_limit, remember_pictures


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Add what the command line names; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a .pt file")
    parser.add_argument("inputs", nargs="*", metavar="IMAGE", help="images, folders, globs, or - for a list on stdin")
    parser.add_argument("--undo", action="store_true", help="bring back the memory before the last pictures")
    parser.add_argument("--yes", action="store_true", help="also pictures that look like defects, or have another size")
    parser.add_argument("--onnx", action="store_true", help="write the .onnx file beside MODEL again")
    options = parser.parse_args(argv)
    if options.model.suffix != ".pt":
        raise InputError(
            f"MODEL {options.model} is no .pt file of train.py: an exported model cannot learn; give the .pt that it "
            "was made from, and --onnx"
        )
    if options.undo == bool(options.inputs):
        raise InputError("give pictures of good parts, or --undo (--help lists every flag)")
    pictures = undo(options.model) if options.undo else list(find_images(options.inputs))
    if not options.undo:
        add(options.model, pictures, options.yes)
    tell_export(options.model, options.onnx, pictures)
    return 0


def undo(path: Path) -> list[Path]:
    """Bring back the file before the last pictures; returns those of them that are still there."""
    log = load_checkpoint(path, metadata_only=True).remembered
    if not log:
        raise InputError(f"{path} has nothing to undo: it is as train.py made it")
    before = kept(path, len(log) - 1)
    if not before.is_file():
        raise InputError(f"{before} is not there any more: what was added to {path} cannot be undone")
    load_checkpoint(before, metadata_only=True)
    os.replace(before, path)
    print(f"{path} is as it was before {log[-1]['when']}: {_pictures(len(log[-1]['files']))} forgotten")
    return [file for file in map(Path, log[-1]["files"]) if file.is_file()]


def kept(path: Path, times: int) -> Path:
    """Where the memory to which pictures were added so many times is kept."""
    return path.with_name(f"{path.name}.undo{times}")


def add(path: Path, paths: Sequence[Path], sure: bool) -> None:
    """Let pictures join the memory in a file; ``sure`` also those that raise doubts."""
    if not paths:
        raise InputError("no picture is given")
    model = TorchModel(path, config)
    checkpoint, category = model.checkpoint, printable(model.checkpoint.category)
    paths, digests = unknown(paths, checkpoint.remembered, category)
    if not paths:
        return
    doubts = other_sizes(paths, checkpoint.picture_sizes)
    seen = look(model.detector, paths, model.info.geometry)
    entry = {
        "when": datetime.now().isoformat(timespec="seconds"),
        "files": [str(file) for file in paths],
        "digests": digests,
    }
    scores, rate = checkpoint.calibration_scores, model.settings.false_alarm_rate
    before = conformal_threshold(scores.numpy(), rate)
    done = remember_pictures(model.detector, checkpoint, seen, before, entry)
    limit = defect_limit(scores)
    doubts += [
        f"{printable(str(file))} looks like a defect (score {score:.4g}, good parts have up to {scores.max():.4g})"
        for file, score in zip(paths, done.before.tolist(), strict=True)
        if score > limit
    ]
    if doubts and not sure:
        more = f", and {len(doubts) - 3} more" if len(doubts) > 3 else ""
        raise InputError(f"{'; '.join(doubts[:3])}{more}: nothing is added; --yes adds them all the same")

    after = conformal_threshold(done.checkpoint.calibration_scores.numpy(), rate)
    done.checkpoint.remembered[-1] |= {"threshold_before": before, "threshold_after": after}
    with atomic_file(kept(path, len(checkpoint.remembered))) as temporary:
        shutil.copyfile(path, temporary)
    save_checkpoint(path, done.checkpoint)
    patches = " and ".join(
        f"{new} patches beside {len(bank)}" for new, bank in zip(done.patches, checkpoint.memory_banks, strict=True)
    )
    print(
        f"[{category}] {_pictures(len(paths))} remembered, {patches}: {int((done.before > before).sum())} NG before, "
        f"{int((done.after > after).sum())} NG now\n"
        f"[{category}] of other good parts like these about {float((done.new_to <= after).float().mean()):.0%} will be "
        f"OK\n"
        f"[{category}] threshold {after:.4g} (before: {before:.4g}), "
        f"{describe_rate(done.checkpoint.calibration_scores.numpy(), rate)}\n"
        f"{path} is written; --undo takes the pictures out again"
    )


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"


def unknown(paths: Sequence[Path], log: Sequence[dict], category: str) -> tuple[list[Path], list[str]]:
    """The pictures that the memory has not been given yet, each once, and digests of their bytes."""
    known = {digest for entry in log for digest in entry["digests"]}
    new: dict[str, Path] = {}
    for path in paths:
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        except OSError as error:
            raise InputError(f"image {path} cannot be read ({error.strerror}): nothing is added") from None
        if digest in known or digest in new:
            print(f"[{category}] {printable(str(path))} is remembered already, and counts once")
        else:
            new[digest] = path
    return list(new.values()), list(new)


def other_sizes(paths: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> list[str]:
    """What there is to say of pictures that are smaller or larger than all of training were."""
    (least_width, least_height), (most_width, most_height) = sizes
    trained = f"{least_width} x {least_height}"
    trained += "" if sizes[0] == sizes[1] else f" to {most_width} x {most_height}"
    found = []
    for path in paths:
        width, height = picture_size(path)
        if not (least_width <= width <= most_width and least_height <= height <= most_height):
            found.append(
                f"{printable(str(path))} has {width} x {height} pixels, training pictures {trained}: another camera?"
            )
    return found


def look(detector: Detector, paths: Sequence[Path], geometry: Geometry) -> Embedding:
    """What the network sees in picture files."""
    pixels = [geometry.apply(read_image(path, detector.bit_depth, geometry=geometry)) for path in paths]
    return detector.net.look(as_images(pixels))


def tell_export(path: Path, wanted: bool, pictures: Sequence[Path]) -> None:
    """Write the exported model again, or say that it is out of date."""
    target = path.with_suffix(".onnx")
    if not wanted:
        if target.is_file():
            print(f"{target} is still as it was: --onnx or export_onnx.py brings it up to date")
        return
    if not pictures:
        raise InputError(f"{target} is not written: there is no picture left to compare it with; use export_onnx.py")
    from export_onnx import write_model  # onnx is needed for nothing else here

    model = TorchModel(path, config)
    settings = replace(
        model.settings, device=torch.device("cpu"), precision="float32", bit_depth=model.detector.bit_depth
    )
    net = build_net(settings).with_state(model.checkpoint.state)
    detector = make_detector(model.checkpoint, net, settings.image_size, path)
    samples = [Sample(picture, GOOD) for picture in pictures]
    category = printable(model.checkpoint.category)
    write_model(target, category, detector, model.checkpoint, settings, samples, mirrored=True)


if __name__ == "__main__":
    sys.exit(main())
