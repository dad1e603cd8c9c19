"""Pictures to test with: of odd sizes, none of one colour, no two alike."""

import io
import pathlib
from collections.abc import Mapping

import numpy as np
import pytest
from PIL import Image


class Pictures:
    """What the data tests make their images and folders with."""

    @staticmethod
    def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
        """(height, width, 3) uint8 of three waves, which JPEG keeps almost as they are."""
        rng = np.random.default_rng((seed, height, width))
        y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
        across, down, phase = rng.uniform(1.5, 6, (3, 3))
        waves = np.sin(x[..., None] * across + y[..., None] * down + phase)
        return (128 + 100 * waves).astype(np.uint8)

    @staticmethod
    def rough(height: int, width: int, seed: int = 0) -> np.ndarray:
        """(height, width, 3) uint8 of noise."""
        rng = np.random.default_rng((seed, height, width))
        return rng.integers(0, 256, (height, width, 3), np.uint8)

    @staticmethod
    def encode(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None, **options) -> bytes:
        """An image file's bytes; `mode` converts first, as CMYK."""
        image = Image.fromarray(pixels)
        buffer = io.BytesIO()
        (image.convert(mode) if mode else image).save(buffer, kind, **options)
        return buffer.getvalue()

    def folder(
        self, root: pathlib.Path, counts: Mapping[str, int], seed: int = 0
    ) -> list[pathlib.Path]:
        """Write `counts[name]` noisy PNGs into root/name; all their paths."""
        paths = []
        for label, (name, count) in enumerate(counts.items()):
            (root / name).mkdir(parents=True)
            for index in range(count):
                number = 1000 * (100 * seed + label) + index
                pixels = self.rough(17 + number % 5, 17 + number % 7, number)
                paths.append(root / name / f"{index:03d}.png")
                paths[-1].write_bytes(self.encode(pixels))
        return paths


@pytest.fixture(scope="session")
def pictures() -> Pictures:
    return Pictures()
