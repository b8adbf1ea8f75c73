"""Any file in, a poster and a video for the web or one sentence out. No database, no jobs."""

from __future__ import annotations

import os
import random
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import pytest
from PIL import Image

from project.gallery.models import Video
from project.gallery.videos import Limits, Made, UnreadableVideo, clear_away, duration, write_web_video
from tests.project.clips import clip, real, song
from tests.project.images import BLUE, GREEN, RED, WHITE

LIMITS = Limits(max_seconds=60, max_pixels=2_000_000)

BLACK = (0, 0, 0)
UPRIGHT = (RED, GREEN, BLUE, WHITE)
"""Above from left to right, then below."""


class Maker:
    """Makes web versions, and looks at what came out."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "source"
        self.folder = folder / "made"
        self.scratch = folder / "scratch"

    def __call__(self, source: Path, limits: Limits = LIMITS, **options: Any) -> Made:
        return write_web_video(source, self.folder, self.scratch, limits, **options)

    @property
    def web(self) -> Path:
        return self.folder / Video.WEB

    @property
    def poster(self) -> Path:
        return self.folder / Video.POSTER

    def files(self) -> set[str]:
        return {
            path.name
            for folder in (self.folder, self.scratch)
            if folder.exists()
            for path in folder.iterdir()
        }

    def first_picture(self) -> Image.Image:
        with av.open(str(self.web)) as file:
            return next(file.decode(video=0)).to_image()

    def moments(self) -> list[float]:
        with av.open(str(self.web)) as file:
            return [float(frame.time) for frame in file.decode(video=0)]


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


@pytest.fixture
def refused(make: Maker) -> Callable[..., str]:
    """The reason for which a file is refused, and nothing left of it."""

    def refused(source: Path, limits: Limits = LIMITS) -> str:
        with pytest.raises(UnreadableVideo) as caught:
            make(source, limits)
        assert make.files() == set()
        assert re.fullmatch(r"The file is not a video that can be shown: .+[^.]\.", str(caught.value))
        return caught.value.reason

    return refused


def assert_quarters(image: Image.Image, expected: tuple[Any, ...] = UPRIGHT, tolerance: int = 30) -> None:
    points = [(x * image.width // 4, y * image.height // 4) for y in (1, 3) for x in (1, 3)]
    found = [image.convert("RGB").getpixel(point) for point in points]
    for pixel, colour in zip(found, expected, strict=True):
        assert max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= tolerance, (found, expected)


class TestWhatIsMade:
    def test_h264_and_aac_that_begin_to_play_before_all_is_there(self, make: Maker):
        made = make(real("bigbuckbunny.mp4"), Limits(size=320))

        assert (made.width, made.height, made.sound, made.notes) == (320, 180, True, [])
        assert made.seconds == pytest.approx(5.3, abs=0.1)
        with av.open(str(make.web)) as file:
            video, audio = file.streams
            assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (video.width, video.height) == (320, 180)
            assert (audio.codec_context.name, audio.codec_context.layout.nb_channels) == ("aac", 2)
            for stream in (video, audio):
                assert float(stream.duration * stream.time_base) == pytest.approx(5.3, abs=0.1)
        content = make.web.read_bytes()
        assert content.index(b"moov") < content.index(b"mdat")
        assert make.files() == {Video.WEB, Video.POSTER}
        assert os.stat(make.web).st_mode & 0o777 == 0o644

    def test_looks_like_the_original(self, make: Maker):
        with av.open(str(real("bikes.mp4"))) as file:
            original = next(file.decode(video=0)).to_image().resize((16, 16), Image.Resampling.BOX)
        make(real("bikes.mp4"), Limits(size=320))

        copy = make.first_picture().resize((16, 16), Image.Resampling.BOX)
        pairs = zip(original.tobytes(), copy.tobytes(), strict=True)
        assert sum(abs(a - b) for a, b in pairs) / len(copy.tobytes()) < 6

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("a.webm", {"codec": "libvpx-vp9", "sound": "libopus"}),
            ("a.mkv", {"codec": "libx264", "sound": "ac3", "layout": "5.1"}),
            ("a.mov", {"codec": "libx264", "sound": "pcm_s16le", "layout": "mono"}),
            ("a.ts", {"codec": "libx264", "sound": "mp2"}),
            ("a.flv", {"codec": "flv", "sound": "libmp3lame"}),
            ("a.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
            ("high.mkv", {"codec": "ffv1", "pix_fmt": "yuv420p10le"}),
            ("a.mp4", {"codec": "libx264", "pix_fmt": "yuv444p"}),
        ],
    )
    def test_formats(self, make: Maker, tmp_path: Path, name: str, options: dict[str, Any]):
        made = make(clip(tmp_path / name, **options))

        assert made.sound == ("sound" in options)
        assert_quarters(make.first_picture())
        with Image.open(make.poster) as poster:
            assert poster.format == "JPEG"
            assert_quarters(poster)

    @pytest.mark.parametrize(
        ("size", "expected"),
        [
            ((101, 75), (100, 76)),
            ((6, 4), (16, 16)),
            ((4000, 10), (1280, 16)),
            ((1600, 1200), (1280, 960)),
            ((320, 240), (320, 240)),
        ],
    )
    def test_even_sizes_no_larger_than_the_web_needs(
        self, make: Maker, tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
    ):
        made = make(clip(tmp_path / "a.avi", size=size, codec="rawvideo", pix_fmt="bgr24", seconds=0.2))

        assert (made.width, made.height) == expected
        assert make.first_picture().size == expected

    @pytest.mark.parametrize(
        ("rotation", "colours"),
        [
            # Against the clock, as FFmpeg's matrices are told.
            (90, (GREEN, WHITE, RED, BLUE)),
            (180, (WHITE, BLUE, GREEN, RED)),
            (-90, (BLUE, RED, WHITE, GREEN)),
        ],
    )
    def test_held_upright(self, make: Maker, tmp_path: Path, rotation: int, colours: tuple[Any, ...]):
        made = make(clip(tmp_path / "a.mp4", size=(320, 200), rotation=rotation))

        assert (made.width, made.height) == ((320, 200) if rotation == 180 else (200, 320))
        assert_quarters(make.first_picture(), colours)

    def test_frames_keep_their_moments(self, make: Maker, tmp_path: Path):
        moments = [0, 0.04, 0.5, 0.6, 3.0]
        made = make(clip(tmp_path / "a.mkv", moments=moments))

        assert make.moments() == pytest.approx(moments, abs=0.002)
        assert made.seconds == pytest.approx(3.0, abs=0.1)

    def test_no_more_than_sixty_frames_a_second(self, make: Maker, tmp_path: Path):
        make(clip(tmp_path / "a.mp4", rate=120))

        assert 55 <= len(make.moments()) <= 62

    @pytest.mark.parametrize(
        ("name", "codec", "pix_fmt"), [("a.mov", "qtrle", "argb"), ("a.mov", "png", "rgba")]
    )
    def test_transparent_becomes_black(
        self, make: Maker, tmp_path: Path, name: str, codec: str, pix_fmt: str
    ):
        picture = Image.new("RGBA", (160, 120), (255, 255, 255, 0))
        picture.paste((*RED, 255), (80, 0, 160, 120))
        make(clip(tmp_path / name, picture=picture, codec=codec, pix_fmt=pix_fmt, seconds=0.3))

        assert_quarters(make.first_picture(), (BLACK, RED, BLACK, RED))

    def test_nothing_of_the_visitor_is_kept(self, make: Maker, tmp_path: Path):
        source = clip(
            tmp_path / "a.mp4", metadata={"comment": "a secret comment", "location": "+48.8577+002.295/"}
        )
        assert b"secret" in source.read_bytes()
        make(source)

        for path in make.folder.iterdir():
            assert b"secret" not in path.read_bytes()
            assert b"48.8577" not in path.read_bytes()

    def test_poster_is_not_the_black_of_the_beginning(self, make: Maker, tmp_path: Path):
        path = tmp_path / "a.mkv"
        with av.open(str(path), "w") as file:
            stream: Any = file.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
            for number in range(10):
                image = (
                    Image.radial_gradient("L").resize((160, 120))
                    if number > 1
                    else Image.new("L", (160, 120))
                )
                frame = av.VideoFrame.from_image(image.convert("RGB"))
                frame.pts, frame.time_base = number, Fraction(1, 10)
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
        make(path)

        with Image.open(make.poster) as poster:
            assert poster.convert("L").getextrema()[1] > 150


class TestProgress:
    @pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
    def test_percent(self, make: Maker, tmp_path: Path, name: str):
        seen: list[tuple[int, int, bool]] = []
        source = clip(tmp_path / name, codec="libvpx-vp9", seconds=3, sound="libopus")

        make(source, report=lambda done, total: seen.append((done, total, make.web.exists())))

        assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
        assert {total for _, total, _ in seen} == {100}
        assert len({done for done, _, _ in seen}) > 10
        # Not seen before it is whole.
        assert [done for done, _, there in seen if there] == [100]

    def test_of_a_recording_that_does_not_know_its_length(self, make: Maker, tmp_path: Path):
        source = clip(tmp_path / "a.webm", codec="libvpx-vp9", seconds=20, options={"live": "1"})
        with av.open(str(source)) as file:
            assert not file.duration or file.duration < 0
        seen: list[int] = []
        make(source, report=lambda done, total: seen.append(done))

        assert seen == sorted(seen)
        assert seen[-1] == 100

    def test_what_it_raises_ends_the_work_and_leaves_nothing(self, make: Maker):
        class Enough(BaseException):
            pass

        def report(done: int, total: int) -> None:
            if done >= 5:
                raise Enough

        with pytest.raises(Enough):
            make(real("bikes.mp4"), report=report)
        assert make.files() == set()


class TestTwice:
    def test_second_run_replaces_the_files(self, make: Maker, tmp_path: Path):
        make(clip(tmp_path / "a.mp4", picture=Image.new("RGB", (320, 240), RED)))
        make(clip(tmp_path / "b.mp4"))

        assert_quarters(make.first_picture())
        assert make.files() == {Video.WEB, Video.POSTER}

    def test_failure_leaves_the_old_files(self, make: Maker, tmp_path: Path):
        make(clip(tmp_path / "a.mp4"))
        before = {path.name: path.read_bytes() for path in make.folder.iterdir()}
        (tmp_path / "b.mp4").write_text("no video")
        with pytest.raises(UnreadableVideo):
            make(tmp_path / "b.mp4")

        assert {path.name: path.read_bytes() for path in make.folder.iterdir()} == before

    def test_litter_of_killed_processes_is_cleared_away(self, make: Maker, tmp_path: Path):
        make.scratch.mkdir()
        old, new = make.scratch / "old", make.scratch / "new"
        for path in (old, new):
            path.touch()
        an_hour_ago = time.time() - 3600
        os.utime(old, (an_hour_ago, an_hour_ago))
        # Another process writes this one, and has written nothing for long.
        code = (
            "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX);"
            "print('locked', flush=True); sys.stdin.read()"
        )
        busy = make.scratch / "busy"
        with subprocess.Popen(
            [sys.executable, "-c", code, busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"locked\n"
            os.utime(busy, (an_hour_ago, an_hour_ago))
            clear_away(make.scratch)
            left = make.files()
            assert process.stdin is not None
            process.stdin.close()
        assert left == {"new", "busy"}
        clear_away(make.scratch)
        assert make.files() == {"new"}


def playlist(path: Path, other: Path) -> None:
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{other}\n#EXT-X-ENDLIST\n")


def concat_list(path: Path, other: Path) -> None:
    path.write_text(f"ffconcat version 1.0\nfile '{other}'\n")


def reference_movie(path: Path, other: Path) -> None:
    """A QuickTime file whose samples lie in another one, which an alias names in full."""
    content = clip(path.with_suffix(".mov"), seconds=0.5).read_bytes()
    name = bytes(other) + b"\0" * (len(bytes(other)) % 2)
    # Nothing of volume, file, levels; the item 2 is the path, -1 the end.
    record = (
        bytes(10 + 28 + 12 + 64 + 16 + 4 + 16) + struct.pack(">HH", 2, len(name)) + name + b"\xff\xff\0\0"
    )
    alias = struct.pack(">I4sI", 12 + len(record), b"alis", 0) + record
    old = content.index(b"url ", content.index(b"dref")) - 4
    grown = len(alias) - 12
    changed = bytearray(content[:old] + alias + content[old + 12 :])
    for box in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        at = content.rindex(box, 0, old) - 4
        changed[at : at + 4] = struct.pack(">I", struct.unpack(">I", content[at : at + 4])[0] + grown)
    path.write_bytes(changed)


class TestFilesThatNameOthers:
    """A stranger's file never makes another one be opened."""

    @pytest.mark.parametrize("write", [playlist, concat_list])
    def test_lists(self, refused: Callable[..., str], tmp_path: Path, write: Callable[[Path, Path], None]):
        source = tmp_path / "upload"
        write(source, clip(tmp_path / "secret.ts", codec="libx264"))

        assert refused(source) == "it is none of MP4, MOV, WebM, MKV, AVI or MPEG"

    def test_descriptor_and_address(self, refused: Callable[..., str], tmp_path: Path):
        for text in ("concat:/etc/passwd|/etc/hosts", "http://127.0.0.1:9/clip.mp4", "#EXTM3U\nfd:0\n"):
            (tmp_path / "upload").write_text(text)
            assert refused(tmp_path / "upload") == "it is none of MP4, MOV, WebM, MKV, AVI or MPEG"

    def test_reference_movie(self, refused: Callable[..., str], tmp_path: Path):
        secret = clip(tmp_path / "secret.mov", seconds=0.5)
        reference_movie(tmp_path / "upload", secret)
        # It is one: a reader that allows it opens the other file.
        opened: dict[str, BinaryIO] = {}

        def io_open(url: str, flags: int, options: dict[str, str]) -> BinaryIO:
            return opened.setdefault(url, open(url, "rb"))

        allow = {"enable_drefs": "1", "use_absolute_path": "1"}
        with av.open(str(tmp_path / "upload"), options=allow, io_open=io_open):
            pass
        for file in opened.values():
            file.close()
        assert str(secret) in "".join(opened)

        assert "damaged" in refused(tmp_path / "upload")


