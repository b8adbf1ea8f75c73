"""
Chromium before the example site, both started once for a module.

Not once for the session: while playwright runs, its thread has an event loop,
and Django would refuse to use a database there in the tests that follow.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.needs import missing

from . import photos
from .site import PASSWORD, USER, Site, running_site

LIMIT = 30_000
"""Milliseconds in which a page has to show what is expected of it."""

ARGUMENTS = (
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    site = getattr(item, "funcargs", {}).get("site")
    if report.failed and site is not None:
        report.sections.append(("what the programs of the site said", site.story()))
    return report


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[photos.Photo]:
    """Twenty photos of ten and more megapixels."""
    try:
        import skimage  # noqa: F401  # is it there?
    except ImportError:
        missing("scikit-image, which carries the photographs, is not installed")
    return photos.photos(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="session")
def bad(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    """Three files that are no photos, each with the reason that the visitor is told."""
    return photos.no_photos(tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        missing("chromium is not installed")
    arguments = [*ARGUMENTS, "--no-sandbox"] if os.geteuid() == 0 else [*ARGUMENTS]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        expect.set_options(timeout=LIMIT)
        yield browser
        browser.close()


class Visitor:
    """Somebody with a browser profile of their own, and all that goes wrong in it."""

    def __init__(self, browser: Browser, site: Site, **options: Any) -> None:
        self.context: BrowserContext = browser.new_context(
            base_url=site.url, viewport={"width": 1440, "height": 900}, **options
        )
        self.context.set_default_timeout(LIMIT)
        self.troubles: list[str] = []
        """Every message on the console, errors of scripts, and answers that are errors."""

        self.visits: list[str] = []
        """Addresses of the pages that were loaded, in order."""

        self.context.on("console", lambda message: self._note(f"console {message.type}: {message.text}"))
        self.context.on("weberror", lambda error: self._note(f"script: {error.error}"))
        self.context.on("requestfailed", self._on_failed_request)
        self.context.on("response", self._on_response)

    def _note(self, trouble: str) -> None:
        self.troubles.append(trouble)

    def _on_failed_request(self, request: Any) -> None:
        # Leaving a page ends what it still asked for.
        if request.failure != "net::ERR_ABORTED":
            self._note(f"{request.failure}: {request.url}")

    def _on_response(self, response: Any) -> None:
        if response.request.is_navigation_request():
            self.visits.append(response.url)
        if response.status >= 400:
            self._note(f"status {response.status}: {response.url}")

    def close(self) -> None:
        self.context.close()


@pytest.fixture(scope="module")
def visitor(browser: Browser, site: Site) -> Iterator[Visitor]:
    visitor = Visitor(browser, site)
    yield visitor
    visitor.close()


@pytest.fixture(scope="module")
def operator(browser: Browser, site: Site) -> Iterator[Visitor]:
    """Somebody who may see the admin, not logged in yet."""
    operator = Visitor(browser, site)
    yield operator
    operator.close()


@pytest.fixture(scope="module")
def admin(operator: Visitor) -> Page:
    """A page of somebody who has logged in through the form."""
    page = operator.context.new_page()
    page.goto("/admin/")
    page.get_by_label("Username").fill(USER)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", name="Site administration")).to_be_visible()
    return page


@pytest.fixture(autouse=True)
def nothing_goes_wrong(visitor: Visitor, operator: Visitor) -> Iterator[None]:
    """No page has anything to say on the console: no error, no violation of the CSP."""
    yield
    troubles = [*visitor.troubles, *operator.troubles]
    visitor.troubles.clear()
    operator.troubles.clear()
    assert troubles == []


@pytest.fixture(scope="session")
def screenshot() -> Callable[[Page, str], None]:
    """Keep a picture of the page, light and dark, in the folder $GEARMAN_SCREENSHOTS if that is set."""
    folder = os.environ.get("GEARMAN_SCREENSHOTS")

    def take(page: Page, name: str) -> None:
        if folder:
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                # Hiding the caret takes an inline style, which the CSP forbids.
                page.screenshot(
                    path=Path(folder) / f"{name}-{scheme}.png",
                    full_page=True,
                    caret="initial",
                    animations="disabled",
                )
            page.emulate_media(color_scheme="light")

    return take
