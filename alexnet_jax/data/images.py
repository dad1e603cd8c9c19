"""Bytes -> checked RGB -> square. What is not an image raises; nothing is guessed."""

import functools
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from alexnet_jax.data import native
from alexnet_jax.data.examples import Example

MAX_BYTES = 2**28  # a larger file is no picture and would fill the memory
MAX_PIXELS = 100_000_000  # a larger claim is taken for an attack or a broken header
MAX_ASPECT = 100  # the longer side over the shorter; more is no picture and would fill the memory
MAX_SCANS = 100  # of a JPEG: each may be a few bytes and take as long as a picture
# Pillow would try others: some have no signature, and EPS is a program that Ghostscript runs.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# What libjpeg warns of though every pixel is there; its other warnings are of lost data.
HARMLESS = ("extraneous bytes before marker 0xd9", "unknown JFIF revision")
_SCAN, _EXIF = b"\xff\xda\0", b"Exif\0\0"


class ImageError(Exception):
    """An image that cannot be read: its name and why, in one line."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Text of files and archives, fit for a line on a terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


def decode(data: bytes | np.ndarray, name: str) -> np.ndarray:
    """The RGB pixels of an image file's bytes; pixels pass as they are.

    JPEGs are decoded whole or not at all; greyscale, CMYK, palette and other modes become RGB;
    the EXIF orientation is applied. Other formats are those of FORMATS that Pillow was built with;
    of several frames the first.

    Args:
      data, name: of an `Example`.

    Returns:
      (h, w, 3) uint8.

    Raises:
      ImageError: not an image, truncated, over MAX_PIXELS, MAX_ASPECT or MAX_SCANS.
    """
    if isinstance(data, np.ndarray):
        return data
    try:
        if data[:3] == b"\xff\xd8\xff":
            pixels = _strictly_decoded(data, name)
            if pixels is not None:
                return pixels
        with _opened(data) as image:
            _check_size(*image.size, name)
            if image.mode.startswith(("I", "F")):
                raise ImageError(f"{name}: has {image.mode} pixels; only 8 bits a channel are read")
            if image.format == "PNG":  # decoding, Pillow does not come to every checksum
                _opened(data).verify()
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except ImageError:
        raise
    except Exception as error:  # at damaged bytes Pillow raises whatever it stumbles over
        detail = " ".join(str(error).split())[:120] or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            detail = "of no known format" if data else "empty file"
        raise ImageError(f"{name}: not a whole image ({detail})") from error


def oddities(example: Example) -> tuple[str, ...]:
    """What is unusual about a whole image's file: of greyscale, cmyk, misnamed and rotated.

    `misnamed` is no JPEG though its name says so; `rotated` has an EXIF orientation.
    """
    if isinstance(example.data, np.ndarray):
        return ()
    try:
        with _opened(example.data) as image:
            called_jpeg = example.name.lower().endswith((".jpg", ".jpeg"))
            signs = {
                "greyscale": image.mode in ("1", "L", "LA"),
                "cmyk": image.mode == "CMYK",
                "misnamed": called_jpeg and image.format not in ("JPEG", "MPO"),
                "rotated": image.getexif().get(ExifTags.Base.Orientation, 1) != 1,
            }
    except Exception:  # by Pillow, though whole
        return ()
    return tuple(name for name, shown in signs.items() if shown)


def _opened(data: bytes) -> Image.Image:
    Image.init()
    return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])


def _strictly_decoded(data: bytes, name: str) -> np.ndarray | None:
    """A JPEG's RGB pixels; None where it is whole but Pillow has to read it.

    Raises ValueError where data is lost, which Pillow would fill in.
    """
    scans = native.count(data, _SCAN) if native.available() else data.count(_SCAN)
    if scans > MAX_SCANS:
        raise ImageError(f"{name}: has {scans} scans; at most {MAX_SCANS} are read")
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height, name)
        if colour in ("Gray", "YCbCr", "RGB"):
            return _upright(simplejpeg.decode_jpeg(data, colorspace="RGB"), data)
        simplejpeg.decode_jpeg(data, colorspace="CMYK")
    except ValueError as error:
        if not any(words in str(error) for words in HARMLESS):
            raise
    return None


def _upright(pixels: np.ndarray, data: bytes) -> np.ndarray:
    """A JPEG's pixels turned as its EXIF orientation says."""
    if not _may_be_turned(data):
        return pixels
    with _opened(data) as header:
        orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
    photo = Image.fromarray(pixels)
    photo.getexif()[ExifTags.Base.Orientation] = orientation
    return np.asarray(ImageOps.exif_transpose(photo))


