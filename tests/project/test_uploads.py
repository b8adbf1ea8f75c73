"""Photos come in with their jobs, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from django.test import Client

from django_gearman.models import JobRecord
from project.gallery import uploads
from project.gallery.models import Photo
from tests.project.images import upload

pytestmark = pytest.mark.django_db


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


class TestAddPhotos:
    def test_each_photo_has_its_job(self, media: Path):
        photos = uploads.add_photos([upload(f"{n}.jpg") for n in range(3)])

        assert [photo.title for photo in photos] == ["0.jpg", "1.jpg", "2.jpg"]
        records = JobRecord.objects.in_bulk([photo.job_id for photo in photos])
        assert len(records) == 3
        for record in records.values():
            assert record.function.endswith("make_thumbnails")
            assert record.queue_name == "images"
            assert record.status == JobRecord.Status.READY
        assert Photo.objects.get(pk=photos[0].pk).job_id == photos[0].job_id

    def test_files_have_nothing_of_the_visitors_name(self, media: Path):
        (photo,) = uploads.add_photos([upload("../evil.html.php")])

        assert files_in(media) == [media / "originals" / photo.key.hex]

    def test_long_name_is_cut(self, media: Path):
        (photo,) = uploads.add_photos([upload("a" * 240 + ".jpg")])
        photo.refresh_from_db()

        assert len(photo.title) <= 255

    def test_failure_leaves_no_photo_no_job_and_no_file(self, media: Path, monkeypatch: pytest.MonkeyPatch):
        fail_at(monkeypatch, 3)

        with pytest.raises(RuntimeError):
            uploads.add_photos([upload(f"{n}.jpg") for n in range(4)])

        assert not Photo.objects.exists()
        assert not JobRecord.objects.exists()
        assert files_in(media) == []


class TestView:
    def test_one_photo(self, client: Client):
        response = client.post("/", {"photos": upload("Grandmother.jpg")})

        assert (response.status_code, response.headers["Location"]) == (302, "/")
        assert Photo.objects.get().title == "Grandmother.jpg"
        assert JobRecord.objects.count() == 1

    def test_several_photos(self, client: Client):
        client.post("/", {"photos": [upload(f"{n}.jpg") for n in range(5)]})

        assert Photo.objects.count() == JobRecord.objects.count() == 5
        assert set(Photo.objects.values_list("job_id", flat=True)) == set(
            JobRecord.objects.values_list("pk", flat=True)
        )

    def test_rollback_leaves_none(self, client: Client, media: Path, monkeypatch: pytest.MonkeyPatch):
        fail_at(monkeypatch, 2)

        with pytest.raises(RuntimeError):
            client.post("/", {"photos": [upload(), upload()]})

        assert not Photo.objects.exists()
        assert not JobRecord.objects.exists()
        assert files_in(media) == []

    def test_refused_upload_explains_and_stores_nothing(self, client: Client):
        response = client.post("/", {})

        assert response.status_code == 422
        assert "Please choose a photo first." in response.content.decode()
        assert not Photo.objects.exists()

    def test_csrf_token_is_required(self):
        response = Client(enforce_csrf_checks=True).post("/", {"photos": upload()})

        assert response.status_code == 403
        assert not Photo.objects.exists()


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the n-th photo's job fail to be enqueued; the ones before are enqueued."""
    real = uploads.make_thumbnails

    class Failing:
        calls = 0

        def enqueue(self, *args: Any) -> Any:
            self.calls += 1
            if self.calls == number:
                raise RuntimeError("cannot enqueue")
            return real.enqueue(*args)

    monkeypatch.setattr(uploads, "make_thumbnails", Failing())


class TestDelete:
    def test_files_go_with_the_row(self, media: Path, django_capture_on_commit_callbacks: Any):
        (photo,) = uploads.add_photos([upload()])
        photo.thumbnails_path.mkdir(parents=True)
        (photo.thumbnails_path / "160.jpg").touch()

        with django_capture_on_commit_callbacks(execute=True):
            Photo.objects.all().delete()

        assert files_in(media) == []

    def test_files_stay_until_commit(self, media: Path):
        (photo,) = uploads.add_photos([upload()])
        photo.delete()  # in the test's transaction, which never commits

        assert len(files_in(media)) == 1
