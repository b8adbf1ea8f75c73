"""The jobs: a list that stays quick with millions of rows, and a page for each."""

from __future__ import annotations

import datetime
from typing import Any
from urllib.parse import urlencode

from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.utils import flatten_fieldsets
from django.core.exceptions import ValidationError
from django.db.models import Exists, OuterRef, Q, QuerySet
from django.db.models.functions import Substr
from django.forms.widgets import CheckboxInput, Script
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from django_gearman.models import JobAttempt, JobGroup, JobRecord
from django_gearman.results import cancel_all, retry_all

from . import filters, format, payload
from .change_list import JobChangeList
from .paginator import JobPaginator
from .read_only import JobRecordModelAdmin, Look, ReadOnly

MATCHES = 1000
"""Jobs of one unique to find at most, newest first."""

AT_ONCE = 1000
"""Jobs that one action takes at most."""

CANCEL_LIMIT = 5.0
"""Seconds in which to see the end of jobs that are cancelled."""

ATTEMPTS = 50
"""Earlier attempts to show, the latest first."""

BIGGEST_ID = 2**63 - 1


@admin.register(JobRecord)
class JobRecordAdmin(Look, ReadOnly, JobRecordModelAdmin):
    list_display = (
        "id",
        "status_badge",
        "function_name",
        "queue",
        "progress",
        "enqueued",
        "started",
        "finished",
        "duration",
        "attempts_made",
        "worker_name",
    )
    list_display_links = ("id", "function_name")
    list_filter = (
        filters.StatusFilter,
        filters.FunctionFilter,
        filters.GroupFilter,
        filters.QueueFilter,
        filters.KindFilter,
        filters.PriorityFilter,
        filters.FinishedFilter,
    )
    list_per_page = 50
    list_max_show_all = 200
    ordering = ("-id",)
    sortable_by = ("id",)
    search_fields = ("=id",)  # shows the box; get_search_results decides
    search_help_text = gettext_lazy("Exactly an id, a handle (H:…) or a unique.")
    paginator = JobPaginator
    actions = ("cancel", "enqueue_again")

    class Media(Look.Media):
        js = [Script("django_gearman/live.js", type="module")]

    # The list.

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[JobChangeList]:
        return JobChangeList

    def lookup_allowed(self, lookup: str, value: str, request: HttpRequest) -> bool:
        # Any other lookup, such as ?message__contains=, would read the whole table.
        return lookup in {job_filter.parameter_name for job_filter in self.list_filter}

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[JobRecord], search_term: str
    ) -> tuple[QuerySet[JobRecord], bool]:
        """Find jobs by what names them exactly, one index look-up for each meaning of the term."""
        term = search_term.strip()
        if not term:
            return queryset, False
        jobs = self.get_queryset(request).values_list("pk", flat=True)
        # ~Q(unique="") lets the partial index serve it.
        found = set(jobs.filter(~Q(unique=""), unique=term).order_by("-pk")[:MATCHES])
        if ":" in term:
            # A handle begins with H: unless the server was told another prefix.
            found.update(jobs.filter(handle=term))
        if term.isascii() and term.isdigit() and len(term) < 20 and int(term) <= BIGGEST_ID:
            found.add(int(term))
        return queryset.filter(pk__in=found), False

    # The actions. Rows are the servers': who may change them may ask a server to.

    def has_cancel_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("django_gearman.change_jobrecord")

    @admin.action(description=gettext_lazy("Cancel"), permissions=["cancel"])
    def cancel(self, request: HttpRequest, queryset: QuerySet[JobRecord]) -> None:
        live = queryset.filter(status__in=JobRecord.LIVE).order_by("-pk").values_list("pk", flat=True)
        ids = list(live[: AT_ONCE + 1])
        count, waiting = cancel_all(ids[:AT_ONCE], queryset.db, CANCEL_LIMIT)
        if len(ids) > AT_ONCE:
            left = _("Only the %(count)d newest of the jobs were looked at: cancel the others once more.")
            self.message_user(request, left % {"count": AT_ONCE}, messages.WARNING)
        if waiting:
            left = ngettext(
                "%(count)d job will be cancelled once a job server sees to it: is one running?",
                "%(count)d jobs will be cancelled once a job server sees to it: is one running?",
                waiting,
            )
            self.message_user(request, left % {"count": waiting}, messages.WARNING)
        done = ngettext("%(count)d job was cancelled.", "%(count)d jobs were cancelled.", count)
        self.message_user(request, done % {"count": count})

    @admin.action(description=gettext_lazy("Enqueue again"), permissions=["cancel"])
    def enqueue_again(self, request: HttpRequest, queryset: QuerySet[JobRecord]) -> None:
        """As ``JobResult.retry`` of each that has ended, the oldest first; of too many none."""
        ids = list(queryset.order_by("pk").values_list("pk", flat=True)[: AT_ONCE + 1])
        if len(ids) > AT_ONCE:
            # They stay as they are: who chose all once more would have the first of them again.
            told = _(
                "More than %(count)d jobs were chosen, and none was enqueued again. Choose fewer by the "
                "filters, or do it by code: Failures in docs/monitoring.md shows how."
            )
            self.message_user(request, told % {"count": AT_ONCE}, messages.ERROR)
            return
        made, joined, unfinished = retry_all(ids, queryset.db)
        if unfinished:
            left = ngettext(
                "%(count)d job has not ended, and was not enqueued again.",
                "%(count)d jobs have not ended, and were not enqueued again.",
                unfinished,
            )
            self.message_user(request, left % {"count": unfinished}, messages.WARNING)
        if joined:
            left = ngettext(
                "%(count)d job was not enqueued again: a job of its unique is still to do.",
                "%(count)d jobs were not enqueued again: jobs of their uniques are still to do.",
                joined,
            )
            self.message_user(request, left % {"count": joined}, messages.WARNING)
        done = ngettext("%(count)d job was enqueued again.", "%(count)d jobs were enqueued again.", made)
        self.message_user(request, done % {"count": made})

    def action_checkbox(self, job: JobRecord) -> SafeString:
        # Django's own is labelled with the function's name, which is anybody's text.
        label = _("Select job %(id)d") % {"id": job.pk}
        checkbox = CheckboxInput({"class": "action-select", "aria-label": label}, lambda value: False)
        return checkbox.render(ACTION_CHECKBOX_NAME, str(job.pk))

    # The page of one job.

    def get_object(
        self, request: HttpRequest, object_id: str, from_field: str | None = None
    ) -> JobRecord | None:
        """Read one row; of the columns that may be huge, only the beginning."""
        jobs = self.get_queryset(request).select_related("server").defer(*payload.COLUMNS)
        try:
            job: JobRecord = jobs.annotate(
                **payload.heads(), has_past_attempts=Exists(JobAttempt.objects.filter(job=OuterRef("pk")))
            ).get(pk=object_id)
        except (JobRecord.DoesNotExist, ValidationError, ValueError):
            return None
        return job

    def get_fieldsets(self, request: HttpRequest, obj: JobRecord | None = None) -> Any:
        ended: tuple[str, ...] = ("result_value",)
        if obj is not None and obj.status in JobRecord.FAILURES:
            ended = ("exception_path", "message_text", "traceback_text")
        logged: tuple[Any, ...] = ()
        if obj is not None and obj.log_head:  # type: ignore[attr-defined]  # annotated
            logged = ((gettext_lazy("What it logged"), {"fields": ("log_text",)}),)
        past: tuple[Any, ...] = ()
        if obj is not None and obj.has_past_attempts:  # type: ignore[attr-defined]  # annotated
            past = ((gettext_lazy("Earlier attempts"), {"fields": ("earlier_attempts",)}),)
        return (
            (
                gettext_lazy("Where it stands"),
                {
                    "fields": (
                        ("status_badge", "progress", "attempts_made"),
                        ("worker_name", "server_name", "handle_text"),
                        *(("group_link",) if obj is not None and obj.group_id is not None else ()),
                    )
                },
            ),
            (gettext_lazy("How it ended"), {"fields": ended}),
            *logged,
            *past,
            (
                gettext_lazy("What was asked"),
                {
                    "fields": (
                        "function_path",
                        "arguments",
                        ("queue", "priority", "kind"),
                        ("unique_text", "reducer_text", "client_text"),
                        ("not_before", "time_limit"),
                    )
                },
            ),
            (
                gettext_lazy("Times"),
                {"fields": (("enqueued", "started", "last_attempted"), ("finished", "duration"))},
            ),
        )

    def get_readonly_fields(self, request: HttpRequest, obj: JobRecord | None = None) -> Any:
        return flatten_fieldsets(self.get_fieldsets(request, obj))

    def render_change_form(
        self,
        request: HttpRequest,
        context: dict[str, Any],
        add: bool = False,
        change: bool = False,
        form_url: str = "",
        obj: JobRecord | None = None,
    ) -> HttpResponse:
        if obj is not None:
            context["title"] = _("Job %(id)d") % {"id": obj.pk}
            context["subtitle"] = format.visible(obj.function, 200)
            context["same_function"] = urlencode({filters.FunctionFilter.parameter_name: obj.function})
        return super().render_change_form(request, context, add, change, form_url, obj)

    # What both show.

    @admin.display(description=gettext_lazy("status"))
    def status_badge(self, job: JobRecord) -> str:
        return format.status(job)

    @admin.display(description=gettext_lazy("function"))
    def function_name(self, job: JobRecord) -> str:
        return format.name(job.function)

    @admin.display(description=gettext_lazy("function"))
    def function_path(self, job: JobRecord) -> str:
        return format.text(job.function)

    @admin.display(description=gettext_lazy("queue"))
    def queue(self, job: JobRecord) -> str:
        return format.text(job.queue_name)

    @admin.display(description=gettext_lazy("progress"))
    def progress(self, job: JobRecord) -> str:
        return format.progress(job)

    @admin.display(description=gettext_lazy("attempts"))
    def attempts_made(self, job: JobRecord) -> str:
        return format.attempts(job)

    @admin.display(description=gettext_lazy("worker"))
    def worker_name(self, job: JobRecord) -> str:
        return format.text(job.worker)

    @admin.display(description=gettext_lazy("enqueued"))
    def enqueued(self, job: JobRecord) -> str:
        return format.moment(job.enqueued_at)

    @admin.display(description=gettext_lazy("started"))
    def started(self, job: JobRecord) -> str:
        return format.moment(job.started_at)

    @admin.display(description=gettext_lazy("last attempted"))
    def last_attempted(self, job: JobRecord) -> str:
        return format.moment(job.last_attempted_at)

    @admin.display(description=gettext_lazy("finished"))
    def finished(self, job: JobRecord) -> str:
        return format.moment(job.finished_at)

    @admin.display(description=gettext_lazy("duration"))
    def duration(self, job: JobRecord) -> str:
        return format.job_duration(job)

    # What the page of one job shows besides.

    @admin.display(description=gettext_lazy("arguments"))
    def arguments(self, job: JobRecord) -> str:
        return payload.arguments(payload.payload_of(job, "workload"))

    @admin.display(description=gettext_lazy("result"))
    def result_value(self, job: JobRecord) -> str:
        return payload.value(payload.payload_of(job, "result"))

    @admin.display(description=gettext_lazy("exception"))
    def exception_path(self, job: JobRecord) -> str:
        return format.text(job.exception)

    @admin.display(description=gettext_lazy("message"))
    def message_text(self, job: JobRecord) -> str:
        return payload.prose(job, "message", _("Message"))

    @admin.display(description=gettext_lazy("traceback"))
    def traceback_text(self, job: JobRecord) -> str:
        return payload.prose(job, "traceback", _("Traceback"))

    @admin.display(description=gettext_lazy("log"))
    def log_text(self, job: JobRecord) -> str:
        return payload.prose(job, "log", _("Log"))

    @admin.display(description=gettext_lazy("attempts"))
    def earlier_attempts(self, job: JobRecord) -> str:
        attempts = (
            job.past_attempts.db_manager(job._state.db)
            .order_by("-number")
            .annotate(
                message_head=Substr("message", 1, payload.SHOWN),
                traceback_head=Substr("traceback", 1, payload.READ),
                log_head=Substr("log", 1, payload.READ),
            )
        )
        return format.past_attempts(attempts.defer("message", "traceback", "log")[:ATTEMPTS])

    @admin.display(description=gettext_lazy("group"))
    def group_link(self, job: JobRecord) -> str:
        group = JobGroup.objects.using(job._state.db).filter(pk=job.group_id or 0).first()
        if group is None:
            return format.NOTHING
        url = reverse(
            "admin:django_gearman_jobgroup_change", args=[group.pk], current_app=self.admin_site.name
        )
        if job.group_index is not None:
            # As GroupFailed and its outcomes count.
            told = _("member %(place)d of %(total)d, counted from 0")
            place = told % {"place": job.group_index, "total": group.total}
        else:
            place = _("follows it")
        link = format_html('<a href="{}">{} {}</a>', url, group.pk, format.visible(group.name, 80))
        return format.with_remark(link, place)

    @admin.display(description=gettext_lazy("kind"))
    def kind(self, job: JobRecord) -> str:
        return _("Background") if job.background else _("Foreground")

    @admin.display(description=gettext_lazy("unique"))
    def unique_text(self, job: JobRecord) -> str:
        return format.text(job.unique)

    @admin.display(description=gettext_lazy("reducer"))
    def reducer_text(self, job: JobRecord) -> str:
        return format.text(job.reducer)

    @admin.display(description=gettext_lazy("client"))
    def client_text(self, job: JobRecord) -> str:
        return format.text(job.client)

    @admin.display(description=gettext_lazy("not before"))
    def not_before(self, job: JobRecord) -> str:
        return format.moment(job.run_after)

    @admin.display(description=gettext_lazy("time limit"))
    def time_limit(self, job: JobRecord) -> str:
        if job.timeout is None:
            return _("The server's")
        return format.duration(datetime.timedelta(seconds=job.timeout))

    @admin.display(description=gettext_lazy("job server"))
    def server_name(self, job: JobRecord) -> str:
        return format.text(job.server.name if job.server else "")

    @admin.display(description=gettext_lazy("handle"))
    def handle_text(self, job: JobRecord) -> str:
        return format.text(job.handle or "")
