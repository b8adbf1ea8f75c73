"""Image files as visitors send them."""

from __future__ import annotations

import io
from typing import Any

from django.core.files.uploadedfile import SimpleUploadedFile
from PIL import Image, ImageDraw

RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 200, 60), (30, 60, 220), (255, 255, 255)


def quarters(size: tuple[int, int] = (64, 48), mode: str = "RGB") -> Image.Image:
    """Red and green above blue and white, so that every turn of it differs."""
    image = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(image)
    x, y = size[0] // 2, size[1] // 2
    draw.rectangle((0, 0, x - 1, y - 1), RED)
    draw.rectangle((x, 0, size[0], y - 1), GREEN)
    draw.rectangle((0, y, x - 1, size[1]), BLUE)
    return image.convert(mode)


def encoded(image: Image.Image, file_format: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def upload(name: str = "photo.jpg", content: bytes | None = None) -> SimpleUploadedFile:
    return SimpleUploadedFile(name, encoded(quarters()) if content is None else content)
