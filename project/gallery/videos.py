"""
A poster and a web-sized version from one video file.

PyAV and files, nothing else: no Django, no jobs. Whatever a stranger may
upload comes through here, so that everything that is not a plain video ends
as UnreadableVideo with a sentence for the visitor.

FFmpeg knows files that name other files or addresses, which it would then open:
playlists, lists to concatenate, references of QuickTime. Here it gets one
descriptor that is open already, and may use no protocol but that (``fd``), no
formats but those of ``FORMATS`` and no decoders but those of ``DECODERS``.

One frame after another goes through, so that memory does not grow with the
length of the video.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import av.error
import av.filter
from av.stream import Disposition
from PIL import Image, ImageStat

VIDEO, POSTER = "web.mp4", "poster.jpg"
"""Names of the two files."""

FORMATS = ("mov", "mp4", "matroska", "webm", "avi", "mpeg", "mpegts", "ogg", "flv", "asf")
"""FFmpeg's demuxers; none of them is told by a file to open another."""

DECODERS = (
    *(
        "h264",
        "hevc",
        "vp8",
        "vp9",
        "libdav1d",
        "av1",
        "mpeg4",
        "mpeg1video",
        "mpeg2video",
        "mjpeg",
        "prores",
    ),
    *("theora", "dvvideo", "h263", "flv", "vc1", "wmv1", "wmv2", "wmv3", "msmpeg4v2", "msmpeg4", "qtrle"),
    *("png", "rawvideo", "ffv1", "huffyuv", "cinepak", "svq3", "dnxhd"),
    *(
        "aac",
        "mp3float",
        "mp3",
        "mp2float",
        "mp2",
        "opus",
        "libopus",
        "vorbis",
        "flac",
        "alac",
        "ac3",
        "eac3",
    ),
    *("pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_u8", "pcm_f32le", "amrnb", "adpcm_ms", "adpcm_ima_wav"),
    *("wmav1", "wmav2"),
)

CLOCK = 90_000
"""Ticks a second of what is written: frames keep their moments, whatever their rate."""

MAX_RATE = 60
"""Frames a second; of many more, some are left out."""

CLOSEST = CLOCK // (MAX_RATE * 4 // 3)
"""Ticks between two frames; less than those of ``MAX_RATE``, whose moments are rounded in many files."""

KEY_FRAME_EVERY = 2
"""Seconds, so that seeking is quick."""

MOST_PICTURES = 240
"""A second, of those that a video may last: what ends files that say no moments."""

PROBED_PIXELS = 36_000_000
"""Of one frame, that is decoded to find out how large it is."""

SHORTFALL = 0.1
"""Part of its own length by which a file may end earlier than it says."""

LITTER_AGE = 60.0
"""Seconds after which what a killed process was writing is cleared away."""

Report = Callable[[int, int], object]
"""Called with (parts done, 100), often."""