class TestUnreadable:
    """The sentence stands on the page and in the job record."""

    def test_text(self, refused: Callable[..., str], tmp_path: Path):
        (tmp_path / "a.mp4").write_text("Dear diary, today I made a video.\n" * 1000)
        assert refused(tmp_path / "a.mp4") == "it is none of MP4, MOV, WebM, MKV, AVI or MPEG"

    def test_picture(self, refused: Callable[..., str], tmp_path: Path):
        Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
        assert refused(tmp_path / "a.png") == "it is none of MP4, MOV, WebM, MKV, AVI or MPEG"

    def test_end_is_missing(self, refused: Callable[..., str], tmp_path: Path):
        content = real("bigbuckbunny.mp4").read_bytes()
        (tmp_path / "a.mp4").write_bytes(content[:600_000])
        assert refused(tmp_path / "a.mp4") == "it is damaged or ends too early"

    def test_half_of_a_file_that_begins_well(self, refused: Callable[..., str], tmp_path: Path):
        whole = clip(tmp_path / "a.mp4", seconds=20, options={"movflags": "faststart"}).read_bytes()
        at = whole.index(b"mdat")
        (tmp_path / "half.mp4").write_bytes(whole[: at + (len(whole) - at) // 2])
        assert re.fullmatch(r"it ends too early, after (9|10) s of 20 s", refused(tmp_path / "half.mp4"))

    @pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.avi", "a.ts", "a.mov"])
    @pytest.mark.parametrize("end", [1, 9, 40, 300])
    def test_only_a_beginning(self, refused: Callable[..., str], tmp_path: Path, name: str, end: int):
        codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
        content = clip(tmp_path / name, codec=codec).read_bytes()
        (tmp_path / "upload").write_bytes(content[:end])
        refused(tmp_path / "upload")

    def test_song(self, refused: Callable[..., str], tmp_path: Path):
        assert refused(song(tmp_path / "a.m4a")) == "there is no moving picture in it"

    def test_song_with_a_cover(self, refused: Callable[..., str], tmp_path: Path):
        path = tmp_path / "a.mkv"
        Image.new("RGB", (64, 48)).save(tmp_path / "cover.png")
        with av.open(str(song(tmp_path / "a.m4a"))) as source, av.open(str(path), "w") as file:
            file.add_attachment("cover.png", "image/png", (tmp_path / "cover.png").read_bytes())
            audio = file.add_stream_from_template(source.streams.audio[0])
            for packet in source.demux(audio=0):
                if packet.dts is not None:
                    packet.stream = audio
                    file.mux(packet)
        assert refused(path) == "there is no moving picture in it"

    def test_attachment_is_passed_over(self, make: Maker, tmp_path: Path):
        path = tmp_path / "a.mkv"
        with av.open(str(clip(tmp_path / "b.mp4"))) as source, av.open(str(path), "w") as file:
            file.add_attachment("evil.ttf", "application/x-truetype-font", b"no font" * 1000)
            video = file.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = video
                    file.mux(packet)
        make(path)
        assert_quarters(make.first_picture())

    def test_too_many_pixels(self, refused: Callable[..., str], tmp_path: Path):
        source = clip(tmp_path / "a.mkv", size=(2000, 1500), seconds=0.1)
        assert refused(source) == "2000 x 1500 are more than 2 megapixels"

    def test_more_pixels_than_anybody_decodes(self, refused: Callable[..., str], tmp_path: Path):
        # 30,000 x 30,000 pixels of nothing, which PNG says in few bytes.
        content = bytearray(
            clip(tmp_path / "a.mov", size=(64, 48), codec="png", pix_fmt="rgb24").read_bytes()
        )
        for at in [found.end() for found in re.finditer(b"IHDR", bytes(content))]:
            content[at : at + 8] = struct.pack(">II", 30_000, 30_000)
        (tmp_path / "b.mov").write_bytes(content)
        assert refused(tmp_path / "b.mov") == "no picture in it can be decoded"

    @pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
    def test_too_long(self, refused: Callable[..., str], tmp_path: Path, name: str):
        assert refused(clip(tmp_path / name, moments=[0, 1, 7200])) == "it is longer than 1 min"

    def test_longer_than_it_says(self, refused: Callable[..., str], tmp_path: Path):
        source = clip(tmp_path / "a.webm", codec="libvpx-vp9", moments=[0, 1, 7200], options={"live": "1"})
        assert refused(source) == "it is longer than 1 min"

    def test_too_many_pictures(
        self, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("project.gallery.videos.MOST_PICTURES", 8)
        assert refused(clip(tmp_path / "a.mp4", rate=30), Limits(max_seconds=3)) == "it has too many pictures"

    def test_too_many_bytes(self, refused: Callable[..., str]):
        assert refused(real("bikes.mp4"), Limits(max_bytes=1000)) == "it has more than 1,000 bytes"

    def test_picture_in_a_code_that_is_not_taken(
        self, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("project.gallery.videos.DECODERS", ("h264",))
        assert refused(clip(tmp_path / "a.mp4")) == "its picture is coded in a way that is not known here"

    def test_sound_in_a_code_that_is_not_taken_is_left_out(
        self, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("project.gallery.videos.DECODERS", ("h264",))
        made = make(clip(tmp_path / "a.mp4", codec="libx264", sound="aac"))

        assert not made.sound
        assert made.notes == ["Its sound is coded in a way that is not known here, and was left out."]

    def test_pictures_that_no_filter_takes(
        self, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(
            "project.gallery.videos._Writer._filters", lambda writer, frame: [("format", "no_such_format")]
        )
        assert refused(clip(tmp_path / "a.mp4")) == "its pictures cannot be converted"

    def test_full_disk_is_not_the_visitors_fault(self, make: Maker, tmp_path: Path):
        """As small a limit for files as a full disk would be."""
        clip(tmp_path / "a.mp4", seconds=3, picture=Image.effect_noise((640, 480), 90).convert("RGB"))
        code = (
            "import resource, signal, sys; from pathlib import Path;"
            "from project.gallery.videos import Limits, write_web_video;"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
            "folder = Path(sys.argv[1]);"
            "write_web_video(folder / 'a.mp4', folder / 'made', folder / 'scratch', Limits())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1
        assert "File too large" in done.stderr.splitlines()[-1]
        assert make.files() == set()

    def test_size_that_changes_on_the_way(self, make: Maker, tmp_path: Path):
        options: dict[str, Any] = {"codec": "libx264"}
        one = clip(tmp_path / "1.ts", size=(320, 240), moments=[0, 0.1, 0.2], **options)
        other = clip(tmp_path / "2.ts", size=(160, 240), moments=[2, 2.1, 2.2], **options)
        parts = [one.read_bytes(), other.read_bytes()]
        (tmp_path / "both.ts").write_bytes(b"".join(parts))
        made = make(tmp_path / "both.ts")

        assert (made.width, made.height) == (320, 240)
        with av.open(str(make.web)) as file:
            pictures = [frame.to_image() for frame in file.decode(video=0)]
        assert len(pictures) == 6
        for picture in pictures:
            assert_quarters(picture)

    @pytest.mark.parametrize("seed", range(6))
    def test_damaged_anywhere(self, make: Maker, tmp_path: Path, seed: int):
        """Either comes out as well as it can or is refused; nothing else happens."""
        chance = random.Random(seed)
        content = bytearray(real("carphone_pristine.mp4").read_bytes())
        for _ in range(60):
            content[chance.randrange(len(content))] = chance.randrange(256)
        (tmp_path / "a.mp4").write_bytes(content)
        try:
            make(tmp_path / "a.mp4")
        except UnreadableVideo:
            assert make.files() == set()
        else:
            assert make.files() == {Video.WEB, Video.POSTER}

    def test_missing_source_is_not_the_visitors_fault(self, make: Maker, tmp_path: Path):
        with pytest.raises(FileNotFoundError):
            make(tmp_path / "gone")


class TestDuration:
    def test_words(self):
        assert [duration(seconds) for seconds in (0, 45, 60, 90, 1800)] == [
            *("0 s", "45 s", "1 min", "1 min 30 s", "30 min")
        ]
