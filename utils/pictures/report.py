"""A report as one HTML file that needs nothing else: escaped tables, embedded pictures and the page around them."""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any

from PIL import Image

from utils.pictures.tables import format_cell

WIDEST = 1400  # pixels of an embedded photograph
SCALE = 0.7  # pixels on the page for one of the file: figures are drawn with 150 to the inch
LONG = 28  # characters of a table's cell from which it may break into lines
DASH = "\N{EN DASH}"  # an empty cell
# Browsers are told that there is nothing to fetch, so that a picture or a style from elsewhere would be seen at once.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def text(value: object) -> str:
    """``value`` as it appears on the page, whatever characters a folder's or a setting's name has."""
    return html.escape(str(value))


def paragraph(content: str, kind: str | None = None) -> str:
    """HTML ``content`` as a paragraph, or as a ``kind`` of one: 'lead', 'note', 'notice' or 'missing'."""
    return f'<p class="{kind}">{content}</p>' if kind else f"<p>{content}</p>"


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], groups: Sequence[tuple[str, int]] = ()) -> str:
    """The ``columns`` (name: title) of rows as a table in a box of its own; rows of the category 'mean' stand out.

    ``groups`` are titles above the columns and how many of them each covers.
    """
    numeric = {name for name in columns if all(isinstance(row.get(name, 0), Number | None) for row in rows)}
    titles = _row([_cell("th", title, name in numeric) for name, title in columns.items()])
    above = [f'<th class="group" colspan="{span}">{text(title)}</th>' for title, span in groups]
    lines = [
        _row(
            [_cell("td", cell(name, row.get(name)), name in numeric) for name in columns], row.get("category") == "mean"
        )
        for row in rows
    ]
    head = (_row(above) if groups else "") + titles
    return f'<div class="table"><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'


def _row(cells: Sequence[str], is_mean: bool = False) -> str:
    return f'<tr class="mean">{"".join(cells)}</tr>' if is_mean else f"<tr>{''.join(cells)}</tr>"


def _cell(tag: str, content: str, is_number: bool) -> str:
    kind = "number" if is_number else "long" if len(content) > LONG else None
    return f'<{tag} class="{kind}">{text(content)}</{tag}>' if kind else f"<{tag}>{text(content)}</{tag}>"


def cell(name: str, value: Any) -> str:
    """A value as the console has it, but ratios in % and a typographer's dash and minus."""
    if value is None:
        return DASH
    if name == "ratio":
        return percent(value)
    shown = format_cell(name, value)
    return shown.replace("-", "\N{MINUS SIGN}", 1) if isinstance(value, float) else shown


def percent(ratio: float) -> str:
    """0.1 -> '10 %', unbroken at the end of a line."""
    return f"{ratio * 100:g}\N{NO-BREAK SPACE}%"


def picture(path: Path, caption: str, wide: bool = False) -> str:
    """An image file, embedded, with what one sees in it; a ``wide`` one scrolls where the page is narrow.

    A photograph is embedded as JPEG (whatever is half the bytes that way). Raises OSError if it cannot be read.
    """
    with Image.open(path) as image:
        image = image.convert("RGB")
    width = round(image.width * SCALE)
    image.thumbnail((WIDEST, WIDEST))
    data, jpeg = path.read_bytes(), io.BytesIO()
    image.save(jpeg, "JPEG", quality=82)
    kind, data = ("jpeg", jpeg.getvalue()) if 2 * jpeg.tell() < len(data) else ("png", data)
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    image = f'<img src="{uri}" width="{width}" alt="{text(caption)}">'
    return f"<figure><div{' class=wide' if wide else ''}>{image}</div><figcaption>{text(caption)}</figcaption></figure>"


def drawn(path: Path, caption: str, wide: bool = False) -> list[str]:
    """The figure at ``path`` as :func:`picture` embeds it; an empty list if it is not there."""
    return [picture(path, caption, wide)] if path.is_file() else []


def grid(figures: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="grid">{"".join(figures)}</div>'


def page(title: str, lead: Sequence[str], sections: Mapping[str, Sequence[str]]) -> str:
    """The whole document from HTML parts: ``lead`` under the title, then ``sections`` with a list of them."""
    names = {title: re.sub(r"\W+", "-", title.lower()).strip("-") for title in sections}
    links = "".join(f'<li><a href="#{name}">{text(title)}</a></li>' for title, name in names.items())
    body = "\n".join(
        f'<section id="{names[title]}">\n<h2>{text(title)}</h2>\n' + "\n".join(parts) + "\n</section>"
        for title, parts in sections.items()
    )
    above = "\n".join(lead)
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{text(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<p class="eyebrow">Report</p>
<h1>{text(title)}</h1>
{above}
<nav><ol>{links}</ol></nav>
</header>
<main>
{body}
</main>
</body>
</html>
"""
