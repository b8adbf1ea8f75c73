"""How a photo would look."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from PIL import Image, ImageStat

from django_gearman.attempts import perform_assigned
from django_gearman.encoding import describe_exception
from project.gallery import views
from project.gallery.forms import PreviewForm
from project.gallery.jobs import make_preview, make_thumbnails
from project.gallery.models import Photo
from project.gallery.previews import write_preview
from project.gallery.thumbnails import UnreadableImage
from project.gallery.uploads import add_photos
from tests.harness import worker_thread
from tests.project.images import encoded, quarters, upload


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(encoded(quarters((1600, 1200))))
    return path


def choices(name: str) -> list[str]:
    return [value for value, _ in PreviewForm.base_fields[name].choices]


class TestWritePreview:
    @pytest.mark.parametrize(
        ("crop", "size"),
        [("whole", (960, 720)), ("square", (720, 720)), ("wide", (960, 540)), ("tall", (576, 720))],
    )
    def test_crops(self, source: Path, tmp_path: Path, crop: str, size: tuple[int, int]):
        assert write_preview(source, tmp_path / "a" / "b.jpg", "as-is", crop) == size
        with Image.open(tmp_path / "a" / "b.jpg") as image:
            assert image.size == size

    def test_every_crop_of_the_form_is_tried(self):
        assert choices("crop") == ["whole", "square", "wide", "tall"]

    def test_looks_differ(self, source: Path, tmp_path: Path):
        means = set()
        for look in choices("look"):
            write_preview(source, tmp_path / "b.jpg", look, "whole")
            with Image.open(tmp_path / "b.jpg") as image:
                means.add(tuple(round(value) for value in ImageStat.Stat(image).mean))
        assert len(means) == len(choices("look"))

    def test_no_photo(self, source: Path, tmp_path: Path):
        source.write_bytes(b"no photo")
        with pytest.raises(UnreadableImage):
            write_preview(source, tmp_path / "b.jpg", "grey", "whole")
        assert not (tmp_path / "b.jpg").exists()


def ready() -> Photo:
    (photo,) = add_photos([upload(content=encoded(quarters((800, 600))))])
    make_thumbnails.call(photo.pk)
    photo.refresh_from_db()
    return photo


@pytest.mark.django_db
class TestPage:
    def test_as_it_is_at_first(self, client: Client):
        photo = ready()
        page = client.get(f"/photos/{photo.pk}/").content.decode()

        assert f'<img src="{photo.large_url}"' in page
        assert "<legend>" in page

    def test_only_photos_that_are_ready(self, client: Client):
        (photo,) = add_photos([upload()])
        assert client.get(f"/photos/{photo.pk}/").status_code == 404

    def test_nonsense_is_not_asked_for(self, client: Client):
        photo = ready()
        response = client.get(f"/photos/{photo.pk}/", {"look": "../../evil", "crop": "whole"})

        assert response.status_code == 200
        assert "Select a valid choice" in response.content.decode()

    def test_no_job_server(self, client: Client):
        photo = ready()
        page = client.get(f"/photos/{photo.pk}/", {"look": "grey", "crop": "square"}).content.decode()

        assert "No worker answered within 3 seconds. This is the photo as it is." in page
        assert f'<img src="{photo.large_url}"' in page


@pytest.mark.django_db(transaction=True)
class TestWithServer:
    def test_worker_makes_it(self, client: Client, database_server: Any, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(views, "PREVIEW_TIMEOUT", 60.0)
        photo = ready()
        functions = {make_preview.name: partial(perform_assigned, make_preview)}
        with worker_thread(functions, database_server, describe=describe_exception):
            page = client.get(f"/photos/{photo.pk}/", {"look": "grey", "crop": "square"}).content.decode()
            assert f'<img src="{photo.url_of("preview-grey-square.jpg")}"' in page
            response = client.get(photo.url_of("preview-grey-square.jpg"))
            assert response.getvalue().startswith(b"\xff\xd8")
            response.close()

            Path(photo.original.path).write_bytes(b"no photo any more")
            page = client.get(f"/photos/{photo.pk}/", {"look": "sepia", "crop": "square"}).content.decode()
            assert "The preview failed: The file is not an image that can be read" in page
            assert f'<img src="{photo.large_url}"' in page

    def test_no_worker(self, client: Client, database_server: Any, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(views, "PREVIEW_TIMEOUT", 0.2)
        photo = ready()
        page = client.get(f"/photos/{photo.pk}/", {"look": "grey", "crop": "square"}).content.decode()

        assert "No worker answered within 0.2 seconds." in page
