"""Whatever lies in the folders, tars, prepared data and caches that the commands are given: it is
named with its reason in one line, the rest is used or nothing is, the memory stays bounded, nothing
is written elsewhere, and no pickle is loaded.

A kind is a row of a table. Nothing here looks into the package: commands are run as users run them,
but in this process, and prepare's worker processes are threads.
"""

import contextlib
import gzip
import io
import itertools
import json
import os
import pathlib
import pickle
import shutil
import signal
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.io
from PIL import Image, features

from alexnet_jax import prepare as command
from alexnet_jax.data import records

pytestmark = [
    pytest.mark.usefixtures("shards_by_threads"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
    pytest.mark.filterwarnings("ignore:Corrupt EXIF data"),
]

MOST_MEMORY = 200  # MB that a kind may take, but one that says more; the bombs hold 300 and over
MOST_SECONDS = 60  # an endless loop is a failure too
MARKER = pathlib.Path(tempfile.gettempdir()) / f"unpickled_{os.getpid()}"
Content = bytes | Callable[[pathlib.Path], Any]


class Marking:
    """Its pickle makes the folder MARKER when it is loaded."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(MARKER),)


PICKLE = pickle.dumps(Marking())
OBJECTS = np.array([Marking()], object)


def write(path: pathlib.Path, content: Content) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


# Running.


class Ran(NamedTuple):
    status: int
    lines: list[str]  # of stderr
    megabytes: float  # of memory more than before, at the most; 0 where it cannot be measured


def _late(*_: object) -> None:
    pytest.fail(f"takes over {MOST_SECONDS} s")


def ran(call: Callable[[], int]) -> Ran:
    """What a command does, says and takes."""
    err, proc = io.StringIO(), pathlib.Path("/proc/self")
    with contextlib.suppress(OSError):
        (proc / "clear_refs").write_text("5")  # the peak becomes what is resident now
    before = _peak(proc)
    usual = signal.signal(signal.SIGALRM, _late)
    signal.alarm(MOST_SECONDS)
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            status = call()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, usual)
    return Ran(status, err.getvalue().splitlines(), _peak(proc) - before)


def _peak(proc: pathlib.Path) -> float:
    try:
        lines = (proc / "status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def prepare(*flags: str, size: int = 16) -> Ran:
    return ran(lambda: command.main(["prepare", f"--size={size}", "--workers=2", *flags]))


def assert_refused(
    found: Ran, *words: object, status: int = 2, megabytes: int = MOST_MEMORY
) -> None:
    """Ended with `status` and one line, which holds `words`, in bounded memory."""
    errors = [line for line in found.lines if line.startswith("error: ")]
    assert found.status == status, found
    assert len(errors) == 1, found.lines
    assert found.lines[-1] == errors[0]
    assert errors[0].isprintable()
    for word in words:
        assert str(word) in errors[0]
    assert found.megabytes < megabytes


@pytest.fixture(autouse=True)
def no_pickle_is_loaded() -> Iterator[None]:
    yield
    loaded = MARKER.exists()
    if loaded:
        MARKER.rmdir()
    assert not loaded


@pytest.fixture(scope="module")
def train(run) -> Callable[..., Ran]:
    """(data source, folder for all that is written, flags) -> one step of training."""

    def call(source: str, folder: pathlib.Path, *flags: str) -> Ran:
        flags = (f"--config.data.source={source}", "--config.train.num_steps=1", *flags)
        cache = f"--config.data.cache_dir={folder / 'cache'}"
        return ran(lambda: run(folder / "run", cache, *flags))

    return call


def test_a_pickle_that_is_loaded_would_be_seen():
    pickle.loads(PICKLE)
    MARKER.rmdir()
    buffer = io.BytesIO()
    np.save(buffer, OBJECTS)
    buffer.seek(0)
    np.load(buffer, allow_pickle=True)
    MARKER.rmdir()


# Images.


def encoded(kind: str, mode: str = "RGB", side: int = 48, **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


JPEG, PNG = encoded("JPEG"), encoded("PNG")
SCAN = JPEG.index(b"\xff\xda")
MEGABYTE = bytes(2**20)


def zeros(megabytes: int, checksum: Callable[..., int], start: bytes = b"") -> tuple[bytes, int]:
    """`start` and many zeros, deflated a thousandfold by repeating what one MB becomes."""
    packer = zlib.compressobj(9, wbits=-15)
    head, part = (packer.compress(d) + packer.flush(zlib.Z_FULL_FLUSH) for d in (start, MEGABYTE))
    state = checksum(start)
    for _ in range(megabytes):
        state = checksum(MEGABYTE, state)
    return head + part * megabytes + b"\3\0", state


def zlib_bomb(megabytes: int, start: bytes = b"") -> bytes:
    packed, state = zeros(megabytes, zlib.adler32, start)
    return b"\x78\xda" + packed + struct.pack(">I", state)


def gzip_bomb(megabytes: int) -> bytes:
    packed, state = zeros(megabytes, zlib.crc32)
    return b"\x1f\x8b\x08" + bytes(7) + packed + struct.pack("<II", state, megabytes << 20)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    width: int, height: int, packed: bytes, *extra: bytes, depth=8, colour=2, interlaced=0
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    body = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", packed), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def small_png(*extra: bytes, **options: int) -> bytes:
    return png(8, 8, zlib.compress(bytes(8 * 25)), *extra, **options)


def jpeg_of_size(width: int, height: int) -> bytes:
    start = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:start] + struct.pack(">HH", height, width) + JPEG[start + 4 :]


def jpeg_of_scans(count: int) -> bytes:
    """Grey and progressive, whose last scan comes again and again."""
    buffer = io.BytesIO()
    Image.new("L", (2000, 2000)).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    return whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * count + whole[-2:]


def jpeg_of_scans_by_channel(count: int) -> bytes:
    """Sequential, its three channels one after another, the last of them again and again."""
    buffer = io.BytesIO()
    Image.new("L", (1000, 1000)).save(buffer, "JPEG")
    whole = buffer.getvalue()
    frame, scan = whole.index(b"\xff\xc0"), whole.index(b"\xff\xda")
    size = whole[frame + 4 : frame + 9]  # bits, height and width
    channels = b"".join(bytes([channel, 0x11, 0]) for channel in (1, 2, 3))
    start = whole[:frame] + b"\xff\xc0\0\x11" + size + b"\3" + channels + whole[frame + 13 : scan]
    scans = [
        b"\xff\xda\0\x08\1" + bytes([c, 0, 0, 63, 0]) + whole[scan + 10 : -2] for c in (1, 2, 3)
    ]
    return start + b"".join(scans) + scans[2] * count + whole[-2:]


def behind_a_decoy(jpeg: bytes) -> bytes:
    """A JPEG; and a harmless one for who follows a marker without length as if it had one."""
    frame = b"\xff\xc0\0\x11\x08\0\x09\0\x0e\3" + bytes(9)
    decoy = frame + b"\xff\xda\0\x0c\3" + bytes(9)
    comments = bytearray(b"\xff\xfe" + struct.pack(">H", 40000) + bytes(39998)) * 2
    place = 0xFFFE  # in the comments: the first one's marker taken for a length
    comments[place : place + len(decoy)] = decoy
    return jpeg[:2] + b"\xff\xd0" + bytes(comments) + jpeg[2:]


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def bmp(width: int, height: int) -> bytes:
    sizes = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 154, 0, 0, 54) + sizes + bytes(100)


def gif(frame: bytes) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0x80, 0, 0) + bytes(6) + frame + b";"


def tiff(following: int, *tags: tuple[int, int], side: int = 16) -> bytes:
    """Grey, with more tags (number, value), and where the next directory is said to lie."""
    usual = {256: side, 257: side, 258: 8, 259: 1, 262: 1, 273: 8, 278: side, 279: 256}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in (*usual.items(), *tags)]
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    return head + b"".join(entries) + struct.pack("<I", following) + bytes(300)


def of_size(size: int) -> Callable[[pathlib.Path], None]:
    def make(path: pathlib.Path) -> None:
        path.write_bytes(b"")
        os.truncate(path, size)  # a hole, which takes no room

    return make


def saved_objects(path: pathlib.Path) -> None:
    with open(path, "wb") as file:
        np.save(file, OBJECTS)


NO_IMAGE, BROKEN = "of no known format", "not a whole image"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
WEBP_CLAIM = b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xfe\x3f\0\xfe\x3f\0"
AVIF = encoded("AVIF") if features.check("avif") else b"\0\0\0\x20ftypavif" + bytes(50)
DDS = b"DDS " + struct.pack("<7I44x", 124, 0x1007, 8, 8, 0, 0, 0) + struct.pack("<8I", *range(8))
HUFFMAN = JPEG.index(b"\xff\xc4") + 5

# Broken images: what they are, and a part of what is said of them.
IMAGES: dict[str, tuple[Content, str]] = {
    "empty": (b"", "empty file"),
    "text": (b"nothing to see\n" * 40, NO_IMAGE),
    "a web page": (b"<!DOCTYPE html><html>404 Not Found</html>", NO_IMAGE),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><rect/></svg>', NO_IMAGE),
    "a gzipped JPEG": (gzip.compress(JPEG), NO_IMAGE),
    "a pickle": (PICKLE, NO_IMAGE),
    "an array of pickles": (saved_objects, NO_IMAGE),
    "a program in PostScript": (EPS, NO_IMAGE),
    "a DDS of unknown pixels": (DDS, NO_IMAGE),
    "a picture in an icon": (
        b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + struct.pack("<II", 99, 22) + small_png(), NO_IMAGE
    ),
    "16 GB": (of_size(2**34), "has 17179869184 bytes; at most 268435456 are read"),
    "a JPEG's head": (b"\xff\xd8\xff\xe0\0\x10JFIF\0", BROKEN),
    "a JPEG cut in its tables": (JPEG[: HUFFMAN + 9], BROKEN),
    "a tenth of a JPEG": (JPEG[: len(JPEG) // 10], BROKEN),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "Premature end"),
    "a JPEG but its last 9 bytes": (JPEG[:-9], "Premature end"),
    "a JPEG without its end marker": (JPEG[:-2], "Premature end"),
    "a JPEG that lost its middle": (JPEG[: len(JPEG) // 2] + JPEG[-2:], "Corrupt JPEG data"),
    "half a progressive JPEG": (encoded("JPEG", progressive=True)[:-1000], "Premature end"),
    "half a CMYK JPEG": (encoded("JPEG", "CMYK")[:-1000], "Premature end"),
    "a JPEG of bad Huffman tables": (JPEG[:HUFFMAN] + b"\xff" * 16 + JPEG[HUFFMAN + 16 :], BROKEN),
    "a JPEG of bad Huffman codes": (
        JPEG[: SCAN + 50] + b"\xff\0" * 200 + JPEG[SCAN + 450 :], "bad Huffman code"
    ),
    "a JPEG taller than its pixels": (jpeg_of_size(48, 600), "Corrupt JPEG data"),
    "a JPEG of no height": (jpeg_of_size(48, 0), BROKEN),
    "a JPEG of no width": (jpeg_of_size(0, 48), BROKEN),
    "a JPEG of 65535x65535": (jpeg_of_size(65535, 65535), "claims 65535 x 65535 pixels"),
    "a JPEG of 65500x65500": (jpeg_of_size(65500, 65500), "claims 65500 x 65500 pixels"),
    "a JPEG of 9999x9999 in 5 kB": (jpeg_of_size(9999, 9999), "Corrupt JPEG data"),
    "a JPEG of 1000 scans": (jpeg_of_scans(1000), "scans; at most 100 are read"),
    "a JPEG of 1000 scans behind a decoy": (
        behind_a_decoy(jpeg_of_scans(1000)),
        "scans; at most 100 are read",
    ),
    "a JPEG of 1000 scans, each of a channel": (
        jpeg_of_scans_by_channel(1000),
        "scans; at most 100 are read",
    ),
    "a PNG's signature": (PNG[:8], BROKEN),
    "half a PNG": (PNG[: len(PNG) // 2], BROKEN),
    "a PNG without its end": (PNG[:-12], BROKEN),
    "half an interlaced PNG": (png(8, 8, zlib.compress(bytes(90)), interlaced=1), "truncated"),
    "a PNG of a wrong header checksum": (flipped(PNG, 29), NO_IMAGE),
    "a PNG of a wrong pixel checksum": (flipped(PNG, len(PNG) - 13), "checksum in b'IDAT'"),
    "a PNG of a bad zlib stream": (png(8, 8, bytes(200)), BROKEN),
    "a PNG of no width": (png(0, 8, zlib.compress(bytes(9))), NO_IMAGE),
    "a PNG of 2147483647x2147483647": (png(2**31 - 1, 2**31 - 1, zlib.compress(b"")), "pixels"),
    "a PNG of 12000x12000 in 420 kB": (png(12000, 12000, zlib_bomb(412)), "12000 x 12000 pixels"),
    "a PNG of 1x100000": (png(1, 100_000, zlib_bomb(1)), "one side is over 100 times the other"),
    "a PNG of 16 bits": (png(8, 8, zlib.compress(bytes(8 * 17)), depth=16, colour=0), "8 bits"),
    "a PNG of a text bomb": (small_png(chunk(b"zTXt", b"a\0\0" + zlib_bomb(400))), "too large"),
    "a PNG of a profile bomb": (small_png(chunk(b"iCCP", b"a\0\0" + zlib_bomb(400))), "too large"),
    "a GIF of no frames": (gif(b""), NO_IMAGE),
    "a GIF of a frame of 65535x65535": (
        gif(b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2\2\x4c\1\0"), "pixels"
    ),
    "a cut WebP": (encoded("WEBP")[:-40], BROKEN),
    "a WebP of 16383x16383": (WEBP_CLAIM, "pixels"),
    "an AVIF of a missing item": (AVIF.replace(b"av01", b"none"), BROKEN),
    "a TIFF of nothing but itself": (b"II*\0\x08\0\0\0\0\0\x08\0\0\0", BROKEN),
    "a TIFF of 65535x65535": (tiff(0, side=65535), "pixels"),
    "a BMP of negative width": (bmp(-10, 10), "pixels"),
    "a BMP of 2147483647x2147483647": (bmp(2**31 - 1, 2**31 - 1), "pixels"),
    "a PPM of 99999999x99999999": (b"P6 99999999 99999999 255\n" + bytes(99), "pixels"),
}  # fmt: skip

# Odd, but whole: read as any other.
WHOLE: dict[str, Content] = {
    "a JPEG of a nonsense profile": encoded("JPEG", icc_profile=b"nonsense" * 99),
    "a JPEG before a zip file": JPEG + b"PK\3\4" * 999,
    "a PNG of nonsense for EXIF": small_png(chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")),
    "a PNG before a GB of zeros": png(8, 8, zlib_bomb(1024)),
    "a TIFF whose next is itself": tiff(8),
    "a TIFF whose EXIF is itself": tiff(0, (34665, 8)),
}


@pytest.fixture
def ghostscript(tmp_path, monkeypatch) -> pathlib.Path:
    """The file that is there once somebody has run it."""
    program, found = tmp_path / "bin" / "gs", tmp_path / "gs_was_run"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {found}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return found


def draw(root: pathlib.Path, **counts: int) -> None:
    """Whole images of two classes, by split."""
    for split, count in counts.items():
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                (root / split / label / f"{number}.jpg").write_bytes(JPEG)


@pytest.mark.parametrize("kind", IMAGES)
def test_prepare_ends_at_a_broken_image(tmp_path, ghostscript, kind):
    content, reason = IMAGES[kind]
    draw(tmp_path / "in", train=1)
    write(tmp_path / "in/train/cat" / f"{kind}.jpg", content)
    found = prepare(f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}")
    allowed = 350 if "9999" in kind else MOST_MEMORY  # three bytes for each of 100 million pixels
    assert_refused(found, f"/{kind}.jpg: ", reason, "1 broken", status=1, megabytes=allowed)
    assert not (tmp_path / "out").exists()
    assert not ghostscript.exists()


@pytest.mark.parametrize("kind", WHOLE)
def test_prepare_takes_an_odd_image(tmp_path, kind):
    draw(tmp_path / "in", train=1)
    write(tmp_path / "in/train/cat" / f"{kind}.jpg", WHOLE[kind])
    found = prepare(f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}")
    assert found.status == 0
    assert found.megabytes < MOST_MEMORY
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["splits"]["train"]["num_examples"] == 3


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory) -> pathlib.Path:
    """A folder with an image of every kind."""
    root = tmp_path_factory.mktemp("kinds") / "in"
    draw(root, train=4, val=2)
    for kind, (content, _) in IMAGES.items():
        write(root / "train/dog" / f"{kind}.jpg", content)
    for kind, content in WHOLE.items():
        write(root / "train/dog" / f"{kind}.jpg", content)
    return root


@pytest.fixture(scope="module")
def trained_on_all(train, all_kinds, tmp_path_factory) -> tuple[pathlib.Path, Ran]:
    """A step of training on it."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(f"folder:{all_kinds}", folder)


def test_training_counts_broken_images_and_goes_on_with_the_others(trained_on_all):
    folder, found = trained_on_all
    assert found.status == 0
    total = 8 + len(IMAGES) + len(WHOLE)
    counts = [line for line in found.lines if "broken and left out" in line]
    assert counts == [f"{len(IMAGES)} of {total} images are broken and left out:"]
    steps = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(step["loss"]) for step in steps)


