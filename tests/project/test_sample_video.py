from __future__ import annotations

import io
from pathlib import Path

import av
import pytest
from django.core.management import CommandError, call_command

from django_gearman.models import JobRecord
from project.gallery.models import Video


def make_sample_video(*args: str) -> str:
    out = io.StringIO()
    call_command("make_sample_video", *args, stdout=out)
    return out.getvalue()


class TestFile:
    def test_picture_and_sound_of_the_length_asked_for(self, tmp_path: Path):
        path = tmp_path / "new" / "a.mp4"
        output = make_sample_video("--seconds", "2", "--width", "320", "--output", str(path))

        assert f"{path}: {path.stat().st_size:,} bytes" in output
        with av.open(str(path)) as file:
            video, audio = file.streams
            assert (video.width, video.height, video.frames) == (320, 180, 50)
            for stream in (video, audio):
                assert float(stream.duration * stream.time_base) == pytest.approx(2, abs=0.1)
            pictures = [frame.to_image().tobytes() for frame in file.decode(video=0)]
        assert len(set(pictures)) == 50, "something moves"

    def test_default_file_is_beside_the_media(self, media: Path):
        make_sample_video("--seconds", "0.1", "--width", "64")
        assert (media.parent / "sample_video.mp4").exists()

    @pytest.mark.parametrize("wrong", [("--seconds", "0"), ("--seconds", "4000"), ("--width", "10")])
    def test_nonsense_is_refused(self, wrong: tuple[str, str]):
        with pytest.raises(CommandError, match="--seconds must be between 0 and 3600"):
            make_sample_video(*wrong)


@pytest.mark.django_db
class TestSubmit:
    def test_as_an_upload_would(self, media: Path):
        output = make_sample_video("--seconds", "0.2", "--width", "64", "--submit")

        video = Video.objects.get()
        assert video.title == "sample_video.mp4"
        assert f"job {JobRecord.objects.get().pk}" in output
        assert not (media.parent / "sample_video.mp4").exists()
