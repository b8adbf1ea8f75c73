"""
What is kept: one row per job, which is the durable queue and the record that
the admin shows, and one row per job server.

No behaviour here beyond what a row *is*. Rows are inserted by ``jobs.py`` (the
database door) and by ``store.py`` (the wire door); outcomes are written by job
servers alone.
"""

from __future__ import annotations

import datetime
from typing import Any, ClassVar

from django.core.checks import CheckMessage
from django.db import models
from django.db.models import Q
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

_OF_MYSQL_INDEXES = ("models.W037", "models.W043")


class ServerLease(models.Model):
    """
    The lease of one job server.

    A server raises ``epoch`` when it starts and proves in the transaction of
    every batch that the epoch is still its own: one that was replaced can
    neither acknowledge nor finish anything.
    """

    name = models.CharField(_("name"), max_length=40, unique=True)
    """What the server calls itself, ``host:port`` unless told otherwise."""

    epoch = models.PositiveBigIntegerField(_("epoch"), default=0)
    """How often the lease was taken; a part of each handle, so that no handle is used twice."""

    address = models.CharField(_("address"), max_length=255, blank=True)
    started_at = models.DateTimeField(_("started at"), null=True)
    renewed_at = models.DateTimeField(_("renewed at"), null=True)
    """When the server last proved to be alive, by the database's clock."""

    class Meta:
        verbose_name = _("job server")
        verbose_name_plural = _("job servers")

    def __str__(self) -> str:
        return self.name


class JobRecord(models.Model):
    """
    One job: what was asked, where it stands, how it ended.

    A row with a ``server`` belongs to that server, which alone changes it; a
    live row without one waits to be claimed.
    """

    class Status(models.TextChoices):
        SCHEDULED = "SCHEDULED", _("Scheduled")
        READY = "READY", _("Ready")
        RUNNING = "RUNNING", _("Running")
        RETRYING = "RETRYING", _("Retrying")
        SUCCESSFUL = "SUCCESSFUL", _("Successful")
        FAILED = "FAILED", _("Failed")
        DEAD = "DEAD", _("Dead")
        CANCELLED = "CANCELLED", _("Cancelled")

    LIVE: ClassVar[tuple[Status, ...]] = (Status.SCHEDULED, Status.READY, Status.RUNNING, Status.RETRYING)
    """Statuses of a job that is still to do; every other status is final."""

    FAILURES: ClassVar[tuple[Status, ...]] = (Status.FAILED, Status.DEAD, Status.CANCELLED)
    """Statuses of a job that ended without a value."""

    id = models.BigAutoField(_("id"), primary_key=True)

    # What was asked.
    function = models.CharField(_("function"), max_length=512)
    queue_name = models.CharField(_("queue"), max_length=100, default="default")
    unique = models.CharField(_("unique"), max_length=256, blank=True, default="")
    """The submitter's key, as ``store.text_of_unique`` writes it; empty for none."""

    reducer = models.CharField(_("reducer"), max_length=512, blank=True, default="")
    workload = models.BinaryField(_("workload"), default=b"")
    priority = models.SmallIntegerField(_("priority"), default=0)
    """-100 to 100, higher first; the wire's low, normal and high are -50, 0 and 50."""

    background = models.BooleanField(_("background"), default=True)
    """Whether the job is kept when its client leaves; foreground jobs are not durable."""

    client = models.CharField(_("client"), max_length=128, blank=True, default="")
    run_after = models.DateTimeField(_("run after"), null=True, blank=True)
    max_attempts = models.PositiveSmallIntegerField(_("max attempts"), null=True, blank=True)
    timeout = models.PositiveIntegerField(_("timeout"), null=True, blank=True)
    """Seconds one attempt may take; null for the server's default."""

    # Where it stands.
    status = models.CharField(_("status"), max_length=10, choices=Status, default=Status.READY)
    handle = models.CharField(_("handle"), max_length=64, null=True, blank=True)  # noqa: DJ001
    """The Gearman handle; null until a server has the job, since unclaimed rows have none to be unique."""

    server = models.ForeignKey(
        ServerLease,
        models.PROTECT,
        verbose_name=_("job server"),
        null=True,
        blank=True,
        db_index=False,  # job_owned serves it, without the history
        related_name="+",
    )
    server_epoch = models.PositiveBigIntegerField(_("server epoch"), null=True, blank=True)
    """The server's epoch when it claimed the row."""

    worker = models.CharField(_("worker"), max_length=128, blank=True, default="")
    """Identity of the worker that has, or last had, the job."""

    attempts = models.PositiveIntegerField(_("attempts"), default=0)
    """How often the job was handed to a worker."""

    numerator = models.BigIntegerField(_("progress numerator"), null=True, blank=True)
    denominator = models.BigIntegerField(_("progress denominator"), null=True, blank=True)

    # How it ended.
    result = models.BinaryField(_("result"), null=True, blank=True)
    """Bytes of WORK_COMPLETE; JSON for a ``@job`` that is not raw. Null until the job succeeded."""

    exception = models.CharField(_("exception"), max_length=512, blank=True, default="")
    """Import path of the exception's class, or a reason given by the server."""

    message = models.TextField(_("message"), blank=True, default="")
    """The exception's own sentence."""

    traceback = models.TextField(_("traceback"), blank=True, default="")

    enqueued_at = models.DateTimeField(_("enqueued at"), default=timezone.now)
    started_at = models.DateTimeField(_("started at"), null=True, blank=True)
    last_attempted_at = models.DateTimeField(_("last attempted at"), null=True, blank=True)
    finished_at = models.DateTimeField(_("finished at"), null=True, blank=True)

    class Meta:
        verbose_name = _("job record")
        verbose_name_plural = _("job records")
        constraints = [
            models.UniqueConstraint(fields=["handle"], name="job_handle_unique"),
            models.CheckConstraint(
                condition=Q(priority__gte=-100, priority__lte=100), name="job_priority_range"
            ),
        ]
        # The partial indexes hold live rows only, so that claim, due and replay
        # cost the same whatever the history. MySQL has no partial indexes: there
        # migration 0002 makes job_claim and job_due of other columns.
        indexes = [
            models.Index(
                models.F("priority").desc(),
                models.F("id").asc(),
                name="job_claim",
                condition=Q(status="READY", server__isnull=True),
            ),
            models.Index(
                fields=["run_after"],
                name="job_due",
                condition=Q(status__in=("SCHEDULED", "RETRYING"), server__isnull=True),
            ),
            models.Index(
                fields=["server", "id"],
                name="job_owned",
                condition=Q(status__in=("SCHEDULED", "READY", "RUNNING", "RETRYING"), server__isnull=False),
            ),
            # The admin: newest first within a status or a function; look-up by unique.
            models.Index(fields=["status", "-id"], name="job_status"),
            models.Index(fields=["function", "-id"], name="job_function"),
            models.Index(fields=["unique", "-id"], name="job_unique", condition=~Q(unique="")),
        ]

    def __str__(self) -> str:
        return f"{self.function} #{self.pk}"

    @classmethod
    def check(cls, **kwargs: Any) -> list[CheckMessage]:
        # What MySQL cannot do of our indexes (conditions, expressions) is made up for in migration 0002.
        return [message for message in super().check(**kwargs) if message.id not in _OF_MYSQL_INDEXES]

    @property
    def is_finished(self) -> bool:
        return self.status not in self.LIVE

    @property
    def duration(self) -> datetime.timedelta | None:
        """How long the last attempt took, or has taken so far; None before it began."""
        if self.last_attempted_at is None:
            return None
        return (self.finished_at or timezone.now()) - self.last_attempted_at
