"""The example site in a browser: a visitor uploads photos, an operator follows the jobs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from tests.harness import wait_until

from .conftest import LIMIT, Visitor
from .photos import Photo, difference, small, turned
from .site import Site

pytestmark = [pytest.mark.browser, pytest.mark.timeout(420)]

Screenshot = Callable[[Page, str], None]

SIZES = (160, 480, 1280)
FORMATS = {"jpg": ("JPEG", "image/jpeg"), "webp": ("WEBP", "image/webp")}

WORK_LIMIT = 180_000
"""Milliseconds in which the worker makes the thumbnails of all photos, on a slow machine."""

RECORDS = "/admin/django_gearman/jobrecord/"
FUNCTION = "project.gallery.jobs.make_thumbnails"

ATTEMPT = """
from datetime import timedelta
from django.utils import timezone
from django_gearman.models import JobAttempt, JobRecord
def attempt(job, number):
    JobAttempt.objects.create(
        job_id=job, number=number, finished_at=timezone.now(), message="no", traceback=f"Traceback {number}"
    )
"""
"""For ``manage.py shell``: what a server writes of an attempt that comes to nothing."""

RETRYING = f"""{ATTEMPT}
job = JobRecord.objects.create(
    function="{FUNCTION}", status="RETRYING", attempts=1, run_after=timezone.now() + timedelta(days=1)
)
attempt(job.pk, 1)
print(job.pk)
"""
"""The same: a job that waits for its next attempt, for long; its number is printed."""

FORGET = "from django_gearman.models import JobRecord; JobRecord.objects.filter(pk={}).delete()"


@dataclass
class Upload:
    """What the visitor saw from pressing the button until every photo was ready."""

    page: Page
    labels_before: list[str]
    """What stood under the photos before a worker was there."""

    activity_before: str
    label_at_work: str
    """What stood under the first photo that a worker had in hand."""

    visits: list[str]
    """The pages that were loaded."""


@pytest.fixture(scope="module")
def upload(
    visitor: Visitor, site: Site, good: list[Photo], bad: dict[Path, str], screenshot: Screenshot
) -> Upload:
    """Twenty photos and three other files, uploaded and worked on."""
    page = visitor.context.new_page()
    page.goto("/")
    screenshot(page, "gallery-empty")
    upload_files(page, [*(photo.path for photo in good), *bad])
    expect(cards(page)).to_have_count(len(good) + len(bad), timeout=WORK_LIMIT)
    labels_before = cards(page).locator(".status").all_inner_texts()
    activity = page.locator("#activity")
    expect(activity).not_to_be_empty()
    activity_before = activity.inner_text()

    site.worker.start()
    at_work = cards(page).filter(has_text=re.compile(r"Making thumbnails: \d of 6"))
    expect(at_work.first).to_be_visible()
    label_at_work = at_work.first.locator(".status").inner_text()
    finished = page.locator("article[data-finished=true]")
    expect(finished.nth(len(good) // 2)).to_be_attached(timeout=WORK_LIMIT)
    screenshot(page, "gallery-progress")
    expect(activity).to_have_text("All done", timeout=WORK_LIMIT)
    return Upload(page, labels_before, activity_before, label_at_work, list(visitor.visits))


@pytest.fixture(autouse=True)
def _after_the_upload(upload: Upload) -> None:
    """Every test begins when the photos are there, whichever of them are run."""


def upload_files(page: Page, files: list[Path]) -> None:
    page.get_by_label("Choose photos").set_input_files(files)
    page.get_by_role("button", name="Upload").click()


def cards(page: Page) -> Locator:
    return page.get_by_role("article")


def card_of(page: Page, name: str) -> Locator:
    return page.get_by_role("article", name=name, exact=True)


def rows(page: Page) -> Locator:
    return page.locator("#result_list > tbody > tr")


def status_of(row: Locator) -> Locator:
    return row.locator(".gearman-status")


def folder_of(page: Page, site: Site, name: str) -> Path:
    """Where the thumbnails of the photo of this name lie, as its card says."""
    address = card_of(page, name).get_by_role("link").first.get_attribute("href") or ""
    return site.media / Path(address).relative_to("/media").parent


def job_of(page: Page, name: str) -> int:
    """The number of the job of the photo of this name."""
    link = card_of(page, name).get_by_role("link", name=re.compile(r"Job.\d+"))
    return int(re.sub(r"\D", "", link.inner_text()))


@pytest.fixture(scope="module")
def more_photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Small ones, for tests that are about the pages."""
    folder = tmp_path_factory.mktemp("more")
    paths = [folder / f"small-{number}.jpg" for number in range(4)]
    for number, path in enumerate(paths):
        Image.new("RGB", (640, 480), (60 * number, 90, 160)).save(path)
    return paths


