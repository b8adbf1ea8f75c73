"""
What visitors upload: photos as large as cameras make them, and files that are
no photos. Each photo comes with a small picture of what its thumbnails have to
show, which is made without the code under test.
"""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageCms, ImageStat

from project.gallery.management.commands.make_sample_photos import paint, sample_photos

REAL = (
    "astronaut.png",
    "camera.png",  # grey
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)
"""Photographs that scikit-image carries, smaller than those of a camera."""

PAINTED = 10
"""How many more ``make_sample_photos`` paints, every one held in another way than the one before."""

MEGAPIXELS = (10, 12, 16)

Transpose = Image.Transpose
HELD: dict[int, Transpose | None] = {
    1: None,
    3: Transpose.ROTATE_180,
    6: Transpose.ROTATE_90,
    8: Transpose.ROTATE_270,
}
"""EXIF orientation, and what makes the pixels of such a file of an upright picture."""

SMALL = (32, 32)
"""Pixels of the pictures that are compared, whatever shape they come from."""


@dataclass(frozen=True)
class Photo:
    """A file that can be made into thumbnails."""

    path: Path
    size: tuple[int, int]
    """Width and height in pixels when held upright."""

    looks: Image.Image
    """The upright picture, ``SMALL``."""


def photos(folder: Path) -> list[Photo]:
    """Twenty photos of ten and more megapixels, written into the folder."""
    return [*_real_photos(folder), *_painted_photos(folder)]


def _real_photos(folder: Path) -> Iterator[Photo]:
    source = resources.files("skimage") / "data"
    for name, megapixels, (orientation, turn) in zip(
        REAL, itertools.cycle(MEGAPIXELS), itertools.cycle(HELD.items())
    ):
        with (source / name).open("rb") as file, Image.open(file) as opened:
            scale = math.sqrt(megapixels * 1_000_000 / (opened.width * opened.height))
            size = (math.ceil(opened.width * scale), math.ceil(opened.height * scale))
            upright = opened.resize(size, Image.Resampling.BICUBIC)
            looks = small(_as_on_screen(opened))
        held = upright if turn is None else upright.transpose(turn)
        stem = name.partition(".")[0]
        if name == "chelsea.png":
            # Not as a camera writes it; the two other formats of the web turn up as well.
            path = folder / f"{stem}.png"
            _save(held, path, orientation, compress_level=1)
        elif name == "coffee.png":
            path = folder / f"{stem}.webp"
            _save(held, path, orientation, quality=85, method=0)
        else:
            path = folder / f"{stem}.jpg"
            _save(held, path, orientation, quality=85)
        yield Photo(path, size, looks)


def _as_on_screen(image: Image.Image) -> Image.Image:
    """Colours as browsers show them: one of the photographs is in Adobe RGB."""
    profile = image.info.get("icc_profile")
    if profile is None:
        return image
    source, srgb = ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, source, srgb)
    assert converted is not None, "only None when converting in place"
    return converted


def _save(image: Image.Image, path: Path, orientation: int, **options: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "A camera"
    image.save(path, exif=exif, icc_profile=image.info.get("icc_profile"), **options)


def _painted_photos(folder: Path) -> Iterator[Photo]:
    for number, (name, content) in enumerate(sample_photos(PAINTED, 12), 1):
        path = folder / name
        path.write_bytes(content)
        with Image.open(path) as image:
            size = image.size
            if image.getexif()[0x0112] in (6, 8):
                size = size[::-1]
        # A painting looks the same in every size.
        yield Photo(path, size, small(paint(number, (size[0] // 8, size[1] // 8))))


def no_photos(folder: Path) -> dict[Path, str]:
    """Files that look like photos to a form, each with what the visitor is to be told of it."""
    truncated, text, bomb = folder / "truncated.jpg", folder / "diary.jpg", folder / "bomb.png"
    with (
        (resources.files("skimage") / "data" / "astronaut.png").open("rb") as file,
        Image.open(file) as image,
    ):
        image.resize((3200, 3200)).save(truncated, quality=85)
    content = truncated.read_bytes()
    truncated.write_bytes(content[: len(content) // 2])
    text.write_text("Dear diary, today I took a photo.\n" * 1000)
    bomb.write_bytes(_png(60_000, 60_000))
    return {
        truncated: "it ends too early",
        text: "it is none of JPEG, PNG, WebP, GIF, TIFF or BMP",
        bomb: "it has more than 100 megapixels",
    }


def _png(width: int, height: int) -> bytes:
    """A PNG that says it is this large, and holds a little of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def small(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize(SMALL, Image.Resampling.BOX)


def difference(one: Image.Image, other: Image.Image) -> float:
    """Of two ``SMALL`` pictures: 0 when they are the same, 255 for black and white."""
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3


def turned(image: Image.Image) -> list[Image.Image]:
    """The picture in the seven ways that a wrong orientation would show it."""
    return [image.transpose(turn) for turn in Transpose]
