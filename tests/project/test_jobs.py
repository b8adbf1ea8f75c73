"""The jobs as a worker runs them, in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from django_gearman import Job
from django_gearman.exceptions import Discard
from project.gallery import previews, thumbnails
from project.gallery.jobs import make_preview, make_thumbnails, make_web_video, render_again, reverse
from project.gallery.models import Photo
from project.gallery.thumbnails import UnreadableImage
from project.gallery.uploads import add_photos
from tests.project.images import encoded, quarters, upload


@pytest.mark.parametrize("job", [make_thumbnails, render_again, make_preview, make_web_video], ids=str)
def test_no_file_keeps_a_worker_for_ever(job: Job[..., Any]):
    """A JPEG of 400 KiB can take 20 seconds, and 64 MiB may be uploaded."""
    assert job.timeout


@pytest.mark.django_db
class TestMakeThumbnails:
    def test_six_files_where_the_page_looks_for_them(self, media: Path):
        (photo,) = add_photos([upload(content=encoded(quarters((2000, 1000))))])

        made = make_thumbnails.call(photo.pk)

        assert (made["width"], made["height"]) == (2000, 1000)
        assert {path.name: path.stat().st_size for path in photo.thumbnails_path.iterdir()} == made["files"]
        for size in Photo.SIZES:
            for suffix in ("jpg", "webp"):
                name = photo.thumbnail_url(size, suffix).split("media/")[1]
                assert (media / name).is_file()

    def test_size_is_kept(self):
        (photo,) = add_photos([upload(content=encoded(quarters((300, 200))))])

        make_thumbnails.call(photo.pk)
        photo.refresh_from_db()

        assert (photo.width, photo.height) == (300, 200)

    def test_running_twice_is_harmless(self):
        (photo,) = add_photos([upload()])

        assert make_thumbnails.call(photo.pk) == make_thumbnails.call(photo.pk)

    def test_what_is_no_photo_fails_with_a_sentence(self):
        (photo,) = add_photos([upload("notes.jpg", b"no photo")])

        with pytest.raises(UnreadableImage, match="The file is not an image that can be read"):
            make_thumbnails.call(photo.pk)

        photo.refresh_from_db()
        assert photo.width is None
        assert not photo.thumbnails_path.exists()


@pytest.mark.django_db
class TestDeletedMeanwhile:
    @pytest.mark.parametrize(
        "run",
        [
            lambda pk: make_thumbnails.call(pk),
            lambda pk: render_again.call(pk, 960, 82),
            lambda pk: make_preview.call(pk, "grey", "square"),
        ],
        ids=["thumbnails", "again", "preview"],
    )
    def test_no_file_stays(
        self,
        run: Callable[[int], object],
        media: Path,
        monkeypatch: pytest.MonkeyPatch,
        django_capture_on_commit_callbacks: Any,
    ):
        (photo,) = add_photos([upload()])
        read = thumbnails.read

        def read_and_delete(*args: Any) -> Any:
            made = read(*args)
            with django_capture_on_commit_callbacks(execute=True):
                Photo.objects.get(pk=photo.pk).delete()
            return made

        monkeypatch.setattr(thumbnails, "read", read_and_delete)
        monkeypatch.setattr(previews, "read", read_and_delete)

        with pytest.raises(Discard, match="The photo was deleted meanwhile"):
            run(photo.pk)
        assert [path for path in media.rglob("*") if path.is_file()] == []


class TestReverse:
    def test_bytes(self):
        assert reverse.call(b"Hello\x00\xff") == b"\xff\x00olleH"
