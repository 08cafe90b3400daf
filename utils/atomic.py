"""Files and folders that are either whole or absent, whenever the program is interrupted."""

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file beside ``path``; it takes that name once the block ends well.

    Parent folders are made. An exception inside the block (an interrupt and a full disk included) removes the temporary
    file and leaves what ``path`` held before. The contents are on the disk before the name changes, so that a power cut
    cannot leave an empty file under it. When two programs write the same path at the same time, one of them fails.
    """
    temporary = _fresh_name(path)
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``, so that what is made in it can be renamed into place.

    Parent folders are made; the temporary folder is removed in any case.
    """
    temporary = _fresh_name(path)
    try:
        temporary.mkdir()
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; it takes that name once the block ends well.

    ``path`` must not exist yet, or be an empty folder: a full one cannot be replaced in one step. An exception inside
    the block removes the temporary folder.
    """
    with scratch_folder(path) as temporary:
        yield temporary
        if path.is_dir():
            path.rmdir()
        os.replace(temporary, path)


def _fresh_name(path: Path) -> Path:
    """A new hidden name beside ``path``. What a killed program left under such a name is removed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
    return path.absolute().with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