class UnreadableVideo(Exception):
    """The file cannot be made into a video for the web, however often one tries."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"The file is not a video that can be shown: {self.reason}."


@dataclass(frozen=True)
class Limits:
    """What is taken; settings.VIDEO_LIMITS has other numbers."""

    max_bytes: int = 512 * 1024 * 1024
    max_seconds: float = 30 * 60
    max_pixels: int = 4096 * 2304
    """Of one frame."""

    size: int = 1280
    """Longest side of what is made, in pixels; smaller ones are not enlarged."""


@dataclass
class Made:
    """What was written."""

    width: int
    """Pixels, as it is shown."""

    height: int
    seconds: float
    sound: bool
    notes: list[str] = field(default_factory=list)
    """Sentences for the visitor: what was left out."""


def write_web_video(
    source: str | os.PathLike[str],
    folder: Path,
    scratch: Path,
    limits: Limits,
    *,
    report: Report = lambda done, total: None,
) -> Made:
    """
    Write ``poster.jpg`` and ``web.mp4`` (H.264, AAC) into the folder.

    Each appears whole or not at all, replacing one that is there.

    Args:
        scratch: Where they lie until they are whole, in the same file system.
            What killed processes left there is cleared away.
        report: May raise, which ends the work.
    Raises:
        UnreadableVideo: If the source is not a video within the limits.
        OSError: If the source is not there or nothing can be written.
    """
    report(0, 100)
    scratch.mkdir(parents=True, exist_ok=True)
    clear_away(scratch)
    with open(source, "rb", buffering=0) as file, unfinished(scratch) as video, unfinished(scratch) as poster:
        size = os.fstat(file.fileno()).st_size
        if size > limits.max_bytes:
            raise UnreadableVideo(f"it has more than {limits.max_bytes:,} bytes")
        with _open(file.fileno(), limits) as opened:
            reader = _Reader(opened, file.fileno(), size, limits)
            writer = _Writer(video, reader, limits)
            try:
                for kind, frame in reader.frames():
                    writer.write(kind, frame)
                    report(min(99, int(100 * reader.part_done())), 100)
                made = writer.finish()
            except BaseException:
                writer.abandon()
                raise
        writer.poster.save(poster)
        folder.mkdir(parents=True, exist_ok=True)
        for temporary, name in ((poster, POSTER), (video, VIDEO)):
            os.chmod(temporary, 0o644)  # mkstemp gives 0600; the web server may be another user
            os.replace(temporary, folder / name)
    report(100, 100)
    return made


# Files that are not finished.


@contextmanager
def unfinished(scratch: Path) -> Iterator[Path]:
    """A new file, which is locked while this process has it and removed if it is still there."""
    descriptor, name = tempfile.mkstemp(dir=scratch)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield Path(name)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)
        os.close(descriptor)


def clear_away(scratch: Path) -> None:
    """Remove what nobody writes any more."""
    for path in scratch.iterdir():
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A new one is not locked for a moment.
                if time.time() - os.fstat(descriptor).st_mtime > LITTER_AGE:
                    os.unlink(path)
            finally:
                os.close(descriptor)


# Reading.


def _open(descriptor: int, limits: Limits) -> Any:
    options = {
        "fd": str(descriptor),
        "protocol_whitelist": "fd",
        "format_whitelist": ",".join(FORMATS),
        "codec_whitelist": ",".join(DECODERS),
        "max_pixels": str(max(limits.max_pixels, PROBED_PIXELS)),
    }
    try:
        return av.open("fd:", options=options)
    except av.error.FFmpegError as error:
        known = _looks_like_video(os.pread(descriptor, 12, 0))
        reason = (
            "it is damaged or ends too early" if known else "it is none of MP4, MOV, WebM, MKV, AVI or MPEG"
        )
        raise UnreadableVideo(reason) from error


def _looks_like_video(head: bytes) -> bool:
    return head[4:8] in (b"ftyp", b"moov", b"mdat") or head.startswith((b"\x1aE\xdf\xa3", b"RIFF", b"OggS"))


class _Reader:
    """The frames of picture and sound, in the order of the file."""

    def __init__(self, source: Any, descriptor: int, size: int, limits: Limits) -> None:
        self._source = source
        self._descriptor = descriptor
        self._size = max(size, 1)
        self._limits = limits
        self.notes: list[str] = []
        # Songs carry their cover as a video of one frame.
        pictures = [s for s in source.streams.video if not s.disposition & Disposition.attached_pic]
        if not pictures:
            raise UnreadableVideo("there is no moving picture in it")
        self.video = pictures[0]
        self.audio = next((s for s in source.streams.audio if s.codec_context is not None), None)
        self._refuse_what_it_says_of_itself()
        if source.streams.audio and (self.audio is None or self.audio.codec_context.name not in DECODERS):
            self.drop_sound()
        for stream in (self.video, self.audio):
            if stream is not None:
                stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
        self.video.codec_context.thread_type = "AUTO"
        self.video.codec_context.thread_count = 2
        self.start = (source.start_time or 0) / 1_000_000
        """Seconds on the file's clock at which it begins."""

        self.now = 0.0
        """Seconds of it that were read."""

        self.pictures = 0
        self.damaged = 0

    def _refuse_what_it_says_of_itself(self) -> None:
        context = self.video.codec_context
        if context is None or context.name not in DECODERS:
            raise UnreadableVideo("its picture is coded in a way that is not known here")
        self._refuse_if_large(context.width, context.height)
        if self.says_seconds is not None:
            self._refuse_if_long(self.says_seconds)

    def _refuse_if_large(self, width: int, height: int) -> None:
        megapixels = f"{self._limits.max_pixels / 1_000_000:.3g} megapixels"
        if not width or not height:
            raise UnreadableVideo(f"its pictures are damaged, or have many more than {megapixels}")
        if width * height > self._limits.max_pixels:
            raise UnreadableVideo(f"{width} x {height} are more than {megapixels}")

    def _refuse_if_long(self, seconds: float) -> None:
        if seconds > self._limits.max_seconds:
            raise UnreadableVideo(f"it is longer than {duration(self._limits.max_seconds)}")

    @property
    def says_seconds(self) -> float | None:
        """How long it is, as it says itself; None if it does not."""
        length = self._source.duration
        return length / 1_000_000 if length and length > 0 else None

    def part_done(self) -> float:
        if self.says_seconds is not None:
            return self.now / self.says_seconds
        # A recording of a browser does not know how long it became.
        return os.lseek(self._descriptor, 0, os.SEEK_CUR) / self._size

    def drop_sound(self) -> None:
        self.audio = None
        self.notes.append("Its sound is coded in a way that is not known here, and was left out.")

    def frames(self) -> Iterator[tuple[str, Any]]:
        streams = [stream for stream in (self.video, self.audio) if stream is not None]
        packets = self._source.demux(streams)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except av.error.FFmpegError:
                # What came until here is there; whether it is enough is told below.
                break
            yield from self._decoded(packet)
        # The end of the file told the decoders already; the end by an error did not.
        for stream in streams:
            yield from self._decoded(None, stream)
        self._refuse_what_ended_early()

    def _decoded(self, packet: Any, stream: Any = None) -> Iterator[tuple[str, Any]]:
        stream = stream or packet.stream
        try:
            frames = stream.decode(packet)
        except EOFError:
            return  # it was told already that nothing more comes
        except av.error.FFmpegError:
            self.damaged += stream is self.video
            return
        for frame in frames:
            if stream is self.video:
                self._refuse_if_large(frame.width, frame.height)
                self.pictures += 1
                if self.pictures > self._limits.max_seconds * MOST_PICTURES:
                    raise UnreadableVideo("it has too many pictures")
            if frame.time is not None:
                self.now = max(self.now, frame.time - self.start)
                self._refuse_if_long(self.now)
            yield stream.type, frame

    def _refuse_what_ended_early(self) -> None:
        if not self.pictures:
            raise UnreadableVideo("no picture in it can be decoded")
        told = self.says_seconds
        if told is not None and self.now < told * (1 - SHORTFALL) - 1:
            raise UnreadableVideo(f"it ends too early, after {duration(self.now)} of {duration(told)}")
        if self.damaged > self.pictures:
            raise UnreadableVideo("most of it is damaged")
        if self.damaged:
            self.notes.append("Some of its pictures are damaged and were left out.")


