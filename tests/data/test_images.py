"""What is an image is read to its last pixel, what is not is refused by name; squares are exact."""

import ctypes
import io
import itertools
import math
import mmap
import platform
import struct
import threading
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import ExifTags, Image

from alexnet_jax import compiled
from alexnet_jax.data import images, native, statistics

HEIGHT, WIDTH = 61, 87
ORIENTATION = 0x0112  # the EXIF tag

# How a stored picture must be turned to stand upright; EXIF 2.3, section 4.6.4 A.
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.fixture(params=["native", "numpy"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By what pixels are moved: this package's C++, or what there is without a compiler."""
    if request.param == "native" and not native.available():
        pytest.skip("no C++ compiler")
    if request.param == "numpy":
        monkeypatch.setattr(native, "available", lambda: False)
    return request.param


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def with_segment(jpeg: bytes, marker: int, body: bytes) -> bytes:
    """A JPEG with one more segment in front of the others."""
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + jpeg[2:]


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header is valid and claims a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(9)))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


def jpeg_claiming(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG whose frame header, after marker, length and precision, claims a size."""
    start = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:start] + struct.pack(">HH", height, width) + jpeg[start + 4 :]


def close(decoded: np.ndarray, drawn: np.ndarray) -> bool:
    """Whether only what JPEG loses has been lost."""
    assert decoded.dtype == np.uint8
    assert decoded.shape == drawn.shape
    difference = abs(decoded.astype(int) - drawn)
    return difference.mean() < 2 and difference.max() < 16


def refusal(data: bytes) -> str:
    """Why `data` is refused, without the name, which must come first."""
    with pytest.raises(images.ImageError) as caught:
        images.decode(data, "some/file.jpg")
    name, _, reason = str(caught.value).partition(": ")
    assert name == "some/file.jpg"
    assert "\n" not in reason
    return reason


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}])
def test_a_jpeg_becomes_its_pixels(pictures, options):
    drawn = pictures.smooth(HEIGHT, WIDTH)
    jpeg = pictures.encode(drawn, "JPEG", quality=95, **options)
    assert close(images.decode(jpeg, "x"), drawn)


def test_a_grey_jpeg_becomes_rgb_with_three_equal_channels(pictures):
    grey = pictures.smooth(HEIGHT, WIDTH)[..., 0]
    decoded = images.decode(pictures.encode(grey, "JPEG", quality=95), "x")
    assert close(decoded, np.stack([grey] * 3, axis=-1))
    assert (decoded == decoded[..., :1]).all()


def test_a_cmyk_jpeg_becomes_rgb_and_not_its_negative(pictures):
    drawn = pictures.smooth(HEIGHT, WIDTH)
    jpeg = pictures.encode(drawn, "JPEG", "CMYK", quality=95)
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.mode == "CMYK"
    assert close(images.decode(jpeg, "x"), drawn)


def test_a_png_becomes_exactly_its_pixels(pictures):
    drawn = pictures.rough(HEIGHT, WIDTH)
    np.testing.assert_array_equal(images.decode(pictures.encode(drawn), "x"), drawn)


def test_png_bytes_are_read_as_png_whatever_the_file_is_called(pictures):
    drawn = pictures.rough(HEIGHT, WIDTH)
    decoded = images.decode(pictures.encode(drawn), "n02105855_2933.JPEG")  # as in ImageNet
    np.testing.assert_array_equal(decoded, drawn)


def test_a_palette_png_becomes_the_colours_of_its_palette(pictures):
    image = Image.fromarray(pictures.rough(HEIGHT, WIDTH)).quantize(13)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    colours = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
    expected = colours[np.asarray(image)]
    assert len(np.unique(expected.reshape(-1, 3), axis=0)) > 5
    np.testing.assert_array_equal(images.decode(buffer.getvalue(), "x"), expected)


def test_an_rgba_png_loses_its_alpha_and_nothing_else(pictures):
    drawn = pictures.rough(HEIGHT, WIDTH)
    alpha = pictures.rough(HEIGHT, WIDTH, 1)[..., :1]
    data = pictures.encode(np.concatenate([drawn, alpha], axis=-1))
    np.testing.assert_array_equal(images.decode(data, "x"), drawn)


def test_a_grey_png_becomes_rgb_with_three_equal_channels(pictures):
    grey = pictures.rough(HEIGHT, WIDTH)[..., 0]
    decoded = images.decode(pictures.encode(grey), "x")
    np.testing.assert_array_equal(decoded, np.stack([grey] * 3, axis=-1))


def test_of_a_gif_the_first_frame_is_read(pictures):
    first, second = (Image.fromarray(pictures.rough(23, 31, s)).quantize(16) for s in (0, 1))
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=[second])
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        assert image.n_frames == 2
    decoded = images.decode(buffer.getvalue(), "x")
    np.testing.assert_array_equal(decoded, np.asarray(first.convert("RGB")))


@pytest.mark.parametrize("orientation", sorted(UPRIGHT))
def test_a_jpegs_exif_orientation_is_applied(pictures, orientation):
    drawn = pictures.smooth(HEIGHT, WIDTH)
    turned = pictures.encode(drawn, "JPEG", quality=95, exif=oriented(orientation))
    assert close(images.decode(turned, "x"), UPRIGHT[orientation](drawn))


def test_the_exif_orientation_is_found_behind_a_colour_profile(pictures):
    drawn = pictures.smooth(HEIGHT, WIDTH)
    turned = pictures.encode(drawn, "JPEG", quality=95, exif=oriented(6))
    profile = b"ICC_PROFILE\0\1\1" + bytes(20_000)
    assert close(images.decode(with_segment(turned, 0xE2, profile), "x"), UPRIGHT[6](drawn))


@pytest.mark.parametrize("exif", [b"", b"nonsense", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08\0\x05"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_jpeg_with_nonsense_for_exif_is_read_as_it_lies(pictures, exif):
    drawn = pictures.smooth(HEIGHT, WIDTH)
    jpeg = pictures.encode(drawn, "JPEG", quality=95)
    assert close(images.decode(with_segment(jpeg, 0xE1, b"Exif\0\0" + exif), "x"), drawn)


def test_a_png_may_mention_exif(pictures):
    drawn = pictures.rough(HEIGHT, WIDTH)
    data = pictures.encode(drawn, exif=oriented(3))
    np.testing.assert_array_equal(images.decode(data, "x"), drawn[::-1, ::-1])


JPEGS = {
    "plain": {},
    "progressive": {"progressive": True},
    "exif": {"exif": oriented(6)},
    "cmyk": {"mode": "CMYK"},
}


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_a_truncated_jpeg_is_refused(pictures, options, kept):
    jpeg = pictures.encode(pictures.rough(HEIGHT, WIDTH), "JPEG", **options)
    refusal(jpeg[: int(kept * len(jpeg))])


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_a_jpeg_that_lost_half_its_pixels_but_not_its_end_is_refused(pictures, options):
    jpeg = pictures.encode(pictures.rough(HEIGHT, WIDTH), "JPEG", **options)
    refusal(jpeg[: len(jpeg) // 2] + jpeg[-2:])
    # Nor does an unknown revision, of which libjpeg warns first and alone, let it through.
    assert jpeg[6:12] == b"JFIF\0\1" or jpeg[2:4] != b"\xff\xe0"
    revised = jpeg.replace(b"JFIF\0\1", b"JFIF\0\2")
    refusal(revised[: len(revised) // 2] + revised[-2:])


@pytest.mark.parametrize("subsampling", [1, 2])
def test_a_jpeg_whose_subsampling_has_no_name_is_read(pictures, subsampling):
    """Of CMYK all but none and, for inks alike, half both ways."""
    pixels = pictures.smooth(HEIGHT, WIDTH)
    jpeg = pictures.encode(pixels, "JPEG", mode="CMYK", subsampling=subsampling)
    with pytest.raises(ValueError, match="Could not determine subsampling"):
        simplejpeg.decode_jpeg_header(jpeg)
    expected = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    np.testing.assert_array_equal(images.decode(jpeg, "x"), expected)
    refusal(jpeg[: len(jpeg) // 2])


@pytest.mark.parametrize("kept", [4, 20, 40, 500, 5000])
def test_a_truncated_png_is_refused(pictures, kept):
    png = pictures.encode(pictures.rough(HEIGHT, WIDTH))
    assert len(png) > 5000
    refusal(png[:kept])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_lack_of_memory_is_not_the_images_fault(kind, pictures, monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError("Unable to allocate 232 MiB")

    data = pictures.encode(pictures.rough(20, 20), kind)
    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", fail)
    monkeypatch.setattr(images.ImageOps, "exif_transpose", fail)
    with pytest.raises(MemoryError, match="232 MiB"):
        images.decode(data, "x")


def test_an_empty_file_is_refused_as_empty():
    assert "empty" in refusal(b"")


def test_text_is_refused_without_a_memory_address():
    reason = refusal(b"<html>404 Not Found</html>" * 10)
    assert "format" in reason
    assert "0x" not in reason


@pytest.mark.parametrize("head", [b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\x00\x10JFIF\0", b"GIF89a"])
def test_a_head_without_a_body_is_refused(head):
    refusal(head)


def test_a_16_bit_png_is_refused(pictures):
    deep = pictures.rough(HEIGHT, WIDTH)[..., 0].astype(np.uint16) * 257
    assert "8 bits" in refusal(pictures.encode(deep))


@pytest.mark.parametrize("side", [10_001, 12_000, 20_000, 2**31 - 1])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_png_that_claims_too_many_pixels_is_refused(side):
    assert "pixels" in refusal(png_claiming(side, side))


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_a_jpeg_that_claims_too_many_pixels_is_refused(pictures, options):
    options = options | {"progressive": False}
    jpeg = pictures.encode(pictures.smooth(HEIGHT, WIDTH), "JPEG", **options)
    assert "65500 x 65400 pixels" in refusal(jpeg_claiming(jpeg, 65500, 65400))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_damage_anywhere_raises_nothing_but_an_image_error(pictures, kind):
    whole = pictures.encode(pictures.smooth(19, 23), kind)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 300), rng.integers(1, 5)):
            damaged[place] = rng.integers(256)
        try:
            assert images.decode(bytes(damaged), "x").shape[2] == 3
        except images.ImageError:
            refused += 1
    assert refused > 5


def means_of_areas(values: np.ndarray, count: int) -> np.ndarray:
    """Axis 0 in `count` equal stretches, each one's mean, by the running sum's differences."""
    running = np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(values, axis=0)])
    edges = np.linspace(0, len(values), count + 1)
    below = np.minimum(edges.astype(int), len(values) - 1)
    part = (edges - below).reshape(-1, *[1] * (values.ndim - 1))
    integral = running[below] + part * values[below]
    return np.diff(integral, axis=0) * count / len(values)


def area_square(image: np.ndarray, size: int) -> np.ndarray:
    """What the area filter and the centre cut should give, float64."""
    height, width, _ = image.shape
    tall = round(height * size / min(height, width))
    wide = round(width * size / min(height, width))
    rows = means_of_areas(image.astype(np.float64), tall)
    both = means_of_areas(rows.swapaxes(0, 1), wide).swapaxes(0, 1)
    top, left = (tall - size) // 2, (wide - size) // 2
    return both[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (64, 64, 16),  # a whole ratio, square
        (61, 61, 60),  # hardly smaller
        (97, 151, 32),  # landscape
        (151, 97, 32),  # portrait
        (75, 301, 23),  # wide
        (212, 45, 17),  # tall
        (300, 310, 9),  # much smaller
        (375, 500, 256),  # as most of ImageNet
        (33, 34, 7),
        (50, 83, 1),
    ],
)
def test_down_each_pixel_is_the_mean_of_the_area_it_covers(form, pictures, height, width, size):
    image = pictures.rough(height, width)
    exact = area_square(image, size)
    square = images.square(image, size)
    assert square.shape == (size, size, 3)
    assert square.dtype == np.uint8
    # The nearest whole number everywhere; where two are as near, either.
    assert abs(square - exact).max() <= 0.5 + 1e-3


def test_averages_of_areas_by_hand(form):
    column = np.array([0, 30, 60, 90, 120], np.uint8)
    image = np.broadcast_to(column[:, None, None], (5, 5, 3))
    # Two stretches of 2.5 pixels: (0 + 30 + 60 / 2) / 2.5 and (60 / 2 + 90 + 120) / 2.5.
    np.testing.assert_array_equal(images.square(image, 2)[:, 0, 0], [24, 96])


@pytest.mark.parametrize(("height", "width"), [(21, 34), (21, 35), (34, 21), (35, 21), (21, 21)])
def test_the_right_size_is_not_resampled_and_the_centre_is_cut(form, pictures, height, width):
    image = pictures.rough(height, width)
    top, left = (height - 21) // 2, (width - 21) // 2
    expected = image[top : top + 21, left : left + 21]
    np.testing.assert_array_equal(images.square(image, 21), expected)


def test_of_an_odd_surplus_the_larger_part_goes_right_and_below(pictures):
    image = pictures.rough(8, 13)
    np.testing.assert_array_equal(images.square(image, 8), image[:, 2:10])
    turned = image.swapaxes(0, 1)
    np.testing.assert_array_equal(images.square(turned, 8), turned[2:10])


@pytest.mark.parametrize(
    ("height", "width"), [(17, 23), (23, 17), (19, 19), (5, 41), (31, 31), (1, 1), (2, 3)]
)
def test_up_it_is_pillows_cubic_and_the_centre(form, pictures, height, width):
    """Of floats, which Pillow does not round between rows and columns."""
    image = pictures.rough(height, width)
    size = 32
    tall, wide = (round(side * size / min(height, width)) for side in (height, width))
    channels = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
    larger = [c.resize((wide, tall), Image.Resampling.BICUBIC) for c in channels]
    top, left = (tall - size) // 2, (wide - size) // 2
    exact = np.stack(larger, axis=-1)[top : top + size, left : left + size].clip(0, 255)
    assert abs(images.square(image, size) - exact).max() <= 0.5 + 1e-3


def test_up_it_overshoots_an_edge_as_only_a_cubic_does(form):
    image = np.full((16, 16, 3), 60, np.uint8)
    image[:, 8:] = 200
    square = images.square(image, 48)
    assert square.min() < 60
    assert square.max() > 200
    assert (square[:, :12] == 60).all()  # four pixels from the edge it has no influence


def test_a_harmless_warning_of_libjpeg_does_not_cost_the_picture():
    pixels = np.random.default_rng(0).integers(0, 255, (60, 50, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    whole = buffer.getvalue()
    expected = np.asarray(Image.open(io.BytesIO(whole)))
    padded = whole[:-2] + bytes(40) + whole[-2:]  # extraneous bytes before the end marker
    revision = whole[:11] + b"\0" + whole[12:]  # JFIF 0.01
    for data in (padded, revision):
        np.testing.assert_array_equal(images.decode(data, "odd.jpg"), expected)


def test_pixels_for_a_moment_are_those_for_good(form, pictures, monkeypatch):
    """Of colours and sizes that the memory for a moment is for, and of others."""
    monkeypatch.setattr(images, "WARM", 3 * 64 * 64)
    monkeypatch.setattr(images, "_own", threading.local())
    drawn = pictures.smooth(HEIGHT, WIDTH)[:, :60]
    files = [
        pictures.encode(drawn, "JPEG"),
        pictures.encode(drawn, "JPEG", progressive=True),
        pictures.encode(drawn, "JPEG", mode="L"),
        pictures.encode(drawn, "JPEG", mode="CMYK"),
        pictures.encode(drawn, "JPEG", exif=oriented(6)),
        pictures.encode(pictures.smooth(65, 64), "JPEG"),  # too large for it
        pictures.encode(drawn, "PNG"),
    ]
    files.append(files[0][:-2] + bytes(40) + files[0][-2:])  # libjpeg warns of it
    for data in files:
        found = images.decode(data, "x", fleeting=True).copy()
        np.testing.assert_array_equal(found, images.decode(data, "x"))
    with pytest.raises(images.ImageError, match="not a whole image"):
        images.decode(files[0][:-100], "x", fleeting=True)
    first = images.decode(files[0], "x", fleeting=True)
    assert images.decode(files[1], "x", fleeting=True).base is first.base


def test_a_needle_is_no_picture():
    buffer = io.BytesIO()
    Image.new("RGB", (1, 101)).save(buffer, "PNG")
    with pytest.raises(images.ImageError, match="is 1 x 101 pixels"):
        images.decode(buffer.getvalue(), "needle.png")


@pytest.mark.parametrize("shape", [(21, 21), (21, 30), (64, 40), (200, 37), (9, 14)], ids=str)
@pytest.mark.parametrize("offset", [(0, 0), (0, 8), (3, 5), (8, 8)])
def test_a_crop_holds_the_pixels_of_its_place_in_the_square(form, pictures, shape, offset):
    """Of images taken as they are, shrunk by little and much, and enlarged."""
    image = pictures.rough(*shape)
    square = images.square(image, 21)
    out = np.zeros((13, 13, 3), np.uint8)
    top, left = offset
    for mirror in (False, True):
        images.crop(image, 21, np.array(offset), mirror, out)
        for y, x in itertools.product(range(13), range(13)):
            column = 12 - x if mirror else x
            assert (out[y, x] == square[top + y, left + column]).all()


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("side", [*range(1, 24), 224])
def test_windows_of_every_width_are_copied_and_mirrored(form, pictures, side, mirror):
    """Between guards, into rows that lie apart."""
    image = pictures.rough(side + 3, side + 2)
    out = np.full((side + 2, side + 2, 3), 7, np.uint8)
    images.crop(image, side + 2, (1, 2), mirror, out[1:-1, 1:-1])
    window = image[1 : side + 1, 2 : side + 2]
    np.testing.assert_array_equal(out[1:-1, 1:-1], window[:, ::-1] if mirror else window)
    out[1:-1, 1:-1] = 7
    assert (out == 7).all()


@pytest.fixture(params=["this processor", "without wide vectors"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the library that native functions are of."""
    if not native.available():
        pytest.skip("no C++ compiler")
    if request.param == "without wide vectors":
        if platform.machine() != "x86_64":
            pytest.skip("no such processor")
        flags = (*native.FLAGS, "-mno-avx512f")
        narrow, _ = compiled.library(
            compiled.compiler(), native.SOURCE, tuple(native.ARGUMENTS), flags
        )
        for name, types in native.ARGUMENTS.items():
            function = getattr(narrow, name)
            function.argtypes, function.restype = types, ctypes.c_int64
        monkeypatch.setattr(native, "_library", lambda: narrow)


# Of the ratios at which more, or fewer, pixels are made at once.
RATIOS = [(7, 4), (700, 401), (16, 9), (15, 8), (199, 100), (2, 1), (9, 4), (1, 1)]


def test_without_a_compiler_the_bits_are_the_same(library, monkeypatch):
    """Processes of one job need not all have one."""
    rng = np.random.default_rng(0)
    for trial in range(200):
        height, width = rng.integers(1, 30 if trial % 3 else 500, 2)
        size = int(rng.integers(1, 2 * min(height, width) + 1))
        if trial >= 150:
            larger, smaller = RATIOS[trial % len(RATIOS)]
            size = int(rng.integers(1, 150))
            height, width = size * larger // smaller, size * larger // smaller + int(trial % 7)
        side = int(rng.integers(1, size + 1))
        offset, mirror = rng.integers(0, size - side + 1, 2), bool(trial % 2)
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        found = np.zeros((2, side, side, 3), np.uint8)
        images.crop(image, size, offset, mirror, found[0])
        with monkeypatch.context() as patch:
            patch.setattr(native, "available", lambda: False)
            images.crop(image, size, offset, mirror, found[1])
        np.testing.assert_array_equal(found[0], found[1])


def walled(shape: tuple[int, ...], last: bool) -> np.ndarray:
    """Zeros that nobody may read or write beside: before, or if `last` behind, is no memory."""
    page, size = mmap.PAGESIZE, math.prod(shape)
    inside = -(-size // page) * page
    memory = np.frombuffer(mmap.mmap(-1, inside + 2 * page), np.uint8)
    for wall in (0, page + inside):
        place, length = ctypes.c_void_p(memory.ctypes.data + wall), ctypes.c_size_t(page)
        assert ctypes.CDLL(None).mprotect(place, length, 0) == 0
    first = page + inside - size if last else page
    return memory[first : first + size].reshape(shape)


@pytest.mark.parametrize("last", [False, True])
def test_nothing_beside_an_image_or_its_crop_is_touched(library, pictures, last):
    """It would be the end of the process, by a signal."""
    for side in (*range(1, 20), 32):
        ratios = [(1, 1), (5 / 3, 2), (15 / 8, 15 / 8), (5, 6)]
        for height, width in [(int(side * tall), int(side * wide)) for tall, wide in ratios]:
            image, out = walled((height, width, 3), last), walled((side, side, 3), last)
            image[:] = pictures.rough(height, width)
            for mirror in (False, True):
                images.crop(image, side, (0, 0), mirror, out)
                square = images.square(image.copy(), side)
                np.testing.assert_array_equal(out, square[:, ::-1] if mirror else square)


def test_a_jpegs_segments_tell_its_scans_and_its_sides(pictures):
    kinds = [{}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}, {"exif": oriented(6)}]
    files = [pictures.encode(pictures.rough(9, 14), "JPEG", **kind) for kind in kinds]
    assert [images.look(data)[1] for data in files] == [False, False, False, True, True]
    assert images.look(files[0]) == (1, False, 9, 14)
    assert images.look(files[1])[0] > 1
    frame = b"\xff\xd8\xff\xc0\0\x11\x08\0\x09\0\x0e\3" + bytes(9)
    together, apart = (b"\xff\xda\0\x0c" + bytes([channels]) + bytes(9) for channels in (3, 1))
    assert images.look(frame + together * 9) == (1, False, 9, 14)  # an image ends with such a scan
    assert images.look(frame + apart * 9) == (9, False, 9, 14)
    without_length = frame[:2] + b"\xff\xd0\0\2" + frame[2:] + together
    assert images.look(without_length) == (1, True, 0, 0)


def test_an_orientation_in_xmp_counts_as_one_in_exif_does(form, pictures):
    jpeg = pictures.encode(pictures.smooth(9, 14), "JPEG")
    text = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    told = with_segment(jpeg, 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + text)
    np.testing.assert_array_equal(images.decode(told, "x"), np.rot90(images.decode(jpeg, "x"), -1))


def with_exif(jpeg: bytes, order: str, *orientations: tuple[int, int, int]) -> bytes:
    """A JPEG with an EXIF of these orientations: type, count and value; and another tag."""
    entries = [struct.pack(f"{order}HHIHxx", ORIENTATION, *numbers) for numbers in orientations]
    entries.insert(0, struct.pack(f"{order}HHII", 0x0100, 4, 1, WIDTH))
    tiff = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(entries))
    return with_segment(jpeg, 0xE1, b"Exif\0\0" + tiff + b"".join(entries) + bytes(4))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's
