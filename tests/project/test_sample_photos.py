from __future__ import annotations

import io
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command
from PIL import Image

from django_gearman.models import JobRecord
from project.gallery.models import Photo
from project.gallery.thumbnails import read


def make_sample_photos(*args: str) -> str:
    out = io.StringIO()
    call_command("make_sample_photos", *args, stdout=out)
    return out.getvalue()


class TestFolder:
    def test_photos_of_the_size_asked_for(self, tmp_path: Path):
        make_sample_photos("--count", "4", "--megapixels", "0.5", "--output", str(tmp_path / "new"))

        paths = sorted((tmp_path / "new").iterdir())
        assert [path.name for path in paths] == [f"sample-{n:03}.jpg" for n in (1, 2, 3, 4)]
        orientations = set()
        for path in paths:
            with Image.open(path) as image:
                assert image.width * image.height == pytest.approx(500_000, rel=0.01)
                orientations.add(image.getexif()[0x0112])
        assert orientations == {1, 3, 6, 8}

    def test_every_photo_is_upright_for_a_reader_of_exif(self, tmp_path: Path):
        make_sample_photos("--count", "4", "--megapixels", "0.1", "--output", str(tmp_path))

        for path in tmp_path.iterdir():
            image, _ = read(path, 1000)
            # The sky is bright, the ground dark.
            sky, ground = (image.convert("L").getpixel((2, y)) for y in (2, image.height - 3))
            assert sky > ground + 40, path.name

    def test_same_on_every_call(self, tmp_path: Path):
        for folder in ("a", "b"):
            make_sample_photos("--count", "1", "--megapixels", "0.1", "--output", str(tmp_path / folder))
        first, second = (next((tmp_path / folder).iterdir()) for folder in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()

    def test_default_folder_is_beside_the_media(self, media: Path):
        make_sample_photos("--count", "1", "--megapixels", "0.1")
        assert (media.parent / "sample_photos" / "sample-001.jpg").exists()

    @pytest.mark.parametrize("wrong", [("--count", "0"), ("--megapixels", "0"), ("--megapixels", "101")])
    def test_nonsense_is_refused(self, wrong: tuple[str, str]):
        with pytest.raises(CommandError):
            make_sample_photos(*wrong)


@pytest.mark.django_db
class TestSubmit:
    def test_as_an_upload_would(self, media: Path):
        output = make_sample_photos("--count", "2", "--megapixels", "0.1", "--submit")

        assert [photo.title for photo in Photo.objects.order_by("pk")] == ["sample-001.jpg", "sample-002.jpg"]
        assert JobRecord.objects.count() == 2
        assert f"job {Photo.objects.first().job_id}" in output
        assert not (media.parent / "sample_photos").exists()
