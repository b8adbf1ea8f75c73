"""Groups and chains: how far each is, its members, and what follows it."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from django.contrib import admin
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from django_gearman.models import JobGroup, JobRecord

from . import format
from .filters import GroupFilter
from .read_only import JobGroupModelAdmin, Look, ReadOnly


class StandingFilter(admin.SimpleListFilter):
    title = gettext_lazy("standing")
    parameter_name = "standing"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Any:
        return [("live", _("At work")), ("over", _("Over")), ("failed", _("With failures"))]

    def queryset(self, request: HttpRequest, queryset: Any) -> Any:
        match self.value():
            case "live":
                return queryset.filter(finished_at=None)
            case "over":
                return queryset.filter(finished_at__isnull=False)
            case "failed":
                return queryset.filter(failed__gt=0)
        return queryset


@admin.register(JobGroup)
class JobGroupAdmin(Look, ReadOnly, JobGroupModelAdmin):
    list_display = ("id", "members", "progress", "failures", "enqueued", "finished_when")
    list_filter = (StandingFilter,)
    ordering = ("-id",)
    sortable_by = ("id",)
    list_per_page = 50
    fields = (
        "members",
        "progress",
        "failures",
        "members_link",
        "follows_success",
        "follows_completion",
        "enqueued",
        "finished_when",
    )
    readonly_fields = fields

    @admin.display(description=gettext_lazy("what is in it"))
    def members(self, group: JobGroup) -> str:
        return format.text(group.name)

    @admin.display(description=gettext_lazy("progress"))
    def progress(self, group: JobGroup) -> str:
        return format.fraction(group.finished, group.total, _("Progress of group %(id)d") % {"id": group.pk})

    @admin.display(description=gettext_lazy("failed"))
    def failures(self, group: JobGroup) -> str:
        return str(group.failed) if group.failed else format.NOTHING

    @admin.display(description=gettext_lazy("jobs"))
    def members_link(self, group: JobGroup) -> SafeString:
        url = reverse("admin:django_gearman_jobrecord_changelist", current_app=self.admin_site.name)
        return format_html(
            '<a href="{}?{}">{}</a>',
            url,
            urlencode({GroupFilter.parameter_name: group.pk}),
            _("%(count)d jobs, and what follows them") % {"count": group.total},
        )

    @admin.display(description=gettext_lazy("on success"))
    def follows_success(self, group: JobGroup) -> str:
        return self._following(group, group.on_success)

    @admin.display(description=gettext_lazy("on completion"))
    def follows_completion(self, group: JobGroup) -> str:
        return self._following(group, group.on_complete)

    def _following(self, group: JobGroup, id: int | None) -> str:
        records = JobRecord.objects.using(group._state.db).only("function", "status", "exception")
        job = records.filter(pk=id).first() if id else None
        if job is None:
            return format.NOTHING
        url = reverse(
            "admin:django_gearman_jobrecord_change", args=[job.pk], current_app=self.admin_site.name
        )
        return format_html('<a href="{}">{}</a> {}', url, format.name(job.function), format.status(job))

    @admin.display(description=gettext_lazy("enqueued"))
    def enqueued(self, group: JobGroup) -> str:
        return format.moment(group.enqueued_at)

    @admin.display(description=gettext_lazy("finished"))
    def finished_when(self, group: JobGroup) -> str:
        return format.moment(group.finished_at)
