"""The settings as a page of the documents: ``python -m utils.settings_table config.py > docs/settings.md``."""

import ast
import html
import re
import sys
from pathlib import Path

from utils.settings import CONSTANTS

OPENING = """\
# Settings

Each setting is a constant in [config.py](../config.py). Edit it there, or override it for one run with the flag of the
same name: `python train.py --category wood --sampling-ratio 0.01`. `--config mine.py` reads a file of your own; what it
leaves out keeps its value. `--help` of any script lists all settings with their present values.

This page is generated, do not edit it: `python -m utils.settings_table config.py > docs/settings.md`.
"""


def settings_table(source: str) -> str:
    """The page in Markdown, from the text of config.py: a section and a table for each of its groups.

    A group is what stands between empty lines: a line ``# Title: one sentence.``, then constants whose values are
    literals.
    """
    page = OPENING
    docstring = ast.parse(source).body[0]
    groups = "\n".join(source.splitlines()[docstring.end_lineno :]).strip()
    for group in re.split(r"\n{2,}", groups):
        title, sentence = group.splitlines()[0].removeprefix("# ").split(": ", 1)
        page += f"\n## {title}\n\n" + _escape(f"{sentence[0].upper()}{sentence[1:].rstrip('.')}.\n\n")
        page += "| setting | default | meaning |\n| --- | --- | --- |\n"
        for node in ast.parse(group).body:
            name, value = node.targets[0].id, ast.literal_eval(node.value)
            page += f"| `{name}` | `{value!r}` | {_escape(CONSTANTS[name].metadata['meaning'])} |\n"
    return page


def _escape(text: str) -> str:
    """``text`` as it is, where Markdown would take <...> for a tag and | for the end of a cell."""
    return html.escape(text, quote=False).replace("|", "\\|")


if __name__ == "__main__":
    print(settings_table(Path(sys.argv[1]).read_text(encoding="utf-8")), end="")
