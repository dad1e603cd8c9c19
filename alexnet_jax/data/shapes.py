"""The built-in image data set `shapes`: one big object of ten kinds on a cluttered background.

A picture is a function of (seed, split, index) alone, so the set needs no download. Six classes
are outlines and four are textures inside a disc or a square. Position, size, rotation, stretch,
colours, clutter and lighting vary from picture to picture and tell nothing about the class, so
that a classifier has to find the shape itself. Which is lighter, the figure or its surroundings,
varies too: single pixels hardly tell the class, edges do.
"""

import math
import pathlib
import tempfile
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageChops, ImageDraw

# Part of the cached set's directory name: change it whenever the pictures change.
VERSION = "1"
SPLIT_SIZES = {"train": 5000, "validation": 1000, "test": 1000}
SPLITS = tuple(SPLIT_SIZES)  # a split's index in here is part of its pictures' seed

SHORT_SIDE = (72, 108)  # pixels, both ends included
LONG_SIDE_RATIO = 1.25  # a long side is at most this many times the short one
OBJECT_DIAMETER = (0.6, 0.9)  # as a fraction of the short side
STRETCH = 0.18  # the object's two axes differ by a factor of at most exp(2 * STRETCH)
CONTRAST = 0.35  # least difference in luminance between figure and surroundings, out of 1
DARK_SHARE = 0.5  # share of the pictures whose figure is darker than its surroundings
CLUTTER = (6, 14)  # number of small things on the background: at least, and less than
GRAIN = 0.03  # standard deviation of each pixel's brightness about the light there
GREY_SHARE = 0.04  # share of the pictures without colour

# ITU-R BT.601 luma, the brightness that JPEG stores.
LUMA = np.array([0.299, 0.587, 0.114])

# An outline or a texture maps object coordinates u, v (float32, the object reaching to radius 1)
# to a depth of the same shape: about the distance to the nearest edge, positive inside.
Depth = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def polygon(u: np.ndarray, v: np.ndarray, points: int, inner: float) -> np.ndarray:
    """Depth inside a star of `points` points at radius 1 with notches at radius `inner`.

    With inner = cos(pi / points) the notches lie on the sides: a regular polygon.
    """
    sector = 2 * math.pi / points
    angle = np.arctan2(v, u) % sector
    angle = np.minimum(angle, sector - angle)
    # All sides fold onto one, from the tip (1, 0) to the notch at half a sector.
    side_x = inner * math.cos(sector / 2) - 1
    side_y = inner * math.sin(sector / 2)
    x, y = np.cos(angle), np.sin(angle)
    radius = np.hypot(u, v)
    return (side_y * (1 - radius * x) + side_x * radius * y) / math.hypot(side_x, side_y)


