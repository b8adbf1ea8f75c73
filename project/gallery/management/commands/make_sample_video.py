"""Renders a video with sound, so that nobody needs to look for one."""

from __future__ import annotations

import math
from argparse import ArgumentParser
from array import array
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from django.conf import settings
from django.core.files import File
from django.core.management.base import BaseCommand, CommandError

from project.gallery.uploads import add_videos

from .make_sample_photos import paint

NAME = "sample_video.mp4"

RATE = 25
"""Frames a second."""

SOUND_RATE = 48_000
SAMPLES = 1024
"""Of sound, in one frame of it."""


class Command(BaseCommand):
    help = "Render a sample video, into a file or straight into the gallery."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--seconds", type=float, default=20, help="how long (default: %(default)s)")
        parser.add_argument("--width", type=int, default=1920, help="pixels, 16:9 (default: %(default)s)")
        target = parser.add_mutually_exclusive_group()
        target.add_argument(
            "--output", type=Path, help="file to write (default: sample_video.mp4 beside the media)"
        )
        target.add_argument("--submit", action="store_true", help="add it to the gallery, as an upload would")

    def handle(self, *args: Any, **options: Any) -> None:
        seconds, width = options["seconds"], options["width"]
        if not (0 < seconds <= 3600 and 64 <= width <= 3840):
            raise CommandError("--seconds must be between 0 and 3600, --width between 64 and 3840.")
        if options["submit"]:
            self._submit(seconds, width)
            return
        path = options["output"] or Path(settings.MEDIA_ROOT).parent / NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        sample_video(path, seconds=seconds, width=width)
        self.stdout.write(f"{path}: {path.stat().st_size:,} bytes")

    def _submit(self, seconds: float, width: int) -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder) / NAME
            sample_video(path, seconds=seconds, width=width)
            with path.open("rb") as file:
                (video,) = add_videos([File(file, name=NAME)])
        self.stdout.write(f"{NAME}: {seconds:g} s, job {video.job_id}")


def sample_video(path: Path, *, seconds: float, width: int = 1280, rate: int = RATE) -> None:
    """
    Write a video of a painted landscape with a clock that counts the seconds, and with a tone.

    The same on every call. MP4 with MPEG-4 and AAC, as old cameras make them.
    """
    import av

    size = (width // 2 * 2, width * 9 // 32 * 2)
    landscape = paint(7, size)
    with av.open(str(path), "w", format="mp4") as file:
        picture = file.add_stream("mpeg4", rate=rate)
        picture.width, picture.height, picture.pix_fmt = *size, "yuv420p"
        picture.bit_rate = 4_000_000
        sound = file.add_stream("aac", rate=SOUND_RATE, layout="mono")
        samples = 0
        for number in range(max(1, round(seconds * rate))):
            frame = av.VideoFrame.from_image(clock(landscape, number / rate))
            frame.pts, frame.time_base = number, Fraction(1, rate)
            file.mux(picture.encode(frame))
            while samples < (number + 1) * SOUND_RATE / rate:
                file.mux(sound.encode(tone(samples)))
                samples += SAMPLES
        file.mux(picture.encode(None))
        file.mux(sound.encode(None))


def clock(landscape: Any, seconds: float) -> Any:
    """The landscape with a hand that goes round once a second, and the time."""
    from PIL import ImageDraw, ImageFont

    image = landscape.copy()
    draw = ImageDraw.Draw(image, "RGBA")
    x, y, radius = image.width / 2, image.height * 0.4, image.height * 0.22
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), (255, 255, 255, 90), (255, 255, 255))
    angle = 2 * math.pi * (seconds % 1)
    end = (x + radius * math.sin(angle), y - radius * math.cos(angle))
    draw.line((x, y, *end), (255, 255, 255), width=max(2, image.width // 160))
    font = ImageFont.load_default(size=max(8, image.height // 12))
    text = f"{int(seconds) // 60}:{seconds % 60:04.1f}"
    draw.text((x, image.height * 0.85), text, (255, 255, 255), font, anchor="mm")
    return image


def tone(start: int) -> Any:
    """A frame of sound from this sample on: a tick at each second, and a quiet hum."""
    import av

    values = array("f")
    for sample in range(start, start + SAMPLES):
        since = sample % SOUND_RATE / SOUND_RATE
        tick = math.exp(-since * 40) * math.sin(2 * math.pi * 880 * since)
        values.append(0.3 * tick + 0.02 * math.sin(2 * math.pi * 110 * sample / SOUND_RATE))
    frame = av.AudioFrame(format="fltp", layout="mono", samples=SAMPLES)
    frame.planes[0].update(values.tobytes())
    frame.pts, frame.sample_rate, frame.time_base = start, SOUND_RATE, Fraction(1, SOUND_RATE)
    return frame
