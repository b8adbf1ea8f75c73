"""What our admins share: look and database, rows that the code declares, and what is not changed there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.db import models
from django.forms import ModelForm
from django.http import HttpRequest

from django_gearman import conf
from django_gearman.models import FunctionLimit, JobGroup, JobRecord, Schedule, ServerLease

if TYPE_CHECKING:
    # Only the stubs know that it is generic.
    JobRecordModelAdmin = admin.ModelAdmin[JobRecord]
    ServerLeaseModelAdmin = admin.ModelAdmin[ServerLease]
    ScheduleModelAdmin = admin.ModelAdmin[Schedule]
    FunctionLimitModelAdmin = admin.ModelAdmin[FunctionLimit]
    JobGroupModelAdmin = admin.ModelAdmin[JobGroup]
else:
    JobRecordModelAdmin = ServerLeaseModelAdmin = ScheduleModelAdmin = admin.ModelAdmin
    FunctionLimitModelAdmin = JobGroupModelAdmin = admin.ModelAdmin


class Look:
    """How the pages of all our models look, and where they look."""

    show_full_result_count = False
    view_on_site: Callable[[Any], str | None] | bool = False
    show_facets = admin.ShowFacets.NEVER

    class Media:
        css = {"all": ["django_gearman/admin.css"]}

    def get_queryset(self, request: HttpRequest) -> models.QuerySet[Any]:
        """Rows of the jobs' database, which need not be the default one."""
        rows: models.QuerySet[Any] = super().get_queryset(request)  # type: ignore[misc]  # a ModelAdmin's
        return rows.using(conf.settings_for().database)

    def delete_model(self, request: HttpRequest, obj: models.Model) -> None:
        """From where it was read, whatever a router says."""
        obj.delete(using=obj._state.db)


class Declared:
    """Rows that the code may declare, and servers work on while they are edited."""

    def has_delete_permission(
        self, request: HttpRequest, obj: Schedule | FunctionLimit | None = None
    ) -> bool:
        # What the code declares would be back at the next start of a server.
        if obj is not None and obj.declared is not None and not obj.withdrawn:
            return False
        may: bool = super().has_delete_permission(request, obj)  # type: ignore[misc]  # a ModelAdmin's
        return may

    def save_model(
        self, request: HttpRequest, obj: Schedule | FunctionLimit, form: Any, change: bool
    ) -> None:
        """Save what was edited, and no more: a server may be firing the schedule, or following the code."""
        obj.save(using=conf.settings_for().database, update_fields=form.changed_data if change else None)


class RowForm(ModelForm):  # type: ignore[type-arg]  # only the stubs know that it is generic
    def validate_unique(self) -> None:
        """As a model form's, in the jobs' database; Django would look in the default one."""
        model = type(self.instance)
        others = model._base_manager.using(conf.settings_for().database).exclude(pk=self.instance.pk)
        for field in model._meta.concrete_fields:
            value = self.cleaned_data.get(field.name)
            if field.unique and value is not None and others.filter(**{field.name: value}).exists():
                self.add_error(field.name, self.instance.unique_error_message(model, (field.name,)))


class ReadOnly:
    """
    Refuses to add, to change and to delete, whatever the user's permissions.

    Rows belong to the job servers: one that is changed behind a server's back
    is a job lost or run twice. Who may look is for Django's permissions to say.
    """

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return False