def disc(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 1 - np.hypot(u, v)


def square(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 0.8 - np.maximum(np.abs(u), np.abs(v))


def triangle(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return polygon(u, v, 3, 0.5)


def star(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return polygon(u, v, 5, rng.uniform(0.4, 0.5))


def cross(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    near, far = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
    return np.minimum(rng.uniform(0.18, 0.28) - near, 1 - far)


def ring(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    half_width = rng.uniform(0.13, 0.22)
    return half_width - np.abs(np.hypot(u, v) - 1 + half_width)


def crescent(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    bite = np.hypot(u - rng.uniform(0.45, 0.6), v) - rng.uniform(0.7, 0.8)
    return np.minimum(1 - np.hypot(u, v), bite)


def stripes(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    frequency = math.pi * rng.uniform(1.6, 2.6)
    return np.sin(frequency * u + rng.uniform(0, 2 * math.pi)) / frequency


def checkerboard(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    frequency = math.pi * rng.uniform(1.8, 2.6)
    phase_u, phase_v = rng.uniform(0, 2 * math.pi, 2)
    columns, rows = np.sin(frequency * u + phase_u), np.sin(frequency * v + phase_v)
    nearest = np.minimum(np.abs(columns), np.abs(rows))
    return np.copysign(nearest, columns * rows) / frequency


def pinwheel(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    blades = rng.integers(3, 5)
    return np.hypot(u, v) * np.sin(blades * np.arctan2(v, u)) / blades


def target(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    frequency = math.pi * rng.uniform(2.0, 3.0)
    return np.sin(frequency * np.hypot(u, v) + rng.uniform(0, 2 * math.pi)) / frequency


OUTLINES: dict[str, Depth] = {
    "crescent": crescent,
    "cross": cross,
    "ring": ring,
    "square": square,
    "star": star,
    "triangle": triangle,
}
TEXTURES: dict[str, Depth] = {
    "checkerboard": checkerboard,
    "pinwheel": pinwheel,
    "stripes": stripes,
    "target": target,
}
# What a texture fills: compact outlines, which leave room for several periods of it.
PATCHES: tuple[Depth, ...] = (disc, square)

LABELS: tuple[str, ...] = tuple(sorted(OUTLINES | TEXTURES))


def palette(rng: np.random.Generator) -> np.ndarray:
    """Colours of background, patch and figure, (3, 3) RGB in 0..1.

    The figure's luminance is at least CONTRAST above the other two's or, as often, below them.
    """
    while True:
        # Ranges chosen so that about every third draw succeeds.
        colours = rng.uniform([[0.02], [0.02], [0.35]], [[0.65], [0.65], [1.0]], (3, 3))
        ground, patch, figure = colours @ LUMA
        if figure - max(ground, patch) >= CONTRAST:
            return 1 - colours if rng.random() < DARK_SHARE else colours


def to_bytes(colours: np.ndarray) -> np.ndarray:
    """Values clipped to 0..1, as uint8 0..255 of the same shape."""
    return (255 * np.clip(colours, 0, 1)).astype(np.uint8)


def draw_ground(rng: np.random.Generator, width: int, height: int, base: np.ndarray) -> Image.Image:
    """A blotchy RGB background of colour about `base`, (3,) in 0..1, with small clutter on it."""
    blotches = base + rng.uniform(-0.16, 0.16, (*rng.integers(2, 7, 2), 3))
    ground = Image.fromarray(to_bytes(blotches)).resize((width, height), Image.Resampling.BICUBIC)
    canvas = ImageDraw.Draw(ground)
    count = rng.integers(*CLUTTER)
    fills = to_bytes(base + rng.uniform(-0.3, 0.3, (count, 3))).tolist()
    centres = rng.uniform(0, (width, height), (count, 2)).tolist()
    reaches = (min(width, height) * rng.uniform(-0.14, 0.14, (count, 2))).tolist()
    for number, (fill, (x, y), (dx, dy)) in enumerate(zip(fills, centres, reaches, strict=True)):
        if number % 2:
            box = (x - abs(dx), y - abs(dy), x + abs(dx), y + abs(dy))
            canvas.ellipse(box, fill=tuple(fill))
        else:
            ends = (x - 2 * dx, y - 2 * dy, x + 2 * dx, y + 2 * dy)
            canvas.line(ends, fill=tuple(fill), width=1 + number // 2)
    return ground


def object_coordinates(
    rng: np.random.Generator, width: int, height: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Place an object in the middle square at random: its u, v at each pixel, its radius in pixels.

    u and v are (height, width) float32, turned, stretched and scaled to the object's radius.
    """
    short = min(width, height)
    radius = short * rng.uniform(*OBJECT_DIAMETER) / 2
    room = short / 2 - radius
    x = np.arange(width, dtype=np.float32) - np.float32(width / 2 + rng.uniform(-room, room))
    y = np.arange(height, dtype=np.float32) - np.float32(height / 2 + rng.uniform(-room, room))
    angle = rng.uniform(0, 2 * math.pi)
    cosine, sine = math.cos(angle) / radius, math.sin(angle) / radius
    stretch = math.exp(rng.uniform(-STRETCH, STRETCH))
    u = stretch * cosine * x + (stretch * sine * y)[:, None]
    v = -sine / stretch * x + (cosine / stretch * y)[:, None]
    return u, v, radius


def paint(picture: Image.Image, depth: np.ndarray, colour: np.ndarray) -> None:
    """Lay `colour` on `picture` where `depth`, in pixels, is positive; edges are a pixel soft."""
    cover = Image.fromarray(to_bytes(depth + 0.5))
    picture.paste(tuple(to_bytes(colour).tolist()), (0, 0), cover)


def expose(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """The picture under light that falls off evenly in one direction, with grain."""
    slope_x, slope_y = rng.uniform(-0.2, 0.2, 2)
    x = np.linspace(-slope_x, slope_x, picture.width, dtype=np.float32)
    y = np.linspace(-slope_y, slope_y, picture.height, dtype=np.float32)[:, None]
    light = np.float32(rng.uniform(0.8, 1.0)) + x + y
    light += np.float32(GRAIN) * rng.standard_normal(light.shape, np.float32)
    return ImageChops.multiply(picture, Image.fromarray(to_bytes(light)).convert("RGB"))


def draw(split: str, index: int, seed: int = 0) -> tuple[np.ndarray, int]:
    """Picture `index` of a split: (height, width, 3) uint8 RGB, and its label as in LABELS.

    Labels take turns, so any run of len(LABELS) indices holds each once. Raises ValueError for a
    split that is not in SPLIT_SIZES.
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    label = index % len(LABELS)
    name = LABELS[label]
    short = rng.integers(*SHORT_SIDE, endpoint=True)
    sides = (short, round(short * rng.uniform(1, LONG_SIDE_RATIO)))
    width, height = rng.permutation(np.array(sides)).tolist()

    ground_colour, patch_colour, figure_colour = palette(rng)
    picture = draw_ground(rng, width, height, ground_colour)
    u, v, radius = object_coordinates(rng, width, height)
    if name in OUTLINES:
        depth = OUTLINES[name](u, v, rng)
    else:
        patch = PATCHES[rng.integers(len(PATCHES))](u, v, rng)
        paint(picture, radius * patch, patch_colour)
        depth = np.minimum(patch, TEXTURES[name](u, v, rng))
    paint(picture, radius * depth, figure_colour)

    picture = expose(rng, picture)
    if rng.random() < GREY_SHARE:
        picture = picture.convert("L").convert("RGB")
    return np.array(picture), label


def write_split(directory: pathlib.Path, split: str, size: int) -> None:
    """Write the first `size` pictures of a split as directory/CLASS/INDEX.jpg."""
    for name in LABELS:
        (directory / name).mkdir(parents=True)
    for index in range(size):
        pixels, label = draw(split, index)
        image = Image.fromarray(pixels)
        if (pixels == pixels[..., :1]).all():
            image = image.convert("L")
        quality = 80 + index // len(LABELS) % 16  # 80..95, the same for every class
        image.save(directory / LABELS[label] / f"{index:05d}.jpg", quality=quality)


def write_shapes(directory: pathlib.Path, split_sizes: Mapping[str, int] = SPLIT_SIZES) -> None:
    """Write the set as directory/SPLIT/CLASS/INDEX.jpg, unless `directory` exists already.

    The set appears whole or not at all: it is written beside its final place and then renamed. If
    two processes do so at once, the first to finish provides the set. Raises OSError if writing
    fails.
    """
    if directory.exists():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".shapes-") as scratch:
        whole = pathlib.Path(scratch, "whole")
        for split, size in split_sizes.items():
            write_split(whole / split, split, size)
        # Fails if another process was faster; its set will do.
        try:
            whole.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise


def shapes_directory(cache: pathlib.Path) -> pathlib.Path:
    """Where this version of the set belongs in the cache directory."""
    return cache / f"shapes-{VERSION}"
