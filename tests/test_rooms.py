"""The rooms of the project: who may import whom."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A room imports its own modules and those of the rooms before it; the top of utils/ is the floor that all stand on.
ROOMS = ("models", "utils", "utils.data", "utils.pictures", "utils.pipeline", "utils.line")


def room(module: str) -> str | None:
    """The room that a module belongs to; None for one of another project."""
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len, default=None)


def imports(file: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_no_import_runs_upward():
    files = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in sorted(ROOT.glob("models/*.py"))}
    files |= {
        file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in sorted(ROOT.glob("utils/**/*.py"))
    }
    assert len(files) > 30
    wrong = [
        f"{name} imports {other}"
        for file, name in files.items()
        for other in imports(file)
        if room(other) is not None and ROOMS.index(room(other)) > ROOMS.index(room(name))
    ]
    assert not wrong


def test_every_room_says_who_lives_there():
    for name in ROOMS[2:]:
        text = ast.get_docstring(ast.parse((ROOT / name.replace(".", "/") / "__init__.py").read_text(encoding="utf-8")))
        assert text and len(text.splitlines()) == 3


def test_only_scripts_import_config():
    for file in [*ROOT.glob("models/*.py"), *ROOT.glob("utils/**/*.py")]:
        assert "config" not in imports(file), file
