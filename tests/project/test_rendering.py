"""Photos rendered again together, through the real queue."""

from __future__ import annotations

import re
import threading
from functools import partial
from typing import Any

import pytest
from django.core import mail
from django.test import Client
from PIL import Image

from django_gearman import GroupResult
from django_gearman.attempts import perform_assigned
from django_gearman.encoding import describe_exception
from django_gearman.models import JobGroup, JobRecord
from project.gallery import thumbnails
from project.gallery.jobs import make_thumbnails, render_again
from project.gallery.models import Photo
from project.gallery.uploads import add_photos
from tests.harness import worker_thread
from tests.project.images import encoded, quarters, upload

pytestmark = pytest.mark.django_db


@pytest.fixture
def photos() -> list[Photo]:
    photos = add_photos([upload(f"{n}.jpg", encoded(quarters((640, 480)))) for n in range(3)])
    for photo in photos:
        make_thumbnails.call(photo.pk)
    return list(Photo.objects.order_by("pk"))


def post(client: Client, which: str, *photos: Photo, large: int = 1920, quality: int = 55) -> Any:
    data = {"which": which, "photos": [photo.pk for photo in photos], "large": large, "quality": quality}
    return client.post("/render/", data)


class TestForm:
    def test_selected(self, client: Client, photos: list[Photo]):
        response = post(client, "selected", photos[0], photos[2])
        made = GroupResult.find(JobGroup.objects.get().pk)

        assert (response.status_code, response.headers["Location"]) == (302, f"/render/{made.id}/")
        assert made.total == 2
        assert made.on_complete is not None
        assert made.on_complete.status == JobRecord.Status.WAITING

    def test_all(self, client: Client, photos: list[Photo]):
        add_photos([upload()])  # which is not ready
        post(client, "all")

        assert JobGroup.objects.get().total == 3

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            ({"which": "selected", "large": 1280, "quality": 82}, "Please select photos first."),
            ({"which": "all", "large": 1280, "quality": 82}, "There are no photos yet."),
            ({"which": "all", "large": 10**9, "quality": 82}, "Select a valid choice. 1000000000"),
            ({"which": "selected", "large": 1280, "quality": 82, "photos": ["x"]}, "not a valid value"),
            ({"which": "selected", "large": 1280, "quality": 82, "photos": ["9" * 25]}, "not a valid value"),
        ],
    )
    def test_refused(self, client: Client, data: dict[str, Any], reason: str):
        page = client.post("/render/", data, follow=True).content.decode()

        assert reason in page
        assert not JobGroup.objects.exists()

    def test_csrf_token_is_required(self):
        assert Client(enforce_csrf_checks=True).post("/render/", {"which": "all"}).status_code == 403

    def test_groups_that_are_not_there(self, client: Client):
        assert client.get("/render/4711/").status_code == 404
        assert client.post("/render/4711/cancel/").status_code == 404
        assert client.get("/render/cards/", {"group": 4711}).content == b""


