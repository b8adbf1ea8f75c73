"""
How a photo would look: a filter and a crop, for a page that waits for it.

Pillow and files, nothing else, as ``thumbnails.py``, which reads and writes them.
"""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image, ImageEnhance, ImageOps

from .thumbnails import ENCODINGS, read, write

SIZE = 960
"""Longest side, in pixels."""

RATIOS = {"square": 1.0, "wide": 16 / 9, "tall": 4 / 5}


def write_preview(source: str | os.PathLike[str], path: Path, look: str, crop: str) -> tuple[int, int]:
    """
    Write it, whole or not at all; its size.

    Raises:
        UnreadableImage: If the source is not a photo.
    """
    image, _ = read(source, SIZE)
    image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    image = with_look(cropped(image, crop), look)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(image, path, ENCODINGS["jpg"])
    return image.size


def cropped(image: Image.Image, crop: str) -> Image.Image:
    """As much of the middle as has the shape."""
    ratio = RATIOS.get(crop)
    if ratio is None:
        return image
    width, height = min(image.width, image.height * ratio), min(image.height, image.width / ratio)
    return ImageOps.fit(image, (max(1, round(width)), max(1, round(height))))


def with_look(image: Image.Image, look: str) -> Image.Image:
    match look:
        case "grey":
            return ImageOps.autocontrast(image.convert("L"), cutoff=0.5).convert("RGB")
        case "sepia":
            return ImageOps.colorize(image.convert("L"), "#1d130b", "#fff3dc", mid="#9c7a53")
        case "vivid":
            return ImageEnhance.Contrast(ImageEnhance.Color(image).enhance(1.6)).enhance(1.1)
        case "cold":
            red, green, blue = image.split()
            bands = red.point(lambda value: value * 0.88), green, blue.point(lambda value: value * 1.12)
            return Image.merge("RGB", bands)
        case _:
            return image
