"""The job servers: which there are, and when each last proved to be alive."""

from __future__ import annotations

from django.contrib import admin
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from django_gearman.models import ServerLease

from . import format
from .read_only import Look, ReadOnly, ServerLeaseModelAdmin


@admin.register(ServerLease)
class ServerLeaseAdmin(Look, ReadOnly, ServerLeaseModelAdmin):
    list_display = ("name", "address", "epoch", "started", "renewed")
    ordering = ("name",)
    fields = ("name", "address", "epoch", "started", "renewed")
    readonly_fields = fields

    @admin.display(description=gettext_lazy("started"))
    def started(self, server: ServerLease) -> str:
        return format.moment(server.started_at)

    @admin.display(description=gettext_lazy("last alive"))
    def renewed(self, server: ServerLease) -> str:
        if server.renewed_at is None:
            return format.NOTHING
        ago = format.duration(timezone.now() - server.renewed_at)
        return format.with_remark(format.moment(server.renewed_at), _("%(duration)s ago") % {"duration": ago})
