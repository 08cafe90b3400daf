"""Every relative link and picture of the documents leads somewhere, to the very heading."""

import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{p.name}" for p in sorted(ROOT.glob("docs/*.md"))),
]
# [text](target), [name]: target and HTML's src="target"
LINK = re.compile(r"""\]\(\s*<?([^)>\s]+)|^\[[^]]+\]:\s*(\S+)|\b(?:src|srcset|href)=["']([^"']+)""", re.MULTILINE)
FENCE = re.compile(r"^ *(```|~~~).*?^ *\1", re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The fragments that lead into a document: its headings as GitHub names them, and HTML's own ids."""
    found, seen = set(re.findall(r"""\b(?:id|name)=["']([^"']+)""", text)), Counter()
    for heading in re.findall(r"^#+ +(.+?)[ #]*$", FENCE.sub("", text), re.MULTILINE):
        shown = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w -]", "", shown.lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def dead_links(document: Path, root: Path) -> list[str]:
    """The targets of ``document`` that are not under ``root``; what has a scheme (https:) is not looked at."""
    prose = re.sub(r"`[^`\n]+`", "", FENCE.sub("", document.read_text(encoding="utf-8")))
    dead = []
    for target in ("".join(groups) for groups in LINK.findall(prose)):
        link = urlsplit(target)
        if link.scheme:
            continue
        file = (document.parent / unquote(link.path)).resolve() if link.path else document
        there = file.exists() and file.is_relative_to(root)
        if there and link.fragment and file.suffix == ".md":
            there = unquote(link.fragment) in anchors(file.read_text(encoding="utf-8"))
        if not there:
            dead.append(target)
    return dead


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_link_is_dead_and_no_picture_missing(name):
    assert dead_links(ROOT / name, ROOT) == []


def test_dead_links_are_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/it s.png").touch()
    (tmp_path / "docs/other.md").write_text(
        '# One, two: `three_x`\n## Same\n## Same\n<a id="own"></a>\n```\n# code\n```\n'
    )
    alive = ["docs/it%20s.png", "docs/", "docs/other.md#one-two-three_x", "docs/other.md#same-1", "docs/other.md#own"]
    alive += ["#title", "https://example.com/none", "mailto:a@example.com"]
    dead = ["none.md", "docs/none.png", "docs/other.md#same-2", "docs/other.md#code", "#none", "../outside.md"]
    (tmp_path.parent / "outside.md").touch()
    lines = ["# Title", *(f"[a link]({target}) ![a picture]({target} 'title')" for target in [*alive, *dead])]
    lines += ["[name]: gone.md", '<img src="gone.png" alt="">', "`[code](none)`", "```", "[more code](none)", "```"]
    (tmp_path / "page.md").write_text("\n".join(lines))
    assert dead_links(tmp_path / "page.md", tmp_path) == [t for t in dead for _ in range(2)] + ["gone.md", "gone.png"]
