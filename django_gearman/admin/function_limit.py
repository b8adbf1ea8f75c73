"""The limits: what is allowed of each function, what is in use of it now, and a form to change that."""

from __future__ import annotations

import time
from typing import Any

from django.contrib import admin
from django.db import transaction
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from django_gearman import conf
from django_gearman.limiting import Standing, is_edited, reset, standings
from django_gearman.models import FunctionLimit, JobRecord

from . import format
from .read_only import Declared, FunctionLimitModelAdmin, Look, RowForm

KEYS = 20
"""Keys of one limit that are shown, those of which most is in use."""


@admin.register(FunctionLimit)
class FunctionLimitAdmin(Declared, Look, FunctionLimitModelAdmin):
    form = RowForm
    list_display = ("function", "allowed", "state", "in_use", "begun")
    list_filter = ("enabled",)
    list_per_page = 100
    ordering = ("function",)
    sortable_by = ("function",)
    search_fields = ("function",)
    actions = ("enable", "disable", "reset_to_code")

    def get_fieldsets(self, request: HttpRequest, obj: FunctionLimit | None = None) -> Any:
        code = ("code",) if obj and obj.declared else ()
        stands = ((gettext_lazy("Where it stands"), {"fields": ("state", "in_use", "begun", "waiting")}),)
        return (
            (None, {"fields": ("function", "enabled", *code)}),
            *(stands if obj else ()),
            (gettext_lazy("What is allowed"), {"fields": ("rate", "concurrency", "by_key")}),
        )

    def get_readonly_fields(self, request: HttpRequest, obj: FunctionLimit | None = None) -> Any:
        shown = ("state", "in_use", "begun", "waiting", "code")
        # What jobs are counted by only the code can change, where they are the code's.
        return (*shown, "function", "by_key") if obj is not None and obj.declared is not None else shown

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        changes = super().get_changelist_instance(request)
        found = standings(list(changes.result_list), time.time())
        for row in changes.result_list:
            row._standings = found[row.function]
        return changes

    # The actions.

    @admin.action(description=gettext_lazy("Enable"), permissions=["change"])
    def enable(self, request: HttpRequest, queryset: QuerySet[FunctionLimit]) -> None:
        queryset.update(enabled=True)

    @admin.action(description=gettext_lazy("Disable"), permissions=["change"])
    def disable(self, request: HttpRequest, queryset: QuerySet[FunctionLimit]) -> None:
        queryset.update(enabled=False)

    @admin.action(description=gettext_lazy("Take the limits of the code"), permissions=["change"])
    def reset_to_code(self, request: HttpRequest, queryset: QuerySet[FunctionLimit]) -> None:
        for row in queryset.filter(declared__isnull=False):
            with transaction.atomic(using=conf.settings_for().database):
                reset(row)
                row.save(using=row._state.db)

    # What is shown.

    @admin.display(description=gettext_lazy("allowed"))
    def allowed(self, limit: FunctionLimit) -> str:
        parts = []
        if limit.rate:
            parts.append(limit.rate)
        if limit.concurrency is not None:
            parts.append(_("%(count)d at once") % {"count": limit.concurrency})
        if limit.by_key:
            parts.append(_("for each key"))
        return format.text(", ".join(parts))

    @admin.display(description=gettext_lazy("state"))
    def state(self, limit: FunctionLimit) -> str:
        if limit.withdrawn:
            return _("Rests: the code declares it no more")
        if not limit.enabled:
            return _("Disabled")
        try:
            limit.limit  # noqa: B018  # it refuses
        except ValueError as error:
            return format.text(str(error))
        return _("Enabled")

    @admin.display(description=gettext_lazy("running now"))
    def in_use(self, limit: FunctionLimit) -> str:
        return self._by_key(limit, lambda each: each.held, limit.concurrency)

    @admin.display(description=gettext_lazy("begun in the last period"))
    def begun(self, limit: FunctionLimit) -> str:
        if not limit.rate:
            return format.NOTHING
        try:
            most = limit.limit.rate
        except ValueError:
            return format.NOTHING
        return self._by_key(limit, lambda each: each.begun, most)

    def _by_key(self, limit: FunctionLimit, number: Any, most: int | None) -> str:
        found = sorted(self._standings(limit), key=lambda each: (-number(each), each.key))
        of = "" if most is None else " / " + str(most)
        if not limit.by_key:
            return format.text(f"{sum(map(number, found))}{of}")
        shown = [f"{each.key}: {number(each)}{of}" for each in found[:KEYS] if number(each)]
        more = ["..."] if len(found) > KEYS else []
        return format.text(", ".join([*shown, *more]) or f"0{of}", 2_000)

    def _standings(self, limit: FunctionLimit) -> list[Standing]:
        """Of the list they were read already, for all rows at once."""
        known: list[Standing] | None = getattr(limit, "_standings", None)
        if known is None:
            known = standings([limit], time.time())[limit.function]
            limit._standings = known  # type: ignore[attr-defined]  # ours alone
        return known

    @admin.display(description=gettext_lazy("waiting"))
    def waiting(self, limit: FunctionLimit) -> str:
        records = JobRecord.objects.using(conf.settings_for().database)
        return str(records.filter(function=limit.function, status=JobRecord.Status.READY).count())

    @admin.display(description=gettext_lazy("in the code"))
    def code(self, limit: FunctionLimit) -> str:
        declared = limit.declared or {}
        said = self.allowed(
            FunctionLimit(
                rate=declared.get("rate", ""),
                concurrency=declared.get("concurrency"),
                by_key=declared.get("by_key", False),
            )
        )
        remark = _("edited here; the code's changes are not taken") if is_edited(limit) else _("as here")
        return format.with_remark(said, remark)
