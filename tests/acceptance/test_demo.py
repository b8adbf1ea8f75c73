"""`python manage.py demo`: the whole example site under supervisord, used as a visitor does."""

from __future__ import annotations

import os
import re
import signal
import sys
import urllib.request
from collections.abc import Iterator
from http.cookiejar import CookieJar
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests import harness
from tests.project.images import encoded, quarters

pytestmark = pytest.mark.acceptance

STOP_LIMIT = 30.0
"""Seconds in which everything ends after INT."""


class Demo(harness.ManagedProcess):
    """The demo on free ports, with a place of its own for all that it keeps."""

    def __init__(self, var: Path) -> None:
        self.site = f"127.0.0.1:{harness.free_port()}"
        self.gearman = harness.free_port()
        super().__init__(
            ["demo"],
            started="Ctrl-C stops everything",
            env={
                "DJANGO_SETTINGS_MODULE": "project.settings",
                "PROJECT_VAR": str(var),
                "WEB_ADDRESS": self.site,
                "GEARMAN_SERVERS": f"127.0.0.1:{self.gearman}",
                # For every program that supervisord starts.
                "PYTHONWARNINGS": "error",
            },
        )

    def _command(self) -> list[str]:
        return [sys.executable, "manage.py", *self.arguments]

    def words(self) -> str:
        """All that it and its programs said, but for the files that supervisord itself does not close."""
        return re.sub(
            r"Exception ignored in: <_io.FileIO name='/dev/fd/1'.*?\nResourceWarning: [^\n]*\n",
            "",
            self.stdout + self.stderr,
            flags=re.DOTALL,
        )

    def family(self) -> set[int]:
        """Process ids of its running descendants, in whatever group they are."""
        processes = harness.running_processes()
        found = {self.pid}
        while more := {each.pid for each in processes if each.parent in found} - found:
            found |= more
        return found - {self.pid}


class Browser:
    """Cookies, forms and no JavaScript."""

    def __init__(self, site: str) -> None:
        self._site = site
        self._cookies = CookieJar()
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(self._cookies))

    def get(self, path: str) -> str:
        return self.download(path).decode()

    def download(self, path: str) -> bytes:
        with self._opener.open(f"http://{self._site}{path}", timeout=20) as response:
            content: bytes = response.read()
            return content

    def is_answered(self) -> bool:
        try:
            self.get("/")
        except OSError:
            return False
        return True

    def _token(self, page: str) -> str:
        found = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page)
        assert found is not None, page
        return found[1]

    def log_in(self, name: str, password: str) -> str:
        fields = {
            "csrfmiddlewaretoken": self._token(self.get("/admin/login/?next=/admin/")),
            "username": name,
            "password": password,
            "next": "/admin/",
        }
        return self._post("/admin/login/?next=/admin/", urlencode(fields).encode(), {})

    def upload(self, photos: dict[str, bytes]) -> str:
        boundary = b"a-line-between-two-parts"
        fields = [
            b'Content-Disposition: form-data; name="csrfmiddlewaretoken"\r\n\r\n'
            + self._token(self.get("/")).encode()
        ]
        for name, content in photos.items():
            head = f'Content-Disposition: form-data; name="photos"; filename="{name}"\r\n'
            fields.append(head.encode() + b"Content-Type: image/jpeg\r\n\r\n" + content)
        body = b"".join(b"--" + boundary + b"\r\n" + field + b"\r\n" for field in fields)
        return self._post(
            "/",
            body + b"--" + boundary + b"--\r\n",
            {"Content-Type": f"multipart/form-data; boundary={boundary.decode()}"},
        )

    def _post(self, path: str, body: bytes, headers: dict[str, str]) -> str:
        request = urllib.request.Request(f"http://{self._site}{path}", body, headers)
        with self._opener.open(request, timeout=20) as response:
            return str(response.read().decode())


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Demo]:
    # It has a database of its own, whatever the other tests use.
    monkeypatch.delenv("DATABASE_URL", raising=False)
    demo = Demo(tmp_path)
    demo.start()
    try:
        yield demo
    finally:
        # Only when the test has failed: it stops the demo itself.
        if demo.is_running:
            for pid in [demo.pid, *demo.family()]:
                os.kill(pid, signal.SIGKILL)
            demo.wait()
        demo.forget()


def test_from_start_to_end(demo: Demo):
    browser = Browser(demo.site)
    assert f"http://{demo.site}/" in demo.stdout
    assert f"http://{demo.site}/admin/" in demo.stdout
    password = re.search(r"user admin, password (\S+)", demo.stdout)
    assert password is not None
    harness.wait_until(browser.is_answered, what="the first page")

    page = browser.upload({"one.jpg": encoded(quarters()), "two.jpg": encoded(quarters((48, 64)))})
    photos = re.findall(r'data-photo-id="(\d+)"', page)
    assert len(photos) == 2
    cards = "/cards/?" + urlencode({"photo": photos}, doseq=True)
    harness.wait_until(
        lambda: browser.get(cards).count('data-status="SUCCESSFUL"') == 2, what="the thumbnails"
    )
    thumbnails = re.findall(r'<img src="([^"]+)"', browser.get("/")[-100_000:])
    thumbnails = [path for path in thumbnails if "/thumbnails/" in path]
    assert len(thumbnails) == 2
    for path in thumbnails:
        assert browser.download(path).startswith(b"\xff\xd8")

    assert "Site administration" in browser.log_in("admin", password[1])
    records = browser.get("/admin/django_gearman/jobrecord/")
    assert records.count("project.gallery.jobs.make_thumbnails") >= 2
    status = harness.ask(demo.gearman, "status")
    assert "project.gallery.jobs.make_thumbnails\t0\t0\t2" in status

    family = demo.family()
    # Server, worker and its three processes, gunicorn and its two.
    assert len(family) == 8
    demo.signal(signal.SIGINT)
    assert demo.wait(STOP_LIMIT) == 0
    assert not any(map(harness.is_running, family))
    for complaint in ("Traceback", "Warning", "Exception ignored", "exit status 1", "SIGKILL"):
        assert complaint not in demo.words(), demo.story()
