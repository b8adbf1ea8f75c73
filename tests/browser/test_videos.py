"""The videos of the example site in a browser: upload, progress, playing, cancelling, failure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.harness import wait_until
from tests.project.clips import looped, real

from .conftest import Visitor
from .site import Site

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

Screenshot = Callable[[Page, str], None]

WORK_LIMIT = 120_000
"""Milliseconds in which a worker is done with a short clip, on a slow machine."""

RECORDS = "/admin/django_gearman/jobrecord/"


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real clip, often enough that one may watch it being converted."""
    return looped(tmp_path_factory.mktemp("clips") / "long.mp4", real("bikes.mp4"), 30)


@pytest.fixture(scope="module", autouse=True)
def worker(site: Site) -> None:
    site.worker.start()


@pytest.fixture
def page(visitor: Visitor) -> Iterator[Page]:
    page = visitor.context.new_page()
    page.goto("/videos/")
    yield page
    page.close()


def upload(page: Page, path: Path) -> Locator:
    """Its card."""
    page.get_by_label("Choose a video").set_input_files(path)
    page.get_by_role("button", name="Upload").click()
    card = page.get_by_role("article", name=path.name, exact=True).first
    expect(card).to_be_visible()
    return card


def status(card: Locator) -> Locator:
    return card.locator(".status")


def cancel(card: Locator) -> None:
    card.get_by_role("button", name="Cancel").click()


def files_of(site: Site) -> set[str]:
    return {
        str(path.relative_to(site.media)) for path in (site.media / "videos").rglob("*") if path.is_file()
    }


class TestVideos:
    def test_real_clip_plays_and_is_sought_in(self, page: Page, site: Site, screenshot: Screenshot):
        screenshot(page, "videos-empty")
        card = upload(page, real("bigbuckbunny.mp4"))
        expect(status(card)).to_have_text("Ready", timeout=WORK_LIMIT)
        expect(page.locator("#activity")).to_have_text("All done")
        expect(page.locator("#news")).to_have_text("bigbuckbunny.mp4: Ready")
        screenshot(page, "videos-ready")

        video = card.locator("video")
        assert video.evaluate("video => video.readyState") == 0, "nothing is loaded before it is asked for"
        video.evaluate("video => { video.muted = true; return video.play() }")
        page.wait_for_function("video => video.currentTime > 0.3", arg=video.element_handle())
        assert video.evaluate("video => [video.videoWidth, video.videoHeight]") == [1280, 720]
        assert video.evaluate("video => video.duration") == pytest.approx(5.3, abs=0.1)
        video.evaluate("video => { video.currentTime = 4 }")
        page.wait_for_function(
            "video => !video.seeking && video.currentTime >= 4", arg=video.element_handle()
        )
        page.wait_for_function("video => video.ended", arg=video.element_handle())
        assert video.evaluate("video => video.error") is None

    def test_progress_moves_and_cancel_ends_it(
        self, page: Page, site: Site, visitor: Visitor, admin: Page, long: Path, screenshot: Screenshot
    ):
        before = files_of(site)
        visits = len(visitor.visits)
        card = upload(page, long)
        expect(status(card)).to_have_text(re.compile(r"Converting: [1-9]\d? %"))
        first = percent(card)
        wait_until(lambda: percent(card) > first, 30, "progress")
        assert float(card.get_by_role("progressbar").get_attribute("value") or 0) >= first
        assert page.locator("#activity").inner_text() == "1 video in progress"
        assert len(visitor.visits) == visits + 2, "the page was loaded again"
        screenshot(page, "videos-progress")
        number = re.sub(r"\D", "", card.get_by_role("link").inner_text())
        admin.goto(f"{RECORDS}{number}/change/")
        expect(admin.get_by_role("progressbar").first).to_be_visible()
        screenshot(admin, "admin-video")

        cancel(card)
        expect(status(card)).to_have_text("Cancelled")
        expect(page.locator(".messages")).to_have_text("“long.mp4” is cancelled.")
        screenshot(page, "videos-cancelled")
        wait_until(lambda: files_of(site) == before, 60.0, "the end of what was half done")
        admin.reload()
        expect(admin.locator(".gearman-status").first).to_have_text("Cancelled")

    def test_more_visitors_than_threads_for_streams(
        self, page: Page, browser: Browser, site: Site, long: Path
    ):
        """Who gets no stream polls, and nobody is kept from the site."""
        card = upload(page, long)
        expect(status(card)).to_have_text(re.compile("Converting"))
        others = [Visitor(browser, site) for _ in range(5)]
        asked: list[str] = []
        pages = [other.context.new_page() for other in others]
        for each in pages:
            each.on("request", lambda request: asked.append(request.url))
            each.goto("/videos/")
        cards = [each.get_by_role("article", name=long.name, exact=True).first for each in pages]
        for each in cards:
            expect(status(each)).to_have_text(re.compile(r"Converting: [1-9]\d? %"))
        cancel(card)
        for each in cards:
            expect(status(each)).to_have_text("Cancelled")
        assert any("/videos/stream/" in url for url in asked)
        assert any("/videos/cards/" in url for url in asked)
        for other in others:
            other.close()
            assert other.troubles == []

    def test_cancelled_while_it_waits_and_tried_again(self, page: Page, site: Site):
        site.worker.stop()
        card = upload(page, real("carphone_pristine.mp4"))
        expect(status(card)).to_have_text("Waiting for a worker")
        cancel(card)
        expect(status(card)).to_have_text("Cancelled")
        site.worker.start()
        card.get_by_role("button", name="Try again").click()
        expect(status(card)).to_have_text("Ready", timeout=WORK_LIMIT)

    def test_broken_files_say_why(self, page: Page, tmp_path: Path, screenshot: Screenshot):
        text, half, list_of_files = tmp_path / "diary.mp4", tmp_path / "half.mp4", tmp_path / "list.mp4"
        text.write_text("Dear diary, today I made a video.\n" * 1000)
        half.write_bytes(real("bigbuckbunny.mp4").read_bytes()[:500_000])
        list_of_files.write_text("#EXTM3U\n#EXTINF:5,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n")
        for path, reason in (
            (text, "it is none of MP4, MOV, WebM, MKV, AVI or MPEG"),
            (half, "it is damaged or ends too early"),
            (list_of_files, "it is none of MP4, MOV, WebM, MKV, AVI or MPEG"),
        ):
            card = upload(page, path)
            expect(status(card)).to_have_text("Failed")
            expect(card.locator(".reason")).to_have_text(
                f"The file is not a video that can be shown: {reason}."
            )
        screenshot(page, "videos-failed")

    def test_narrow_window_is_not_scrolled_sideways(self, page: Page, screenshot: Screenshot):
        page.set_viewport_size({"width": 360, "height": 800})
        overhang = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        screenshot(page, "videos-narrow")
        assert overhang <= 0

    def test_without_javascript(self, browser: Browser, site: Site):
        visitor = Visitor(browser, site, java_script_enabled=False)
        page = visitor.context.new_page()
        page.goto("/videos/")
        card = upload(page, real("carphone_distorted.mp4"))

        def is_ready() -> bool:
            page.reload()
            return status(card).inner_text() == "Ready"

        wait_until(is_ready, WORK_LIMIT / 1000, "the video")
        visitor.close()
        assert visitor.troubles == []


def percent(card: Locator) -> int:
    found = re.search(r"(\d+) %", status(card).inner_text())
    assert found is not None, "it has ended"
    return int(found[1])
