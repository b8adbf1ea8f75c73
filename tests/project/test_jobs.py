"""The jobs as a worker runs them, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from project.gallery.jobs import make_thumbnails, reverse
from project.gallery.models import Photo
from project.gallery.thumbnails import UnreadableImage
from project.gallery.uploads import add_photos
from tests.project.images import encoded, quarters, upload


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


class TestReverse:
    def test_bytes(self):
        assert reverse.call(b"Hello\x00\xff") == b"\xff\x00olleH"
