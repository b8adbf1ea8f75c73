"""Paints photos of the size that cameras make, so that nobody needs to look for some."""

from __future__ import annotations

import colorsys
import io
import random
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.files.base import ContentFile
from django.core.management.base import BaseCommand, CommandError

from project.gallery.uploads import add_photos

RATIOS = ((4, 3), (3, 2), (3, 4), (16, 9), (1, 1), (2, 3))

ORIENTATIONS = (1, 6, 3, 8)
"""EXIF: how the camera was held. A reader turns the pixels by the angle below."""

ANGLES = {1: 0, 3: 180, 6: 90, 8: 270}
"""Degrees counter-clockwise from upright to the pixels of a file with that orientation."""


class Command(BaseCommand):
    help = "Paint sample photos, into a folder or straight into the gallery."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--count", type=int, default=20, help="how many photos (default: %(default)s)")
        parser.add_argument(
            "--megapixels", type=float, default=12, help="size of each photo (default: %(default)s)"
        )
        target = parser.add_mutually_exclusive_group()
        target.add_argument(
            "--output", type=Path, help="folder to write to (default: sample_photos beside the media)"
        )
        target.add_argument(
            "--submit", action="store_true", help="add them to the gallery, as an upload would"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if options["count"] < 1 or not 0 < options["megapixels"] <= 100:
            raise CommandError("--count must be 1 or more, --megapixels between 0 and 100.")
        photos = sample_photos(options["count"], options["megapixels"])
        if options["submit"]:
            self._submit(photos)
        else:
            self._write(photos, options["output"] or Path(settings.MEDIA_ROOT).parent / "sample_photos")

    def _submit(self, photos: Iterator[tuple[str, bytes]]) -> None:
        # One by one, so that the workers start while the next is painted.
        for name, content in photos:
            (photo,) = add_photos([ContentFile(content, name=name)])
            self.stdout.write(f"{name}: {len(content):,} bytes, job {photo.job_id}")

    def _write(self, photos: Iterator[tuple[str, bytes]], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in photos:
            (folder / name).write_bytes(content)
            self.stdout.write(f"{folder / name}: {len(content):,} bytes")


def sample_photos(count: int, megapixels: float) -> Iterator[tuple[str, bytes]]:
    """Name and JPEG of each photo; the same on every call."""
    for number in range(1, count + 1):
        ratio = RATIOS[number % len(RATIOS)]
        scale = (megapixels * 1_000_000 / (ratio[0] * ratio[1])) ** 0.5
        size = (max(1, round(ratio[0] * scale)), max(1, round(ratio[1] * scale)))
        orientation = ORIENTATIONS[number % len(ORIENTATIONS)]
        yield f"sample-{number:03}.jpg", sample_photo(number, size, orientation)


def sample_photo(number: int, size: tuple[int, int], orientation: int) -> bytes:
    """
    A JPEG that shows hills under a sky, and its number.

    Args:
        size: Width and height in pixels, when the photo is held upright.
    """
    from PIL import Image

    image = paint(number, size).rotate(ANGLES[orientation], expand=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, exif=exif)
    return file.getvalue()


def paint(number: int, size: tuple[int, int]) -> Any:
    from PIL import ImageDraw, ImageFont

    chance = random.Random(number)
    # Steps of the golden ratio: neighbours differ, and no colour comes twice.
    # From cyan over violet to orange; green skies look ill.
    hue = 0.5 + 0.6 * (number * 0.618034 % 1)
    width, height = size

    image = _sky(size, hue)
    draw = ImageDraw.Draw(image, "RGBA")
    radius = min(size) * chance.uniform(0.1, 0.17)
    x, y = width * chance.uniform(0.2, 0.8), height * chance.uniform(0.2, 0.4)
    for glow in range(5, -1, -1):
        reach = radius * (1 + glow * 0.28)
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), (255, 244, 214, 255 if glow == 0 else 34))
    for layer in range(4):
        draw.polygon(
            _hills(chance, size, layer), _colour(hue + 0.52, 0.3 + layer * 0.12, 0.62 - layer * 0.14)
        )

    font = ImageFont.load_default(size=max(8, min(size) // 8))
    # In the middle, which a cropped thumbnail still shows.
    draw.text((width / 2, height * 0.62), f"{number:03}", (255, 255, 255, 225), font, anchor="mm")
    return image


def _sky(size: tuple[int, int], hue: float) -> Any:
    from PIL import Image

    upper, lower = (
        Image.new("RGB", size, _colour(hue, 0.55, 0.9)),
        Image.new("RGB", size, _colour(hue + 0.1, 0.2, 1)),
    )
    return Image.composite(lower, upper, Image.linear_gradient("L").resize(size, Image.Resampling.BICUBIC))


def _hills(chance: random.Random, size: tuple[int, int], layer: int) -> list[tuple[float, float]]:
    """A ridge from the left edge to the right, closed along the bottom; later layers stand lower."""
    width, height = size
    steps = 10
    ridge = [
        (width * step / steps, height * (0.5 + layer * 0.12 + chance.uniform(-0.06, 0.06)))
        for step in range(steps + 1)
    ]
    return [(0, height), *ridge, (width, height)]


def _colour(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)