@pytest.fixture
def without_worker(site: Site) -> Iterator[Site]:
    """A site that makes no thumbnails until ``site.worker.start()``."""
    site.worker.stop()
    yield site
    for program in (site.web, site.worker):
        if not program.is_running:
            program.start()


class TestUpload:
    def test_photos_wait_until_a_worker_is_there(
        self, upload: Upload, good: list[Photo], bad: dict[Path, str]
    ):
        count = len(good) + len(bad)
        assert upload.labels_before == ["Waiting for a worker"] * count
        assert upload.activity_before == f"{count} photos in progress"

    def test_progress_is_shown(self, upload: Upload):
        assert re.fullmatch(r"Making thumbnails: [0-6] of 6", upload.label_at_work)

    def test_page_is_not_loaded_again(self, upload: Upload, site: Site):
        # The empty gallery, the answer to the form, and where that leads to.
        assert upload.visits == [f"{site.url}/"] * 3

    def test_every_photo_shows_its_thumbnail(self, upload: Upload, good: list[Photo], screenshot: Screenshot):
        for photo in good:
            card = card_of(upload.page, photo.path.name)
            expect(card.locator(".status")).to_have_text("Ready")
            picture = card.get_by_role("img", name=photo.path.name, exact=True)
            picture.scroll_into_view_if_needed()
            expect(picture).to_have_js_property("complete", True)
            assert picture.evaluate("img => img.naturalWidth") > 0
            assert picture.evaluate("img => img.currentSrc").endswith(".webp")
        upload.page.evaluate("scrollTo(0, 0)")
        screenshot(upload.page, "gallery-done")

    def test_every_other_file_shows_the_reason(self, upload: Upload, bad: dict[Path, str]):
        for path, reason in bad.items():
            card = card_of(upload.page, path.name)
            expect(card.locator(".status")).to_have_text("Failed")
            expect(card.locator(".reason")).to_have_text(
                f"The file is not an image that can be read: {reason}."
            )
            expect(card.get_by_role("img")).to_have_count(0)

    def test_narrow_window_is_not_scrolled_sideways(self, upload: Upload, screenshot: Screenshot):
        page = upload.page
        wide = page.viewport_size
        page.set_viewport_size({"width": 360, "height": 800})
        overhang = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        screenshot(page, "gallery-narrow")
        page.set_viewport_size(wide)
        assert overhang <= 0


