"""
Thumbnails from one image file.

Pillow and files, nothing else: no Django, no jobs. Whatever a stranger may
upload comes through here, so that everything that is not a plain picture ends
as UnreadableImage with a sentence for the visitor.
"""

from __future__ import annotations

import io
import os
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000
"""
More than most cameras have. A pixel takes 4 bytes of memory, and up to 10
while it is turned or converted, so that a worker needs 1 GB for the largest.
"""

# Pillow's own guard, for the whole process: it warns above the limit, and
# refuses above twice the limit. Here the warning refuses as well.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

# Pillow knows many more, some of which are drawings, or run other programs.
READABLE = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")

ENCODINGS: dict[str, dict[str, object]] = {
    "webp": {"format": "WEBP", "quality": 80, "method": 4},
    "jpg": {"format": "JPEG", "quality": 82, "progressive": True, "optimize": True},
}
"""Options of Pillow's ``save`` by the suffix of the file."""

Report = Callable[[int, int], object]
"""Called with (files written, files to write)."""


class UnreadableImage(Exception):
    """The file cannot be made into thumbnails, however often one tries."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"The file is not an image that can be read: {self.reason}."


@dataclass(frozen=True)
class Thumbnails:
    """What was written."""

    width: int
    """Pixels of the original, as it is to be shown."""

    height: int
    files: dict[str, int]
    """Bytes of each file by its name."""


def write_thumbnails(
    source: str | os.PathLike[str],
    folder: Path,
    sizes: Sequence[int],
    *,
    quality: int | None = None,
    report: Report = lambda written, total: None,
) -> Thumbnails:
    """
    Write ``<size>.webp`` and ``<size>.jpg`` into the folder for each size.

    Each file appears whole or not at all, replacing one that is there. An
    image smaller than a size keeps its own.

    Args:
        quality: Of the encoders, from 1 to 95; None for that of ``ENCODINGS``.
    Raises:
        UnreadableImage: If the source is not a photo.
        OSError: If the source is not there or the folder cannot be written.
    """
    files: dict[str, int] = {}
    total = len(sizes) * len(ENCODINGS)
    report(0, total)
    image, (width, height) = read(source, max(sizes))
    folder.mkdir(parents=True, exist_ok=True)
    # From the largest down: each is made from the one before, which is small.
    for size in sorted(sizes, reverse=True):
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
        for suffix, options in ENCODINGS.items():
            if quality is not None:
                options = options | {"quality": quality}
            name = f"{size}.{suffix}"
            files[name] = write(image, folder / name, options)
            report(len(files), total)
    return Thumbnails(width, height, files)


def read(source: str | os.PathLike[str], size: int) -> tuple[Image.Image, tuple[int, int]]:
    """
    The picture upright, in sRGB, without metadata, and the size of the original.

    The longest side of a large picture may already be reduced, to no less
    than ``size`` pixels.
    """
    with open(source, "rb") as file, _pillow_errors_as_unreadable(), _open(file) as opened:
        width, height = opened.size
        scale = min(1, size / max(width, height))
        # A JPEG can be decoded at a half, a quarter or an eighth, much faster.
        opened.draft(None, (max(1, round(width * scale)), max(1, round(height * scale))))
        opened.load()
        as_stored = opened.size
        ImageOps.exif_transpose(opened, in_place=True)  # which else makes a copy even of what is upright
        image = _to_srgb(_reduced(opened, size))
        if opened.size != as_stored and width != height:
            width, height = height, width
    image.info.clear()  # save() would copy a comment from here
    return image, (width, height)


def _open(file: io.BufferedReader) -> Image.Image:
    try:
        return Image.open(file, formats=READABLE)
    except UnidentifiedImageError:
        raise UnreadableImage("it is none of JPEG, PNG, WebP, GIF, TIFF or BMP") from None


@contextmanager
def _pillow_errors_as_unreadable() -> Iterator[None]:
    """Only around reading, since a full disk raises OSError as well."""
    try:
        with warnings.catch_warnings():
            # Damaged metadata and unusual transparency are not our concern.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"it has more than {MAX_PIXELS // 1_000_000} megapixels") from error
    # What Pillow's readers raise for damaged files, besides their OSError.
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise UnreadableImage(_sentence(error)) from error
    except (EOFError, struct.error, zlib.error) as error:
        raise UnreadableImage(_sentence(error)) from error


def _sentence(error: Exception) -> str:
    text = str(error).strip().rstrip(".") or type(error).__name__
    return "it ends too early" if "truncated" in text.lower() else text


def _reduced(image: Image.Image, size: int) -> Image.Image:
    """Reduced by a whole number, before conversions that would copy every pixel."""
    factor = max(image.size) // size
    if factor < 2:
        return image
    # An average is one of colours: not of entries of a palette, nor of bits,
    # nor with a colour that stands for transparency.
    if image.mode in ("1", "P", "PA") or (image.mode in ("L", "RGB") and "transparency" in image.info):
        image = image.convert("RGBA" if image.has_transparency_data else "L" if image.mode == "1" else "RGB")
        image.info.pop("transparency", None)
    # Not while a pixel has 16 bits or more.
    if image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr"):
        return image
    reduced = image.reduce(factor)
    reduced.info = image.info
    return reduced


def _to_srgb(image: Image.Image) -> Image.Image:
    """In RGB, as browsers expect it when nothing else is said; what is transparent becomes white."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if profile and image.mode in ("RGB", "CMYK"):
        # A profile that cannot be used is as good as none.
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            return _apply_profile(image, profile)
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or more bits; ``convert`` alone would turn everything above 255 to white."""
    _, brightest = image.getextrema()
    full = next((full for full in (1.0, 255.0, 65535.0) if brightest <= full), brightest)
    if image.mode == "F" or full > 255:
        image = image.point(lambda value: value * (255 / full))
    image = image.convert("L")
    image.info.pop("transparency", None)
    return image


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None, "only None when converting in place"
    return converted


def write(image: Image.Image, path: Path, options: dict[str, object]) -> int:
    """Write the file, whole or not at all, and return its bytes."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    try:
        with open(descriptor, "wb") as file:
            image.save(file, **options)
        length = os.path.getsize(temporary)
        os.chmod(temporary, 0o644)  # mkstemp gives 0600; the web server may be another user
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return length
