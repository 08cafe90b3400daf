"""Judged pictures as one HTML page that needs nothing else, worst first, for a person to go through."""

import base64
import hashlib
import html
import io
import json
import re
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from models.errors import InputError
from utils.atomic import atomic_file
from utils.console import check_writable
from utils.data.image import Geometry

SIDE = 192  # pixels of a thumbnail's longer side: ten thousand pictures take 50 to 160 MB
QUALITY = 50  # of JPEG; colours at full resolution, or else the green outlines fade
PART = 60  # pictures that the page loads at a time: whole rows for one to six columns


class _Entry(NamedTuple):
    order: float
    offset: int  # in the waiting file: a row, then a thumbnail
    row: int  # bytes
    thumbnail: int  # bytes


class Gallery:
    """Takes pictures as they are judged and writes the page at the end.

    Rows and thumbnails wait in an unnamed file beside the page, so that memory hardly grows with their number.

    Raises:
        InputError: ``path`` is no .html file (a picture named there by mistake is safe), or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
            raise InputError(f"--gallery {path} is no name for a page: it must end in .html")
        check_writable(path.parent, "--gallery")
        # Read here, not after hours of work; from a zip file too.
        self.template = files(__package__).joinpath("gallery.html").read_text(encoding="utf-8")
        self.path, self.entries = path, list[_Entry]()
        self.waiting = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - gone with the gallery, whatever happens

    def add(self, row: Mapping[str, Any], size: tuple[int, int] | None, picture: Image.Image | None) -> None:
        """Add a verdict's ``row``, its file's ``size`` (width, height) and its :func:`thumbnail`.

        Both are None for a file that could not be read; its row has no score, and is shown last.
        """
        encoded = _json({**row, "size": size}).encode()
        data = b""
        if picture is not None:
            jpeg = io.BytesIO()
            picture.save(jpeg, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
            data = base64.b64encode(jpeg.getvalue())
        order = np.inf if row["score"] is None else -row["score"]
        self.entries.append(_Entry(order, self.waiting.tell(), len(encoded), len(data)))
        self.waiting.write(encoded + data)

    def write(self, title: str, lead: str) -> None:
        """Write the page, with two texts at its head, whole or not at all.

        Raises :class:`InputError` if no picture was added.
        """
        if not any(entry.thumbnail for entry in self.entries):
            raise InputError(f"--gallery {self.path}: there is no picture to show, no page is written")
        entries = sorted(self.entries, key=lambda entry: entry.order)
        head, tail = _fill(self.template, title, lead).split("<!-- data -->")
        with atomic_file(self.path) as temporary, open(temporary, "wb") as page:
            page.write(head.encode())
            page.write(b'<script type="application/json" id="rows">[')
            for number, entry in enumerate(entries):
                page.write((b",\n" if number else b"\n") + self._read(entry.offset, entry.row))
            page.write(b"\n]</script>\n")
            for start in range(0, len(entries), PART):
                page.write(b'<script type="text/plain" class="part">')
                for entry in entries[start : start + PART]:
                    page.write(self._read(entry.offset + entry.row, entry.thumbnail) + b"\n")
                page.write(b"</script>\n")
            page.write(tail.encode())

    def _read(self, offset: int, length: int) -> bytes:
        self.waiting.seek(offset)
        return self.waiting.read(length)


def thumbnail(image: Image.Image, drawn: Image.Image, geometry: Geometry, shape: tuple[int, int]) -> Image.Image:
    """A picture beside its heat map, small, in the same frame.

    Args:
        image: the file's own, upright.
        drawn: the overlay over what the model saw of it.
        geometry: how that was cut out.
        shape: (height, width) of what the model saw, in its pixels.
    """
    scale = SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    picture = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    corner, step = geometry.in_file(image.size)
    left, top = (round(position * scale) for position in corner)
    seen = tuple(max(1, round(side * each * scale)) for side, each in zip(shape[::-1], step, strict=True))
    heat = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.7)  # pale: not looked at
    heat.paste(drawn.resize(seen, Image.Resampling.BILINEAR, reducing_gap=2.0), (left, top))
    both = Image.new("RGB", (2 * width, height), "white")
    both.paste(picture, (0, 0))
    both.paste(heat, (width, 0))
    return both


def _json(value: object) -> str:
    """JSON in ASCII that can stand inside of a script element, whatever characters a file's name has."""
    return json.dumps(value).replace("<", "\\u003c")


def _fill(template: str, title: str, lead: str) -> str:
    """The template with its texts, and a policy under which no other script or style than its own runs."""
    sources = {}
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        sources[tag] = f"{tag}-src 'sha256-{digest}'"
    policy = f"default-src 'none'; img-src data:; {sources['script']}; {sources['style']}; base-uri 'none'"
    texts = {"policy": policy, "title": html.escape(title), "lead": html.escape(lead)}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: texts[match[1]], template)
