"""How a script meets its user: one line for each error, and an exit code. Imports neither torch nor tqdm by itself."""

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from models.errors import InputError

T = TypeVar("T")
Run = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]  # see ``in_turn``
Main = Callable[[Sequence[str] | None], int | None]


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are :class:`InputError`, like all others; flags are not abbreviated."""

    def __init__(self, description: str | None = None, **options: Any):
        options = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter} | options
        super().__init__(description=description, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists every flag)")


def command(main: Main) -> Callable[..., int]:
    """Wrap a script's ``main(argv=None)``: the user's mistakes become an exit code instead of a traceback.

    0 (or what ``main`` returns) when it went well; 2 for an :class:`InputError`, an operating-system error (disk full,
    no permission) or memory that ran out, after one line on stderr; 130 when interrupted. Any other exception is a
    fault of ours and passes through.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except InputError as error:
            return _fail(str(error))
        except OSError as error:
            return _fail(_line(error))
        except KeyboardInterrupt:
            print("\ninterrupted: finished results are kept, run the same command again to go on", file=sys.stderr)
            return 130
        except Exception as error:
            if not _out_of_memory(error):
                raise
            return _fail(
                f"out of memory: lower BATCH_SIZE or IMAGE_SIZE, or use a smaller SAMPLING_RATIO ({_line(error)})"
            )

    return wrapped


def _out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # where it was never imported it raised nothing
    on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return on_gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)  # torch's on a CPU


def printable(text: str) -> str:
    """One line for a terminal, a table or a log: line breaks, control characters and undecodable bytes are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@functools.cache
def warn_once(message: str) -> None:
    """One line on stderr, however often the same is said: images are read again for each condition and level."""
    print(f"warning: {printable(message)}", file=sys.stderr)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str) -> int:
    print(f"error: {printable(message)}", file=sys.stderr)
    return 2


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """``items`` behind a progress bar, which shows on a terminal only: logs stay readable."""
    from tqdm import tqdm  # not there on an edge device, which shows no bar

    return iter(tqdm(items, desc=what, total=total, unit="", leave=False, disable=None, dynamic_ncols=True))


def in_turn(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """What ``work`` makes of each item, one after the other; in its place the error that the user can mend."""
    for item in items:
        try:
            outcome = work(item)
        except (InputError, OSError) as error:
            outcome = error
        yield outcome


def succeeded(outcomes: Iterable[Any]) -> Iterator[Any]:
    """What ``in_turn`` gives, where an error ends it all."""
    for outcome in outcomes:
        if isinstance(outcome, (InputError, OSError)):
            raise outcome
        yield outcome


def for_each(
    names: Sequence[str], work: Callable[[str], T], gather: Callable[[T], Any] | None = None, run: Run = in_turn
) -> int:
    """Do ``work`` for each name; one that fails never costs the others. Returns the script's exit code.

    What it returns goes to ``gather``, in the order of the names; ``run`` may do several at a time, elsewhere. A single
    name's error is raised as it is (exit code 2). Of several, those that fail are listed at the end (1).
    """
    failed = {}
    for name, outcome in zip(names, run(work, names), strict=True):
        try:
            if isinstance(outcome, (InputError, OSError)):
                raise outcome
            if gather is not None:
                gather(outcome)
        except (InputError, OSError) as error:
            if len(names) == 1:
                raise
            failed[name] = _line(error)
            print(f"error: {name}: {failed[name]}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(names)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def check_writable(folder: Path, setting: str) -> None:
    """Make the folder and try a file in it, before hours of work end at a locked door. Raises :class:`InputError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{setting} {folder} cannot be written to ({error.strerror}): choose another folder") from None
