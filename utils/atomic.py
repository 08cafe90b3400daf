"""Files and folders that are either whole or absent, whenever the program is interrupted."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UMASK = os.umask(0)  # the only way to read it; set back at once
os.umask(_UMASK)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file beside ``path``; it takes that name once the block ends well.

    Parent folders are made. An exception inside the block (an interrupt and a full disk included) removes the temporary
    file and leaves what ``path`` held before. The contents are on the disk before the name changes, so that a power cut
    cannot leave an empty file under it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_UMASK)  # mkstemp's 0600 would hide the result from the user's colleagues
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; it takes that name once the block ends well.

    ``path`` must not exist yet, or be an empty folder: replacing a full one cannot be done in one step. An exception
    inside the block removes the temporary folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_UMASK)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