class TestRun:
    def test_thumbnails_and_mail(
        self, client: Client, photos: list[Photo], gearman_jobs: Any, mailoutbox: list[mail.EmailMessage]
    ):
        before = photos[0]
        post(client, "all")
        gearman_jobs.run_all()
        after = Photo.objects.get(pk=before.pk)

        assert (after.large, after.edition) == (1920, 1)
        assert after.large_url == f"{before.large_url.replace('1280', '1920')}?1"
        assert {path.name for path in after.folder_path.iterdir()} == {
            f"{size}.{suffix}" for size in (160, 480, 1920) for suffix in ("jpg", "webp")
        }
        with Image.open(after.folder_path / "1920.jpg") as image:
            assert image.size == (640, 480), "not enlarged"
        (message,) = mailoutbox
        assert message.subject == "3 of 3 photos were rendered again"
        assert message.to == ["gallery@example.com"]

    def test_page_when_all_is_done(self, client: Client, photos: list[Photo], gearman_jobs: Any):
        post(client, "selected", photos[0])
        gearman_jobs.run_all()
        page = client.get(f"/render/{JobGroup.objects.get().pk}/").content.decode()

        assert "Done: all 1" in page
        assert 'data-finished="true"' in page
        size = sum(path.stat().st_size for path in photos[0].folder_path.iterdir())
        assert re.search(rf"All thumbnails together have {size / 1024:.1f}\sKB", page)
        assert "A summary was mailed to gallery@example.com." in page

    def test_deleted_and_damaged_photos_are_named_in_the_mail(
        self, client: Client, photos: list[Photo], gearman_jobs: Any, mailoutbox: list[mail.EmailMessage]
    ):
        post(client, "all")
        photos[0].delete()
        with open(photos[1].original.path, "wb") as file:
            file.write(b"no photo")
        gearman_jobs.run_all()

        (message,) = mailoutbox
        assert message.subject == "1 of 3 photos were rendered again"
        assert re.search(r"- job \d+: The photo was deleted\.", message.body)
        assert re.search(r"- job \d+: The file is not an image that can be read", message.body)
        page = client.get(f"/render/{JobGroup.objects.get().pk}/").content.decode()
        assert "Done, but for 2 of 3" in page
        assert "All thumbnails together" not in page

    def test_smaller_again(self, client: Client, photos: list[Photo], gearman_jobs: Any):
        for large, quality in ((1920, 92), (960, 55)):
            post(client, "selected", photos[0], large=large, quality=quality)
            gearman_jobs.run_all()
        photo = Photo.objects.get(pk=photos[0].pk)

        assert (photo.large, photo.edition) == (960, 2)
        assert {path.stem for path in photo.folder_path.iterdir()} == {"160", "480", "960"}


@pytest.mark.django_db(transaction=True)
class TestWithServer:
    def test_one_at_a_time_of_a_photo(
        self, database_server: Any, photos: list[Photo], monkeypatch: pytest.MonkeyPatch
    ):
        read, begun, other_photo = thumbnails.read, [], threading.Event()

        def read_in_turn(source: Any, size: int) -> Any:
            begun.append(size)
            if size == 960:  # the first, which lasts until there was time for all that may begin
                assert other_photo.wait(60)
            elif size == 1280:
                other_photo.set()
            return read(source, size)

        monkeypatch.setattr(thumbnails, "read", read_in_turn)
        calls = [(photos[0].pk, 960, 82), (photos[0].pk, 1920, 82), (photos[1].pk, 1280, 82)]
        results = [render_again.enqueue(*call) for call in calls]
        functions = {render_again.name: partial(perform_assigned, render_again)}
        with worker_thread(functions, database_server, threads=2, describe=describe_exception):
            for result in results:
                result.get(60)

        # The other photo may be first: two threads begin at once.
        assert (sorted(begun[:2]), begun[2:]) == ([960, 1280], [1920])
        photo = Photo.objects.get(pk=photos[0].pk)
        assert (photo.large, photo.edition) == (1920, 2)
        assert {path.stem for path in photo.folder_path.iterdir()} == {"160", "480", "1920"}


class TestPage:
    def test_progress_and_cancel(self, client: Client, photos: list[Photo]):
        post(client, "all")
        address = f"/render/{JobGroup.objects.get().pk}/"
        assert "Rendering: 0 of 3" in client.get(address).content.decode()

        response = client.post(f"{address}cancel/")
        assert response.headers["Location"] == address
        page = client.get(address).content.decode()
        assert "Done, but for 3 of 3" in page
        assert "The summary is being mailed." in page

    def test_stream(self, client: Client, photos: list[Photo], gearman_jobs: Any):
        post(client, "selected", photos[0])
        gearman_jobs.run_all()
        response = client.get("/render/stream/", {"group": JobGroup.objects.get().pk})

        assert b"Done: all 1" in response.getvalue()
        response.close()

    def test_stream_of_a_group_that_was_pruned(self, client: Client):
        response = client.get("/render/stream/", {"group": 4711})

        assert b'data: {"group-4711": ""}\n' in response.getvalue()
        response.close()