class TestThumbnails:
    """Each of the six files of each photo, on disk and as served."""

    def test_every_file_is_there_and_no_other(self, upload: Upload, site: Site, good: list[Photo]):
        folders = {folder_of(upload.page, site, photo.path.name) for photo in good}
        assert set((site.media / "thumbnails").iterdir()) == folders
        for folder in folders:
            assert {path.name for path in folder.iterdir()} == {
                f"{size}.{suffix}" for size in SIZES for suffix in FORMATS
            }

    def test_served_as_on_disk(self, upload: Upload, site: Site, good: list[Photo]):
        for photo in good:
            folder = folder_of(upload.page, site, photo.path.name)
            for path in folder.iterdir():
                response = upload.page.request.get(f"/media/{path.relative_to(site.media)}")
                assert response.status == 200
                assert response.headers["content-type"] == FORMATS[path.suffix[1:]][1]
                assert response.body() == path.read_bytes()
                response.dispose()

    @pytest.mark.parametrize("suffix", FORMATS)
    @pytest.mark.parametrize("size", SIZES)
    def test_picture(self, upload: Upload, site: Site, good: list[Photo], size: int, suffix: str):
        for photo in good:
            path = folder_of(upload.page, site, photo.path.name) / f"{size}.{suffix}"
            with Image.open(BytesIO(path.read_bytes())) as image:
                assert image.format == FORMATS[suffix][0], path
                assert image.mode == "RGB"
                assert not image.getexif(), "what the camera says of itself is not given away"
                shape = image.size
                looks = small(image)
            assert max(shape) == size
            scale = size / max(photo.size)
            assert shape == pytest.approx((photo.size[0] * scale, photo.size[1] * scale), abs=1)
            found = difference(looks, photo.looks)
            wrong = min(difference(looks, turn) for turn in turned(photo.looks))
            assert found < 4, f"{photo.path.name} does not look like the original"
            assert found * 2 < wrong, f"{photo.path.name} could be turned"

    def test_page_says_how_wide_they_are(self, upload: Upload, site: Site, good: list[Photo]):
        for photo in good:
            folder = folder_of(upload.page, site, photo.path.name)
            for source in card_of(upload.page, photo.path.name).locator("[srcset]").all():
                for candidate in (source.get_attribute("srcset") or "").split(", "):
                    address, width = candidate.split()
                    with Image.open(folder / Path(address).name) as image:
                        assert int(width.removesuffix("w")) == pytest.approx(image.width, abs=1)

    def test_originals_have_no_address(self, upload: Upload, site: Site):
        originals = list((site.media / "originals").iterdir())
        assert originals
        response = upload.page.request.get(f"/media/{originals[0].relative_to(site.media)}")
        assert response.status == 404
        response.dispose()


class TestGalleryPage:
    def test_visitors_without_javascript_reload(
        self, browser: Browser, without_worker: Site, more_photos: list[Path]
    ):
        visitor = Visitor(browser, without_worker, java_script_enabled=False)
        page = visitor.context.new_page()
        page.goto("/")
        upload_files(page, more_photos[:1])
        expect(cards(page).first.locator(".status")).to_have_text("Waiting for a worker")

        without_worker.worker.start()

        def is_ready() -> bool:
            page.reload()
            return cards(page).first.locator(".status").inner_text() == "Ready"

        wait_until(is_ready, LIMIT / 1000, "the thumbnails")
        visitor.close()
        assert visitor.troubles == []

    def test_page_waits_for_a_web_server_that_is_away(
        self, visitor: Visitor, without_worker: Site, more_photos: list[Path]
    ):
        page = visitor.context.new_page()
        page.goto("/")
        upload_files(page, more_photos[:2])
        expect(page.locator("#activity")).to_have_text("2 photos in progress")

        without_worker.web.stop()
        expect(page.locator("#connection")).to_have_text("Reconnecting…")
        without_worker.web.start()
        without_worker.worker.start()

        expect(page.locator("#activity")).to_have_text("All done", timeout=2 * LIMIT)
        expect(page.locator("#connection")).to_be_empty()
        page.close()
        # What the browser itself says of a server that does not answer.
        away = "ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE", "gallery: TypeError"
        visitor.troubles[:] = [
            trouble for trouble in visitor.troubles if not any(word in trouble for word in away)
        ]


