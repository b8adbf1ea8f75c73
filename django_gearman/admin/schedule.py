"""The schedules: when each is due next, and a form to change that."""

from __future__ import annotations

import datetime
import json
from typing import Any

from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.db import OperationalError, transaction
from django.db.models import QuerySet
from django.forms import JSONField, Textarea
from django.forms.fields import InvalidJSONInput
from django.http import HttpRequest
from django.urls import reverse
from django.utils.formats import date_format
from django.utils.html import format_html, format_html_join
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from django_gearman import conf
from django_gearman.exceptions import InvalidSchedule
from django_gearman.job_declarations import scheduled_record
from django_gearman.models import Schedule
from django_gearman.scheduler import insert, is_edited, reset

from . import format
from .read_only import Declared, Look, RowForm, ScheduleModelAdmin

NEXT_TIMES = 5

DEEPEST = 30
"""Lists and objects that may be nested in arguments; MariaDB takes some 30, others more."""

_TOO_DEEP = gettext_lazy("Lists and objects may be nested %(depth)d deep at most.")

DECLARED = ("name", "function")
"""What the code says of its own schedules, and nobody else."""


class ArgumentsField(JSONField):
    """JSON that every database can keep, and every page can show."""

    def to_python(self, value: Any) -> Any:
        try:
            parsed = super().to_python(value)
            self._refuse(parsed)
        except RecursionError:
            raise ValidationError(_TOO_DEEP % {"depth": DEEPEST}) from None
        except ValueError as error:  # a number of thousands of digits, or half of a surrogate pair
            raise ValidationError(str(error)) from error
        return parsed

    def _refuse(self, value: Any, depth: int = 0) -> None:
        if depth == DEEPEST and isinstance(value, list | dict):
            raise ValidationError(_TOO_DEEP % {"depth": DEEPEST})
        match value:
            case str():
                value.encode()
                if "\0" in value:
                    raise ValidationError(_("The character \\u0000 is not allowed."))
            case list():
                for each in value:
                    self._refuse(each, depth + 1)
            case dict():
                for key, each in value.items():
                    self._refuse(key, depth)
                    self._refuse(each, depth + 1)

    def bound_data(self, data: Any, initial: Any) -> Any:
        # As it was typed: what was refused can perhaps neither be read nor written anew.
        return data if data is None else InvalidJSONInput(data)

    def prepare_value(self, value: Any) -> Any:
        text = super().prepare_value(value)
        # The code may declare what a page cannot show.
        return text if format.visible(text) == text else json.dumps(value, cls=self.encoder)


class ScheduleForm(RowForm):
    class Meta:
        model = Schedule
        fields = "__all__"  # fieldsets choose
        field_classes = {"args": ArgumentsField, "kwargs": ArgumentsField}
        widgets = {name: Textarea(attrs={"rows": 3, "cols": 60}) for name in ("args", "kwargs")}

    def clean(self) -> dict[str, Any]:
        """Refuse arguments that the function does not take, now and not when its time has come."""
        cleaned = super().clean() or self.cleaned_data
        if not self.errors and cleaned.get("args") is not None and cleaned.get("kwargs") is not None:
            function = cleaned.get("function", self.instance.function)
            probe = Schedule(function=function, args=cleaned["args"], kwargs=cleaned["kwargs"])
            try:
                scheduled_record(probe)
            except (TypeError, ValueError, OperationalError) as error:
                raise ValidationError({"args": str(error)}) from error
        return cleaned


