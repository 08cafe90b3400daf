"""Fetch a large archive and unpack it, trusting neither the network nor the disk nor what is in the archive."""

import errno
import hashlib
import http.client
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from models.errors import InputError

TIMEOUT = 60  # seconds without a byte after which a connection counts as lost
BLOCK = 1 << 20  # bytes read at a time


def download(url: str, path: Path, sha256: str, otherwise: str) -> None:
    """Fetch ``url`` into ``path``, which exists only if its checksum was right.

    What has arrived is kept in ``path``.part, and the next call asks for the rest only. A server that cannot send a
    part, or whose file has changed since, makes it start anew. A lost connection is opened again for as long as each
    one brings something.

    Args:
        url: web address, http or https.
        path: where the file goes; parent folders are made.
        sha256: the file's checksum, 64 hexadecimal digits.
        otherwise: what the user can do if the address does not work; ends the errors that say so.

    Raises:
        InputError: no web address, server out of reach, file not there, disk too small or full, wrong checksum.
    """
    if not url.startswith(("https://", "http://")):
        raise InputError(f"{url!r} is no web address: it must start with https:// or http://")
    part = path.with_name(f"{path.name}.part")
    while True:
        before = _size(part)
        try:
            _fetch_rest(url, part)
            break
        except HTTPError as error:
            raise InputError(f"{url} is refused (HTTP {error.code} {error.reason}): {otherwise}") from None
        except ConnectionError as error:
            if _size(part) <= before:
                raise InputError(f"{url} cannot be reached ({error}): try again later, or {otherwise}") from None
    _version(part).unlink(missing_ok=True)
    try:
        check_sha256(part, sha256)
    except InputError as error:
        part.unlink()
        raise InputError(f"{error} (what was fetched is removed)") from None
    os.replace(part, path)


def check_sha256(path: Path, expected: str) -> None:
    """Raise :class:`InputError` unless the file has this SHA-256 (64 hexadecimal digits)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file, _bar("checking", path.stat().st_size) as bar:
        while block := file.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    if (found := digest.hexdigest()) != expected.lower():
        raise InputError(
            f"{path} is damaged or another file, its SHA-256 is {found} instead of {expected.lower()}: fetch it again, "
            "or give the checksum of the file that you want"
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar archive (plain, gz, bz2 or xz) into ``folder``.

    Raises:
        InputError: a member would land outside the folder or is no plain file, the archive is damaged, the disk full.
    """
    try:
        with (
            _full_disk_is_input_error(folder),
            open(archive, "rb") as raw,
            tarfile.open(fileobj=raw) as tar,
            _bar("unpacking", _size(archive)) as bar,
        ):
            for member in tar:
                if not (member.isfile() or member.isdir()):  # a data set has no use for links, an attacker has
                    raise InputError(f"{archive} is refused: {member.name!r} is a link or a device")
                if PurePosixPath(member.name).is_absolute():  # the filter would quietly make it relative
                    raise InputError(f"{archive} is refused: {member.name!r} is an absolute path")
                tar.extract(member, folder, filter="data")
                bar.update(raw.tell() - bar.n)
    except tarfile.FilterError as error:
        raise InputError(f"{archive} is refused: {error}") from None
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise InputError(f"{archive} is no tar archive, damaged or cut short ({reason}): fetch it again") from None


def _fetch_rest(url: str, part: Path) -> None:
    """Append to ``part`` what it lacks. Raises HTTPError, or ConnectionError if the server is out of reach or lost."""
    arrived = _size(part)
    headers = {}
    if arrived:
        headers["Range"] = f"bytes={arrived}-"
        if _version(part).exists():
            headers["If-Range"] = _version(part).read_text()  # another version is sent from its start
    try:
        response = _open(url, headers)
    except HTTPError as error:
        if arrived and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing follows what has arrived; the checksum tells whether that is all
        raise
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            arrived = 0
        length = response.headers["Content-Length"]
        total = arrived + int(length) if length else None
        part.parent.mkdir(parents=True, exist_ok=True)
        if total:
            _check_room(part.parent, 2 * total - arrived)  # pictures hardly shrink: unpacked they take as much again
        with _full_disk_is_input_error(part.parent), open(part, "ab" if arrived else "wb") as file:
            if not arrived:
                _note_version(part, response.headers)
            with _bar("downloading", total, arrived) as bar:
                for block in _blocks(response):
                    file.write(block)
                    bar.update(len(block))
    if total and _size(part) < total:
        raise ConnectionError(f"the connection ended at {_size(part) / 1e9:.1f} of {total / 1e9:.1f} GB")


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    try:
        return urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError:
        raise
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise ConnectionError(getattr(error, "reason", error)) from None


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            block = response.read(BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(error) from None
        if not block:
            return
        yield block


def _version(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


def _note_version(part: Path, headers: http.client.HTTPMessage) -> None:
    """Remember which version of the file ``part`` is the beginning of, in the words that If-Range takes."""
    tag = headers["ETag"]
    version = tag if tag and not tag.startswith("W/") else headers["Last-Modified"]
    if version:
        _version(part).write_text(version)
    else:
        _version(part).unlink(missing_ok=True)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"the disk of {folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed")


@contextmanager
def _full_disk_is_input_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"the disk of {folder} is full: make room and run the same command again") from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _bar(what: str, total: int | None, initial: int = 0) -> tqdm:
    """A bar of bytes, on a terminal only."""
    options = {"unit": "B", "unit_scale": True, "leave": False, "disable": None, "dynamic_ncols": True}
    return tqdm(desc=what, total=total, initial=initial, **options)
