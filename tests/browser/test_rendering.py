"""
Photos rendered again together: a group, its progress, and the mail when all
have ended. And how one photo would look, which a worker is asked while the page waits.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image, ImageStat
from playwright.sync_api import Page, expect

from project.gallery.management.commands.make_sample_photos import sample_photos
from tests.harness import wait_until
from tests.project.images import encoded, quarters

from .conftest import Visitor
from .site import Site

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

Screenshot = Callable[[Page, str], None]

PHOTOS = 8


@pytest.fixture(scope="module")
def page(visitor: Visitor, site: Site, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The gallery with some photos in it, all of them ready."""
    folder = tmp_path_factory.mktemp("photos")
    for name, content in sample_photos(PHOTOS, 4):
        (folder / name).write_bytes(content)
    site.worker.start()
    page = visitor.context.new_page()
    page.goto("/")
    page.get_by_label("Choose photos").set_input_files(sorted(folder.iterdir()))
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("article[data-status=SUCCESSFUL]")).to_have_count(PHOTOS)
    return page


def open_tools(page: Page) -> None:
    page.goto("/")
    page.get_by_text("Render again…").click()


def mails(site: Site) -> list[str]:
    return [path.read_text() for path in sorted((site.folder / "mail").glob("*"))]


class TestRenderAgain:
    def test_nothing_selected(self, page: Page):
        open_tools(page)
        page.get_by_role("button", name="Selected photos").click()
        expect(page.locator(".messages")).to_have_text("Please select photos first.")

    def test_selected_photos(self, page: Page, site: Site, screenshot: Screenshot):
        open_tools(page)
        for name in ("sample-002.jpg", "sample-003.jpg"):
            page.get_by_role("checkbox", name=f"Select {name}").check()
        page.get_by_label("Large pictures").select_option("1920 pixels")
        page.get_by_label("Quality").select_option("Small files")
        screenshot(page, "render-form")
        page.get_by_role("button", name="Selected photos").click()
        expect(page.locator(".status")).to_have_text("Done: all 2")
        expect(page.get_by_text("A summary was mailed to gallery@example.com.")).to_be_visible()
        expect(page.get_by_text(re.compile("All thumbnails together have [0-9.]+.KB"))).to_be_visible()

        (mail,) = mails(site)
        assert "Subject: 2 of 2 photos were rendered again" in mail
        page.get_by_role("link", name="Back to the photos").click()
        link = page.get_by_role("article", name="sample-002.jpg").get_by_role("link").first
        response = page.request.get(link.get_attribute("href") or "")
        with Image.open(BytesIO(response.body())) as image:
            assert max(image.size) == 1920
        response.dispose()
        folder = site.media / (link.get_attribute("href") or "").split("?")[0].removeprefix("/media/")
        assert {path.stem for path in folder.parent.iterdir()} == {"160", "480", "1920"}

    def test_all_with_one_that_cannot_be_and_cancelled(self, page: Page, site: Site, screenshot: Screenshot):
        original: Path = min((site.media / "originals").iterdir(), key=lambda path: path.stat().st_mtime)
        content = original.read_bytes()
        original.write_bytes(b"no photo any more")
        open_tools(page)
        page.get_by_role("button", name="All photos").click()
        expect(page.locator(".status")).to_have_text(f"Done, but for 1 of {PHOTOS}")
        expect(page.get_by_text("A summary was mailed")).to_be_visible()
        screenshot(page, "render-done")
        original.write_bytes(content)
        last = mails(site)[-1]
        assert f"Subject: {PHOTOS - 1} of {PHOTOS} photos were rendered again" in last
        assert "The file is not an image that can be read" in last

    def test_progress_and_cancel(self, page: Page, site: Site, screenshot: Screenshot):
        site.worker.stop()
        before = len(mails(site))
        open_tools(page)
        page.get_by_role("button", name="All photos").click()
        expect(page.locator(".status")).to_have_text(f"Rendering: 0 of {PHOTOS}")
        screenshot(page, "render-progress")
        page.get_by_role("button", name="Cancel what is left").click()
        expect(page.locator(".status")).to_have_text(f"Done, but for {PHOTOS} of {PHOTOS}")
        expect(page.get_by_text("The summary is being mailed.")).to_be_visible()
        site.worker.start()
        expect(page.get_by_text("A summary was mailed")).to_be_visible()
        wait_until(lambda: len(mails(site)) == before + 1, 60.0, "the mail")
        assert f"Subject: 0 of {PHOTOS} photos were rendered again" in mails(site)[-1]


def shown(page: Page) -> Image.Image:
    """The picture that the page shows."""
    picture = page.locator(".photo img")
    expect(picture).to_have_js_property("complete", True)
    assert picture.evaluate("img => img.naturalWidth") > 0
    response = page.request.get(picture.get_attribute("src") or "")
    try:
        return Image.open(BytesIO(response.body())).convert("RGB")
    finally:
        response.dispose()


def test_preview_and_what_is_shown_without_a_worker(
    page: Page, site: Site, tmp_path: Path, screenshot: Screenshot
):
    """Last, for it leaves the site without a worker."""
    (tmp_path / "colours.jpg").write_bytes(encoded(quarters((1600, 1200))))
    page.goto("/")
    page.get_by_label("Choose photos").set_input_files(tmp_path / "colours.jpg")
    page.get_by_role("button", name="Upload").click()
    page.get_by_role("link", name="Try a look on colours.jpg").click()
    assert shown(page).size == (1280, 960)

    page.get_by_label("Black and white").check()
    page.get_by_label("Square").check()
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("img", name="colours.jpg, preview")).to_be_visible()
    picture = shown(page)
    assert picture.size == (720, 720)
    assert max(ImageStat.Stat(picture.convert("HSV")).extrema[1]) < 10, "no colours"
    expect(page.get_by_label("Square")).to_be_checked()
    screenshot(page, "preview")
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    screenshot(page, "preview-narrow")
    page.set_viewport_size({"width": 1440, "height": 900})

    site.worker.stop()
    page.get_by_label("Sepia").check()
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("alert")).to_have_text(
        "No worker answered within 3 seconds. This is the photo as it is."
    )
    assert shown(page).size == (1280, 960)
    screenshot(page, "preview-without-worker")
