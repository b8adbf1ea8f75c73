"""
The filters beside the list.

Status and function have indexes of their own and search the whole history.
The others look at the newest ``RECENT`` jobs only: an index for each would be
paid by every job, for questions that are nearly always about the last hours.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Final

from django.contrib import admin
from django.contrib.admin.options import IncorrectLookupParameters
from django.db import connections
from django.db.models import Max, Q, QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from django_gearman.models import JobRecord

from .format import short_name, visible

if TYPE_CHECKING:
    from django.contrib.admin.options import ModelAdmin
    from django.utils.functional import _StrOrPromise

RECENT: Final = 100_000
"""Ids, counted from the newest, among which a filter without an index looks."""

CHOICES: Final = 100
"""Functions and queues to offer at most."""

Choices = Iterable[tuple[str, "_StrOrPromise"]]


class JobFilter(admin.SimpleListFilter):
    """A filter that is one condition; subclasses say which."""

    indexed: ClassVar[bool] = False
    """Whether the condition, newest jobs first, is served by an index of its own."""

    @property
    def active(self) -> bool:
        return self.value() is not None

    def condition(self, value: str) -> Q:
        """Return what the value asks for; KeyError when it was not offered."""
        raise NotImplementedError

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        value = self.value()
        if value is None:
            return queryset
        if "\0" in value:  # PostgreSQL would raise an error
            raise IncorrectLookupParameters
        try:
            return queryset.filter(self.condition(value))
        except KeyError as error:
            raise IncorrectLookupParameters from error


class StatusFilter(JobFilter):
    title = _("status")
    parameter_name = "status"
    indexed = True

    def lookups(self, request: HttpRequest, model_admin: ModelAdmin[Any]) -> Choices:
        return [(status.value, status.label) for status in JobRecord.Status]

    def condition(self, value: str) -> Q:
        if value not in JobRecord.Status.values:
            raise KeyError(value)
        return Q(status=value)


class FunctionFilter(JobFilter):
    title = _("function")
    parameter_name = "function"
    indexed = True

    def lookups(self, request: HttpRequest, model_admin: ModelAdmin[Any]) -> Choices:
        paths = functions(model_admin.get_queryset(request))
        chosen = self.value()
        if chosen is not None and chosen not in paths:
            paths.append(chosen)
        # Two functions of one name are told apart by their paths.
        names = Counter(map(short_name, paths))
        for path in paths:
            name = short_name(path)
            yield path, visible(name if names[name] == 1 else path, 80)

    def condition(self, value: str) -> Q:
        return Q(function=value)


class QueueFilter(JobFilter):
    title = _("queue")
    parameter_name = "queue"

    def lookups(self, request: HttpRequest, model_admin: ModelAdmin[Any]) -> Choices:
        recent = model_admin.get_queryset(request).filter(pk__gt=newest(request, model_admin) - RECENT // 10)
        names = set(recent.order_by().values_list("queue_name", flat=True).distinct()[:CHOICES])
        chosen = self.value()
        if chosen is not None:
            names.add(chosen)
        elif len(names) < 2:
            return []
        return [(name, visible(name, 80)) for name in sorted(names)]

    def condition(self, value: str) -> Q:
        return Q(queue_name=value)


class GroupFilter(JobFilter):
    """For who comes from the page of a group; else it is not there."""

    title = _("group")
    parameter_name = "group"
    indexed = True

    def lookups(self, request: HttpRequest, model_admin: ModelAdmin[Any]) -> Choices:
        chosen = self.value()
        return [] if chosen is None else [(chosen, visible(chosen, 20))]

    def condition(self, value: str) -> Q:
        if not (value.isascii() and value.isdigit() and len(value) < 19):
            raise KeyError(value)
        return Q(group=int(value))


class KindFilter(JobFilter):
    title = _("kind")
    parameter_name = "kind"

    def lookups(self, request: HttpRequest, model_admin: ModelAdmin[Any]) -> Choices:
        return [("background", _("Background")), ("foreground", _("Foreground"))]

    def condition(self, value: str) -> Q:
        return {"background": Q(background=True), "foreground": Q(background=False)}[value]


class PriorityFilter(JobFilter):
    title = _("priority")
    parameter_name = "priority"

    def lookups(self, request: HttpRequest, model_admin: ModelAdmin[Any]) -> Choices:
        return [("high", _("High")), ("normal", _("Normal")), ("low", _("Low"))]

    def condition(self, value: str) -> Q:
        return {"high": Q(priority__gt=0), "normal": Q(priority=0), "low": Q(priority__lt=0)}[value]


class FinishedFilter(JobFilter):
    title = _("finished")
    parameter_name = "finished"

    SPANS: ClassVar[dict[str, datetime.timedelta]] = {
        "hour": datetime.timedelta(hours=1),
        "day": datetime.timedelta(days=1),
        "week": datetime.timedelta(days=7),
    }

    def lookups(self, request: HttpRequest, model_admin: ModelAdmin[Any]) -> Choices:
        return [
            ("hour", _("In the last hour")),
            ("day", _("In the last day")),
            ("week", _("In the last week")),
        ]

    def condition(self, value: str) -> Q:
        return Q(finished_at__gte=timezone.now() - self.SPANS[value])


def newest(request: HttpRequest, model_admin: ModelAdmin[Any]) -> int:
    """Return the highest id, 0 for none; asked for once in a request."""
    found: int | None = getattr(request, "_gearman_newest", None)
    if found is None:
        jobs = model_admin.get_queryset(request)
        found = jobs.order_by().aggregate(last=Max("pk"))["last"] or 0
        request._gearman_newest = found  # type: ignore[attr-defined]  # our own
    return found


def functions(jobs: QuerySet[JobRecord]) -> list[str]:
    """
    Return the first ``CHOICES`` names of functions in the table, sorted.

    A loose index scan: each step looks up, in the index job_function, the name
    that follows the last. SELECT DISTINCT would read the whole index.
    """
    connection = connections[jobs.db]
    if connection.vendor == "oracle":  # which writes recursion differently
        return []
    table = connection.ops.quote_name(JobRecord._meta.db_table)
    column = connection.ops.quote_name("function")
    with connection.cursor() as cursor:
        cursor.execute(
            f"WITH RECURSIVE names (name, step) AS ("  # noqa: S608  # of quoted names
            f" SELECT MIN({column}), 1 FROM {table}"
            f" UNION ALL"
            f" SELECT (SELECT MIN({column}) FROM {table} WHERE {column} > names.name), step + 1"
            f" FROM names WHERE name IS NOT NULL AND step < %s"
            f") SELECT name FROM names WHERE name IS NOT NULL",
            [CHOICES],
        )
        return [name for (name,) in cursor.fetchall()]
