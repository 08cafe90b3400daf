"""The pictures that a command line names: files, folders, globs, or a list on stdin."""

import glob
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from models.errors import InputError
from utils.console import printable
from utils.data.image import EXTENSIONS


def find_images(inputs: Sequence[str]) -> Iterable[Path]:
    """The files that the inputs name: a list of each once, unless some are still to come on stdin.

    Raises :class:`InputError` for a folder or glob that holds none.
    """
    found: list[Iterable[Path]] = []
    for text in inputs:
        if text == "-":
            if hasattr(sys.stdin, "reconfigure"):
                sys.stdin.reconfigure(errors="surrogateescape")  # a file's name need not be text
            found.append(Path(line.rstrip("\r\n")) for line in sys.stdin if line.strip())
            continue
        path = Path(text)
        if path.is_dir():
            images = sorted(file for file in path.rglob("*") if is_image(file))
        elif glob.has_magic(text) and not path.exists():
            images = sorted(file for file in map(Path, glob.glob(text, recursive=True)) if is_image(file))
        else:
            images = [path]
        if not images:
            raise InputError(f"{printable(text)} holds no image ({', '.join(EXTENSIONS)})")
        found.append(images)
    paths = itertools.chain.from_iterable(found)
    return paths if "-" in inputs else list(dict.fromkeys(paths))


def is_image(path: Path) -> bool:
    """Whether a file's name says that it is an image."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
