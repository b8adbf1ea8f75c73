"""
How bytes and long texts look: as JSON, as text, or as a hex dump; never whole
when they are large.

The database is asked for the beginning of each and for its size, so that a
result of a gigabyte costs no more to look at than one of a kilobyte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from django.db import models
from django.db.models.functions import Length, Substr
from django.template.defaultfilters import filesizeformat
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

from django_gearman import continuations
from django_gearman.models import JobRecord

from .format import NOTHING, visible

COLUMNS: Final = ("workload", "result", "message", "traceback", "log")
"""Columns whose size a client or a worker chose."""

READ: Final = 64 * 1024
"""Bytes (of texts: characters) to take from the database: what is longer is not parsed."""

SHOWN: Final = 10_000
"""Characters of one payload to show."""

DUMPED: Final = 2_048
"""Bytes of one payload to show when it takes a hex dump, which is five times as long."""


@dataclass(frozen=True)
class Payload:
    """The beginning of one binary column."""

    head: bytes
    size: int
    """Bytes of the whole column."""

    @property
    def complete(self) -> bool:
        return self.size == len(self.head)


def heads() -> dict[str, models.Expression]:
    """Return annotations with the beginning and the size of each of ``COLUMNS``, to be deferred."""
    found: dict[str, models.Expression] = {}
    for column in COLUMNS:
        kind: models.Field[Any, Any] = models.TextField()
        if column in {"workload", "result"}:
            kind = models.BinaryField()
        found[f"{column}_head"] = Substr(column, 1, READ, output_field=kind)
        found[f"{column}_size"] = Length(column)
    return found


def payload_of(job: JobRecord, column: str) -> Payload | None:
    """Return what ``heads`` brought along of a binary column; None when it is null."""
    head, size = getattr(job, f"{column}_head"), getattr(job, f"{column}_size")
    # SQLite's SUBSTR makes NULL of an empty blob; the size tells them apart.
    return None if size is None else Payload(bytes(head or b""), size)


def arguments(payload: Payload | None) -> str:
    """Return the workload as a table of arguments when a ``@job`` wrote it, otherwise as ``value``."""
    call = _parse(payload) if payload else None
    if (
        isinstance(call, dict)
        and {"args", "kwargs"} <= call.keys() <= {"args", "kwargs", "trace", "limit", continuations.RESULTS}
        and isinstance(call["args"], list)
        and isinstance(call["kwargs"], dict)
    ):
        match call.get(continuations.RESULTS):
            case None:
                return _call(call["args"], call["kwargs"])
            case [int() as group, int(), int() as count]:
                return _call(call["args"], call["kwargs"], (group, count))
    return value(payload)


def value(payload: Payload | None) -> str:
    """Return bytes as indented JSON, as text or as a hex dump, with a remark on what is left out."""
    if payload is None:
        return NOTHING
    if not payload.head:
        return format_html('<span class="gearman-quiet">{}</span>', _("Empty"))
    parsed = _parse(payload)
    if parsed is not _NOT_JSON:
        shown, whole = _indented(parsed, SHOWN)
        return _block(shown, _("JSON"), _remark(payload, None if whole else len(shown)))
    readable = _decode(payload)
    if readable is not None:
        cut = None if payload.complete and len(readable) <= SHOWN else min(len(readable), SHOWN)
        return _block(readable[:SHOWN], _("Text"), _remark(payload, cut))
    cut = None if payload.complete and payload.size <= DUMPED else min(len(payload.head), DUMPED)
    return _block(_dump(payload.head[:DUMPED]), _("Bytes"), _remark(payload, cut))


def prose(job: JobRecord, column: str, label: str) -> str:
    """Return a long text, such as a traceback, in a box called ``label``."""
    head, size = getattr(job, f"{column}_head"), getattr(job, f"{column}_size")
    if not head:
        return NOTHING
    remark = ""
    if size > len(head):
        remark = _("The first %(shown)d of %(size)d characters.") % {"shown": len(head), "size": size}
    return _block(head, label, remark)


LINE: Final = 80
"""Characters up to which a list or a mapping among the arguments stays in one line."""

_NOT_JSON: Final = object()


def _parse(payload: Payload) -> Any:
    if not payload.complete:
        return _NOT_JSON
    try:
        return json.loads(payload.head.decode())
    except (ValueError, RecursionError):  # ValueError: not UTF-8, not JSON, or a number beyond reason
        return _NOT_JSON


def _decode(payload: Payload) -> str | None:
    """Return the head as text, or None when it is not meant to be read."""
    # The cut may have gone through a character, of which up to three bytes are left.
    for missing in range(1 if payload.complete else 4):
        try:
            text = payload.head[: len(payload.head) - missing].decode()
        except UnicodeDecodeError:
            continue
        return None if any(char < " " and char not in "\t\n\r" for char in text) else text
    return None


def _indented(parsed: Any, limit: int) -> tuple[str, bool]:
    """Return indented JSON up to ``limit`` characters, and whether that is all of it."""
    text = ""
    try:
        # Piece by piece: indentation makes much out of little that is deeply nested.
        for piece in json.JSONEncoder(indent=2, ensure_ascii=False).iterencode(parsed):
            text += piece[: limit + 1]
            if len(text) > limit:
                return text[:limit], False
    except RecursionError:
        return text, False
    return text, True


def _call(args: list[Any], kwargs: dict[str, Any], results: tuple[int, int] | None = None) -> SafeString:
    """Return a table, whose first argument is the results of a group, told by its id and their number."""
    left = SHOWN
    rows: list[tuple[str, str]] = []
    if results is not None:
        told = _("The %(count)d results of group %(group)d") % {"count": results[1], "group": results[0]}
        rows.append(("1", told))
    named: Iterable[tuple[str, Any]] = (
        *((str(position), argument) for position, argument in enumerate(args, 1 + len(rows))),
        *((f"{keyword}=", argument) for keyword, argument in kwargs.items()),
    )
    total = len(args) + len(kwargs) + len(rows)
    if not total:
        return format_html('<span class="gearman-quiet">{}</span>', _("No arguments"))
    for label, argument in named:
        if left <= 0:
            break
        shown, whole = _indented(argument, left)
        if whole and len(shown) < 3 * LINE:
            line = json.dumps(argument, ensure_ascii=False)
            shown = line if len(line) <= LINE else shown
        rows.append((visible(label, 100), visible(shown) + ("" if whole else "…")))
        left -= len(label) + len(shown)
    remark = ""
    if left <= 0:
        remark = _("%(shown)d of %(total)d arguments, the first %(limit)d characters.") % {
            "shown": len(rows),
            "total": total,
            "limit": SHOWN,
        }
    return format_html(
        '<div class="gearman-payload" tabindex="0" role="region" aria-label="{}">'
        '<table class="gearman-call"><tbody>{}</tbody></table></div>{}',
        _("Arguments"),
        format_html_join("", '<tr><th scope="row"><bdi>{}</bdi></th><td><pre>{}</pre></td></tr>', rows),
        format_html('<div class="gearman-quiet">{}</div>', remark) if remark else "",
    )


def _dump(data: bytes) -> str:
    return "\n".join(_dump_lines(data))


def _dump_lines(data: bytes) -> Iterator[str]:
    for offset in range(0, len(data), 16):
        line = data[offset : offset + 16]
        ascii_ = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in line)
        yield f"{offset:08x}  {line[:8].hex(' '):23}  {line[8:].hex(' '):23}  {ascii_}"


def _remark(payload: Payload, cut: int | None) -> str:
    size = filesizeformat(payload.size)
    if cut is None:
        return size
    return _("The first %(shown)d of %(size)s.") % {"shown": cut, "size": size}


def _block(text: str, label: str, remark: str) -> SafeString:
    """Return a box that scrolls by itself; with a keyboard too, hence the tab stop."""
    return format_html(
        '<pre class="gearman-payload" tabindex="0" role="region" aria-label="{}">{}</pre>{}',
        label,
        visible(text),
        format_html('<div class="gearman-quiet">{}</div>', remark) if remark else "",
    )