class TestListOfJobs:
    def test_every_job_is_listed_with_its_status_and_progress(
        self, admin: Page, upload: Upload, good: list[Photo], bad: dict[Path, str], screenshot: Screenshot
    ):
        for name, status, figures in (
            *((photo.path.name, "Successful", "6/6") for photo in good),
            *((path.name, "Failed", "0/6") for path in bad),
        ):
            job = job_of(upload.page, name)
            admin.goto(f"{RECORDS}?q={job}")
            expect(rows(admin)).to_have_count(1)
            expect(status_of(rows(admin))).to_have_text(status)
            expect(rows(admin).locator(".gearman-figures")).to_have_text(figures)
            expect(rows(admin).get_by_role("progressbar")).to_have_accessible_name(f"Progress of job {job}")
        admin.goto(RECORDS)
        screenshot(admin, "admin-list")

    def test_the_last_column_is_whole_beside_the_filters(self, admin: Page, screenshot: Screenshot):
        admin.goto(RECORDS)
        wide = admin.viewport_size
        assert wide is not None
        admin.set_viewport_size({"width": 1300, "height": 900})
        screenshot(admin, "admin-list-1300")
        overhang = admin.evaluate(
            "(list => list.scrollWidth - list.clientWidth)(document.querySelector('#changelist .results'))"
        )
        admin.set_viewport_size(wide)
        assert overhang <= 0

    def test_reached_from_the_index(self, admin: Page, screenshot: Screenshot):
        admin.goto("/admin/")
        screenshot(admin, "admin-index")
        admin.get_by_role("link", name="Job records").first.click()
        expect(rows(admin).first).to_be_visible()

    def test_filter_by_failed(
        self, admin: Page, upload: Upload, bad: dict[Path, str], screenshot: Screenshot
    ):
        admin.goto(RECORDS)
        admin.locator("#changelist-filter").get_by_role("link", name="Failed", exact=True).click()
        expect(rows(admin)).to_have_count(len(bad))
        expect(status_of(rows(admin))).to_have_text(["Failed"] * len(bad))
        expect(rows(admin).locator(".gearman-reason")).to_have_text(["UnreadableImage"] * len(bad))
        screenshot(admin, "admin-failed")

    def test_search_by_id_and_by_handle(self, admin: Page, upload: Upload, good: list[Photo]):
        job = job_of(upload.page, good[0].path.name)
        admin.goto(f"{RECORDS}{job}/change/")
        handle = admin.locator(".fieldBox.field-handle_text .readonly").inner_text()
        assert handle.startswith("H:")

        for term in (str(job), handle):
            admin.goto(RECORDS)
            admin.locator("#searchbar").fill(term)
            admin.get_by_role("button", name="Search").click()
            expect(rows(admin)).to_have_count(1)
            expect(rows(admin).locator(".field-id")).to_have_text(str(job))

    def test_list_follows_new_jobs(
        self,
        admin: Page,
        operator: Visitor,
        visitor: Visitor,
        without_worker: Site,
        more_photos: list[Path],
        screenshot: Screenshot,
    ):
        gallery = visitor.context.new_page()
        gallery.goto("/")
        upload_files(gallery, more_photos[:1])
        expect(gallery.locator("#activity")).to_have_text("1 photo in progress")

        admin.goto(RECORDS)
        expect(status_of(rows(admin).nth(0))).to_have_text("Ready")
        live = admin.get_by_role("button", name="Live")
        expect(live).to_be_visible()
        before = rows(admin).count()
        visits = len(operator.visits)

        # Meanwhile somebody uploads more.
        upload_files(gallery, more_photos[1:])
        added = len(more_photos) - 1
        expect(rows(admin)).to_have_count(before + added)
        expect(status_of(rows(admin).nth(0))).to_have_text("Ready")
        screenshot(admin, "admin-list-live")

        # Those that came are chosen with the others.
        there = rows(admin).count()
        expect(admin.locator(".action-counter").first).to_have_text(f"0 of {there} selected")
        admin.locator("#action-toggle").check()
        expect(admin.locator("input.action-select:checked")).to_have_count(there)
        expect(admin.locator(".action-counter").first).to_have_text(f"{there} of {there} selected")
        admin.locator("#action-toggle").uncheck()
        rows(admin).nth(2).locator("input.action-select").check()
        rows(admin).nth(0).locator("input.action-select").click(modifiers=["Shift"])
        expect(admin.locator(".action-counter").first).to_have_text(f"3 of {there} selected")
        admin.locator("#action-toggle").check()
        admin.locator("#action-toggle").uncheck()

        without_worker.worker.start()
        for number in range(added + 1):
            expect(status_of(rows(admin).nth(number))).to_have_text("Successful")
            expect(rows(admin).nth(number).locator(".gearman-figures")).to_have_text("6/6")
        expect(live).to_be_hidden()
        assert len(operator.visits) == visits, "the page was loaded again"
        gallery.close()


@pytest.fixture
def retrying(site: Site) -> Iterator[int]:
    """A job that has failed once and is to be tried again, another day."""
    job = int(site.manage("shell", "-c", RETRYING).split()[-1])
    yield job
    site.manage("shell", "-c", FORGET.format(job))


