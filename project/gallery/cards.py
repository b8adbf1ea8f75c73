"""What a page says about a photo or a video: its row and its job's record, joined."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from django_gearman import GroupResult
from django_gearman.models import JobRecord

from .models import Photo, Upload, Video

Status = JobRecord.Status

LABELS: dict[str, str] = {
    Status.WAITING: "Waiting for others",
    Status.SCHEDULED: "Waiting for its time",
    Status.READY: "Waiting for a worker",
    Status.RUNNING: "Making thumbnails",
    Status.RETRYING: "Waiting for another attempt",
    Status.SUCCESSFUL: "Ready",
    Status.FAILED: "Failed",
    Status.DEAD: "Given up",
    Status.CANCELLED: "Cancelled",
}


C = TypeVar("C", bound="Card")


@dataclass(frozen=True)
class Card:
    """An upload as the page shows it."""

    upload: Any
    status: str
    numerator: int | None = None
    denominator: int | None = None
    reason: str = ""
    """Why nothing came of it, for the visitor; empty unless the job failed."""

    @property
    def label(self) -> str:
        """The status in the visitor's words."""
        label = LABELS[Status(self.status)]
        if self.status == Status.RUNNING and self.denominator:
            return f"{label}: {self.numerator} of {self.denominator}"
        return label

    @property
    def is_finished(self) -> bool:
        return self.status not in JobRecord.LIVE

    @property
    def is_ready(self) -> bool:
        return self.status == Status.SUCCESSFUL


@dataclass(frozen=True)
class VideoCard(Card):
    @property
    def label(self) -> str:
        if self.status == Status.RUNNING:
            return f"Converting: {self.numerator} %" if self.denominator else "Converting"
        return super().label

    @property
    def may_try_again(self) -> bool:
        # What FAILED is no video, and would be none the next time either.
        return self.status in (Status.CANCELLED, Status.DEAD)


@dataclass(frozen=True)
class GroupCard:
    """Photos that are rendered again together, and what follows."""

    group: GroupResult[list[int]]
    total_bytes: int | None
    """Of all thumbnails; None unless all were made."""

    mail: str
    """Status of the job that mails the summary."""

    @property
    def is_finished(self) -> bool:
        return self.group.is_finished and self.mail not in JobRecord.LIVE

    @property
    def status(self) -> str:
        if not self.group.is_finished:
            return Status.RUNNING
        return Status.FAILED if self.group.failed else Status.SUCCESSFUL

    @property
    def label(self) -> str:
        group = self.group
        if not group.is_finished:
            return f"Rendering: {group.finished} of {group.total}"
        return (
            f"Done, but for {group.failed} of {group.total}" if group.failed else f"Done: all {group.total}"
        )


def group_card(group: GroupResult[list[int]]) -> GroupCard:
    added_up, mailed = group.on_success, group.on_complete
    done = added_up is not None and added_up.status == Status.SUCCESSFUL
    total = added_up.return_value if done else None
    return GroupCard(group, total, Status.CANCELLED if mailed is None else mailed.status)


def cards(photos: Iterable[Photo]) -> list[Card]:
    """One card for each photo, with one query for all their jobs."""
    return _cards(Card, photos)


def video_cards(videos: Iterable[Video]) -> list[VideoCard]:
    return _cards(VideoCard, videos)


def _cards(kind: type[C], uploads: Iterable[Upload]) -> list[C]:
    uploads = list(uploads)
    records = JobRecord.objects.only("status", "numerator", "denominator", "message").in_bulk(
        [upload.job_id for upload in uploads if upload.job_id is not None]
    )
    return [_card(kind, upload, records.get(upload.job_id)) for upload in uploads]


def _card(kind: type[C], upload: Upload, record: JobRecord | None) -> C:
    if record is not None:
        return kind(upload, record.status, record.numerator, record.denominator, record.message)
    # The record was pruned; the size says that the job had succeeded.
    if upload.width is not None:
        return kind(upload, Status.SUCCESSFUL)
    return kind(upload, Status.CANCELLED, reason="The record of its job is gone.")