@pytest.mark.parametrize("order", ["<", ">"])
def test_an_exif_that_says_upright_is_taken_at_its_word_and_no_other(pictures, order):
    """Never where Pillow reads another orientation, whatever is broken."""
    jpeg, rng = pictures.encode(pictures.rough(9, 14), "JPEG"), np.random.default_rng(0)
    for orientations, upright in [
        ([(3, 1, 1)], True),
        ([], False),  # another standard may say it
        ([(3, 1, 0)], False),
        ([(4, 1, 1)], False),
        ([(3, 2, 1)], False),
        *[([(3, 1, turned)], False) for turned in range(2, 10)],
        ([(3, 1, 1), (3, 1, 6)], False),
        ([(3, 1, 6), (3, 1, 1)], False),
    ]:
        data = with_exif(jpeg, order, *orientations)
        assert images.look(data) == ((1, False, 9, 14) if upright else (1, True, 0, 0))
        for _ in range(200):
            broken = np.frombuffer(data, np.uint8).copy()
            broken[rng.integers(4, 60, 2)] = rng.choice([0, 1, 3, 6, 8, 0x12, 0x49, 0x4D, 0xFF], 2)
            if images.look(broken.tobytes())[1:] == (False, 9, 14):
                with Image.open(io.BytesIO(broken.tobytes())) as image:
                    assert image.getexif().get(ORIENTATION, 1) not in range(2, 9)


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
def test_what_does_not_fit_is_refused_before_memory_is_touched(pictures):
    image, out = pictures.rough(20, 30), np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="does not fit"):
        native.copy(image[:8, :7], False, out)
    with pytest.raises(ValueError, match="no rows of three bytes"):
        native.copy(image[:8, :8].astype(np.int8), False, out)
    with pytest.raises(ValueError, match="no rows of three bytes"):
        native.copy(image[:8, :8], False, np.zeros((8, 16, 3), np.uint8)[:, ::2])
    for outputs, first in [
        ((10, 15), (3, 0)),
        ((10, 15), (0, -1)),
        ((40, 7), (0, 0)),
        ((9, 40), (0, 0)),
    ]:
        with pytest.raises(ValueError, match="is no window"):
            native.resize(image, outputs, first, False, out)
    with pytest.raises(ValueError, match="is no window"):
        native.resize(image, (10, 15), (0, 0), False, out[:, :4])
    pixels, products = np.zeros((8, 8, 3), np.int64), np.zeros((3, 3), np.int64)
    for sums in [
        (pixels[:7], products),
        (pixels.astype(np.int32), products),
        (np.zeros((8, 16, 3), np.int64)[:, ::2], products),
        (pixels, products[:2]),
        (pixels, products.T[::-1]),
    ]:
        with pytest.raises(ValueError, match="neither an image nor"):
            native.add(out, *sums)
    for wrong in (out.astype(np.uint16), out[:, :, 0], np.zeros((8, 8, 4), np.uint8)):
        with pytest.raises(ValueError, match="neither an image nor"):
            native.add(wrong, np.zeros(wrong.shape, np.int64), products)
    assert not pixels.any()
    assert not products.any()