def duration(seconds: float) -> str:
    """``45 s``, ``30 min``, ``1 min 30 s``."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if rest else f"{minutes} min"


# Writing.


class _Writer:
    """Encodes what it is given, upright and small enough, and looks out for a poster."""

    def __init__(self, path: Path, reader: _Reader, limits: Limits) -> None:
        self._path = path
        self._reader = reader
        self._limits = limits
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        self._video: Any = None
        self._audio: Any = None
        self._graph: Any = None
        self._graph_for: tuple[Any, ...] = ()
        self._ticks = -1
        self._samples = 0
        self.poster = _Poster()

    def write(self, kind: str, frame: Any) -> None:
        if kind == "audio":
            self._write_sound(frame)
            return
        if self._video is None:
            self._begin(frame)
        kind_of_frame = (frame.width, frame.height, frame.format.name, frame.rotation)
        if kind_of_frame != self._graph_for:
            # A video may change its size on the way.
            self._drain()
            with _unconvertible():
                self._graph = self._graph_of(frame)
            self._graph_for = kind_of_frame
        with _unconvertible():
            self._graph.vpush(frame)
        self._pull()

    def _begin(self, frame: Any) -> None:
        """Both streams, before anything is written: a header knows them all."""
        width, height = fitted(frame, self._reader.video.sample_aspect_ratio, self._limits.size)
        rate = min(Fraction(MAX_RATE), max(Fraction(1), _fraction(self._reader.video.guessed_rate, 25)))
        rate = rate.limit_denominator(1001)
        options = {"preset": "veryfast", "crf": "23", "maxrate": "4M", "bufsize": "8M"}
        self._video = self._container.add_stream("libx264", rate=rate, options=options)
        self._video.width, self._video.height, self._video.pix_fmt = width, height, "yuv420p"
        context = self._video.codec_context
        context.time_base = Fraction(1, CLOCK)
        context.gop_size = max(1, round(rate * KEY_FRAME_EVERY))
        # BT.709, as the filter makes it and browsers expect it.
        context.color_range = context.colorspace = context.color_primaries = context.color_trc = 1
        if self._reader.audio is not None:
            given = self._reader.audio.codec_context
            mono = given.layout.nb_channels == 1
            self._audio = self._container.add_stream("aac", rate=48_000, layout="mono" if mono else "stereo")
            self._audio.bit_rate = 64_000 if mono else 128_000

    def _graph_of(self, frame: Any) -> Any:
        """The filters for frames like this one."""
        graph = av.filter.Graph()
        time_base = _fraction(frame.time_base, 1)
        nodes = [
            graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=time_base)
        ]
        nodes += [graph.add(name, arguments) for name, arguments in self._filters(frame)]
        nodes.append(graph.add("buffersink"))
        for one, next_one in pairwise(nodes):
            one.link_to(next_one)
        graph.configure()
        return graph

    def _filters(self, frame: Any) -> Iterator[tuple[str, str]]:
        if any(component.is_alpha for component in frame.format.components) or frame.format.has_palette:
            # What is transparent becomes black.
            yield "format", "gbrap"
            yield "premultiply", "inplace=1"
        # Degrees against the clock by which the picture lies in the file.
        match quarter_turns(frame):
            case 1:
                yield "transpose", "cclock"
            case 2:
                yield "hflip", ""
                yield "vflip", ""
            case 3:
                yield "transpose", "clock"
        size = f"{self._video.width}:{self._video.height}"
        yield "scale", f"{size}:flags=bicubic:out_color_matrix=bt709:out_range=tv"
        yield "setsar", "1"
        yield "format", "yuv420p"

    def _drain(self) -> None:
        if self._graph is not None:
            with _unconvertible():
                self._graph.vpush(None)
            self._pull()
            self._graph = None

    def _pull(self) -> None:
        while True:
            with _unconvertible():
                try:
                    frame = self._graph.vpull()
                except (av.error.BlockingIOError, av.error.EOFError):
                    return
            self._encode(frame)

    def _encode(self, frame: Any) -> None:
        if frame.time is None:
            ticks = self._ticks + max(CLOSEST, round(CLOCK / float(self._video.codec_context.framerate)))
        else:
            ticks = max(0, round((frame.time - self._reader.start) * CLOCK))
        if self._ticks >= 0 and ticks < self._ticks + CLOSEST:
            return
        self._ticks = ticks
        self.poster.offer(frame, ticks / CLOCK, self._reader.says_seconds)
        frame.pts, frame.time_base = ticks, Fraction(1, CLOCK)
        frame.pict_type = 0  # the encoder decides
        self._container.mux(self._video.encode(frame))

    def _write_sound(self, frame: Any) -> None:
        if self._reader.audio is None:
            return
        if self._video is None:
            return  # sound before the first picture
        if frame.pts is not None:
            base = _fraction(frame.time_base, 1)
            frame.pts = max(0, frame.pts - round(Fraction(self._reader.start) / base))
        try:
            packets = self._audio.encode(frame)
        except (av.error.FFmpegError, ValueError):
            self._reader.drop_sound()
            return
        self._samples += frame.samples
        self._container.mux(packets)

    def finish(self) -> Made:
        self._drain()
        self._container.mux(self._video.encode(None))
        if self._samples and self._reader.audio is not None:
            self._container.mux(self._audio.encode(None))
        self._container.close()
        return Made(
            self._video.width,
            self._video.height,
            round(max(self._reader.now, self._ticks / CLOCK), 3),
            sound=bool(self._samples),
            notes=self._reader.notes,
        )

    def abandon(self) -> None:
        """Close it; without the file, whose end it would otherwise write."""
        with suppress(FileNotFoundError):
            os.unlink(self._path)
        with suppress(av.error.FFmpegError, ValueError):
            self._container.close()


@contextmanager
def _unconvertible() -> Iterator[None]:
    """Only around the filters, since what is written may fail as well, for want of room."""
    try:
        yield
    except av.error.FFmpegError as error:
        raise UnreadableVideo("its pictures cannot be converted") from error


class _Poster:
    """The frame with most to see in it of three, since many videos begin in black."""

    QUALITY = 82

    def __init__(self) -> None:
        self._best: tuple[float, Image.Image] | None = None
        self._offered = 0

    def offer(self, frame: Any, seconds: float, length: float | None) -> None:
        moments = (0.0, 0.1 * length, 0.35 * length) if length else (0.0, 1.0, 4.0)
        if self._offered == len(moments) or seconds < moments[self._offered]:
            return
        self._offered += 1
        image = frame.to_image()
        contrast = ImageStat.Stat(image.convert("L")).stddev[0]
        if self._best is None or contrast > self._best[0]:
            self._best = contrast, image

    def save(self, path: Path) -> None:
        assert self._best is not None, "offered with the first frame that was written"
        self._best[1].save(path, "JPEG", quality=self.QUALITY, progressive=True)


def quarter_turns(frame: Any) -> int:
    """By how many quarters, against the clock, the picture is to be turned."""
    return round((frame.rotation or 0) / 90) % 4


def fitted(frame: Any, aspect: Any, size: int) -> tuple[int, int]:
    """Width and height of what is made: upright, square pixels, even numbers, no more than ``size``."""
    ratio = _fraction(aspect, 1)
    if not Fraction(1, 4) <= ratio <= 4:
        ratio = Fraction(1)
    width, height = frame.width * max(Fraction(1), ratio), frame.height * max(Fraction(1), 1 / ratio)
    if quarter_turns(frame) % 2:
        width, height = height, width
    scale = min(Fraction(1), Fraction(size) / max(width, height))
    return _even(width * scale), _even(height * scale)


def _even(pixels: Fraction) -> int:
    return max(16, round(pixels / 2) * 2)


def _fraction(value: Any, default: int) -> Fraction:
    """PyAV's rational number, which may be None or nothing."""
    if value is None or not value.numerator or not value.denominator:
        return Fraction(default)
    return Fraction(value.numerator, value.denominator)
