"""The part that the admins of jobs and servers share: looking is allowed, changing is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.contrib import admin
from django.db import models
from django.http import HttpRequest

from django_gearman.models import JobGroup, JobRecord, Schedule, ServerLease

if TYPE_CHECKING:
    # Only the stubs know that it is generic.
    JobRecordModelAdmin = admin.ModelAdmin[JobRecord]
    ServerLeaseModelAdmin = admin.ModelAdmin[ServerLease]
    ScheduleModelAdmin = admin.ModelAdmin[Schedule]
    JobGroupModelAdmin = admin.ModelAdmin[JobGroup]
else:
    JobRecordModelAdmin = ServerLeaseModelAdmin = ScheduleModelAdmin = JobGroupModelAdmin = admin.ModelAdmin


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