@pytest.mark.parametrize("values", [(0, 256), (255, 256)])
@pytest.mark.parametrize("size", [1, 7, 64, 300])
def test_sums_are_those_of_integers_that_never_overflow(form, size, values):
    """300 x 300 white pixels have a sum of squares beyond 32 bits."""
    images_of = np.random.default_rng(size).integers(*values, (3, size, 2 * size, 3), np.uint8)
    sums = statistics.Sums(size)
    for image in images_of:
        sums.add(image[:, ::2])
    used = images_of[:, :, ::2]
    exact = used.reshape(-1, 3).astype(object)  # Python's integers
    assert sums.count == 3
    np.testing.assert_array_equal(sums.pixels, used.astype(np.int64).sum(0))
    np.testing.assert_array_equal(sums.products, exact.T @ exact)


def test_a_jpeg_with_an_orientation_is_turned_before_it_is_mirrored(pictures):
    photo = Image.fromarray(pictures.rough(24, 24))
    exif = photo.getexif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", exif=exif)
    out = np.zeros((16, 16, 3), np.uint8)
    images.crop(images.decode(buffer.getvalue(), "a.jpg"), 24, (2, 4), True, out)
    upright = np.rot90(np.asarray(Image.open(buffer)), -1)  # 6: a quarter turn to the right
    np.testing.assert_array_equal(out, upright[2:18, 4:20][:, ::-1])