@admin.register(Schedule)
class ScheduleAdmin(Declared, Look, ScheduleModelAdmin):
    form = ScheduleForm
    list_display = ("name", "times", "state", "next_time", "last_time", "job")
    list_filter = ("enabled",)
    list_per_page = 100
    ordering = ("name",)
    sortable_by = ("name",)
    search_fields = ("name", "function")
    actions = ("enable", "disable", "enqueue_now", "reset_to_code")

    def get_fieldsets(self, request: HttpRequest, obj: Schedule | None = None) -> Any:
        standing = (
            (gettext_lazy("Where it stands"), {"fields": ("state", "next_five", ("last_time", "job"))}),
        )
        return (
            (None, {"fields": ("name", "function", "enabled", *(("code",) if obj and obj.declared else ()))}),
            *(standing if obj else ()),
            (gettext_lazy("When"), {"fields": (("cron", "tz"), "interval", "catch_up")}),
            (gettext_lazy("What"), {"fields": ("args", "kwargs", ("queue_name", "priority"))}),
        )

    def get_readonly_fields(self, request: HttpRequest, obj: Schedule | None = None) -> Any:
        shown = ("state", "next_five", "last_time", "job", "code")
        return (*shown, *DECLARED) if obj is not None and obj.declared is not None else shown

    # The actions.

    @admin.action(description=gettext_lazy("Enable"), permissions=["change"])
    def enable(self, request: HttpRequest, queryset: QuerySet[Schedule]) -> None:
        self._switch(request, queryset, enabled=True)

    @admin.action(description=gettext_lazy("Disable"), permissions=["change"])
    def disable(self, request: HttpRequest, queryset: QuerySet[Schedule]) -> None:
        self._switch(request, queryset, enabled=False)

    def _switch(self, request: HttpRequest, queryset: QuerySet[Schedule], *, enabled: bool) -> None:
        for row in queryset:
            row.enabled = enabled
            try:
                row.save(using=row._state.db, update_fields=["enabled"])
            except InvalidSchedule as error:
                self.message_user(request, f"{row}: {error}", messages.ERROR)

    @admin.action(description=gettext_lazy("Enqueue a job now"), permissions=["change"])
    def enqueue_now(self, request: HttpRequest, queryset: QuerySet[Schedule]) -> None:
        count = 0
        for row in queryset:
            try:
                record = scheduled_record(row)
            except (TypeError, ValueError, OperationalError) as error:
                self.message_user(request, f"{row}: {error}", messages.ERROR)
                continue
            record.client = f"schedule {row.name}"[:128]
            if insert(record, conf.settings_for().database):
                count += 1
            else:
                told = _(
                    "Schedule %(schedule)s: its last job is still to do, and its unique allows no other."
                )
                self.message_user(request, told % {"schedule": row}, messages.WARNING)
        done = ngettext("%(count)d job was enqueued.", "%(count)d jobs were enqueued.", count)
        self.message_user(request, done % {"count": count})

    @admin.action(
        description=gettext_lazy("Take the times and arguments of the code"), permissions=["change"]
    )
    def reset_to_code(self, request: HttpRequest, queryset: QuerySet[Schedule]) -> None:
        for row in queryset.filter(declared__isnull=False):
            with transaction.atomic(using=conf.settings_for().database):
                reset(row)
                row.save(using=row._state.db)

    # What is shown.

    @admin.display(description=gettext_lazy("when"))
    def times(self, schedule: Schedule) -> str:
        if schedule.interval is not None:
            return _("every %(interval)s") % {"interval": _interval(schedule.interval)}
        return format.with_remark(format.text(schedule.cron), schedule.zone_name)

    @admin.display(description=gettext_lazy("state"))
    def state(self, schedule: Schedule) -> str:
        if schedule.withdrawn:
            return _("Rests: the code declares it no more")
        if not schedule.enabled:
            return _("Disabled")
        if schedule.error:
            return format_html("{} {}", _("Cannot be fired:"), format.text(schedule.error, 500))
        return _("Enabled")

    @admin.display(description=gettext_lazy("next time"), ordering="next_at")
    def next_time(self, schedule: Schedule) -> str:
        return format.moment(_moment(schedule.next_at))

    @admin.display(description=gettext_lazy("last time"))
    def last_time(self, schedule: Schedule) -> str:
        return format.moment(_moment(schedule.last_at))

    @admin.display(description=gettext_lazy("last job"))
    def job(self, schedule: Schedule) -> str:
        if schedule.last_job is None:
            return format.NOTHING
        address = reverse("admin:django_gearman_jobrecord_change", args=[schedule.last_job])
        return format_html('<a href="{}">{}</a>', address, schedule.last_job)

    @admin.display(description=gettext_lazy("next five times"))
    def next_five(self, schedule: Schedule) -> str:
        try:
            times = schedule.next_times(NEXT_TIMES)
        except InvalidSchedule as error:
            return format.text(str(error))
        if not times:
            return format.NOTHING
        return format_html(
            '<ol class="gearman-times">{}</ol>',
            format_html_join(
                "",
                '<li><time datetime="{}">{} <span class="gearman-quiet">{}</span></time></li>',
                ((at.isoformat(), date_format(at, "D Y-m-d H:i:s"), _zone(at)) for at in times),
            ),
        )

    @admin.display(description=gettext_lazy("in the code"))
    def code(self, schedule: Schedule) -> str:
        declared = schedule.declared or {}
        interval = declared.get("interval")
        said = declared.get("cron") or _("every %(interval)s") % {
            "interval": _interval(datetime.timedelta(seconds=interval or 0))
        }
        remark = _("edited here; the code's changes are not taken") if is_edited(schedule) else _("as here")
        return format.with_remark(format.text(f"{said} {declared.get('tz', '')}".strip()), remark)


def _interval(interval: datetime.timedelta) -> str:
    """An interval exactly, in the largest units that it has."""
    seconds = int(interval.total_seconds())
    parts = []
    for unit, size in ((_("d"), 86_400), (_("h"), 3600), (_("min"), 60), (_("s"), 1)):
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts)


def _zone(moment: datetime.datetime) -> str:
    """A zone's name at a moment, and its distance from UTC, by which the two hours of autumn differ."""
    return f"{moment.tzname()} {moment:%z}"


def _moment(seconds: int | None) -> datetime.datetime | None:
    try:
        return None if seconds is None else datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (OverflowError, ValueError):  # beyond the year 9999
        return None
