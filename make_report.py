"""One page with every table and figure that is there, the settings, and the paper's own figures beside ours.

    python make_report.py --category all --sampling-ratio all

Collects what the other scripts wrote with the same settings; measures nothing itself. What is missing is named, with
the command that makes it (``make paper`` runs them all).

Writes SAVE_DIR/report.html, which needs no other file. Settings are in config.py.
"""

import shlex
import sys
from collections.abc import Sequence

import config
from utils.atomic import atomic_file
from utils.console import check_writable, command
from utils.data.dataset import find_categories
from utils.pictures.report import page
from utils.pictures.sections import (
    beside_the_paper,
    conditions,
    detection,
    making,
    missing,
    odd_images,
    opening,
    pictures,
    speed,
)
from utils.pictures.studies import beside_patchcore, blur, colour, gap, noise, parts
from utils.pipeline.timing import describe_machine, describe_versions
from utils.settings import SettingsParser

PACKAGES = ("torch", "torchvision", "onnxruntime", "timm", "numpy", "scipy", "scikit-learn", "pywavelets", "pillow")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of the categories and ratios that the settings ask for; returns the exit code."""
    settings, _ = SettingsParser(config, __doc__).read(argv)
    categories = find_categories(settings)
    check_writable(settings.save_dir, "SAVE_DIR")
    flags = shlex.join(sys.argv[1:] if argv is None else argv)
    machine, versions = describe_machine(settings.device), describe_versions(*PACKAGES)

    # A section's title, its content (nothing where its scripts have not run) and those scripts.
    found = (
        ("Look at these first", odd_images(settings, categories), "train.py"),
        ("Beside the paper", beside_the_paper(settings, categories, machine), "benchmark_fps.py"),
        ("Detection", detection(settings), "evaluation.py"),
        ("Beside PatchCore, same backbone", beside_patchcore(settings), "-m benchmarks.real"),
        ("Speed and memory", speed(settings), "benchmark_fps.py"),
        ("What it sees", pictures(settings, categories), "test.py"),
        ("Which condition", conditions(settings, categories), "evaluation.py"),
        ("Sensor noise", noise(settings, categories), "eval_noise_robustness.py", "visualize_noise_robustness.py"),
        ("Focus", blur(settings, categories), "eval_blur_robustness.py"),
        ("Light and colour", colour(settings, categories), "eval_color_robustness.py", "visualize_color_robustness.py"),
        ("Semantic attention", gap(settings), "eval_gap_score.py"),
        ("What each part is worth", parts(settings), "ablation.py"),
    )
    sections = {title: content or [missing(scripts, flags)] for title, content, *scripts in found}
    sections["How it was made"] = making(settings, flags, machine, versions)

    data = settings.data_path.resolve().name
    what = ", ".join(categories) if len(categories) <= 4 else f"{len(categories)} categories of {data}"
    path = settings.save_dir / "report.html"
    with atomic_file(path) as temporary:
        temporary.write_text(page(f"WEDGE-Net on {what}", opening(settings, categories), sections), encoding="utf-8")
    print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB), in a browser: {path.resolve().as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
