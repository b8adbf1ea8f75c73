"""What the pages say about photos and their jobs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from django.test import Client

from django_gearman.models import JobRecord
from project.gallery import views
from project.gallery.models import Photo
from project.middleware import POLICY, content_security_policy

pytestmark = pytest.mark.django_db

Status = JobRecord.Status


def photo(title: str = "photo.jpg", *, status: str = Status.READY, **record: Any) -> Photo:
    """A photo whose job stands here."""
    job = JobRecord.objects.create(function="make_thumbnails", status=status, **record)
    size = {"width": 3000, "height": 4000} if status == Status.SUCCESSFUL else {}
    return Photo.objects.create(title=title, job_id=job.pk, **size)


def card(client: Client, photo: Photo) -> str:
    return client.get("/cards/", {"photo": photo.pk}).content.decode()


class TestGallery:
    def test_empty_gallery_says_what_to_do(self, client: Client):
        page = client.get("/").content.decode()

        assert 'enctype="multipart/form-data"' in page
        assert "make_sample_photos --submit" in page

    def test_links_to_the_records(self, client: Client):
        page = client.get("/").content.decode()

        assert 'href="/admin/"' in page
        assert 'href="/admin/django_gearman/jobrecord/"' in page

    def test_newest_first_on_pages(self, client: Client, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(views, "PAGE", 2)
        photos = [photo() for _ in range(3)]

        def shown(page: str) -> list[int]:
            content = client.get("/", {"page": page}).content.decode()
            return [int(pk) for pk in re.findall(r'data-photo-id="(\d+)"', content)]

        assert shown("1") == [photos[2].pk, photos[1].pk]
        assert shown("2") == [photos[0].pk]
        assert shown("nonsense") == shown("1")

    def test_queries_do_not_grow_with_photos(self, client: Client, django_assert_num_queries: Any):
        for _ in range(5):
            photo()
        with django_assert_num_queries(3):  # the count, the photos, their records
            client.get("/")

    def test_no_inline_script_or_style(self, client: Client):
        photo()
        page = client.get("/").content.decode()

        assert not re.search(r"<style|style=|\son\w+=|javascript:", page)
        assert re.findall(r"<script[^>]*>(.*?)</script>", page) == [""]

    def test_not_cached(self, client: Client):
        assert "no-store" in client.get("/").headers["Cache-Control"]


class TestCard:
    def test_waiting(self, client: Client):
        html = card(client, photo())

        assert 'data-status="READY" data-finished="false"' in html
        assert '<progress value="0" max="1"' in html
        assert "Waiting for a worker" in html

    def test_running(self, client: Client):
        html = card(client, photo(status=Status.RUNNING, numerator=4, denominator=6))

        assert 'data-status="RUNNING" data-finished="false"' in html
        assert '<progress value="4" max="6"' in html
        assert "Making thumbnails: 4 of 6" in html

    def test_ready(self, client: Client):
        done = photo(status=Status.SUCCESSFUL)
        html = card(client, done)

        assert 'data-status="SUCCESSFUL" data-finished="true"' in html
        assert "<progress" not in html
        assert '<source type="image/webp"' in html
        # The widths are of an upright picture.
        assert re.findall(r"(\d+)\.webp (\d+)w", html) == [("160", "120"), ("480", "360"), ("1280", "960")]
        assert f"thumbnails/{done.key.hex}/1280.jpg" in html

    def test_failed_says_why(self, client: Client):
        html = card(client, photo(status=Status.FAILED, message="<it> is none of JPEG."))

        assert 'data-status="FAILED" data-finished="true"' in html
        assert "&lt;it&gt; is none of JPEG." in html

    @pytest.mark.parametrize("status", Status.values)
    def test_every_status_has_a_label(self, client: Client, status: str):
        html = card(client, photo(status=status))

        assert f'data-status="{status}"' in html
        assert re.search(r'<span class="status">\w', html)

    def test_name_is_escaped(self, client: Client):
        html = card(client, photo("<script>alert(1)</script>", status=Status.SUCCESSFUL))

        assert "<script>" not in html
        assert "&lt;script&gt;" in html

    def test_pruned_record_of_a_made_photo(self, client: Client):
        done = photo(status=Status.SUCCESSFUL)
        JobRecord.objects.all().delete()

        assert 'data-status="SUCCESSFUL"' in card(client, done)

    def test_pruned_record_of_a_photo_that_was_not_made(self, client: Client):
        lost = photo(status=Status.FAILED)
        JobRecord.objects.all().delete()

        assert 'data-finished="true"' in card(client, lost)
        assert "The record of its job is gone." in card(client, lost)

    def test_only_what_was_asked_for(self, client: Client):
        first, second, _ = photo(), photo(), photo()
        html = client.get("/cards/", {"photo": [second.pk, first.pk, "x", "9" * 30, "-1"]}).content.decode()

        assert set(re.findall(r'data-photo-id="(\d+)"', html)) == {str(first.pk), str(second.pk)}

    def test_queries_do_not_grow_with_photos(self, client: Client, django_assert_num_queries: Any):
        photos = [photo().pk for _ in range(5)]
        with django_assert_num_queries(2):
            client.get("/cards/", {"photo": photos})


class TestThumbnail:
    def test_served(self, client: Client, media: Path):
        done = photo(status=Status.SUCCESSFUL)
        done.thumbnails_path.mkdir(parents=True)
        (done.thumbnails_path / "160.jpg").write_bytes(b"a picture")

        response = client.get(done.thumbnail_url(160, "jpg"))

        assert b"".join(response.streaming_content) == b"a picture"
        assert response.headers["Content-Type"] == "image/jpeg"
        response.close()

    @pytest.mark.parametrize(
        "name",
        ["../originals/secret", "%2e%2e/originals/secret", "originals/..", "../secret", "gone/160.jpg"],
    )
    def test_originals_have_no_address(self, client: Client, media: Path, name: str):
        (media / "originals").mkdir(parents=True)
        (media / "originals" / "secret").touch()
        done = photo(status=Status.SUCCESSFUL)
        folder = done.thumbnail_url(160, "jpg").removesuffix(f"{done.key.hex}/160.jpg")

        assert client.get(folder + name).status_code in (400, 404)


class TestAdmin:
    def test_list_links_each_photo_to_its_record(self, admin_client: Client):
        done = photo(status=Status.SUCCESSFUL)
        waiting = photo()
        page = admin_client.get("/admin/gallery/photo/").content.decode()

        assert f'href="/admin/django_gearman/jobrecord/{done.job_id}/change/"' in page
        assert f'href="/admin/django_gearman/jobrecord/{waiting.job_id}/change/"' in page
        assert done.thumbnail_url(160, "jpg") in page
        assert waiting.key.hex not in page

    def test_photo_page(self, admin_client: Client):
        done = photo(status=Status.SUCCESSFUL)

        assert admin_client.get(f"/admin/gallery/photo/{done.pk}/change/").status_code == 200

    def test_none_is_added_without_a_job(self, admin_client: Client):
        assert admin_client.get("/admin/gallery/photo/add/").status_code == 403


class TestContentSecurityPolicy:
    def test_every_page_has_it(self, rf: Any):
        response = content_security_policy(lambda request: views.index(request))(rf.get("/"))

        assert response.headers["Content-Security-Policy"] == POLICY
        assert "unsafe" not in POLICY