class TestPageOfOneJob:
    def test_failed_job_shows_message_and_traceback(
        self, admin: Page, upload: Upload, bad: dict[Path, str], screenshot: Screenshot
    ):
        for path, reason in bad.items():
            admin.goto(f"{RECORDS}{job_of(upload.page, path.name)}/change/")
            expect(status_of(admin.locator("#content"))).to_have_text("Failed")
            message = f"The file is not an image that can be read: {reason}."
            expect(admin.get_by_role("region", name="Message")).to_have_text(message)
            traceback = admin.get_by_role("region", name="Traceback")
            expect(traceback).to_contain_text("write_thumbnails")
            expect(traceback).to_contain_text(f"UnreadableImage: {message}")
        screenshot(admin, "admin-job-failed")

    def test_successful_job_shows_arguments_and_return_value(
        self, admin: Page, upload: Upload, site: Site, good: list[Photo], screenshot: Screenshot
    ):
        for photo in good:
            name = photo.path.name
            admin.goto(f"{RECORDS}{job_of(upload.page, name)}/change/")
            expect(status_of(admin.locator("#content"))).to_have_text("Successful")
            expect(admin.locator(".field-function_path .readonly")).to_have_text(FUNCTION)
            number = (card_of(upload.page, name).get_attribute("data-photo-id")) or ""
            expect(admin.get_by_role("region", name="Arguments").get_by_role("cell")).to_have_text(number)
            result = json.loads(admin.get_by_role("region", name="JSON").inner_text())
            assert result == {
                "width": photo.size[0],
                "height": photo.size[1],
                "files": {
                    path.name: path.stat().st_size for path in folder_of(upload.page, site, name).iterdir()
                },
            }
        screenshot(admin, "admin-job-successful")

    def test_page_follows_its_job(
        self,
        admin: Page,
        operator: Visitor,
        visitor: Visitor,
        without_worker: Site,
        more_photos: list[Path],
        screenshot: Screenshot,
    ):
        gallery = visitor.context.new_page()
        gallery.goto("/")
        upload_files(gallery, more_photos[:1])
        expect(gallery.locator("#activity")).to_have_text("1 photo in progress")
        cards(gallery).first.get_by_role("link", name="Job").click()
        # Visitors are sent to the login, operators to the job.
        expect(gallery.get_by_role("button", name="Log in")).to_be_visible()
        screenshot(gallery, "admin-login")
        gallery.close()

        admin.goto(RECORDS)
        rows(admin).first.get_by_role("link").first.click()
        expect(status_of(admin.locator("#content"))).to_have_text("Ready")
        expect(admin.get_by_role("button", name="Live")).to_be_visible()
        visits = len(operator.visits)
        screenshot(admin, "admin-job-ready")

        without_worker.worker.start()
        expect(status_of(admin.locator("#content"))).to_have_text("Successful")
        expect(admin.get_by_role("region", name="JSON")).to_contain_text('"width": 640')
        # A section that was not there when the page was loaded.
        expect(admin.get_by_role("region", name="Log")).to_contain_text("6 files of a photo of 640 x ")
        expect(admin.get_by_role("heading", name="Times")).to_have_count(1)
        expect(admin.get_by_role("button", name="Live")).to_be_hidden()
        assert len(operator.visits) == visits, "the page was loaded again"

    def test_what_was_opened_stays_open(self, admin: Page, site: Site, retrying: int):
        admin.goto(f"{RECORDS}{retrying}/change/")
        attempts = admin.locator("details")
        attempts.first.locator("summary").press("Enter")
        expect(attempts.first.locator("pre")).to_be_visible()
        site.manage("shell", "-c", f"{ATTEMPT}attempt({retrying}, 2)")
        expect(attempts).to_have_count(2)
        # The newest stands first.
        expect(attempts.last.locator("pre")).to_have_text("Traceback 1")
        expect(attempts.last.locator("pre")).to_be_visible()
        expect(attempts.first.locator("pre")).to_be_hidden()

    def test_page_says_when_the_session_has_ended(self, admin: Page, operator: Visitor, retrying: int):
        admin.goto(f"{RECORDS}{retrying}/change/")
        expect(admin.get_by_role("button", name="Live")).to_be_visible()
        cookies = operator.context.cookies()
        operator.context.clear_cookies()
        admin.get_by_role("button", name="Not live: reload the page").click()
        expect(admin.get_by_role("button", name="Log in")).to_be_visible()
        operator.context.add_cookies(cookies)  # type: ignore[arg-type]  # of one type, told twice

    def test_way_to_the_jobs_of_the_same_function(self, admin: Page, upload: Upload, good: list[Photo]):
        admin.goto(f"{RECORDS}{job_of(upload.page, good[0].path.name)}/change/")
        admin.get_by_role("link", name="Jobs of this function").click()
        expect(rows(admin).nth(len(good))).to_be_visible()


