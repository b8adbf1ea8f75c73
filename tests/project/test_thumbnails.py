"""Any file in, six thumbnails or one sentence out. No database, no jobs."""

from __future__ import annotations

import errno
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageCms

from project.gallery import thumbnails
from project.gallery.thumbnails import UnreadableImage, write_thumbnails
from tests.project.images import BLUE, GREEN, RED, WHITE, encoded, quarters

SIZES = (160, 480)
NAMES = {"160.jpg", "160.webp", "480.jpg", "480.webp"}

# Where red, green, blue and white have to be in what is shown.
UPRIGHT = (RED, GREEN, BLUE, WHITE)

Make = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "thumbnails"


@pytest.fixture
def make(tmp_path: Path, folder: Path) -> Make:
    """Write thumbnails of these bytes and return their folder."""

    def make(content: bytes, **options: Any) -> Path:
        source = tmp_path / "source"
        source.write_bytes(content)
        write_thumbnails(source, folder, SIZES, **options)
        return folder

    return make


def assert_quarters(path: Path, expected: tuple[tuple[int, int, int], ...] = UPRIGHT, tolerance: int = 45):
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    points = [(x * image.width // 4, y * image.height // 4) for y in (1, 3) for x in (1, 3)]
    for point, colour in zip(points, expected, strict=True):
        pixel = image.getpixel(point)
        assert max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= tolerance, (path.name, point)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims this size, and has hardly any bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


class TestSizes:
    def test_every_size_is_written_in_both_formats(self, make: Make):
        written = make(encoded(quarters((1200, 900))))

        assert {path.name for path in written.iterdir()} == NAMES
        for path in written.iterdir():
            size = int(path.stem)
            with Image.open(path) as image:
                assert image.size == (size, size * 3 // 4)
                assert image.format == {".jpg": "JPEG", ".webp": "WEBP"}[path.suffix]
            assert_quarters(path)

    def test_small_image_is_not_enlarged(self, make: Make):
        with Image.open(make(encoded(quarters((200, 100)))) / "480.jpg") as image:
            assert image.size == (200, 100)

    def test_extreme_shape_keeps_a_pixel(self, make: Make):
        with Image.open(make(encoded(Image.new("RGB", (9000, 3)))) / "160.webp") as image:
            assert image.size == (160, 1)

    def test_large_jpeg_is_decoded_at_a_fraction(self, tmp_path: Path):
        source = tmp_path / "large.jpg"
        source.write_bytes(encoded(quarters((4000, 3000))))

        image, size = thumbnails.read(source, 480)

        assert size == (4000, 3000)
        assert image.size == (500, 375)

    def test_original_size_and_file_sizes_are_returned(self, tmp_path: Path, folder: Path):
        source = tmp_path / "source"
        source.write_bytes(encoded(quarters((1200, 900))))

        made = write_thumbnails(source, folder, SIZES)

        assert (made.width, made.height) == (1200, 900)
        assert made.files == {name: (folder / name).stat().st_size for name in NAMES}


class TestProgress:
    def test_each_file_is_reported_once_it_is_there(self, make: Make, folder: Path):
        seen = []

        def report(written: int, total: int) -> None:
            seen.append((written, total, len(list(folder.iterdir())) if folder.exists() else 0))

        make(encoded(quarters()), report=report)

        assert seen == [(n, 4, n) for n in range(5)]


class TestTwice:
    def test_second_run_replaces_the_files(self, make: Make):
        make(encoded(Image.new("RGB", (300, 200), RED)))
        written = make(encoded(quarters((600, 400))))

        assert {path.name for path in written.iterdir()} == NAMES
        assert_quarters(written / "480.jpg")

    def test_failed_write_leaves_the_old_file_and_nothing_else(
        self, make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
    ):
        content = encoded(quarters())
        make(content)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}

        def disk_full(*args: object, **kwargs: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Image.Image, "save", disk_full)
        with pytest.raises(OSError, match="No space left"):
            make(content)

        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


class TestOrientation:
    # How the pixels lie in a file whose picture is upright.
    TURNS = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }

    @pytest.mark.parametrize("orientation", TURNS)
    @pytest.mark.parametrize("size", [(640, 400), (2400, 1500)], ids=["whole", "reduced"])
    def test_picture_is_shown_upright(
        self, tmp_path: Path, folder: Path, orientation: int, size: tuple[int, int]
    ):
        turn = self.TURNS[orientation]
        image = quarters(size)
        exif = Image.Exif()
        exif[0x0112] = orientation
        source = tmp_path / "source"
        source.write_bytes(encoded(image if turn is None else image.transpose(turn), exif=exif))

        made = write_thumbnails(source, folder, SIZES)

        assert (made.width, made.height) == size
        for name in NAMES:
            assert_quarters(folder / name)
            with Image.open(folder / name) as shown:
                assert shown.size == (int(name.split(".")[0]), int(name.split(".")[0]) * 5 // 8)
                assert 0x0112 not in shown.getexif()


class TestModes:
    @pytest.mark.parametrize(
        ("mode", "file_format"),
        [
            ("CMYK", "JPEG"),
            ("RGBA", "PNG"),
            ("P", "PNG"),
            ("P", "GIF"),
            ("RGB", "TIFF"),
            ("RGB", "BMP"),
            ("RGBA", "WEBP"),
            ("CMYK", "TIFF"),
        ],
    )
    def test_colours_stay(self, make: Make, mode: str, file_format: str):
        written = make(encoded(quarters((1100, 825), mode), file_format))

        for path in written.iterdir():
            assert_quarters(path)

    @pytest.mark.parametrize(
        ("mode", "file_format"), [("L", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("F", "TIFF")]
    )
    def test_grey_stays(self, make: Make, mode: str, file_format: str):
        image = Image.new("L", (200, 100))
        image.paste(255, (100, 0, 200, 100))
        written = make(encoded(image.convert(mode), file_format))

        self.assert_black_and_white(written / "160.jpg")

    def test_sixteen_bits_are_scaled(self, make: Make):
        image = Image.new("I;16", (200, 100), 300)
        image.paste(65535, (100, 0, 200, 100))

        self.assert_black_and_white(make(encoded(image, "PNG")) / "160.jpg")

    def assert_black_and_white(self, path: Path) -> None:
        with Image.open(path) as shown:
            assert shown.mode == "RGB"
            assert max(shown.getpixel((30, 40))) < 20
            assert min(shown.getpixel((130, 40))) > 235

    @pytest.mark.parametrize("palette", [False, True])
    def test_transparency_becomes_white(self, make: Make, palette: bool):
        image = Image.new("RGBA", (1000, 500), (0, 0, 0, 0))
        image.paste((*RED, 255), (500, 0, 1000, 500))
        written = make(encoded(image.convert("P") if palette else image, "PNG"))

        assert_quarters(written / "160.jpg", (WHITE, RED, WHITE, RED))

    def test_transparent_colour_becomes_white(self, make: Make):
        image = quarters((1000, 750))
        assert_quarters(
            make(encoded(image, "PNG", transparency=RED)) / "160.jpg", (WHITE, GREEN, BLUE, WHITE)
        )

    def test_colour_profile_is_applied(self, make: Make):
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        written = make(encoded(quarters(), icc_profile=profile))
        assert_quarters(written / "160.jpg")  # not a profile of RGB: left alone

        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        assert_quarters(make(encoded(quarters(), icc_profile=srgb)) / "160.jpg")


MEASURE = """
import re, sys
from pathlib import Path
from project.gallery.thumbnails import write_thumbnails

def most():
    # Not ru_maxrss, which begins with that of the process that started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

before = most()
write_thumbnails(sys.argv[1], Path(sys.argv[2]), (160, 480))
print(most() - before)
"""


class TestMemory:
    @pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory")
    @pytest.mark.parametrize(("mode", "options"), [("P", {"transparency": 0}), ("1", {}), ("RGB", {})])
    def test_bytes_of_a_pixel(self, tmp_path: Path, folder: Path, mode: str, options: dict[str, Any]):
        source = tmp_path / "source"
        source.write_bytes(encoded(Image.new(mode, (6000, 5000)), "PNG", compress_level=1, **options))
        command = [sys.executable, "-c", MEASURE, str(source), str(folder)]
        kilobytes = int(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60).stdout)

        assert kilobytes * 1024 / (6000 * 5000) < {"P": 10.5, "1": 4, "RGB": 6}[mode]

    @pytest.mark.parametrize("mode", ["1", "P", "PA", "L", "LA", "RGB", "RGBA"])
    def test_large_and_transparent_is_as_small_and_transparent(self, mode: str):
        image = Image.new("L", (1000, 500), 255)
        image.paste(0, (500, 0, 1000, 500))
        image = image.convert("RGB").convert(mode)
        if mode in ("1", "P", "L", "RGB"):
            image.info["transparency"] = {"RGB": (0, 0, 0)}.get(mode, 0)
        elif mode != "PA":
            image.putalpha(image.getchannel(0))

        reduced = thumbnails._to_srgb(thumbnails._reduced(image, 100))
        assert reduced.size == (100, 50)
        assert [reduced.getpixel(at) for at in ((20, 20), (80, 20))] == [
            thumbnails._to_srgb(image).getpixel(at) for at in ((200, 200), (800, 200))
        ]


class TestMetadata:
    def test_nothing_of_the_visitor_is_kept(self, make: Make):
        exif = Image.Exif()
        exif[0x010E] = "a secret description"
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        content = encoded(quarters(), exif=exif, comment=b"a secret comment", icc_profile=profile)
        assert b"secret description" in content
        assert b"secret comment" in content

        for path in make(content).iterdir():
            assert b"secret" not in path.read_bytes()
            with Image.open(path) as image:
                assert not image.getexif()
                assert "icc_profile" not in image.info


class TestUnreadable:
    """The sentence stands on the page and in the job record."""

    def test_text(self, make: Make):
        with pytest.raises(UnreadableImage) as caught:
            make(b"This is not a photo.")
        assert str(caught.value) == (
            "The file is not an image that can be read: it is none of JPEG, PNG, WebP, GIF, TIFF or BMP."
        )

    def test_format_that_runs_other_programs(self, make: Make):
        with pytest.raises(UnreadableImage, match="it is none of JPEG"):
            make(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")

    @pytest.mark.parametrize(
        ("file_format", "part"), [("JPEG", 0.6), ("PNG", 0.6), ("WEBP", 0.6), ("GIF", 0.3)]
    )
    def test_truncated(self, make: Make, folder: Path, file_format: str, part: float):
        content = encoded(Image.effect_noise((640, 480), 90).convert("RGB"), file_format)
        with pytest.raises(UnreadableImage, match=r"^The file is not an image that can be read: .+[^.]\.$"):
            make(content[: int(len(content) * part)])
        assert not folder.exists()

    def test_truncated_photo_says_so(self, make: Make):
        content = encoded(quarters((640, 480)))
        with pytest.raises(UnreadableImage, match=r": it ends too early\.$"):
            make(content[: len(content) // 2])

    @pytest.mark.parametrize("end", [3, 12, 30, 200])
    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
    def test_only_a_beginning(self, make: Make, file_format: str, end: int):
        with pytest.raises(UnreadableImage):
            make(encoded(Image.effect_noise((640, 480), 90).convert("RGB"), file_format)[:end])

    @pytest.mark.parametrize("size", [(10_001, 10_000), (60_000, 60_000)], ids=["warning", "error"])
    def test_decompression_bomb(self, make: Make, size: tuple[int, int]):
        with pytest.raises(UnreadableImage, match="it has more than 100 megapixels"):
            make(png_header(*size))

    def test_missing_source_is_not_the_visitors_fault(self, tmp_path: Path, folder: Path):
        with pytest.raises(FileNotFoundError):
            write_thumbnails(tmp_path / "gone", folder, SIZES)
