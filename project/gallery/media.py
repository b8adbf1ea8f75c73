"""
Files of the gallery for browsers, with Range: a video is sought in by asking
for a part of it, which Django's own view for files does not know.

Enough for a demonstration; on a server let nginx serve these folders.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import BinaryIO

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.handlers.asgi import ASGIRequest
from django.http import Http404, HttpRequest, HttpResponse, StreamingHttpResponse
from django.utils.http import http_date
from django.views.decorators.cache import cache_control
from django.views.decorators.http import require_safe

from .models import Video

CHUNK = 256 * 1024
TYPES = {Video.WEB: "video/mp4", Video.POSTER: "image/jpeg"}


@cache_control(max_age=3600)
@require_safe
def video_file(request: HttpRequest, folder: str, name: str) -> HttpResponse | StreamingHttpResponse:
    """Poster or web version; the originals are bytes that a stranger chose, and have no address."""
    if name not in TYPES:
        raise Http404
    try:
        file = (Path(settings.MEDIA_ROOT) / Video.FOLDER / folder / name).open("rb")
    except OSError as error:
        raise Http404 from error
    status = os.fstat(file.fileno())
    length, tag = status.st_size, f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
    headers = {
        "Content-Type": TYPES[name],
        "Accept-Ranges": "bytes",
        "ETag": tag,
        "Last-Modified": http_date(status.st_mtime),
    }
    if request.headers.get("If-None-Match") == tag:
        file.close()
        return HttpResponse(status=304, headers=headers)
    part = None
    if request.headers.get("If-Range", tag) == tag:
        part = parse_range(request.headers.get("Range", ""), length)
    if part is not None and part.start >= part.stop:
        file.close()
        return HttpResponse(status=416, headers=headers | {"Content-Range": f"bytes */{length}"})
    whole = part is None
    part = range(length) if part is None else part
    headers["Content-Length"] = str(len(part))
    if not whole:
        headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{length}"
    if request.method == "HEAD":
        file.close()
        return HttpResponse(status=200 if whole else 206, headers=headers)
    body = _achunks(file, part) if isinstance(request, ASGIRequest) else _chunks(file, part)
    response = StreamingHttpResponse(body, status=200 if whole else 206, headers=headers)
    response._resource_closers.append(file.close)  # as Django's FileResponse does
    return response


def parse_range(header: str, length: int) -> range | None:
    """The part that is asked for, empty if there is none such; None for the whole file."""
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", header.strip())
    if found is None or not (found[1] or found[2]):
        return None  # several parts, or nonsense: the whole is a good answer
    if not found[1]:
        return range(max(0, length - int(found[2])), length)
    first = int(found[1])
    last = int(found[2]) if found[2] else length - 1
    if found[2] and last < first:
        return None
    return range(first, min(last + 1, length))


def _chunks(file: BinaryIO, part: range) -> Iterator[bytes]:
    file.seek(part.start)
    left = len(part)
    while left and (chunk := file.read(min(CHUNK, left))):
        left -= len(chunk)
        yield chunk


async def _achunks(file: BinaryIO, part: range) -> AsyncIterator[bytes]:
    chunks = _chunks(file, part)
    while chunk := await sync_to_async(next)(chunks, b""):
        yield chunk
