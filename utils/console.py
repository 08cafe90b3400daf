"""How a script meets its user: one line for each error, and an exit code."""

import functools
import sys
from collections.abc import Callable, Sequence

import torch

from models.errors import InputError

Main = Callable[[Sequence[str] | None], int | None]


def command(main: Main) -> Callable[..., int]:
    """Wrap a script's ``main(argv=None)``: returns its exit code instead of letting the user's mistakes end in a traceback.

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
        except (torch.OutOfMemoryError, MemoryError) as error:
            return _fail(f"out of memory: lower BATCH_SIZE or IMAGE_SIZE, or use a smaller SAMPLING_RATIO ({_line(error)})")
        except OSError as error:
            return _fail(_line(error))
        except KeyboardInterrupt:
            print("\ninterrupted: finished results are kept, run the same command again to go on", file=sys.stderr)
            return 130

    return wrapped


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
