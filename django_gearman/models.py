"""
What is kept: one row per job, which is the durable queue and the record that
the admin shows; and rows for attempts, groups, wishes to cancel, schedules,
limits and job servers.

No behaviour here beyond what a row *is*. Rows of jobs are inserted by
``submission.py`` and ``groups.py`` (the database door) and by ``store`` (the
wire door); outcomes are written by the server that has the job, and of what
none has by who cancels it. What fires schedules is in
``scheduler.py``.
"""

from __future__ import annotations

import datetime
import hashlib
import re
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, ClassVar

from django.conf import settings
from django.core.checks import CheckMessage
from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import Q
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from . import permits, schedules
from .exceptions import InvalidSchedule

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
        WAITING = "WAITING", _("Waiting for others")
        SCHEDULED = "SCHEDULED", _("Scheduled")
        READY = "READY", _("Ready")
        RUNNING = "RUNNING", _("Running")
        RETRYING = "RETRYING", _("Retrying")
        SUCCESSFUL = "SUCCESSFUL", _("Successful")
        FAILED = "FAILED", _("Failed")
        DEAD = "DEAD", _("Dead")
        CANCELLED = "CANCELLED", _("Cancelled")

    SERVED: ClassVar[tuple[Status, ...]] = (Status.SCHEDULED, Status.READY, Status.RUNNING, Status.RETRYING)
    """Statuses of a job that is for job servers to see to."""

    LIVE: ClassVar[tuple[Status, ...]] = (Status.WAITING, *SERVED)
    """Statuses of a job that is still to do; every other status is final."""

    FAILURES: ClassVar[tuple[Status, ...]] = (Status.FAILED, Status.DEAD, Status.CANCELLED)
    """Statuses of a job that ended without a value."""

    id = models.BigAutoField(_("id"), primary_key=True)

    # What was asked.
    function = models.CharField(_("function"), max_length=512)
    queue_name = models.CharField(_("queue"), max_length=100, default="default")
    unique = models.CharField(_("unique"), max_length=256, blank=True, default="")
    """The submitter's key, as ``store.text_of_unique`` writes it; empty for none."""

    unique_key = models.CharField(  # noqa: DJ001  # unique, and many have none
        _("unique key"), max_length=64, null=True, blank=True, default=None, editable=False
    )
    """``unique_key_of`` a background job that has a unique and is still to do; null of all others."""

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

    limit_key = models.CharField(  # noqa: DJ001  # an empty one is a key
        _("limit key"), max_length=64, null=True, blank=True, default=None, editable=False
    )
    """What the function's limit is counted by; null where that is not by a key, or the job does not say."""

    # With which others. Without a constraint of the database, which would lock the
    # group's row for each of thousands of members; who deletes a group deletes no job.
    group = models.ForeignKey(
        "JobGroup",
        models.DO_NOTHING,
        verbose_name=_("group"),
        null=True,
        blank=True,
        editable=False,
        db_constraint=False,
        db_index=False,  # job_group serves it
        related_name="+",
    )
    group_index = models.PositiveIntegerField(_("place in the group"), null=True, blank=True, editable=False)
    """From 0; null of what is run when the group is over."""

    # Where it stands.
    status = models.CharField(_("status"), max_length=10, choices=Status, default=Status.READY)
    handle = models.CharField(_("handle"), max_length=64, null=True, blank=True)  # noqa: DJ001  # unique, and many have none
    """The Gearman handle; null until a server has the job, since unclaimed rows have none to be unique."""

    server = models.ForeignKey(
        ServerLease,
        models.PROTECT,
        verbose_name=_("job server"),
        null=True,
        blank=True,
        db_constraint=False,  # whoever sets it has proved the lease in the same transaction
        db_index=False,  # job_owned serves it, without the history
        related_name="+",
    )
    server_epoch = models.PositiveBigIntegerField(_("server epoch"), null=True, blank=True)
    """The server's epoch when it claimed the row."""

    worker = models.CharField(_("worker"), max_length=128, blank=True, default="")
    """Identity of the worker that has, or last had, the job."""

    attempts = models.PositiveIntegerField(_("attempts"), default=0)
    """How often the job was handed to a worker."""

    interruptions = models.PositiveIntegerField(_("interruptions"), default=0)
    """How many of the attempts ended with their job server, which is no fault of the job's."""

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

    log = models.TextField(_("log"), blank=True, default="")
    """The last lines that the last attempt logged."""

    enqueued_at = models.DateTimeField(_("enqueued at"), default=timezone.now)
    started_at = models.DateTimeField(_("started at"), null=True, blank=True)
    last_attempted_at = models.DateTimeField(_("last attempted at"), null=True, blank=True)
    finished_at = models.DateTimeField(_("finished at"), null=True, blank=True)

    class Meta:
        verbose_name = _("job record")
        verbose_name_plural = _("job records")
        constraints = [
            models.UniqueConstraint(fields=["handle"], name="job_handle_unique"),
            # One job at a time for each unique of a function, whichever door it came by.
            models.UniqueConstraint(fields=["unique_key"], name="job_unique_key"),
            models.CheckConstraint(
                condition=Q(priority__gte=-100, priority__lte=100), name="job_priority_range"
            ),
        ]
        # The partial indexes hold live rows only, so that claim, due and replay
        # cost the same whatever the history. MySQL has no partial indexes: there
        # migration 0006 makes job_claim and job_due of other columns. The last two
        # columns of those are there to count by the index alone.
        indexes = [
            models.Index(
                fields=["function", "-priority", "id", "status", "server"],
                name="job_claim",
                condition=Q(status="READY", server__isnull=True),
            ),
            models.Index(
                fields=["function", "run_after", "id", "status", "server"],
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
            models.Index(fields=["group", "group_index"], name="job_group", condition=Q(group__isnull=False)),
            # What is old enough to be pruned, oldest first.
            models.Index(
                fields=["status", "finished_at", "id"],
                name="job_history",
                condition=Q(finished_at__isnull=False),
            ),
        ]

    def __str__(self) -> str:
        # Any client's text, which headings show as it is: nothing in it is to hide or reorder others.
        name = self.function if self.function.isprintable() else repr(self.function)[1:-1]
        return f"{name} #{self.pk}"

    @classmethod
    def check(cls, **kwargs: Any) -> list[CheckMessage]:
        # What MySQL cannot do of our indexes (conditions, expressions) is made up for in migration 0006.
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


def unique_key_of(function: str, unique: str, workload: bytes = b"") -> str | None:
    """
    What two jobs have in common that are to be one; None for a job without a unique.

    A hash, since functions and uniques together are longer than what every
    database can have unique. Short plain uniques stand in it as they are: those
    that follow each other, as numbers do, then share the pages of the index, and a
    batch of submissions does not write a page for each.

    Args:
        unique: As the column has it; ``-`` stands for the workload, and for none where that is empty.
    """
    if not unique or (unique == "-" and not workload):
        return None
    if unique != "-" and _PLAIN_UNIQUE.fullmatch(unique):
        return f"{_hash_of_function(function)}:{unique}"
    of = hashlib.sha256(function.encode())
    of.update(b"\0" + unique.encode())
    if unique == "-":
        of.update(b"\0" + workload)
    return of.hexdigest()


# No spaces, which some collations do not see at the end. With a colon it is no hash of the other kind.
_PLAIN_UNIQUE = re.compile("[!-~]{1,40}")


@lru_cache(maxsize=1_000)
def _hash_of_function(function: str) -> str:
    return hashlib.sha256(function.encode()).hexdigest()[:23]


class JobAttempt(models.Model):
    """
    One attempt at a job that came to nothing: its worker was lost, or it raised and is tried again.

    The last attempt of each job stands in its ``JobRecord``.
    """

    job = models.ForeignKey(
        JobRecord,
        models.CASCADE,
        verbose_name=_("job"),
        related_name="past_attempts",
        db_index=False,  # the constraint's index serves it
    )
    number = models.PositiveIntegerField(_("attempt"))
    """From 1."""

    worker = models.CharField(_("worker"), max_length=128, blank=True, default="")
    started_at = models.DateTimeField(_("started at"), null=True, blank=True)
    finished_at = models.DateTimeField(_("finished at"))
    exception = models.CharField(_("exception"), max_length=512, blank=True, default="")
    """Import path of the exception's class; empty when the server told the reason."""

    message = models.TextField(_("message"), blank=True, default="")
    traceback = models.TextField(_("traceback"), blank=True, default="")
    log = models.TextField(_("log"), blank=True, default="")
    """The last lines that it logged."""

    class Meta:
        verbose_name = _("job attempt")
        verbose_name_plural = _("job attempts")
        constraints = [models.UniqueConstraint(fields=["job", "number"], name="job_attempt_unique")]

    def __str__(self) -> str:
        return f"attempt {self.number} of #{self.job_id}"


class JobGroup(models.Model):
    """
    Jobs that are gone about together: how many have ended, and what comes next.

    Its members stand in stages, one after the other: a group has one, a chain one for each
    step. What a later stage runs, and what is run when all is over, are jobs from the
    beginning, ``WAITING``. Whoever writes the end of a member counts it here in the same
    transaction, and whoever counts the last of a stage begins the next.
    """

    name = models.CharField(_("name"), max_length=200, blank=True, default="")
    """What is in it, for people to read."""

    plan = models.JSONField(_("plan"), default=dict, editable=False)
    """Its stages; see ``continuations.Plan``."""

    total = models.PositiveIntegerField(_("members"), default=0)
    stage = models.PositiveIntegerField(_("stage"), default=0)
    """Which stage is at work, from 0."""

    left = models.IntegerField(_("left"), default=0)
    """How many members of this stage have not ended yet."""

    successful = models.PositiveIntegerField(_("successful"), default=0)
    failed = models.PositiveIntegerField(_("failed"), default=0)
    """How many ended without a value; in a chain also those that were not begun any more."""

    on_success = models.BigIntegerField(_("on success"), null=True, blank=True)
    on_complete = models.BigIntegerField(_("on completion"), null=True, blank=True)
    """Id of the record of what is run at the end; null for nothing."""

    enqueued_at = models.DateTimeField(_("enqueued at"), default=timezone.now)
    finished_at = models.DateTimeField(_("finished at"), null=True, blank=True)
    """When the last member's end was counted; null before."""

    class Meta:
        # As of schedules.
        required_db_features = ("supports_json_field",)
        verbose_name = _("job group")
        verbose_name_plural = _("job groups")
        indexes = [
            # Those at work; few, whatever the history.
            models.Index(fields=["id"], name="job_group_live", condition=Q(finished_at__isnull=True)),
        ]

    def __str__(self) -> str:
        return f"{self.name} #{self.pk}"

    @classmethod
    def check(cls, **kwargs: Any) -> list[CheckMessage]:
        # Of MySQL's primary key the end is no farther.
        return [message for message in super().check(**kwargs) if message.id not in _OF_MYSQL_INDEXES]

    @property
    def is_finished(self) -> bool:
        return self.finished_at is not None

    @property
    def finished(self) -> int:
        """How many members have ended."""
        return self.successful + self.failed


class Cancellation(models.Model):
    """
    Somebody wants a job to end that a job server has: that server, whichever it is, sees to it.

    Rows are made by whoever cancels, and deleted by job servers once the job has ended.
    """

    job_id = models.BigIntegerField(_("job"), primary_key=True)
    """Of the ``JobRecord``. No relation: to prune records need not look for these."""

    requested_at = models.DateTimeField(_("requested at"), default=timezone.now)

    class Meta:
        verbose_name = _("cancellation")
        verbose_name_plural = _("cancellations")

    def __str__(self) -> str:
        return f"cancellation of #{self.job_id}"


class Schedule(models.Model):
    """
    When a function is to be run, again and again.

    Job servers make the jobs: the one whose compare-and-set of ``next_at``
    succeeds makes them in the same transaction. Moments are seconds since 1970:
    a naive datetime, as databases keep it when ``USE_TZ`` is off, does not tell
    the two hours apart that the end of summer time shows alike.
    """

    class CatchUp(models.TextChoices):
        NONE = "none", _("None: go on with the next")
        ONE = "one", _("One job for all of them")
        ALL = "all", _("One job for each")

    name = models.CharField(
        _("name"), max_length=600, unique=True, help_text=_("What tells this schedule from others.")
    )
    function = models.CharField(
        _("function"),
        max_length=512,
        help_text=_("Name on the wire: of a @job its import path, unless it was given another."),
    )

    # When.
    cron = models.CharField(
        _("cron"),
        max_length=200,
        blank=True,
        default="",
        help_text=_("Minute, hour, day of month, month, day of week. Or an interval."),
    )
    interval = models.DurationField(
        _("interval"), null=True, blank=True, help_text=_("[days] hours:minutes:seconds. Or a cron.")
    )
    tz = models.CharField(
        _("time zone"),
        max_length=64,
        blank=True,
        default="",
        help_text=_("Whose clock the cron means, such as Europe/Paris; the site's when empty."),
    )
    catch_up = models.CharField(
        _("missed times"),
        max_length=4,
        choices=CatchUp,
        default=CatchUp.ONE,
        help_text=_("What becomes of times at which no job server was up."),
    )
    enabled = models.BooleanField(_("enabled"), default=True)

    # What.
    args = models.JSONField(
        _("arguments"), blank=True, default=list, help_text=_('A JSON array, such as [7, "large"].')
    )
    kwargs = models.JSONField(
        _("keyword arguments"),
        blank=True,
        default=dict,
        help_text=_('A JSON object, such as {"size": 800}.'),
    )
    queue_name = models.CharField(
        _("queue"), max_length=100, blank=True, default="", help_text=_("The job's own when empty.")
    )
    priority = models.SmallIntegerField(
        _("priority"),
        null=True,
        blank=True,
        help_text=_("-100 to 100, higher first; the job's own when empty."),
    )

    declared = models.JSONField(_("declared"), null=True, editable=False)
    """What the code said when a server last looked; null for a schedule that was made in the admin."""

    withdrawn = models.BooleanField(_("withdrawn"), default=False, editable=False)
    """The code declared it and does no more: it rests, and keeps what was set here."""

    # Where it stands.
    plan = models.CharField(max_length=400, default="", editable=False)
    """What ``next_at`` was worked out from; when it differs from ``current_plan``, the times were edited."""

    next_at = models.BigIntegerField(_("next time"), null=True, editable=False, db_index=True)
    """Seconds since 1970; null when it rests."""

    last_at = models.BigIntegerField(_("last time"), null=True, editable=False)
    """The time, not the moment, for which the last job was made."""

    last_job = models.BigIntegerField(_("last job"), null=True, editable=False)
    """Id of its record, which may be gone."""

    error = models.TextField(_("error"), blank=True, default="", editable=False)
    """Why it does not fire; empty unless it cannot."""

    STANDING: ClassVar[frozenset[str]] = frozenset({"plan", "next_at", "last_at", "last_job", "error"})
    """Fields that servers write."""

    class Meta:
        # Else `manage.py check` would open the database to ask for it, also where there is none yet.
        required_db_features = ("supports_json_field",)
        verbose_name = _("schedule")
        verbose_name_plural = _("schedules")
        constraints = [
            models.CheckConstraint(
                condition=Q(cron="", interval__isnull=False) | (~Q(cron="") & Q(interval__isnull=True)),
                name="schedule_cron_or_interval",
                violation_error_message=_("Give either a cron or an interval."),
            ),
            models.CheckConstraint(
                condition=Q(priority__isnull=True) | Q(priority__gte=-100, priority__lte=100),
                name="schedule_priority_range",
                violation_error_message=_("A priority is from -100 to 100."),
            ),
        ]

    def __str__(self) -> str:
        return self.name

    def save(self, *args: Any, update_fields: Iterable[str] | None = None, **kwargs: Any) -> None:
        """
        Save; when the times were edited, the next is after now and never one that has passed.

        Where it stands is left as it is in the row otherwise: a server may have
        fired it since this object was read.

        Raises:
            InvalidSchedule: The times make no sense.
        """
        # What could not be fired may be mended now.
        edited = self.plan != self.current_plan or bool(self.error)
        if edited:
            self.replan(int(time.time()))
        if update_fields is None and not self._state.adding:
            names = {field.name for field in self._meta.concrete_fields if not field.primary_key}
            update_fields = names - self.STANDING
        if update_fields is not None and edited:
            update_fields = {*update_fields, "plan", "next_at", "error"}
        super().save(*args, update_fields=update_fields, **kwargs)

    @property
    def rests(self) -> bool:
        return self.withdrawn or not self.enabled

    @property
    def zone_name(self) -> str:
        return self.tz or str(settings.TIME_ZONE)

    @property
    def timing(self) -> schedules.Timing:
        """
        Which moments it names.

        Raises:
            InvalidSchedule: None; or not on this machine.
        """
        return schedules.timing(self.cron, self.interval, self.zone_name)

    @property
    def current_plan(self) -> str:
        """All that the next time depends on; empty when there is to be none."""
        if self.rests:
            return ""
        return f"{self.cron} {self.zone_name}" if self.cron else f"every {self.interval}"

    def replan(self, now: int) -> None:
        """
        Work out the next time anew: after ``now``, whatever was planned before.

        Raises:
            InvalidSchedule: There is none.
        """
        self.next_at = None if self.rests else self.timing.next_after(now, None)
        self.plan = self.current_plan
        self.error = ""

    def next_times(self, count: int) -> list[datetime.datetime]:
        """The next times, on the clock that is meant; none when it rests."""
        if self.next_at is None:
            return []
        zone = schedules.time_zone(self.zone_name)
        times = schedules.next_times(self.timing, self.next_at, count)
        return [datetime.datetime.fromtimestamp(at, zone) for at in times]

    def clean(self) -> None:
        field = "tz"
        try:
            schedules.time_zone(self.zone_name)
            field = "cron" if self.cron else "interval"
            if self.cron or self.interval is not None:
                schedules.timing(self.cron, self.interval, self.zone_name)
        except InvalidSchedule as error:
            raise ValidationError({field: str(error)}) from error
        self.args = [] if self.args is None else self.args
        self.kwargs = {} if self.kwargs is None else self.kwargs
        if not isinstance(self.args, list):
            raise ValidationError({"args": _("Arguments are a JSON array.")})
        if not isinstance(self.kwargs, dict):
            raise ValidationError({"kwargs": _("Keyword arguments are a JSON object.")})


class FunctionLimit(models.Model):
    """How many jobs of a function may run, or begin, at a time, over all job servers."""

    function = models.CharField(
        _("function"),
        max_length=512,
        unique=True,
        help_text=_("Name on the wire: of a @job its import path, unless it was given another."),
    )
    rate = models.CharField(
        _("rate"),
        max_length=40,
        blank=True,
        default="",
        help_text=_("How many may begin in any period, such as 10/m or 5/30s: s, m, h or d. Empty for any."),
    )
    concurrency = models.PositiveIntegerField(
        _("at once"), null=True, blank=True, help_text=_("How many may run at once. Empty for any.")
    )
    by_key = models.BooleanField(
        _("for each key"),
        default=False,
        help_text=_("Whether it holds for each key of the jobs, as limit_key gives it, and not for all."),
    )
    enabled = models.BooleanField(_("enabled"), default=True)

    declared = models.JSONField(_("declared"), null=True, editable=False)
    """What the code said when a server last looked; null for a limit that was made in the admin."""

    withdrawn = models.BooleanField(_("withdrawn"), default=False, editable=False)
    """The code declared it and does no more: it rests, and keeps what was set here."""

    class Meta:
        required_db_features = ("supports_json_field",)
        verbose_name = _("limit")
        verbose_name_plural = _("limits")
        constraints = [
            models.CheckConstraint(
                condition=~Q(rate="") | Q(concurrency__isnull=False),
                name="limit_rate_or_concurrency",
                violation_error_message=_("Give a rate, or how many at once, or both."),
            ),
        ]

    def __str__(self) -> str:
        return self.function

    @property
    def rests(self) -> bool:
        return self.withdrawn or not self.enabled

    @property
    def limit(self) -> permits.Limit:
        """
        What it allows.

        Raises:
            ValueError: It makes no sense.
        """
        count, period = permits.parse_rate(self.rate) if self.rate else (None, 60)
        return permits.Limit(count, float(period), self.concurrency, self.by_key)

    def clean(self) -> None:
        self.rate = self.rate.strip()
        try:
            self.limit  # noqa: B018  # it refuses
        except ValueError as error:
            raise ValidationError({"rate": str(error)}) from error
        if self.concurrency is not None and not 1 <= self.concurrency <= permits.MOST:
            raise ValidationError({"concurrency": _("A number from 1 to 1,000,000; empty for any.")})


class LimitUse(models.Model):
    """
    What is in use of one limit, or of one of its keys; nobody's but the job servers'.

    They change it in transactions that lock the row, so that a limit is exact.
    """

    digest = models.CharField(max_length=64, unique=True)
    """Of function and key: both together are longer than what every database can have unique."""

    function = models.CharField(_("function"), max_length=512)
    key = models.CharField(_("key"), max_length=64, blank=True)
    book = models.TextField(blank=True, default="")
    """What ``permits.Use`` has written down."""

    touched = models.FloatField(db_index=True)
    """When it was last written, in seconds since 1970 by the database's clock."""

    class Meta:
        verbose_name = _("use of a limit")
        verbose_name_plural = _("uses of limits")

    def __str__(self) -> str:
        return f"{self.function} {self.key}".strip()
