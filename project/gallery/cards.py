"""What a page says about a photo: the photo's row and its job's record, joined."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from django_gearman.models import JobRecord

from .models import Photo

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


@dataclass(frozen=True)
class Card:
    """A photo as the page shows it."""

    photo: Photo
    status: str
    numerator: int | None = None
    denominator: int | None = None
    reason: str = ""
    """Why there are no thumbnails, for the visitor; empty unless the job failed."""

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


def cards(photos: Iterable[Photo]) -> list[Card]:
    """One card for each photo, with one query for all their jobs."""
    photos = list(photos)
    records = JobRecord.objects.only("status", "numerator", "denominator", "message").in_bulk(
        [photo.job_id for photo in photos if photo.job_id is not None]
    )
    return [_card(photo, records.get(photo.job_id)) for photo in photos]


def _card(photo: Photo, record: JobRecord | None) -> Card:
    if record is not None:
        return Card(photo, record.status, record.numerator, record.denominator, record.message)
    # The record was pruned; the size says that the job had succeeded.
    if photo.width is not None:
        return Card(photo, Status.SUCCESSFUL)
    return Card(photo, Status.CANCELLED, reason="The record of its job is gone.")