@pytest.mark.parametrize("kind", IMAGES)
def test_training_names_a_broken_image(trained_on_all, all_kinds, kind):
    start = f"  {all_kinds / 'train/dog' / kind}.jpg: "
    (line,) = [line for line in trained_on_all[1].lines if line.startswith(start)]
    assert IMAGES[kind][1] in line


@pytest.mark.parametrize("kind", WHOLE)
def test_training_names_no_whole_image(trained_on_all, kind):
    assert not [line for line in trained_on_all[1].lines if kind in line]


# Names that would end a line, paint it, turn it round or are no text; and how they are shown.
NAMES = {
    b"a\nerror: all is lost.jpg": r"a\nerror: all is lost.jpg",
    b"b\x1b[2J\r\x07.jpg": r"b\x1b[2J\r\x07.jpg",
    b"c\xe2\x80\xaegpj.a": r"c\u202egpj.a",
    b"d\xff\xfe.jpg": r"d\udcff\udcfe.jpg",
}


def test_a_file_name_cannot_forge_a_line(train, tmp_path):
    draw(tmp_path / "in", train=4, val=2)
    for name in NAMES:
        (tmp_path / "in/train/cat" / os.fsdecode(name)).write_bytes(b"broken")
    found = prepare(f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}")
    assert_refused(found, *(f"/{shown}: not a whole" for shown in NAMES.values()), status=1)
    found = train(f"folder:{tmp_path / 'in'}", tmp_path)
    assert found.status == 0
    assert all(line.isprintable() for line in found.lines)
    for shown in NAMES.values():
        assert sum(f"/{shown}: not a whole" in line for line in found.lines) == 1


