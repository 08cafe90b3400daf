"""What the sample data set shows: two surfaces and two parts, whole or damaged, before any camera has seen them.

Each part is a function ``(rng, light, flaw) -> picture``: everything about the part comes from ``rng``, everything
about its damage from ``flaw``, so that the same part can be drawn with and without the damage. Pictures are
(256, 256, 3) float, brightness 0 to 1 as on a screen; a mask or height alone is (256, 256). Lengths are pixels,
angles radians, points (x, y) with y downwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw
from scipy import ndimage

SIZE = 256
ROWS, COLS = np.mgrid[:SIZE, :SIZE].astype(float)


@dataclass(frozen=True)
class Flaw:
    """One defect: its kind, how plain it is to see (0 faint to 1 clear), and the randomness of its shape."""

    kind: str
    strength: float
    rng: Generator


# --- Brushes --------------------------------------------------------------------------------------------------------


def noise(rng: Generator, tall: float, wide: float | None = None) -> np.ndarray:
    """(256, 256) random field of mean 0 and deviation 1, smooth over ``tall`` x ``wide`` pixels."""
    wide = tall if wide is None else wide
    down, right = np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)
    spectrum = np.fft.rfft2(rng.standard_normal((SIZE, SIZE)))
    spectrum *= np.exp(-2 * np.pi**2 * ((tall * down) ** 2 + (wide * right) ** 2))
    field = np.fft.irfft2(spectrum, (SIZE, SIZE))
    field -= field.mean()
    return field / field.std()


def ramp(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below ``low``, 1 above ``high``, smooth in between; ``low`` may be the larger one."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def over(picture: np.ndarray, colour: np.ndarray | tuple, cover: np.ndarray) -> np.ndarray:
    """The picture under paint of a colour (3,) or (256, 256, 3), as opaque as ``cover`` (256, 256) says."""
    return picture + cover[..., None] * (np.asarray(colour) - picture)


def walk(
    rng: Generator, start: np.ndarray, heading: float, length: float, bend: float, ragged: float = 0
) -> np.ndarray:
    """(N, 2) points, 3 pixels apart, of a path that turns slowly (``bend`` per step) and jerks (``ragged``)."""
    steps = max(3, int(length / 3))
    headings = heading + np.cumsum(rng.normal(0, bend, steps)) + rng.normal(0, ragged, steps)
    return start + 3 * np.cumsum(np.stack([np.cos(headings), np.sin(headings)], 1), 0)


def drawn(paths: list[np.ndarray], widths: list[float]) -> np.ndarray:
    """(256, 256) coverage of lines; each path thins out towards its end."""
    fine = 4
    sheet = Image.new("L", (fine * SIZE, fine * SIZE))
    pen = ImageDraw.Draw(sheet)
    for path, width in zip(paths, widths, strict=True):
        for i, pair in enumerate(pairwise(path)):
            thickness = width * (1 - 0.7 * i / len(path))
            pen.line([tuple(fine * p) for p in pair], fill=255, width=max(1, round(fine * thickness)))
    return np.asarray(sheet.resize((SIZE, SIZE), Image.Resampling.BOX)) / 255


def slope(height: np.ndarray, light: float) -> np.ndarray:
    """How much a relief rises away from the light: positive on the flanks that face it."""
    return -(np.cos(light) * ndimage.sobel(height, 1) + np.sin(light) * ndimage.sobel(height, 0)) / 8


def anywhere(rng: Generator, margin: float = 50) -> np.ndarray:
    """A point, ``margin`` away from the border: the centre crop must not lose a defect."""
    return rng.uniform(margin, SIZE - margin, 2)


def frame(centre: np.ndarray, turn: float) -> tuple[np.ndarray, np.ndarray]:
    """Every pixel's coordinates, two (256, 256), along and across an axis through ``centre``."""
    x, y = COLS - centre[0], ROWS - centre[1]
    return x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)


def blob(rng: Generator, centre: np.ndarray, radius: float, roughness: float, squeeze: float = 1) -> np.ndarray:
    """(256, 256) signed distance, about, to the outline of an irregular spot: negative inside."""
    along, across = frame(centre, rng.uniform(0, np.pi))
    ragged = noise(rng, 0.35 * radius + 0.5) + 0.4 * noise(rng, 0.1 * radius + 0.5)
    return np.hypot(along, across / squeeze) - radius * (1 + roughness * ragged)


