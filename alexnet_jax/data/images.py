"""Bytes -> checked RGB -> square. What is not an image raises; nothing is guessed."""

import io
import re
import struct
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from alexnet_jax.data import native
from alexnet_jax.data.examples import Example
from alexnet_jax.errors import FailedError, printable, reason

MAX_BYTES = 2**28  # a larger file is not a picture and would exhaust memory
MAX_PIXELS = 100_000_000  # a larger claim is taken for an attack or a broken header
MAX_ASPECT = 100  # longer side over shorter; more is not a picture and would exhaust memory
MAX_SCANS = 100  # of a JPEG: each may be a few bytes yet take as long as a whole picture
# Pillow would try others: some have no signature, and EPS is a program that Ghostscript runs.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# Warnings of libjpeg and an error of simplejpeg that whole files cause; all others mean lost data.
HARMLESS = ("extraneous bytes before marker 0xd9", "Could not determine subsampling")
REVISION = "unknown JFIF revision"  # harmless, but libjpeg reports only its first warning
WARM = 2**22  # bytes; reusing memory gains nothing where caches cannot hold it
_own = threading.local()
# Pillow's limit; MAX_PIXELS is the one here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_SCAN, _EXIF, _XMP = b"\xff\xda\0", b"Exif\0\0", b"http:/"


class ImageError(FailedError):
    """An image that cannot be read: its name and why, in one line."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def decode(data: bytes | np.ndarray, name: str, fleeting: bool = False) -> np.ndarray:
    """The RGB pixels of an image file's bytes; an array of pixels is returned as it is.

    JPEGs are decoded whole or not at all; greyscale, CMYK, palette and other modes become RGB;
    the EXIF orientation is applied. Other formats are those of FORMATS that Pillow was built with;
    of several frames, the first is read.

    Args:
      data, name: of an `Example`.
      fleeting: whether the pixels are no longer needed when this thread decodes again; they may
        then lie in warm memory that the next image will overwrite.

    Returns:
      (h, w, 3) uint8.

    Raises:
      ImageError: not an image, truncated, over MAX_PIXELS, MAX_ASPECT or MAX_SCANS.
    """
    if isinstance(data, np.ndarray):
        return data
    try:
        if data[:3] == b"\xff\xd8\xff":
            pixels = _strictly_decoded(data, name, fleeting)
            if pixels is not None:
                return pixels
        with _opened(data) as image:
            _check_size(*image.size, name)
            if image.mode.startswith(("I", "F")):
                raise ImageError(f"{name}: has {image.mode} pixels; convert them to 8 bits")
            if image.format == "PNG":  # decoding does not verify every checksum
                _opened(data).verify()
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (ImageError, MemoryError):  # lack of memory does not make an image broken
        raise
    except Exception as error:  # on damaged data Pillow may raise anything
        detail = reason(error)
        if isinstance(error, UnidentifiedImageError):
            detail = "of no known format" if data else "empty file"
        raise ImageError(f"{name}: not a whole image ({detail})") from error


def decoders() -> str:
    """The versions of the libraries that decode; others may read images that these cannot."""
    return f"Pillow {PIL.__version__}, simplejpeg {simplejpeg.__version__}"


def oddities(example: Example) -> tuple[str, ...]:
    """What is unusual about a whole image's file: any of greyscale, cmyk, misnamed, rotated.

    `misnamed` is not a JPEG though its name says so; `rotated` has an EXIF orientation.
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
    except Exception:  # Pillow cannot read it, though it is whole
        return ()
    return tuple(name for name, shown in signs.items() if shown)


def _opened(data: bytes) -> Image.Image:
    Image.init()
    return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])


def _strictly_decoded(data: bytes, name: str, fleeting: bool) -> np.ndarray | None:
    """A JPEG's RGB pixels; None if it is whole but Pillow has to read it.

    Raises ValueError if data is lost, which Pillow would fill in. Only Pillow reads unusual chroma
    subsampling, and it notices only a file that ends too soon.
    """
    scans, odd, height, width = look(data)
    if scans > MAX_SCANS:
        raise ImageError(f"{name}: has {scans} scans; at most {MAX_SCANS} are read")
    try:
        colour = "RGB"
        if odd:
            header: Any = simplejpeg.decode_jpeg_header(data)
            height, width, colour, _ = header
        _check_size(width, height, name)
        if colour in ("Gray", "YCbCr", "RGB"):
            memory = _warm_memory() if fleeting and 3 * height * width <= WARM else None
            pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=memory)
            return _upright(pixels, data) if odd else pixels
        simplejpeg.decode_jpeg(data, colorspace="CMYK")
    except ValueError as error:
        if REVISION in str(error):
            known = re.sub(rb"JFIF\0..", b"JFIF\0\1\1", data, flags=re.DOTALL)
            return _strictly_decoded(known, name, fleeting)
        if not any(words in str(error) for words in HARMLESS):
            raise
    return None


def look(data: bytes) -> tuple[int, bool, int, int]:
    """What a JPEG's segments say, as far as they can be followed.

    Returns:
      scans: an upper bound on the number of scans that are read.
      odd: False if it has pixels, one or three channels, and no segment says it is not upright.
      height: in pixels; meaningful only where `odd` is False.
      width: likewise.
    """
    place, channels, height, width, odd, scans, sequential = 2, 0, 0, 0, True, 0, False
    while place + 10 <= len(data):
        sign, kind = data[place : place + 2]
        if sign != 0xFF or kind < 0xC0 or kind == 0xFF or 0xD0 <= kind <= 0xD9:
            break
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        start = data[place + 4 : place + 10]
        if start == _XMP:
            break
        if start == _EXIF:
            if not _is_upright(data[place + 10 : end]):
                break
        elif kind == 0xDA:
            odd = channels not in (1, 3) or not height * width
            scans = int(sequential and data[place + 4] == channels)  # what follows is not read
            break
        elif kind in (0xC0, 0xC1, 0xC2):  # the frame
            height, width, channels = struct.unpack_from(">HHB", data, place + 5)
            sequential = kind != 0xC2
        place = end
    return scans or data.count(_SCAN), odd, height, width


