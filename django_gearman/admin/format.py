"""
How single values look: texts of strangers, times, spans, statuses, progress.

Everything a client or a worker sent is hostile until ``visible`` and
``format_html`` have seen it. No queries here.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from typing import Any, Final

from django.utils import timezone
from django.utils.formats import date_format
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

from django_gearman.models import JobAttempt, JobRecord

NOTHING: Final = "\N{EN DASH}"

# Control characters, what reorders or hides text, and surrogates, which do not
# even survive encoding. Tab and newline are harmless.
_UNSEEN: Final = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def visible(text: str, limit: int | None = None) -> str:
    """
    Return the text with everything invisible spelled out, as in ``\\u202e``.

    It still needs escaping for HTML.

    Args:
        limit: Characters of ``text`` to keep; an ellipsis stands for the rest.
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    return _UNSEEN.sub(
        lambda found: found[0].encode("unicode_escape").decode("ascii"), text.replace("\r\n", "\n")
    )


def short_name(path: str) -> str:
    """Return the last part of a dotted path: the function's or the exception's own name."""
    return path.rstrip(".").rpartition(".")[2] or path


def name(path: str) -> SafeString:
    """Return the last part of a dotted path, with the whole path as its title."""
    return format_html(
        '<span class="gearman-name" title="{}">{}</span>', visible(path), visible(short_name(path), 60)
    )


def text(value: str, limit: int | None = None) -> str:
    """Return a stranger's text as part of a line, or the dash when there is none."""
    if not value:
        return NOTHING
    return format_html('<bdi class="gearman-text">{}</bdi>', visible(value, limit))


def with_remark(shown: object, remark: object) -> SafeString:
    return format_html('{} <span class="gearman-quiet">{}</span>', shown, remark)


def moment(value: datetime.datetime | None) -> str:
    """Return a time to the second in the user's zone; of today the time of day only."""
    if value is None:
        return NOTHING
    now = timezone.now()
    local, today = _local(value), _local(now)
    shown = format_html('<span class="gearman-span">{}</span>', date_format(local, "H:i:s"))
    if local.date() != today.date():
        shown = format_html('<span class="gearman-span">{}</span> {}', date_format(local, "Y-m-d"), shown)
    zone = local.tzname() or ""
    return format_html(
        '<time class="gearman-time" datetime="{}" title="{}">{}</time>',
        value.isoformat(),
        f"{date_format(local, 'DATE_FORMAT')}, {date_format(local, 'H:i:s.u')} {zone}".rstrip(),
        shown,
    )


def _local(value: datetime.datetime) -> datetime.datetime:
    if timezone.is_naive(value):
        return value
    try:
        return timezone.localtime(value)
    except OverflowError:  # the last moment that there is, as one says for never
        return value


def duration(span: datetime.timedelta) -> str:
    """Return a span in its two largest units; clocks that disagree make zero of it."""
    seconds = max(span.total_seconds(), 0.0)
    if seconds < 10:
        return _("%(seconds).2f s") % {"seconds": seconds}
    if seconds < 60:
        return _("%(seconds).1f s") % {"seconds": seconds}
    minutes, second = divmod(int(seconds), 60)
    if minutes < 60:
        return _("%(minutes)d min %(seconds)d s") % {"minutes": minutes, "seconds": second}
    hours, minute = divmod(minutes, 60)
    if hours < 24:
        return _("%(hours)d h %(minutes)d min") % {"hours": hours, "minutes": minute}
    days, hour = divmod(hours, 24)
    return _("%(days)d d %(hours)d h") % {"days": days, "hours": hour}


def job_duration(job: JobRecord) -> str:
    """Return how long the last attempt took, or has taken so far."""
    running = job.status == JobRecord.Status.RUNNING
    span = job.duration
    # A job that waits to be tried again has an attempt behind it whose end is not recorded.
    if span is None or not (running or job.finished_at):
        return NOTHING
    shown = format_html('<span class="gearman-span">{}</span>', duration(span))
    return with_remark(shown, _("so far")) if running else shown


def past_attempts(attempts: Iterable[JobAttempt]) -> SafeString:
    """Return a table of attempts that came to nothing; their long texts are annotated as ``…_head``."""
    rows = [
        (
            attempt.number,
            moment(attempt.started_at),
            duration(attempt.finished_at - attempt.started_at) if attempt.started_at else NOTHING,
            text(attempt.worker),
            _why(attempt),
        )
        for attempt in attempts
    ]
    return format_html(
        '<div class="gearman-payload" tabindex="0" role="region" aria-label="{}">'
        '<table class="gearman-attempts"><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>',
        _("Earlier attempts"),
        format_html_join(
            "",
            '<th scope="col">{}</th>',
            [(title,) for title in (_("Attempt"), _("Started"), _("Duration"), _("Worker"), _("Why"))],
        ),
        format_html_join(
            "",
            '<tr><th scope="row">{}</th><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>',
            rows,
        ),
    )


def _why(attempt: Any) -> str:
    message, traceback = attempt.message_head or "", attempt.traceback_head or ""
    line = ": ".join(part for part in (short_name(attempt.exception), message) if part)
    log = attempt.log_head or ""
    if not traceback and not log:
        return text(line)
    logged = format_html("<pre>{}</pre>", visible(log)) if log else ""
    return format_html(
        "<details><summary>{}</summary>{}<pre>{}</pre></details>", text(line), logged, visible(traceback)
    )


def status(job: JobRecord) -> SafeString:
    """Return the status as a badge, and of a failure the exception's name."""
    known = job.status in JobRecord.Status.values
    badge = format_html(
        '<span class="gearman-status gearman-status-{}"{}>{}</span>',
        job.status.lower() if known else "unknown",
        SafeString("") if job.is_finished else SafeString(" data-gearman-unfinished"),
        visible(str(job.get_status_display())),
    )
    if not job.exception:
        return badge
    return format_html('{}<div class="gearman-quiet gearman-reason">{}</div>', badge, name(job.exception))


def progress(job: JobRecord) -> str:
    """Return a bar with the figures beside it; figures only, when they make no fraction."""
    done, total = job.numerator, job.denominator
    if done is None or total is None:
        return NOTHING
    return fraction(done, total, _("Progress of job %(id)d") % {"id": job.pk})


def fraction(done: int, total: int, label: str) -> str:
    """Return so much of so much, as ``progress``; the label is read out."""
    figures = f"{done}/{total}"
    if total <= 0:
        return figures
    return format_html(
        '<span class="gearman-progress"><progress max="{}" value="{}" aria-label="{}"></progress> '
        '<span class="gearman-figures">{}</span></span>',
        total,
        min(max(done, 0), total),
        label,
        figures,
    )


def attempts(job: JobRecord) -> str:
    if job.max_attempts is None:
        return str(job.attempts)
    return f"{job.attempts}/{job.max_attempts}"
