"""How large and how deep pictures may be. Imports nothing of this project."""

from typing import Any, NamedTuple

DEPTHS = (8, 10, 12, 14, 16)  # bits of a camera's pixels
SMALLEST = 32  # pixels: a picture of two patches at stride 16


class Size(NamedTuple):
    """``height`` and ``width`` in pixels of what the network sees."""

    height: int
    width: int

    def written(self) -> int | list[int]:
        """As a file has it: one number for a square, as ever, so that older files and newer ones are alike."""
        return self.height if self.height == self.width else list(self)


def as_size(value: Any) -> Size:
    """224, or (224, 896) or [224, 896] for height and width -> Size.

    Raises :class:`ValueError` saying what is allowed.
    """
    sides = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(sides) != 2 or any(type(side) is not int or side < SMALLEST for side in sides):
        raise ValueError(f"a whole number of at least {SMALLEST}, or two of them, height and width, such as (224, 896)")
    return Size(*sides)
