"""What the page of the videos says, and what its buttons do."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from asgiref.testing import ApplicationCommunicator
from django.core.asgi import get_asgi_application
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client

from django_gearman import JobContext
from django_gearman.exceptions import Discard
from django_gearman.models import JobRecord, ServerLease
from project.gallery import jobs, videos
from project.gallery.jobs import make_web_video
from project.gallery.models import Video
from project.gallery.uploads import add_videos
from tests.project.clips import clip
from tests.project.images import upload

pytestmark = pytest.mark.django_db

Status = JobRecord.Status


def video(title: str = "clip.mp4", *, status: str = Status.READY, **record: Any) -> Video:
    """A video whose job stands here."""
    job = JobRecord.objects.create(function="make_web_video", status=status, **record)
    size = {"width": 1280, "height": 720, "seconds": 5} if status == Status.SUCCESSFUL else {}
    return Video.objects.create(title=title, job_id=job.pk, **size)


def card(client: Client, video: Video) -> str:
    return client.get("/videos/cards/", {"video": video.pk}).content.decode()


def label(html: str) -> str:
    found = re.search(r'class="status">([^<]*)<', html)
    assert found is not None
    return found[1]


def uploaded(tmp_path: Path, **options: Any) -> Video:
    content = clip(tmp_path / "clip.mp4", **options).read_bytes()
    (video,) = add_videos([SimpleUploadedFile("clip.mp4", content)])
    return video


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


class TestPage:
    def test_empty_page_says_what_to_do(self, client: Client):
        page = client.get("/videos/").content.decode()

        assert 'accept="video/*"' in page
        assert "make_sample_video --submit" in page

    def test_no_inline_script_or_style(self, client: Client):
        for status in Status:
            video(status=status)
        page = client.get("/videos/").content.decode()

        assert not re.search(r"<style|style=|\son\w+=|javascript:", page)
        assert re.findall(r"<script[^>]*>(.*?)</script>", page) == [""]

    def test_queries_do_not_grow_with_videos(self, client: Client, django_assert_num_queries: Any):
        for _ in range(5):
            video()
        with django_assert_num_queries(3):  # the count, the videos, their records
            client.get("/videos/")

    @pytest.mark.parametrize(
        ("status", "record", "expected"),
        [
            (Status.READY, {}, "Waiting for a worker"),
            (Status.RUNNING, {}, "Converting"),
            (Status.RUNNING, {"numerator": 42, "denominator": 100}, "Converting: 42 %"),
            (Status.SUCCESSFUL, {}, "Ready"),
            (Status.FAILED, {"message": "It is <text>."}, "Failed"),
            (Status.DEAD, {"message": "The worker was lost"}, "Given up"),
            (Status.CANCELLED, {}, "Cancelled"),
        ],
    )
    def test_states(self, client: Client, status: str, record: dict[str, Any], expected: str):
        html = card(client, video(status=status, **record))

        assert label(html) == expected
        assert ("/cancel/" in html) == (status in JobRecord.LIVE)
        assert ("/again/" in html) == (status in (Status.DEAD, Status.CANCELLED))
        assert ("<video controls" in html) == (status == Status.SUCCESSFUL)
        if record.get("message"):
            assert record["message"].replace("<", "&lt;").replace(">", "&gt;") in html

    def test_notes_are_shown(self, client: Client):
        made = video(status=Status.SUCCESSFUL)
        Video.objects.update(notes="Its sound was left out.")

        assert "Its sound was left out." in card(client, made)

    def test_link_to_the_records_of_videos(self, client: Client, admin_client: Client):
        for name in (make_web_video.name, "other"):
            JobRecord.objects.create(function=name)
        page = client.get("/videos/").content.decode()
        found = re.search(r'href="(/admin/django_gearman/jobrecord/\?[^"]+)"', page)
        assert found is not None

        rows = re.findall(r"field-function.*?</t", admin_client.get(found[1]).content.decode(), re.DOTALL)
        assert len(rows) == 1
        assert "make_web_video" in rows[0]

    def test_admin(self, admin_client: Client):
        done, waiting = video(status=Status.SUCCESSFUL), video()
        page = admin_client.get("/admin/gallery/video/").content.decode()

        assert done.poster_url in page
        assert waiting.key.hex not in page
        assert admin_client.get(f"/admin/gallery/video/{done.pk}/change/").status_code == 200
        assert admin_client.get("/admin/gallery/video/add/").status_code == 403


class TestUpload:
    def test_video_and_its_job(self, client: Client, media: Path):
        response = client.post("/videos/", {"video": SimpleUploadedFile("../My clip.mp4", b"anything")})

        assert (response.status_code, response.headers["Location"]) == (302, "/videos/")
        made = Video.objects.get()
        record = JobRecord.objects.get(pk=made.job_id)
        assert made.title == "My clip.mp4"
        assert (record.queue_name, record.timeout, record.max_attempts) == ("video", 3600, 3)
        assert files_in(media) == [media / "originals" / made.key.hex]

    @pytest.mark.parametrize(
        ("files", "reason"),
        [
            ({}, "Please choose a video first."),
            ({"video": SimpleUploadedFile("a.mp4", b"")}, "A file without content cannot be a video."),
            ({"video": SimpleUploadedFile("a.mp4", bytes(2000))}, "a video may have 1000\xa0bytes"),
        ],
    )
    def test_refused(self, client: Client, settings: Any, files: dict[str, Any], reason: str):
        settings.VIDEO_LIMITS = {"max_bytes": 1000}
        response = client.post("/videos/", files)

        assert response.status_code == 422
        assert reason in response.content.decode()
        assert not Video.objects.exists()

    def test_video_among_photos_is_shown_the_way(self, client: Client):
        clip = SimpleUploadedFile("a.mp4", b"anything", content_type="video/mp4")
        response = client.post("/", {"photos": [upload(), clip]})

        assert response.status_code == 422
        assert "“a.mp4” is a video; videos have a page of their own." in response.content.decode()
        assert not JobRecord.objects.exists()

    def test_csrf_token_is_required(self):
        client = Client(enforce_csrf_checks=True)
        made = video()
        for address in ("/videos/", f"/videos/{made.pk}/cancel/", f"/videos/{made.pk}/again/"):
            assert client.post(address).status_code == 403
        assert JobRecord.objects.get().status == Status.READY


class TestButtons:
    def test_cancel(self, client: Client, tmp_path: Path):
        made = uploaded(tmp_path)
        page = client.post(f"/videos/{made.pk}/cancel/", follow=True).content.decode()

        assert "“clip.mp4” is cancelled." in page
        assert JobRecord.objects.get().status == Status.CANCELLED
        assert label(card(client, made)) == "Cancelled"

    def test_cancel_too_late(self, client: Client):
        made = video(status=Status.SUCCESSFUL)
        page = client.post(f"/videos/{made.pk}/cancel/", follow=True).content.decode()

        assert "“clip.mp4” had ended already." in page

    @pytest.mark.django_db(transaction=True)  # in a transaction nothing is waited for
    def test_cancel_without_its_job_server(self, client: Client, settings: Any):
        settings.GEARMAN = {"default": {"SERVERS": ["127.0.0.1:9"], "TIMEOUT": 0.2}}
        made = video(status=Status.RUNNING, handle="H:gone:r1", server_epoch=1)
        JobRecord.objects.update(server=ServerLease.objects.create(name="gone:4730"))
        page = client.post(f"/videos/{made.pk}/cancel/", follow=True).content.decode()

        assert "“clip.mp4” will be cancelled once its job server is there again." in page

    def test_again(self, client: Client, tmp_path: Path):
        made = uploaded(tmp_path)
        client.post(f"/videos/{made.pk}/cancel/")
        client.post(f"/videos/{made.pk}/again/")
        made.refresh_from_db()

        assert label(card(client, made)) == "Waiting for a worker"
        # Pressed by somebody who had not seen it yet.
        client.post(f"/videos/{made.pk}/again/")
        assert JobRecord.objects.count() == 2

    def test_only_by_post_and_of_what_is_there(self, client: Client):
        made = video()
        assert client.get(f"/videos/{made.pk}/cancel/").status_code == 405
        assert client.post(f"/videos/{made.pk + 1}/cancel/").status_code == 404
        assert client.post(f"/videos/{made.pk + 1}/again/").status_code == 404


class TestJob:
    def test_files_where_the_page_looks_for_them(self, client: Client, tmp_path: Path, media: Path):
        made = uploaded(tmp_path, sound="aac")
        result = make_web_video.call(made.pk)
        made.refresh_from_db()

        assert result == {"width": 320, "height": 240, "seconds": made.seconds, "sound": True}
        assert (made.width, made.height) == (320, 240)
        for url in (made.web_url, made.poster_url):
            response = client.get(url)
            assert response.status_code == 200
            assert len(response.getvalue()) > 500
            response.close()
        assert files_in(media / "videos") == sorted(
            [made.folder_path / "poster.jpg", made.folder_path / "web.mp4"]
        )

    def test_running_twice_is_harmless(self, tmp_path: Path):
        made = uploaded(tmp_path)
        assert make_web_video.call(made.pk) == make_web_video.call(made.pk)

    def test_limits_of_the_settings(self, tmp_path: Path, settings: Any, media: Path):
        made = uploaded(tmp_path, seconds=3)
        settings.VIDEO_LIMITS = {"max_seconds": 2}

        with pytest.raises(Discard, match="shown: it is longer than 2 s"):
            make_web_video.call(made.pk)
        assert files_in(media / "videos") == []

    def test_deleted_before(self, tmp_path: Path):
        with pytest.raises(Discard, match="The video was deleted"):
            make_web_video.call(4711)

    def test_deleted_meanwhile_leaves_no_file(
        self,
        tmp_path: Path,
        media: Path,
        monkeypatch: pytest.MonkeyPatch,
        django_capture_on_commit_callbacks: Any,
    ):
        made = uploaded(tmp_path)
        monkeypatch.setattr(JobContext, "set_progress", delete_once(made, django_capture_on_commit_callbacks))

        with pytest.raises(Discard, match="The video was deleted meanwhile"):
            make_web_video.call(made.pk)
        assert files_in(media) == []
        assert not made.folder_path.exists()

    def test_deleted_in_the_last_percent_leaves_no_file(
        self,
        tmp_path: Path,
        media: Path,
        monkeypatch: pytest.MonkeyPatch,
        django_capture_on_commit_callbacks: Any,
    ):
        made = uploaded(tmp_path)
        finish = videos._Writer.finish

        def delete_and_finish(writer: videos._Writer) -> videos.Made:
            with django_capture_on_commit_callbacks(execute=True):
                Video.objects.get(pk=made.pk).delete()
            return finish(writer)

        monkeypatch.setattr(videos._Writer, "finish", delete_and_finish)

        with pytest.raises(Discard, match="The video was deleted meanwhile"):
            make_web_video.call(made.pk)
        assert files_in(media) == []

    def test_cancelled_ends_between_two_frames(
        self, tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch
    ):
        made = uploaded(tmp_path)
        monkeypatch.setattr(JobContext, "cancelled", True)

        with pytest.raises(jobs.JobCancelled):
            make_web_video.call(made.pk)
        assert files_in(media / "videos") == []


def delete_once(made: Video, on_commit: Any) -> Any:
    def set_progress(context: JobContext, done: int, total: int) -> None:
        if done > 10 and Video.objects.filter(pk=made.pk).exists():
            with on_commit(execute=True):
                Video.objects.get(pk=made.pk).delete()

    return set_progress


class TestDelete:
    def test_files_go_with_the_row(
        self, tmp_path: Path, media: Path, django_capture_on_commit_callbacks: Any
    ):
        made = uploaded(tmp_path)
        make_web_video.call(made.pk)
        with django_capture_on_commit_callbacks(execute=True):
            Video.objects.all().delete()

        assert files_in(media) == []


class TestStream:
    def test_unfinished_and_finished(self, client: Client):
        done, failed = video(status=Status.SUCCESSFUL), video(status=Status.FAILED, message="no")
        response = client.get("/videos/stream/", {"video": [done.pk, failed.pk]})
        text = response.getvalue().decode()
        response.close()

        assert response.headers["Content-Type"] == "text/event-stream"
        first, over = text.strip().split("\n\n")
        shown = json.loads(first.removeprefix("event: cards\ndata: "))
        assert label(shown[f"video-{done.pk}"]) == "Ready"
        assert label(shown[f"video-{failed.pk}"]) == "Failed"
        assert over == "event: over\ndata: null"

    def test_deleted_before(self, client: Client):
        made = video(status=Status.SUCCESSFUL)
        gone = made.pk + 1
        response = client.get("/videos/stream/", {"video": [made.pk, gone]})
        first, over = response.getvalue().decode().strip().split("\n\n")
        response.close()

        shown = json.loads(first.removeprefix("event: cards\ndata: "))
        assert label(shown[f"video-{made.pk}"]) == "Ready"
        assert shown[f"video-{gone}"] == ""
        assert over == "event: over\ndata: null"

    @pytest.mark.parametrize("query", ["", "?video=", "?video=x&video=1e9&video=99999999999999999999"])
    def test_nothing_to_follow(self, client: Client, query: str):
        response = client.get(f"/videos/stream/{query}")
        assert response.getvalue().endswith(b"event: over\ndata: null\n\n")
        response.close()


@pytest.mark.django_db(transaction=True)  # the handler has a thread of its own
class TestStreamUnderASGI:
    """Through Django's own handler: the answer comes in pieces, while the job goes on."""

    def test_progress_as_it_is_made(self):
        made = video(status=Status.RUNNING, numerator=1, denominator=100)
        records = JobRecord.objects.filter(pk=made.job_id)

        async def follow() -> None:
            async with asyncio.timeout(20):
                application = await opened(made)
                await told(application, "Converting: 1 %")
                await records.aupdate(numerator=60)
                await told(application, "Converting: 60 %")
                await records.aupdate(status=Status.CANCELLED)
                await told(application, "Cancelled before it was done")
                await told(application, "event: over")
                await application.wait()

        async_to_sync(follow)()

    def test_listener_who_leaves(self):
        made = video(status=Status.RUNNING)

        async def leave() -> None:
            async with asyncio.timeout(20):
                application = await opened(made)
                await told(application, "Converting")
                await application.send_input({"type": "http.disconnect"})
                await application.wait()

        async_to_sync(leave)()


async def opened(made: Video) -> ApplicationCommunicator:
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/videos/stream/",
        "query_string": f"video={made.pk}".encode(),
        "headers": [],
    }
    application = ApplicationCommunicator(get_asgi_application(), scope)
    await application.send_input({"type": "http.request", "body": b""})
    assert (await application.receive_output())["status"] == 200
    return application


async def told(application: ApplicationCommunicator, expected: str) -> None:
    while expected not in (await application.receive_output())["body"].decode():
        pass
