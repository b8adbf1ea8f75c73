"""How a photo would look: a worker is asked while the page waits, and the photo shown when none answers."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image, ImageStat
from playwright.sync_api import Page, expect

from tests.project.images import encoded, quarters

from .conftest import Visitor
from .site import Site

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

Screenshot = Callable[[Page, str], None]


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
    visitor: Visitor, site: Site, tmp_path: Path, screenshot: Screenshot
):
    site.worker.start()
    (tmp_path / "colours.jpg").write_bytes(encoded(quarters((1600, 1200))))
    page = visitor.context.new_page()
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
    page.close()