class TestOtherPagesOfTheAdmin:
    def test_job_server_is_alive(self, admin: Page, screenshot: Screenshot):
        admin.goto("/admin/django_gearman/serverlease/")
        expect(rows(admin)).to_have_count(1)
        expect(rows(admin).locator(".field-renewed")).to_contain_text(re.compile(r"\d+\.\d+ s ago"))
        screenshot(admin, "admin-servers")
        rows(admin).get_by_role("link").first.click()
        expect(admin.locator(".field-epoch .readonly")).to_have_text("1")
        screenshot(admin, "admin-server")

    def test_schedule_is_made_and_shows_its_next_times(self, admin: Page, screenshot: Screenshot):
        admin.goto("/admin/django_gearman/schedule/add/")
        admin.get_by_label("Name").fill("nightly")
        admin.get_by_label("Function").fill("wc")
        admin.get_by_label("Cron").fill("30 2 * *")
        admin.get_by_label("Time zone").fill("Europe/Paris")
        admin.get_by_role("button", name="Save and continue editing").click()
        expect(admin.locator(".errorlist").last).to_contain_text("a cron has five fields")
        screenshot(admin, "admin-schedule-wrong")
        admin.get_by_label("Cron").fill("30 2 * * *")
        admin.get_by_role("button", name="Save and continue editing").click()
        expect(admin.locator(".gearman-times li")).to_have_count(5)
        expect(admin.locator(".gearman-times li").first).to_contain_text(re.compile(r"02:30:00 CES?T"))
        screenshot(admin, "admin-schedule")
        admin.goto("/admin/django_gearman/schedule/")
        expect(rows(admin).filter(has_text="nightly")).to_contain_text("30 2 * * *")
        screenshot(admin, "admin-schedules")
        rows(admin).filter(has_text="nightly").get_by_role("checkbox").check()
        admin.locator("select[name=action]").select_option("Disable")
        admin.get_by_role("button", name=re.compile("Go|Run")).click()
        expect(rows(admin).filter(has_text="nightly")).to_contain_text("Disabled")

    def test_photos_lead_to_their_jobs(
        self, admin: Page, upload: Upload, good: list[Photo], screenshot: Screenshot
    ):
        admin.goto("/admin/gallery/photo/")
        row = rows(admin).filter(has_text=good[0].path.name)
        expect(row.get_by_role("link", name=f"Job {job_of(upload.page, good[0].path.name)}")).to_be_visible()
        screenshot(admin, "admin-photos")
        row.get_by_role("link", name=good[0].path.name, exact=True).click()
        expect(admin.locator(".field-width .readonly")).to_have_text(str(good[0].size[0]))
        screenshot(admin, "admin-photo")

    def test_deleted_photo_takes_its_files_along(
        self, admin: Page, upload: Upload, site: Site, good: list[Photo]
    ):
        name = good[-1].path.name
        folder = folder_of(upload.page, site, name)
        before = len(list((site.media / "originals").iterdir()))
        admin.goto("/admin/gallery/photo/")
        rows(admin).filter(has_text=name).get_by_role("link", name=name, exact=True).click()
        admin.locator("a.deletelink").click()
        admin.get_by_role("button", name="Yes").click()
        expect(rows(admin).filter(has_text=name)).to_have_count(0)
        assert not folder.exists()
        assert len(list((site.media / "originals").iterdir())) == before - 1