def _is_upright(tiff: bytes) -> bool:
    """Whether the first directory of EXIF data, a TIFF, says that the image is upright."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return False
    try:
        (first,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, first)
        entries = [
            struct.unpack_from(f"{order}HHIHxx", tiff, first + 2 + 12 * place)
            for place in range(count)
        ]
    except struct.error:
        return False
    found = [entry[1:] for entry in entries if entry[0] == ExifTags.Base.Orientation]
    return bool(found) and all(entry == (3, 1, 1) for entry in found)  # one 16-bit number


def _warm_memory() -> np.ndarray:
    """WARM bytes of this thread's own.

    They must not be aligned to 32 bytes: libjpeg-turbo writes aligned pixels past the caches.
    """
    if not hasattr(_own, "memory"):
        memory = np.empty(WARM + 32, np.uint8)
        _own.memory = memory[(16 - memory.ctypes.data) % 32 :][:WARM]
    return _own.memory


def _upright(pixels: np.ndarray, data: bytes) -> np.ndarray:
    """A JPEG's pixels rotated as its EXIF orientation says."""
    with _opened(data) as header:
        orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation not in range(2, 9):  # upright, or not a known orientation
        return pixels
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
    """Resize the shorter side to `size` and crop the centre: (h, w, 3) -> (size, size, 3) uint8.

    Shrinks by the area filter, each output pixel the mean of the area it covers; enlarges by cubic.
    Source: the original's preparation (cuda-convnet2, make-data).
    """
    out = np.empty((size, size, 3), np.uint8)
    crop(image, size, (0, 0), False, out)
    return out


def crop(
    image: np.ndarray, size: int, offset: Sequence[int] | np.ndarray, mirror: bool, out: np.ndarray
) -> None:
    """Write a crop of an image's `square` into `out`; no pixel outside the crop is computed.

    Args:
      image: (h, w, 3) uint8.
      size: pixels a side of the square.
      offset: the crop's top and left in the square.
      mirror: whether to flip left and right.
      out: (s, s, 3) uint8, s at most `size`.
    """
    height, width, _ = image.shape
    shorter, side = min(height, width), len(out)
    tall = max(size, round(height * size / shorter))
    wide = max(size, round(width * size / shorter))
    top, left = (tall - size) // 2 + int(offset[0]), (wide - size) // 2 + int(offset[1])
    if shorter == size:
        window = image[top : top + side, left : left + side]
    elif native.available():
        native.resize(np.ascontiguousarray(image), (tall, wide), (top, left), mirror, out)
        return
    else:
        window = _resized(image, (tall, wide), (top, left), side)
    if native.available() and window.strides[1:] == (3, 1):
        native.copy(window, mirror, out)
    elif mirror:  # numpy is slow at moving three bytes and quick at moving every third
        for channel in range(3):
            out[..., channel] = window[:, ::-1, channel]
    else:
        out[:] = window


def _resized(
    image: np.ndarray, outputs: tuple[int, int], first: tuple[int, int], side: int
) -> np.ndarray:
    """The (side, side, 3) uint8 window at `first` of the image resized to `outputs`.

    Products are added one at a time; other forms might fuse a multiply and an add.
    """
    for axis, shape in ((0, (-1, 1, 1)), (1, (1, -1, 1))):
        inputs = image.shape[axis]
        form = _areas if outputs[axis] <= inputs else _cubics
        pixels, shares = form(inputs, outputs[axis], first[axis], side)
        sums: Any = 0
        for place, share in zip(pixels.T, shares.T.astype(np.float32)):
            taken = image.take(np.minimum(place, inputs - 1), axis)  # where clipped, the share is 0
            sums = sums + taken * share.reshape(shape)
        image = sums
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8)


def _areas(inputs: int, outputs: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Input pixels under each output pixel and their shares of its area, (count, taps) each."""
    scale = inputs / outputs
    edges = np.arange(first, first + count + 1) * scale
    begin, end = edges[:-1, None], np.minimum(edges[1:, None], inputs)
    pixels = begin.astype(np.int64) + np.arange(int(scale) + 2)
    covered = np.minimum(end, pixels + 1) - np.maximum(begin, pixels)
    return pixels, np.maximum(covered, 0) / scale


def _cubics(inputs: int, outputs: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`_areas` for Keys's cubic (a = -1/2), cut off at the edges and renormalised to a sum of 1."""
    centre = (np.arange(first, first + count)[:, None] + 0.5) * (inputs / outputs)
    pixels = np.maximum(centre - 1.5, 0).astype(np.int64) + np.arange(5)
    far = abs(pixels + 0.5 - centre)
    near = (1.5 * far - 2.5) * far * far + 1
    beyond = (((far - 5) * far + 8) * far - 4) * -0.5
    shares = np.where(far < 1, near, np.where(far < 2, beyond, 0)) * (pixels < inputs)
    return pixels, shares / np.cumsum(shares, axis=1)[:, -1:]  # one by one, as C++ adds them