def _may_be_turned(data: bytes) -> bool:
    """Whether EXIF is among a JPEG's segments before its first scan, or they cannot be followed."""
    place = 2
    while place + 10 <= len(data):
        sign, kind = data[place : place + 2]
        if sign != 0xFF or kind < 0xC0 or kind == 0xFF or data[place + 4 : place + 10] == _EXIF:
            return True
        if kind == 0xDA:
            return False
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return True


def _check_size(width: Any, height: Any, name: str) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise ImageError(
            f"{name}: claims {width} x {height} pixels; at most {MAX_PIXELS:,} are read"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{name}: is {width} x {height} pixels; one side is over {MAX_ASPECT} times the other"
        )


def square(image: np.ndarray, size: int) -> np.ndarray:
    """The shorter side to `size`, the centre of the longer: (h, w, 3) -> (size, size, 3) uint8.

    Down by the area filter, each output pixel the mean of the area it covers; up by the cubic.
    Source: the original's preparation (cuda-convnet2, make-data).
    """
    out = np.empty((size, size, 3), np.uint8)
    crop(image, size, (0, 0), False, out)
    return out


def crop(
    image: np.ndarray, size: int, offset: Sequence[int] | np.ndarray, mirror: bool, out: np.ndarray
) -> None:
    """Write into `out` a crop of the `square` of an image; no pixel outside it is computed.

    Args:
      image: (h, w, 3) uint8.
      size: pixels a side of the square.
      offset: the crop's top and left in the square.
      mirror: whether left and right change places.
      out: (s, s, 3) uint8, s at most `size`.
    """
    height, width, _ = image.shape
    shorter, side = min(height, width), len(out)
    tall, wide = (max(size, round(length * size / shorter)) for length in (height, width))
    top, left = (tall - size) // 2 + int(offset[0]), (wide - size) // 2 + int(offset[1])
    if shorter > size:
        if native.available():
            image = np.ascontiguousarray(image)
            native.shrink(image, (tall, wide), (top, left), mirror, out)
            return
        window = _shrunk(image, (tall, wide), (top, left), side)
    else:
        if shorter < size:
            larger = Image.fromarray(image).resize((wide, tall), Image.Resampling.BICUBIC)
            image = np.asarray(larger)
        window = image[top : top + side, left : left + side]
    if native.available() and window.strides[1:] == (3, 1):
        native.copy(window, mirror, out)
    elif mirror:  # numpy is slow at moving three bytes and quick at moving every third
        for channel in range(3):
            out[..., channel] = window[:, ::-1, channel]
    else:
        out[:] = window


def _shrunk(
    image: np.ndarray, outputs: tuple[int, int], first: tuple[int, int], side: int
) -> np.ndarray:
    """(side, side, 3) uint8 from `first` on of the image shrunk to `outputs` by the area filter."""
    rows, down = _area(image.shape[0], outputs[0], first[0], side, 1)
    columns, across = _area(image.shape[1], outputs[1], first[1], side, 3)
    region = image[rows, columns].astype(np.float32)
    lines = down @ region.reshape(len(region), -1)  # (side, columns * 3)
    turned = across @ lines.T  # (side * 3, side)
    return np.rint(turned).astype(np.uint8).reshape(side, 3, side).transpose(2, 0, 1)


@functools.lru_cache(maxsize=4096)
def _area(
    inputs: int, outputs: int, first: int, count: int, channels: int
) -> tuple[slice, scipy.sparse.csr_array]:
    """The area filter from `inputs` pixels to `outputs`, for `count` of these from `first` on.

    Returns:
      The input pixels it reads, and for these its weights, (count * channels, pixels * channels)
      float32; channels lie beside each other.
    """
    scale = inputs / outputs
    edges = np.arange(first, first + count + 1) * scale
    starts, ends = edges[:-1, None], np.minimum(edges[1:, None], inputs)
    low, high = int(edges[0]), min(math.ceil(edges[-1]), inputs)
    pixels = starts.astype(np.int64) + np.arange(int(scale) + 2)  # (count, taps)
    covered = np.minimum(ends, pixels + 1) - np.maximum(starts, pixels)
    covered = np.maximum(covered, 0)
    weights = (covered / scale).astype(np.float32)
    places = np.minimum(pixels, high - 1) - low  # where clipped, the weight is 0
    channel = np.arange(channels)[:, None]
    indices = places[:, None] * channels + channel  # (count, channels, taps)
    data = np.broadcast_to(weights[:, None], indices.shape)
    ends_of_rows = np.arange(count * channels + 1) * pixels.shape[1]
    shape = (count * channels, (high - low) * channels)
    csr = scipy.sparse.csr_array((data.ravel(), indices.ravel(), ends_of_rows), shape=shape)
    return slice(low, high), csr