# --- Tile -----------------------------------------------------------------------------------------------------------


def tile(rng: Generator, light: float, flaw: Flaw | None) -> np.ndarray:
    """Polished stone tile: dark, ragged blotches of several sizes on a clouded light ground."""
    scale = rng.uniform(0.9, 1.1)
    ground = 0.71 + 0.02 * noise(rng, 25) + 0.025 * noise(rng, 3) + 0.03 * noise(rng, 0.7)
    picture = ground[..., None] * np.array([1.0, 0.97, 0.92])
    ragged = 0.45 * noise(rng, 1.6) + 0.25 * noise(rng, 0.7)
    for size, level, colour in (
        (6.5, 0.75, (0.50, 0.47, 0.44)),
        (5, 0.95, (0.22, 0.20, 0.20)),
        (2.2, 2.1, (0.30, 0.24, 0.20)),
    ):
        spots = noise(rng, size * scale) + ragged
        tint = np.array(colour) * (1 + 0.12 * noise(rng, 2))[..., None]
        picture = over(picture, tint, 0.9 * ramp(spots, level, level + 0.35))
    return picture if flaw is None else TILE[flaw.kind](picture, light, flaw)


def crack(picture: np.ndarray, light: float, flaw: Flaw) -> np.ndarray:
    """A jagged crack; the clearer, the more it branches."""
    rng, strength = flaw.rng, flaw.strength
    heading, length = rng.uniform(0, 2 * np.pi), 35 + 110 * strength
    start = anywhere(rng, 80) - 0.5 * length * np.array([np.cos(heading), np.sin(heading)])
    trunk = walk(rng, start, heading, length, 0.06, 0.5)
    paths, widths = [trunk], [1.2 + 1.6 * strength]
    for _ in range(round(3 * strength)):
        fork = trunk[rng.integers(len(trunk) // 4, 3 * len(trunk) // 4)]
        turn = rng.choice([-1, 1]) * rng.uniform(0.4, 1.1)
        paths.append(walk(rng, fork, heading + turn, 0.4 * length, 0.06, 0.5))
        widths.append(0.6 * widths[0])
    depth = drawn(paths, widths)
    picture = over(picture, (0.10, 0.09, 0.08), (0.7 + 0.25 * strength) * depth)
    return picture + 0.35 * slope(-ndimage.gaussian_filter(depth, 0.8), light)[..., None]


def glue_strip(picture: np.ndarray, light: float, flaw: Flaw) -> np.ndarray:
    """A strip of dried glue: it whitens what it lies on and shines along its edge."""
    rng, strength = flaw.rng, flaw.strength
    along, across = frame(anywhere(rng, 80), rng.uniform(0, np.pi))
    wave = noise(rng, 12)
    half_length, half_width = 25 + 45 * strength, 7 + 7 * strength
    outside = np.maximum(np.abs(along) - half_length - 2 * wave, np.abs(across + 2 * wave) - half_width - 1.2 * wave)
    cover = ramp(outside, 1.5, -1.5)
    picture = over(picture, (0.80, 0.77, 0.68), (0.22 + 0.4 * strength) * cover)
    thickness = ndimage.gaussian_filter(cover, 2) + 0.06 * cover * noise(rng, 3)
    return picture + (0.5 + 0.5 * strength) * slope(thickness, light)[..., None]


def gray_stroke(picture: np.ndarray, light: float, flaw: Flaw) -> np.ndarray:
    """A dry brush has passed: grey bristle marks that skip over the ground."""
    rng, strength = flaw.rng, flaw.strength
    along, across = frame(anywhere(rng, 80), rng.uniform(0, np.pi))
    across = across + 0.002 * along**2
    half_length, half_width = 24 + 48 * strength, 6 + 9 * strength
    bristles = ndimage.map_coordinates(noise(rng, 0.9, 20), [across + SIZE / 2, along + SIZE / 2], order=1, mode="wrap")
    outside = np.maximum((np.abs(along) - half_length) / 4, np.abs(across) - half_width)
    cover = ramp(outside + 1.5 * bristles, 1.5, -1.5) * (0.8 + 0.2 * ramp(bristles, 1.5, -1))
    return over(picture, (0.47, 0.47, 0.48), (0.35 + 0.5 * strength) * cover)


TILE: dict[str, Callable] = {"crack": crack, "glue_strip": glue_strip, "gray_stroke": gray_stroke}


# --- Wood -----------------------------------------------------------------------------------------------------------


def wood(rng: Generator, light: float, flaw: Flaw | None) -> np.ndarray:
    """A planed plank, sawn lengthwise from a log whose heart lies behind it; seldom with a knot."""
    x = (COLS - rng.uniform(-60, SIZE + 60)) / rng.uniform(0.9, 1.1)
    depth = rng.uniform(60, 160) + rng.uniform(-0.25, 0.25) * (ROWS - SIZE / 2)
    radius = np.hypot(x, depth) + 2.5 * noise(rng, 60, 25) + 0.5 * noise(rng, 25, 3)
    knot = np.zeros((SIZE, SIZE))
    if rng.random() < 0.1:
        at = anywhere(rng, 20)
        away = np.hypot(COLS - at[0], 0.6 * (ROWS - at[1]))
        radius = radius + 40 * np.exp(-((away / 14) ** 2))
        knot = np.exp(-((away / 8) ** 4))
    years = radius / rng.uniform(11, 15) + 0.35 * noise(rng, 80, 30)
    season = years % 1
    late = ramp(season, 0.25, 0.9) * ramp(season, 1.0, 0.93)
    fibre = 0.6 * noise(rng, 30, 0.8) + 0.4 * noise(rng, 8, 0.6)
    pores = ramp(noise(rng, 7, 0.6), 1.7, 2.6)
    dark = 0.42 * late + 0.11 * fibre + 0.10 * noise(rng, 70, 14) + 0.8 * knot + 0.3
    light_wood, dark_wood = np.array([0.80, 0.60, 0.40]), np.array([0.52, 0.33, 0.19])
    picture = light_wood + np.clip(dark, 0, 1.5)[..., None] * (dark_wood - light_wood)
    picture = over(picture, (0.33, 0.20, 0.12), 0.6 * pores)
    return picture if flaw is None else WOOD[flaw.kind](picture, light, flaw)


def scratch(picture: np.ndarray, light: float, flaw: Flaw) -> np.ndarray:
    """Scratches across the grain, which bare lighter wood: one deep, up to two beside it."""
    rng, strength = flaw.rng, flaw.strength
    heading, length = rng.uniform(-0.9, 0.9), 35 + 90 * strength
    start = anywhere(rng, 90) - 0.5 * length * np.array([np.cos(heading), np.sin(heading)])
    paths, widths = [walk(rng, start, heading, length, 0.03)], [1 + 1.5 * strength]
    for _ in range(round(2 * strength)):
        paths.append(walk(rng, start + rng.normal(0, 4, 2), heading, length, 0.03))
        widths.append(1.0)
    groove = drawn(paths, widths)
    picture = over(picture, (0.86, 0.70, 0.52), (0.24 + 0.5 * strength) * groove)
    return picture + (0.25 + 0.5 * strength) * slope(-ndimage.gaussian_filter(groove, 0.8), light)[..., None]


def hole(picture: np.ndarray, light: float, flaw: Flaw) -> np.ndarray:
    """Worm holes: one, or a few when plain to see."""
    rng, strength = flaw.rng, flaw.strength
    at = anywhere(rng, 60)
    inside = np.zeros((SIZE, SIZE))
    for k in range(1 + round(2 * strength * rng.random())):
        distance = blob(rng, at + (k > 0) * rng.normal(0, 18, 2), (1.6 + 4.8 * strength) * rng.uniform(0.8, 1.1), 0.12)
        inside = np.maximum(inside, ramp(distance, 0.8, -0.8))
    shade = np.roll(inside, [round(np.sin(light)), round(np.cos(light))], (0, 1))
    picture = over(picture, (0.30, 0.18, 0.10), (0.6 + 0.3 * strength) * inside)
    picture = over(picture, (0.07, 0.05, 0.04), (0.45 + 0.5 * strength) * inside * shade)
    return picture + 0.25 * slope(-ndimage.gaussian_filter(inside, 1), light)[..., None]


def color(picture: np.ndarray, light: float, flaw: Flaw) -> np.ndarray:
    """A drop of ink that has soaked in and crept along the fibres: the grain shows through."""
    rng, strength = flaw.rng, flaw.strength
    distance = blob(rng, anywhere(rng, 60), 6 + 16 * strength, 0.2, rng.uniform(0.6, 1)) - 2.5 * noise(rng, 12, 0.8)
    cover = ramp(distance, 1.5, -2.5) * (0.75 + 0.25 * ramp(distance, -6, 0))
    ink = np.array([(0.55, 0.15, 0.15), (0.25, 0.20, 0.40), (0.20, 0.33, 0.25)][rng.integers(3)])
    return over(picture, ink * (0.6 + 0.8 * picture), (0.2 + 0.5 * strength) * cover)


WOOD: dict[str, Callable] = {"scratch": scratch, "hole": hole, "color": color}


# --- Bottle ---------------------------------------------------------------------------------------------------------

# Brightness of brown glass from the bottle's middle to its edge, seen from above against a lit table.
_GLASS = np.array(
    [  # distance from the middle (1 = the edge), red, green, blue
        (0.00, 0.80, 0.74, 0.66),
        (0.22, 0.86, 0.80, 0.72),
        (0.30, 0.72, 0.62, 0.50),
        (0.34, 0.84, 0.77, 0.68),
        (0.48, 0.84, 0.75, 0.63),
        (0.495, 0.60, 0.36, 0.18),
        (0.51, 0.20, 0.10, 0.05),
        (0.54, 0.12, 0.06, 0.04),
        (0.60, 0.08, 0.04, 0.03),
        (0.62, 0.38, 0.20, 0.09),
        (0.65, 0.48, 0.27, 0.12),
        (0.68, 0.15, 0.08, 0.05),
        (0.80, 0.07, 0.04, 0.03),
        (0.84, 0.20, 0.10, 0.05),
        (0.88, 0.30, 0.16, 0.08),
        (0.91, 0.10, 0.05, 0.04),
        (1.00, 0.05, 0.03, 0.03),
    ]
)


def bottle(rng: Generator, light: float, flaw: Flaw | None) -> np.ndarray:
    """A brown glass bottle from above: the lit bottom in the middle, dark rings of mouth and shoulder around it."""
    centre, radius = SIZE / 2 + rng.normal(0, 2.5, 2), rng.normal(108, 1.5)
    tilt, spin = rng.normal(0, 3, 2), rng.uniform(0, 2 * np.pi)
    x, y = COLS - centre[0], ROWS - centre[1]
    rim = (np.hypot(x, y) / radius - 1) * radius  # pixels beyond the edge
    depth = np.clip(-rim / radius, 0, 1)
    x, y = x - depth * tilt[0], y - depth * tilt[1]
    angle, away = np.arctan2(y, x), np.hypot(x, y) / radius
    wavy = away + 0.003 * noise(rng, 14)
    lee = ramp(np.cos(angle - light), 0.7, -1)  # the side away from the light, which the light leaves through

    picture = np.stack([np.interp(wavy, _GLASS[:, 0], _GLASS[:, c]) for c in (1, 2, 3)], -1)
    glow = lee * (np.exp(-(((wavy - 0.80) / 0.05) ** 2)) + 0.5 * np.exp(-(((wavy - 0.94) / 0.03) ** 2)))
    picture = picture + 0.5 * glow[..., None] * np.array([0.55, 0.27, 0.08])
    thread = 0.56 + 0.03 * ((angle - spin) / (2 * np.pi) % 1)
    for ring, width, at, spread, gain in (
        (0.872, 0.014, light, 6, 0.85),
        (0.645, 0.008, light, 1.2, 0.6),
        (0.665, 0.006, light + np.pi, 3, 0.5),
        (0.968, 0.008, light + 0.4, 12, 0.6),
        (0.735, 0.010, light - 0.5, 14, 0.5),
        (thread, 0.007, light + 2.5, 1.5, 0.45),
    ):
        window = np.exp(spread * (np.cos(angle - at - rng.normal(0, 0.08)) - 1))
        picture = picture + (gain * np.exp(-(((wavy - ring) / width) ** 2)) * window)[..., None]
    for ring, at, gain in ((0.775, light + 0.25, 0.6), (0.915, light - 0.7, 0.35), (0.70, light + 2.9, 0.3)):
        window = ramp(np.abs(wavy - ring), 0.032, 0.012) * ramp(np.cos(angle - at), 0.97, 0.992)
        picture = picture + (gain * window)[..., None]
    floor = ramp(away, 0.50, 0.46)
    knurls = np.cos(48 * (angle - spin)) * np.exp(-(((wavy - 0.415) / 0.03) ** 2))
    dome = 0.10 * ramp(away, 0.2, 0) * np.cos(angle - light) - 0.12 * ramp(away, 0.3, 0.5) * lee
    picture = picture + (floor * (0.06 * knurls + dome + 0.012 * noise(rng, 5)))[..., None]
    if flaw is not None and flaw.kind == "contamination":
        picture = contamination(picture, centre, radius, flaw)

    table = (0.90 - 0.10 * ramp(rim, 13, 0) + 0.006 * noise(rng, 2))[..., None] * np.array([1.0, 0.99, 0.97])
    table = over(table, (0.85, 0.62, 0.36), 0.45 * lee * ramp(rim, 14, 0))
    if flaw is not None and flaw.kind in ("broken_small", "broken_large"):
        picture = broken(picture, table, centre, radius, flaw)
    return over(table, picture, ramp(rim, 0.8, -0.8))


def broken(picture: np.ndarray, table: np.ndarray, centre: np.ndarray, radius: float, flaw: Flaw) -> np.ndarray:
    """A piece has chipped off: shell-shaped facets, some bright and some dark; a large one leaves a gap in the edge."""
    rng, large = flaw.rng, flaw.kind == "broken_large"
    turn = rng.uniform(0, 2 * np.pi)
    outward = np.array([np.cos(turn), np.sin(turn)])
    size = 16 + 16 * flaw.strength if large else 2.5 + 7 * flaw.strength
    at = centre + radius * outward * (rng.uniform(0.85, 0.95) if large else rng.choice([0.62, 0.9]))
    chip = ramp(blob(rng, at, size, 0.12, rng.uniform(0.6, 0.9)), 0.7, -0.7)
    reach = np.stack([np.hypot(COLS - sx, ROWS - sy) for sx, sy in at + rng.normal(0, 0.8 * size, (6, 2))])
    facet, (nearest, second) = reach.argmin(0), np.sort(reach, 0)[:2]
    shade = rng.uniform(0.05, 0.7, 6)[facet] + 0.06 * np.sin(nearest / 1.6) + 0.25 * nearest / size
    tint = np.array([1.0, 0.74, 0.48]) * shade[..., None] + 0.5 * ramp(second - nearest, 1.5, 0)[..., None]
    picture = over(picture, np.clip(tint, 0, 1), (0.35 + 0.55 * flaw.strength) * chip)
    if large:
        picture = over(picture, table, ramp(blob(rng, centre + radius * outward, 0.6 * size, 0.15), 0.7, -0.7))
    return picture


def contamination(picture: np.ndarray, centre: np.ndarray, radius: float, flaw: Flaw) -> np.ndarray:
    """Something has fallen in: a crumb, a smear or a fibre."""
    rng, strength = flaw.rng, flaw.strength
    turn, reach = rng.uniform(0, 2 * np.pi), 0.4 * radius * np.sqrt(rng.random())
    at = centre + reach * np.array([np.cos(turn), np.sin(turn)])
    colour = np.array([(0.35, 0.30, 0.24), (0.60, 0.60, 0.58), (0.52, 0.58, 0.66)][rng.integers(3)])
    if rng.random() < 0.3:
        cover = drawn([walk(rng, at, rng.uniform(0, 2 * np.pi), 15 + 45 * strength, 0.25)], [1.2 + strength])
    else:
        distance = blob(rng, at, 3 + 12.5 * strength, 0.3, rng.uniform(0.5, 1))
        cover = ramp(distance, 1, -2) * (0.85 + 0.1 * noise(rng, 2))
    return over(picture, colour, np.clip((0.3 + 0.5 * strength) * cover, 0, 1))


# --- Screw ----------------------------------------------------------------------------------------------------------

_LENGTH, _PITCH, _THREAD = 198.0, 12.0, 4.5  # of the screw, between two turns of its thread, height of the thread
_PROFILE = (  # distance from the top of the head; radius there
    (0, 2, 7, 27, 32, 66, 70, 158, _LENGTH),
    (21, 24, 23, 12.5, 11, 11, 9.5, 8.8, 0.3),
)


def screw(rng: Generator, light: float, flaw: Flaw | None) -> np.ndarray:
    """A countersunk wood screw that lies on paper, head to the left: its relief is modelled, then lit."""
    centre, turn, scale = SIZE / 2 + rng.normal(0, 4, 2), rng.normal(0, 0.07), rng.normal(1, 0.015)
    spin, brushed, paper = rng.uniform(), noise(rng, 1.5), 0.004 * noise(rng, 30)
    along, across = frame(centre, turn)
    along, across = along / scale + _LENGTH / 2, across / scale
    thread = _THREAD * ramp(along, 64, 74) * ramp(along, _LENGTH - 2, _LENGTH - 30)
    end, dents = _LENGTH, 0.0
    if flaw is not None and flaw.kind == "manipulated_front":  # bent, and its point broken off
        bend = flaw.rng.choice([-1, 1]) * (7 + 16 * flaw.strength)
        across = across - bend * (np.maximum(along - _LENGTH + 60, 0) / 60) ** 2
        end = _LENGTH - flaw.rng.uniform(2, 4 + 12 * flaw.strength)
    if flaw is not None and flaw.kind == "thread_side":  # flattened on one side
        at, side = flaw.rng.uniform(86, 158), flaw.rng.choice([-1, 1])
        worn = np.exp(-(((along - at) / (11 + 13 * flaw.strength)) ** 4)) * ramp(side * across, -3, 1)
        thread = thread * (1 - (0.7 + 0.3 * flaw.strength) * worn)
        dents = 0.8 * worn * noise(flaw.rng, 1.5)

    core = np.interp(along, *_PROFILE)
    around = np.arcsin(np.clip(across / (core + 0.6 * _THREAD), -1, 1))
    phase = (along / _PITCH + around / (2 * np.pi) + spin) % 1
    radius = core + thread * np.clip(1 - 1.7 * np.abs(2 * phase - 1), 0, 1) + dents
    outside = np.maximum(np.abs(across) - radius, np.maximum(-along, along - end)) * scale
    cover = ramp(outside, 0.7, -0.7)
    steel = metal(scale * np.sqrt(np.maximum(radius**2 - across**2, 0)), light) + 0.012 * brushed[..., None]
    if flaw is not None and flaw.kind == "scratch_head":
        steel = scratch_head(steel, centre, turn, flaw)

    away = -5 * np.array([np.sin(light), np.cos(light)])
    shadow = ndimage.gaussian_filter(ndimage.shift(cover, away, order=1), 3)
    ground = ((0.78 + paper) * (1 - 0.5 * shadow))[..., None] * np.array([1.0, 1.0, 0.99])
    return over(ground, steel, cover)


def metal(height: np.ndarray, light: float) -> np.ndarray:
    """Polished steel of this relief (256, 256): it mirrors the lamp brightly and the room once more, faintly."""
    down, right = np.gradient(ndimage.gaussian_filter(height, 0.6))
    facing = 0.75 - 0.66 * (right * np.cos(light) + down * np.sin(light))
    facing = facing / np.sqrt(1 + right**2 + down**2)
    lamp, room = np.exp(-(((facing - 0.93) / 0.12) ** 2)), np.exp(-(((facing - 0.35) / 0.10) ** 2))
    return (0.20 + 0.38 * np.clip(facing, 0, 1) + 0.42 * lamp + 0.17 * room)[..., None] * np.array([1.0, 0.98, 0.93])


def scratch_head(picture: np.ndarray, centre: np.ndarray, turn: float, flaw: Flaw) -> np.ndarray:
    """Bright marks where a tool has slipped on the head."""
    rng, strength = flaw.rng, flaw.strength
    axis, side = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
    paths = []
    for _ in range(2 + round(3 * strength)):
        at = centre + axis * (9 - _LENGTH / 2 + rng.normal(0, 4)) + side * rng.normal(0, 6)
        paths.append(walk(rng, at, turn + rng.normal(1.2, 0.5), 10 + 14 * strength, 0.1))
    marks = drawn(paths, [1.2 + 1.2 * strength] * len(paths))
    return over(picture, (0.97, 0.96, 0.93), (0.55 + 0.4 * strength) * marks)


PARTS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "tile": (tile, tuple(TILE)),
    "wood": (wood, tuple(WOOD)),
    "bottle": (bottle, ("broken_small", "broken_large", "contamination")),
    "screw": (screw, ("scratch_head", "thread_side", "manipulated_front")),
}
