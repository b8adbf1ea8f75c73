"""Files of videos, and parts of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.http.response import HttpResponseBase
from django.test import Client

from project.gallery.media import parse_range

pytestmark = pytest.mark.django_db  # the end of a request looks at the connection

CONTENT = bytes(range(256)) * 4000
ADDRESS = "/media/videos/abc123/web.mp4"


@pytest.fixture(autouse=True)
def file(media: Path) -> Path:
    path = media / "videos" / "abc123" / "web.mp4"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    return path


def body(response: HttpResponseBase) -> bytes:
    content = response.getvalue()
    response.close()
    return bytes(content)


class TestParseRange:
    @pytest.mark.parametrize(
        ("header", "expected"),
        [
            ("bytes=0-", range(100)),
            ("bytes=0-0", range(1)),
            ("bytes=10-19", range(10, 20)),
            ("bytes=90-1000", range(90, 100)),
            ("bytes=-5", range(95, 100)),
            ("bytes=-1000", range(100)),
            ("bytes=100-", range(100, 100)),
            ("bytes=-0", range(100, 100)),
            ("bytes=9-3", None),
            ("bytes=0-1,5-6", None),
            ("bytes=-", None),
            ("lines=0-1", None),
            ("", None),
        ],
    )
    def test_cases(self, header: str, expected: range | None):
        assert parse_range(header, 100) == expected


class TestVideoFile:
    def test_whole(self, client: Client):
        response = client.get(ADDRESS)

        assert response.status_code == 200
        assert response.headers["Content-Type"] == "video/mp4"
        assert response.headers["Accept-Ranges"] == "bytes"
        assert response.headers["Content-Length"] == str(len(CONTENT))
        assert body(response) == CONTENT

    @pytest.mark.parametrize(
        ("asked", "first", "last"),
        [
            ("bytes=0-", 0, 1_023_999),
            ("bytes=500000-800000", 500_000, 800_000),
            ("bytes=-3", 1_023_997, 1_023_999),
        ],
    )
    def test_part(self, client: Client, asked: str, first: int, last: int):
        response = client.get(ADDRESS, headers={"Range": asked})

        assert response.status_code == 206
        assert response.headers["Content-Range"] == f"bytes {first}-{last}/{len(CONTENT)}"
        assert response.headers["Content-Length"] == str(last - first + 1)
        assert body(response) == CONTENT[first : last + 1]

    def test_part_that_is_not_there(self, client: Client):
        response = client.get(ADDRESS, headers={"Range": "bytes=2000000-"})

        assert response.status_code == 416
        assert response.headers["Content-Range"] == f"bytes */{len(CONTENT)}"

    def test_part_of_another_version_is_the_whole(self, client: Client, file: Path):
        tag = client.head(ADDRESS).headers["ETag"]
        asked = {"Range": "bytes=0-9", "If-Range": tag}
        before = client.get(ADDRESS, headers=asked)
        assert (before.status_code, body(before)) == (206, CONTENT[:10])
        file.write_bytes(CONTENT[:5000])
        response = client.get(ADDRESS, headers=asked)

        assert response.status_code == 200
        assert body(response) == CONTENT[:5000]

    def test_head_and_not_modified(self, client: Client):
        head = client.head(ADDRESS, headers={"Range": "bytes=0-9"})
        assert (head.status_code, head.headers["Content-Length"], body(head)) == (206, "10", b"")
        again = client.get(ADDRESS, headers={"If-None-Match": head.headers["ETag"]})
        assert (again.status_code, body(again)) == (304, b"")

    def test_under_asgi(self, async_client: Any):
        async def read() -> bytes:
            response = await async_client.get(ADDRESS, headers={"Range": "bytes=1000-700000"})
            assert response.status_code == 206
            content = b"".join([chunk async for chunk in response.streaming_content])
            response.close()
            return content

        assert async_to_sync(read)() == CONTENT[1000:700_001]

    @pytest.mark.parametrize(
        "name",
        [
            "abc123/other.mp4",
            "abc123/.web.mp4",
            "abc124/web.mp4",
            "../originals/x",
            ".unfinished/web.mp4",
            "abc123/..%2f..%2fdb",
        ],
    )
    def test_nothing_else_has_an_address(self, client: Client, name: str):
        assert client.get(f"/media/videos/{name}").status_code == 404