# What is no file of its own: said and left out.
NO_FILES = {
    "a folder.jpg": lambda path: path.mkdir(),
    "a link to nothing.jpg": lambda path: path.symlink_to("nowhere"),
    "a link to a device.jpg": lambda path: path.symlink_to("/dev/zero"),
    "a pipe.jpg": os.mkfifo,
}


def test_what_is_no_file_is_named_and_left_out(train, tmp_path):
    draw(tmp_path / "in", train=4, val=2)
    paths = [tmp_path / "in/train/cat" / name for name in NO_FILES]
    for path, make in zip(paths, NO_FILES.values()):
        make(path)
    prepared = prepare(f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}")
    for found in (prepared, train(f"folder:{tmp_path / 'in'}", tmp_path)):
        assert found.status == 0
        for path in paths:
            (line,) = [line for line in found.lines if str(path) in line]
            assert "not read" in line


def unreadable(path: pathlib.Path) -> None:
    path.write_bytes(JPEG)
    path.chmod(0)


# What the disk refuses, which another time it may not: nothing is left out for it.
REFUSED = {
    "a link to itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "a disk error": (lambda path: path.symlink_to("/proc/self/mem"), "Input/output error"),
    "no permission": (unreadable, "Permission denied"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_disk_refuses_ends_the_run_by_name(train, tmp_path, kind):
    make, reason = REFUSED[kind]
    draw(tmp_path / "in", train=4, val=2)
    path = tmp_path / "in/train/cat/x.jpg"
    make(path)
    if kind == "no permission" and os.access(path, os.R_OK):
        pytest.skip("root reads everything")
    if kind == "a disk error" and not path.exists():
        pytest.skip("needs /proc")
    prepared = prepare(f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}")
    for found in (prepared, train(f"folder:{tmp_path / 'in'}", tmp_path)):
        assert_refused(found, path, reason, status=1)
    assert not (tmp_path / "out").exists()


# Archives.

TARS = {
    "train": "ILSVRC2012_img_train.tar",
    "val": "ILSVRC2012_img_val.tar",
    "devkit": "ILSVRC2012_devkit_t12.tar.gz",
}


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, size: int | None = None, link=""
) -> bytes:
    """A member of a tar, of whatever kind and claimed size."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def tar(*members: bytes) -> bytes:
    return b"".join(members) + bytes(1024)


def image(label: str, number: int, data: bytes = JPEG) -> bytes:
    return member(f"{label}_{number}.JPEG", data)


N01, N02 = (tar(image(label, 1), image(label, 2)) for label in ("n01", "n02"))
FIRST, SECOND = member("n01.tar", N01), member("n02.tar", N02)
TRAIN = tar(FIRST, SECOND)
VAL = tar(image("val", 1), image("val", 2))


def mat(**variables: Any) -> bytes:
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, variables)
    return buffer.getvalue()


def mat_bomb(megabytes: int) -> bytes:
    """A MATLAB file whose one variable is packed zeros."""
    count = megabytes << 20
    start = struct.pack(
        "<6I2I2i2I8s2I", 14, count + 64, 6, 8, 9, 0, 5, 8, 1, count, 1, 7, b"synsets", 2, count
    )
    packed = zlib_bomb(megabytes, start)
    return bytes(124) + b"\0\1IM" + struct.pack("<II", 15, len(packed)) + packed


def synsets(*names: str) -> bytes:
    kinds = [(field, object) for field in ("ILSVRC2012_ID", "WNID", "words", "num_children")]
    rows = [(float(number), name, "words", 0.0) for number, name in enumerate(names, 1)]
    return mat(synsets=np.array(rows, kinds).reshape(-1, 1))


SYNSETS = synsets("n01", "n02")


def devkit(table: bytes = SYNSETS, truth: bytes = b"1\n2\n") -> bytes:
    files = {"meta.mat": table, "ILSVRC2012_validation_ground_truth.txt": truth}
    return gzip.compress(tar(*(member(f"kit/data/{name}", data) for name, data in files.items())))


def with_hole(start: bytes, size: int, end: bytes) -> Callable[[pathlib.Path], None]:
    """A file of `start`, a hole of `size` bytes and `end`."""

    def make(path: pathlib.Path) -> None:
        path.write_bytes(start)
        os.truncate(path, len(start) + size)
        with open(path, "ab") as file:
            file.write(end)

    return make


def odd(kind: bytes, link: str = "") -> bytes:
    return tar(FIRST, SECOND, member("odd", kind=kind, link=link))


PAX_SIZE = member("x", b"14 size=-1024\n", tarfile.XHDTYPE)
NO_FILE, DAMAGED = "'odd', which is no plain file", "damaged at byte"


def few_labels(path: pathlib.Path) -> None:
    path.with_name(TARS["devkit"]).write_bytes(devkit(truth=b"1\n"))


class Archive(NamedTuple):
    """One of the tars replaced by something else, and what is said of it."""

    file: str
    content: Content
    reason: str
    status: int = 2


ARCHIVES = {
    "nothing": Archive("train", b"", "empty file"),
    "text": Archive("train", b"404 Not Found\n" * 99, "cannot be read"),
    "a pickle": Archive("train", PICKLE, "cannot be read"),
    "a gzipped tar": Archive("train", gzip.compress(TRAIN), "cannot be read"),
    "an empty tar": Archive("train", tar(), "no class tars"),
    "a cut tar": Archive("train", TRAIN[: len(TRAIN) // 2], "cut short"),
    "a tar that ends with a header": Archive("val", VAL[:512], "cut short"),
    "a tar without its end": Archive("val", VAL[:-1024], DAMAGED),
    "a class tar that is cut": Archive(
        "train", tar(member("n01.tar", N01[:-3000]), SECOND), "n01.tar is cut short"
    ),
    "a class tar that is a picture": Archive(
        "train", tar(FIRST, member("n02.tar", JPEG)), "n02.tar is cut short or damaged"
    ),
    "a class tar of nothing": Archive(
        "train", tar(FIRST, member("n02.tar", tar())), "n02.tar has no images"
    ),
    "a header of a wrong checksum": Archive("val", flipped(VAL, VAL.rindex(b"val_2")), DAMAGED),
    "a class twice": Archive("train", tar(FIRST, SECOND, FIRST), "class 'n01' twice"),
    "a number twice": Archive("val", tar(image("a", 1), image("b", 1)), "number 1 twice"),
    "a member of no number": Archive("val", tar(member("readme", JPEG)), "readme"),
    "a number above all": Archive("val", tar(image("a", 99)), "1 to 2"),
    "a file among class tars": Archive("train", tar(FIRST, member("n02.zip", N02)), "'n02.zip'"),
    "a symbolic link": Archive("train", odd(tarfile.SYMTYPE, "/etc/passwd"), NO_FILE),
    "a hard link": Archive("train", odd(tarfile.LNKTYPE, "n01.tar"), NO_FILE),
    "a character device": Archive("train", odd(tarfile.CHRTYPE), NO_FILE),
    "a block device": Archive("train", odd(tarfile.BLKTYPE), NO_FILE),
    "a pipe": Archive("train", odd(tarfile.FIFOTYPE), NO_FILE),
    "a sparse member": Archive("train", odd(tarfile.GNUTYPE_SPARSE), NO_FILE),
    "a member of an unknown kind": Archive("train", odd(b"Z"), NO_FILE),
    "a link in a class tar": Archive(
        "train",
        tar(member("n01.tar", tar(image("n01", 1), member("odd", b"", b"2", link="/etc"))), SECOND),
        f"n01.tar has {NO_FILE}",
    ),
    "a member of a terabyte": Archive("val", tar(member("a_1.JPEG", JPEG, size=2**40)), DAMAGED),
    "a member of 300 MB": Archive(
        "val", with_hole(member("a_1.JPEG", size=300 << 20), 300 << 20, tar()),
        "a_1.JPEG: has 314572800 bytes", 1,
    ),
    "a member of negative size": Archive(
        "train", tar(member("n01.tar", tar(image("n01", 1), member("again", size=-512))), SECOND),
        "n01.tar is cut short or damaged",
    ),
    "a pax header of negative size": Archive(
        "val", tar(PAX_SIZE, image("a", 1)), "download it again"
    ),
    "a pax header of negative size behind an image": Archive(
        "val", tar(image("a", 1), PAX_SIZE, image("a", 2)), DAMAGED
    ),
    "a pax header of negative size in a class tar": Archive(
        "train", tar(member("n01.tar", tar(PAX_SIZE, image("n01", 1), image("n01", 2))), SECOND),
        "damaged at byte",
    ),
    "a name of a terabyte": Archive("val", tar(member("a", kind=b"L", size=2**40)), "a header of"),
    "a name of 300 MB": Archive(
        "val", with_hole(member("a", kind=b"L", size=300 << 20), 300 << 20, VAL), "a header of"
    ),
    "a name of negative size": Archive(
        "val", tar(member("a", kind=b"L", size=-512)), "cannot be read"
    ),
    "64 kB of digits": Archive("val", tar(member("x", b"1" * 65536, b"x")) + VAL, "a header of"),
    "ten thousand names of one member": Archive(
        "val", member("a", b"name\0", b"L") * 10_000 + VAL, "cannot be read"
    ),
    "a class name of two lines": Archive(
        "train", tar(FIRST, member("n02\nerror: \x1b[2J.tar", N02)), r"n02\\nerror: \\x1b[2J"
    ),
    "an image of no bytes": Archive("val", tar(image("a", 1, b"")), "a_1.JPEG: not a whole", 1),
    "an image that is a tar": Archive("val", tar(image("a", 1, N01)), NO_IMAGE, 1),
    "an image that is a pickle": Archive("val", tar(image("a", 1, PICKLE)), NO_IMAGE, 1),
    "an image that is a bomb": Archive(
        "val", tar(image("a", 1, png(12000, 12000, zlib_bomb(412)))), "12000 x 12000 pixels", 1
    ),
    "a broken image's name of two lines": Archive(
        "val", tar(member("a\nerror: \x1b[2J_1.JPEG", b"x")), r"a\nerror: \x1b[2J_1.JPEG: ", 1
    ),
    "a devkit of nothing": Archive("devkit", b"", "cannot be read"),
    "a cut devkit": Archive("devkit", devkit()[:-100], "cannot be read"),
    "a devkit of a wrong checksum": Archive("devkit", flipped(devkit(), -8), "cannot be read"),
    "a devkit that is a pickle": Archive("devkit", PICKLE, "cannot be read"),
    "a devkit that is a bomb": Archive("devkit", gzip_bomb(400), "bytes unpacked"),
    "a devkit of 16 GB": Archive("devkit", of_size(2**34), "bytes unpacked"),
    "a devkit before 16 GB": Archive("devkit", with_hole(devkit(), 2**34, b""), "bytes unpacked"),
    "a devkit of a link": Archive(
        "devkit", gzip.compress(tar(member("kit/data/meta.mat", b"", b"2", link="/etc/passwd"))),
        "no plain file",
    ),
    "a table that is a bomb": Archive("devkit", devkit(mat_bomb(400)), "bytes unpacked"),
    "a table that is a pickle": Archive("devkit", devkit(PICKLE), "no table of synsets"),
    "a table of something else": Archive("devkit", devkit(mat(a=1)), "no table of synsets"),
    "a table that lacks a class": Archive("devkit", devkit(synsets("n01")), "class 'n02'"),
    "labels of no class": Archive("devkit", devkit(truth=b"1\n7\n"), "line 2: '7'"),
    "labels that are no text": Archive("devkit", devkit(truth=b"1\n\xff\x1b[2J\n"), "line 2: "),
    "labels that are too few": Archive("val", few_labels, "1 to 1"),
}  # fmt: skip

# Names that point elsewhere: they are no paths here, and of no harm.
ESCAPING = {
    "above": "../../../escaped/n01_1.JPEG",
    "from the root": "{root}/escaped/n01_1.JPEG",
    "from here": "./escaped/../../n01_1.JPEG",
    "by a drive": "C:\\escaped\\..\\n01_1.JPEG",
}


class Place(NamedTuple):
    """Where tars are prepared: everything but `out` and what lies beside it must stay."""

    root: pathlib.Path
    tars: pathlib.Path
    output: pathlib.Path

    def state(self) -> dict[str, tuple]:
        found = {}
        for path in self.root.rglob("*"):
            if self.output.parent not in path.parents:
                status = path.lstat()
                moment = 0 if path == self.output.parent else status.st_mtime_ns
                found[str(path)] = (status.st_mode, status.st_size, moment)
        return found

    def prepare(self) -> Ran:
        """Prepares, and looks whether anything was written elsewhere."""
        before = self.state()
        flags = (f"--input={self.tars}", f"--output={self.output}", "--unofficial")
        found = prepare(*flags)
        assert self.state() == before
        return found


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    found = Place(tmp_path, tmp_path / "a/b/tars", tmp_path / "a/b/c/out")
    for folder in (found.tars, found.output.parent, tmp_path / "a/b/here", tmp_path / "escaped"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b/here")
    for kind, content in {"train": TRAIN, "val": VAL, "devkit": devkit()}.items():
        (found.tars / TARS[kind]).write_bytes(content)
    return found


def test_whole_tars_are_prepared(place):
    assert place.prepare().status == 0
    assert (place.output / "manifest.json").is_file()


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_malformed_archive_is_refused_and_nothing_is_published(place, kind):
    file, content, reason, status = ARCHIVES[kind]
    path = place.tars / TARS[file]
    write(path, content)
    found = place.prepare()
    # Of a broken image the name in the tar is said.
    assert_refused(found, *([path] if status == 2 else ["1 broken"]), reason, status=status)
    assert {entry.name for entry in place.output.parent.iterdir()} <= {"out.partial"}


@pytest.mark.parametrize("kind", [kind for kind in ARCHIVES if "a pax header" in kind])
def test_what_newer_tarfile_refuses_too_late_is_not_passed_over(place, monkeypatch, kind):
    """As since Python 3.14: at a size below 0 it has already moved on."""
    usual = tarfile.TarInfo._block

    def block(member: tarfile.TarInfo, count: int) -> int:
        if count < 0:
            raise tarfile.InvalidHeaderError("invalid offset")
        return usual(member, count)

    monkeypatch.setattr(tarfile.TarInfo, "_block", block)
    file, content, reason, status = ARCHIVES[kind]
    path = place.tars / TARS[file]
    write(path, content)
    assert_refused(place.prepare(), path, reason, status=status)


@pytest.mark.parametrize("kind", ESCAPING)
def test_a_path_in_an_archive_leads_nowhere(place, kind):
    name = ESCAPING[kind].format(root=place.root)
    inner = tar(member(name, JPEG), image("n01", 2))
    outer = tar(member(name.replace("n01_1.JPEG", "n01.tar"), inner), SECOND)
    if "\\" in name:  # no separator here, so part of a name
        outer = tar(member("n01.tar", inner), SECOND)
    (place.tars / TARS["train"]).write_bytes(outer)
    (place.tars / TARS["val"]).write_bytes(tar(member(name, JPEG)))
    found = place.prepare()
    assert found.status == 0, found
    assert {entry.name for entry in place.output.parent.iterdir()} == {"out"}
    source = records.open_records(place.output, "train")
    stored = name if "\\" in name else "n01_1.JPEG"
    assert source.read(0).name == f"n01/{stored}"


# Prepared data.

MANIFEST, SHARD = "manifest.json", "train-00000.array_record"
INDEX, STATISTICS = "train.index.npz", "statistics.npz"
CHANGED, DIGEST_OF = "manifest.json was changed", "has other bytes than were written"
DIGEST = f"{SHARD} {DIGEST_OF}"
# Of an array of a terabyte.
HUGE_HEADER = (
    b"\x93NUMPY\1\0\x76\0" + b"{'descr':'<f4','fortran_order':False,'shape':(%d,)}" % 2**38
)
Damage = Callable[[pathlib.Path], Any]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    """Raw pixels of eight images for training and four for validation."""
    root = tmp_path_factory.mktemp("prepared")
    draw(root / "in", train=4, val=2)
    flags = (f"--input={root / 'in'}", f"--output={root / 'out'}", "--format=raw")
    assert prepare(*flags, size=41).status == 0
    return root / "out"


def shard(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["splits"]["train"]["shards"][0]


def replaced(file: str, content: bytes) -> Damage:
    return lambda directory: (directory / file).write_bytes(content)


def flip(place: int) -> Damage:
    """A bit of the first record."""

    def make(directory: pathlib.Path) -> None:
        with np.load(directory / INDEX) as index:
            offset = int(index["offset"][0])
        path = directory / SHARD
        path.write_bytes(flipped(path.read_bytes(), offset + place))

    return make


def edited(change: Callable[[dict[str, Any]], Any], seal: bool = True) -> Damage:
    """A change of the manifest, whose own checksum is brought up to date or not."""

    def make(directory: pathlib.Path) -> None:
        path = directory / MANIFEST
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(records.sealed(manifest) if seal else manifest))

    return make


def sealed(file: str, content: Content) -> Damage:
    """A file replaced by somebody who brings all checksums up to date."""

    def make(directory: pathlib.Path) -> None:
        write(directory / file, content)
        entry = records.file_entry(directory / file)
        edited(
            lambda m: shard(m).update(entry) if file == SHARD else m["files"].update({file: entry})
        )(directory)

    return make


def npz(pack: Callable[..., None] = np.savez, **new: Any) -> Content:
    """Some arrays of an .npz file replaced."""

    def make(path: pathlib.Path) -> None:
        with np.load(path) as old:
            kept = dict(old)
        with open(path, "wb") as out:
            pack(out, **kept | new)

    return make


def arrays(file: str, pack: Callable[..., None] = np.savez, **new: Any) -> Damage:
    return sealed(file, npz(pack, **new))


def npz_of(content: bytes) -> bytes:
    """A whole zip file whose members are `content`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("mean_image", "channel_std", "eigenvalues", "eigenvectors"):
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


# What nobody brought the checksums up to date for: said by training, and by --verify.
DAMAGED_DATA: dict[str, tuple[Damage, str, str, int]] = {
    "a cut shard": (lambda d: os.truncate(d / SHARD, 9999), f"{SHARD} has 9999 bytes", "9999", 2),
    "a missing shard": (lambda d: (d / SHARD).unlink(), f"{SHARD} is missing", "missing", 2),
    "a flipped bit in a label": (flip(0), f"{SHARD} is damaged at byte", DIGEST, 1),
    "a flipped bit in a name's length": (flip(4), f"{SHARD} is damaged at byte", DIGEST, 1),
    "changed labels": (
        replaced("labels.txt", b"dog\ncat\n"), DIGEST_OF, DIGEST_OF, 2
    ),
    "cut statistics": (
        lambda d: os.truncate(d / STATISTICS, 99), f"{STATISTICS} has 99 bytes", "99 bytes", 2
    ),
}  # fmt: skip

# What both say of the manifest.
MANIFESTS: dict[str, tuple[Damage, str]] = {
    "noise": (replaced(MANIFEST, b"\xff\0\x80" * 99), "no readable manifest.json"),
    "a pickle": (replaced(MANIFEST, PICKLE), "no readable manifest.json"),
    "100,000 brackets": (replaced(MANIFEST, b"[" * 100_000), "no readable manifest.json"),
    "another version": (edited(lambda m: m.update(version="1\nerror: ")), "of version '1\\nerror"),
    "an edit": (edited(lambda m: m.update(size=8), seal=False), CHANGED),
    "no splits": (edited(lambda m: m.pop("splits")), CHANGED),
    "splits in a list": (edited(lambda m: m.update(splits=[])), CHANGED),
    "words for numbers": (edited(lambda m: m.update(size="x")), CHANGED),
    "a shard without its size": (edited(lambda m: shard(m).pop("bytes")), CHANGED),
    "a shard above the folder": (edited(lambda m: shard(m).update(file=f"../{SHARD}")), CHANGED),
    "a shard from the root": (edited(lambda m: shard(m).update(file="/etc/passwd")), CHANGED),
    "a shard's name of two lines": (edited(lambda m: shard(m).update(file="a\nerror: ")), CHANGED),
}

# What somebody brought all checksums up to date for, so that training alone can know.
FORGED: dict[str, tuple[Damage, str]] = {
    "10 to the 18 examples": (
        edited(lambda m: m["splits"]["train"].update(num_examples=10**18)), f"{INDEX}: it is not of"
    ),
    "squares of a billion pixels a side": (
        edited(lambda m: m.update(size=10**9)), f"{STATISTICS}: mean_image is not"
    ),
    "a mean image of pickles": (arrays(STATISTICS, mean_image=OBJECTS), "Object arrays cannot be"),
    "principal colours of pickles": (
        arrays(STATISTICS, eigenvectors=OBJECTS), "Object arrays cannot be"
    ),
    "an index of pickles": (arrays(INDEX, offset=OBJECTS), f"{INDEX}: Object arrays cannot be"),
    "statistics that are a pickle": (sealed(STATISTICS, PICKLE), f"{STATISTICS}: "),
    "statistics that are one array": (sealed(STATISTICS, saved_objects), f"{STATISTICS}: "),
    "statistics of a terabyte": (sealed(STATISTICS, npz_of(HUGE_HEADER)), f"{STATISTICS}: "),
    "statistics of no arrays": (sealed(STATISTICS, npz_of(PICKLE)), f"{STATISTICS}: "),
    "packed statistics, of 400 MB": (
        arrays(STATISTICS, np.savez_compressed, mean_image=np.zeros(100 << 20, np.float32)),
        f"{STATISTICS}: its arrays are compressed",
    ),
    "statistics of another size": (
        arrays(STATISTICS, mean_image=np.zeros((5, 5, 3), np.float32)), "mean_image is not"
    ),
    "statistics that are no numbers": (
        arrays(STATISTICS, channel_std=np.full(3, np.nan, np.float32)), "channel_std is not"
    ),
    "an index of another shard": (arrays(INDEX, shard=np.full(8, 7)), "a shard that is none of 1"),
    "an index beyond its shard": (arrays(INDEX, offset=np.full(8, 2**62)), "outside its shard"),
    "an index before its shard": (arrays(INDEX, offset=np.full(8, -(2**62))), "outside its shard"),
    "records of negative length": (arrays(INDEX, length=np.full(8, -1)), "outside its shard"),
    "records of 2 GB": (arrays(INDEX, length=np.full(8, 2**31 - 1)), "outside its shard"),
    "an index of another length": (arrays(INDEX, length=np.zeros(3, int)), "not of 8 examples"),
    "fewer labels than the index has": (sealed("labels.txt", b"cat\n"), "a label that is none"),
    "labels that are no text": (sealed("labels.txt", b"\xff\xfe\n\n"), "labels.txt: "),
}  # fmt: skip


@pytest.fixture
def copy(prepared, tmp_path) -> pathlib.Path:
    """Prepared data to damage, with the same files once more above it."""
    shutil.copytree(prepared, tmp_path / "data")
    return shutil.copytree(prepared, tmp_path / "data/copy")


def verify(directory: pathlib.Path) -> Ran:
    return ran(lambda: command.main(["prepare", f"--verify={directory}"]))


@pytest.mark.parametrize("kind", DAMAGED_DATA)
def test_damaged_data_is_named_by_training_and_by_verify(train, copy, tmp_path, kind):
    damage, trained, verified, status = DAMAGED_DATA[kind]
    damage(copy)
    assert_refused(train(f"records:{copy}", tmp_path), trained, status=status)
    assert_refused(verify(copy), verified, status=1)


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_malformed_manifest_is_named_by_training_and_by_verify(train, copy, tmp_path, kind):
    damage, reason = MANIFESTS[kind]
    damage(copy)
    for found in (train(f"records:{copy}", tmp_path), verify(copy)):
        assert_refused(found, copy, reason)


@pytest.mark.parametrize("kind", FORGED)
def test_forged_data_is_refused_though_its_checksums_are_right(train, copy, tmp_path, kind):
    damage, reason = FORGED[kind]
    damage(copy)
    assert_refused(train(f"records:{copy}", tmp_path), copy, reason)
    assert verify(copy).status == 0


SHARDS = {
    "a pickle": PICKLE,
    "noise": np.random.default_rng(0).bytes(2**17),
    "nothing": b"",
}


@pytest.mark.parametrize("kind", SHARDS)
def test_a_forged_shard_is_refused_though_its_checksum_is_right(train, copy, tmp_path, kind):
    sealed(SHARD, SHARDS[kind])(copy)
    found = train(f"records:{copy}", tmp_path)
    if kind == "noise":  # of the right length
        assert_refused(found, f"{SHARD} is damaged at byte", status=1)
    else:
        assert_refused(found, f"{INDEX}: a record lies outside its shard")
    assert_refused(verify(copy), f"{SHARD} has 0 records, not 8", status=1)


# What earlier runs have left.

SURVEYS: dict[str, Content] = {
    "a pickle": PICKLE,
    "noise": np.random.default_rng(0).bytes(9999),
    "nothing": b"",
    "one array": saved_objects,
    "arrays of pickles": npz(mean_image=OBJECTS),
    "broken images of pickles": npz(broken=OBJECTS),
    "packed arrays": npz(np.savez_compressed),
    "another size": npz(mean_image=np.zeros((3, 3, 3), np.float32)),
    "images that are not there": npz(broken=np.array([10**9])),
}


@pytest.fixture(scope="module")
def surveyed(train, tmp_path_factory) -> pathlib.Path:
    """Whole images, and the cache of a run on them."""
    folder = tmp_path_factory.mktemp("surveyed")
    draw(folder / "in", train=4, val=2)
    assert train(f"folder:{folder / 'in'}", folder).status == 0
    return folder


# A run for two: the survey of the one split, and of the other.
PAIRS = [*itertools.zip_longest(list(SURVEYS)[::2], list(SURVEYS)[1::2], fillvalue="noise")]


@pytest.mark.parametrize("kinds", PAIRS, ids=" and ".join)
def test_malformed_surveys_are_named_and_made_again(train, surveyed, tmp_path, kinds):
    shutil.copytree(surveyed / "cache", tmp_path / "cache")
    kept = sorted((tmp_path / "cache/surveys").iterdir())
    for path, kind in zip(kept, kinds, strict=True):
        write(path, SURVEYS[kind])
    found = train(f"folder:{surveyed / 'in'}", tmp_path)
    assert found.status == 0
    for path in kept:
        assert any(line.startswith(f"{path} is damaged") for line in found.lines)
        whole = surveyed / "cache/surveys" / path.name
        with np.load(path) as again, np.load(whole) as first:
            np.testing.assert_array_equal(again["mean_image"], first["mean_image"])


LEFT_BEHIND = {
    "a journal entry that is a pickle": ("journal/train-00000.npz", PICKLE),
    "a journal entry of pickles": ("journal/train-00000.npz", npz(label=OBJECTS)),
    "a journal entry of no facts": ("journal/train-00000.npz", npz(facts=np.array("[1, 2]"))),
    "a plan of noise": ("plan.json", b"\xff\0{"),
    "a plan that is a pickle": ("plan.json", PICKLE),
    "a plan of brackets": ("plan.json", b"[" * 100_000),
}


@pytest.mark.parametrize("kind", LEFT_BEHIND)
def test_what_a_stopped_preparation_left_is_named_where_it_is_malformed(tmp_path, kind):
    file, content = LEFT_BEHIND[kind]
    draw(tmp_path / "in", train=1)
    (tmp_path / "in/train/cat/x.jpg").write_bytes(b"")
    flags = (f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}")
    assert prepare(*flags).status == 1  # and all that is whole is kept
    path = tmp_path / "out.partial" / file
    write(path, content)
    assert_refused(prepare(*flags, "--allow_broken=1"), f"{path} is damaged", "to begin again")
    assert not (tmp_path / "out").exists()


CHECKPOINT = ("meta", "metrics", "params", "statistics", "training", "sha256.json")


@pytest.mark.parametrize("part", CHECKPOINT)
def test_a_checkpoint_of_pickles_is_refused(trained_on_all, all_kinds, run, tmp_path, part):
    shutil.copytree(trained_on_all[0] / "run", tmp_path / "run")
    (path,) = (tmp_path / "run/checkpoints").glob(f"*/{part}")
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            file.write_bytes(PICKLE)
    flags = ("--mode=eval", f"--config.data.source=folder:{all_kinds}")
    found = ran(lambda: run(tmp_path / "run", *flags))
    assert_refused(found, tmp_path / "run/checkpoints", "damaged")
