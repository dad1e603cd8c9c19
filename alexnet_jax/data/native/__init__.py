"""The workers' pixel operations in C++, without holding the interpreter lock.

Call only if `available`; `data.images` and `data.statistics` compute the same without them, bit for
bit.
"""

import ctypes
import functools
import pathlib
from typing import Any

import numpy as np

from alexnet_jax import compiled

SOURCE = pathlib.Path(__file__).parent / "images.cc"
# Fused multiply-adds would give other results than numpy's.
FLAGS = ("-ffp-contract=off",)
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
ARGUMENTS = {
    "copy": [*[_POINTER, _NUMBER] * 2, *[_NUMBER] * 3],
    "resize": [_POINTER, *[_NUMBER] * 9, _POINTER, _NUMBER],
    "add": [_POINTER, _NUMBER, _POINTER, _POINTER],
}


def available() -> bool:
    """Whether a library could be compiled."""
    return _library() is not None


def copy(window: np.ndarray, mirror: bool, out: np.ndarray) -> None:
    """Write a window into `out`, flipped left to right if `mirror`.

    Args:
      window, out: (rows, columns, 3) uint8, each row contiguous; rows may be apart.

    Raises:
      ValueError: their shapes differ, or they are not such arrays.
    """
    rows, columns, _ = _checked(window).shape
    if _checked(out).shape != window.shape:
        raise ValueError(f"{window.shape} does not fit into {out.shape}")
    places = (window.ctypes.data, window.strides[0], out.ctypes.data, out.strides[0])
    _library().copy(*places, rows, columns, int(mirror))


def resize(
    image: np.ndarray, outputs: tuple[int, int], first: tuple[int, int], mirror: bool,
    out: np.ndarray,
) -> None:  # fmt: skip
    """Write a window of the resized image into `out`, as `data.images.crop` does.

    Args:
      image: (h, w, 3) uint8, each row contiguous.
      outputs: (h', w') of the whole resized image.
      first: top and left of the window in it.
      mirror: whether to flip left and right.
      out: (s, s, 3) uint8, likewise.

    Raises:
      ValueError: the window is not inside the resized image, or these are not such arrays.
    """
    side, (height, width, _) = len(_checked(out)), _checked(image).shape
    (tall, wide), (top, left) = outputs, first
    inside = 0 <= top <= tall - side and 0 <= left <= wide - side
    alike = (tall > height) == (wide > width)
    if not inside or not alike or out.shape[1] != side:
        raise ValueError(f"{out.shape} at {first} is no window of {image.shape} made {outputs}")
    place, to = (image.ctypes.data, image.strides[0]), (out.ctypes.data, out.strides[0])
    _library().resize(*place, height, width, tall, wide, top, left, side, int(mirror), *to)


def add(image: np.ndarray, pixels: np.ndarray, products: np.ndarray) -> None:
    """Add an image to `pixels`, and the products of its channels to `products`.

    Args:
      image: (h, w, 3) uint8.
      pixels, products: (h, w, 3) and (3, 3) int64, contiguous.

    Raises:
      ValueError: these are not such arrays.
    """
    image = np.ascontiguousarray(image)
    for array, dtype, shape in (
        (image, np.uint8, (*image.shape[:2], 3)),
        (pixels, np.int64, image.shape),
        (products, np.int64, (3, 3)),
    ):
        if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
            raise ValueError(f"{array.shape} {array.dtype} is neither an image nor its sums")
    _library().add(image.ctypes.data, image.size // 3, pixels.ctypes.data, products.ctypes.data)


def _checked(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.shape[2:] != (3,) or array.strides[1:] != (3, 1):
        raise ValueError(f"{array.shape} {array.dtype} are no rows of three bytes a pixel")
    return array


@functools.cache
def _library() -> Any:
    """The compiled library; None if it cannot be had."""
    library, _ = compiled.load(SOURCE, tuple(ARGUMENTS), FLAGS, "images are cropped more slowly")
    for name, types in ARGUMENTS.items() if library else ():
        function = getattr(library, name)
        function.argtypes, function.restype = types, _NUMBER
    return library
