"""Bytes -> checked RGB -> square. What is not an image raises; nothing is guessed."""

import functools
import io
import struct
from typing import Any

import numpy as np
import scipy.sparse
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000  # a larger claim is taken for an attack or a broken header
MAX_ASPECT = 100  # the longer side over the shorter; more is no picture and would fill the memory
# What libjpeg warns of though every pixel is there; its other warnings are of lost data.
HARMLESS = ("extraneous bytes before marker 0xd9", "unknown JFIF revision")
_UNREADABLE = (
    ValueError, OSError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError
)  # fmt: skip


class ImageError(Exception):
    """An image that cannot be read: its name and why."""


def decode(data: bytes, name: str) -> np.ndarray:
    """The RGB pixels of an image file's bytes.

    JPEGs are decoded whole or not at all; greyscale, CMYK, palette and other modes become RGB;
    a JPEG's EXIF orientation is applied. Other formats are those Pillow reads; of several frames
    the first.

    Args:
      data: the file's bytes.
      name: for messages.

    Returns:
      (h, w, 3) uint8.

    Raises:
      ImageError: not an image, truncated, over MAX_PIXELS or MAX_ASPECT.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            pixels = _strictly_decoded(data, name)
            if pixels is not None:
                return pixels
        with Image.open(io.BytesIO(data)) as image:
            _check_size(*image.size, name)
            if image.mode.startswith(("I", "F")):
                raise ImageError(f"{name}: has {image.mode} pixels; only 8 bits a channel are read")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except _UNREADABLE as error:
        detail = "empty file" if not data else " ".join(str(error).split())[:120]
        if data and isinstance(error, UnidentifiedImageError):
            detail = "of no known format"
        raise ImageError(f"{name}: not a whole image ({detail})") from error


def _strictly_decoded(data: bytes, name: str) -> np.ndarray | None:
    """A JPEG's RGB pixels; None where it is whole but Pillow has to read it.

    Raises ValueError where data is lost, which Pillow would fill in.
    """
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
    if data.find(b"Exif\0\0", 0, 1 << 16) < 0:
        return pixels
    with Image.open(io.BytesIO(data)) as header:
        orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
    photo = Image.fromarray(pixels)
    photo.getexif()[ExifTags.Base.Orientation] = orientation
    return np.asarray(ImageOps.exif_transpose(photo))


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
    height, width, _ = image.shape
    shorter = min(height, width)
    if shorter == size:
        tall, wide = height, width
    else:
        tall, wide = (max(size, round(side * size / shorter)) for side in (height, width))
    top, left = (tall - size) // 2, (wide - size) // 2
    if shorter < size:
        larger = Image.fromarray(image).resize((wide, tall), Image.Resampling.BICUBIC)
        image, shorter = np.asarray(larger), size
    if shorter == size:
        return np.ascontiguousarray(image[top : top + size, left : left + size])
    rows = _area(height, tall, top, size) @ image.reshape(height, -1).astype(np.float32)
    turned = rows.reshape(size, width, 3).swapaxes(0, 1).reshape(width, -1)  # (w, size * 3)
    both = _area(width, wide, left, size) @ turned  # (size, size * 3), columns first
    return np.rint(both).astype(np.uint8).reshape(size, size, 3).swapaxes(0, 1).copy()


@functools.lru_cache(maxsize=4096)
def _area(inputs: int, outputs: int, first: int, count: int) -> scipy.sparse.csr_array:
    """Weights (count, inputs) float32 of the area filter for outputs first .. first + count - 1."""
    scale = inputs / outputs
    edges = np.arange(first, first + count + 1) * scale
    starts, ends = edges[:-1], np.minimum(edges[1:], inputs)
    pixels = np.arange(inputs)
    covered = np.minimum(ends[:, None], pixels + 1) - np.maximum(starts[:, None], pixels)
    covered = np.maximum(covered, 0)
    return scipy.sparse.csr_array((covered / covered.sum(1, keepdims=True)).astype(np.float32))
