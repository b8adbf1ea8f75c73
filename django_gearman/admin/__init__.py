"""
What operators see: the jobs and the job servers, to read and not to change, and the schedules, to edit.

Django's admin imports this package when it discovers the admins of all apps;
importing it registers ours. Nothing else of ``django_gearman`` imports it.
"""

from .job_group import JobGroupAdmin
from .job_record import JobRecordAdmin
from .schedule import ScheduleAdmin
from .server_lease import ServerLeaseAdmin

__all__ = ["JobGroupAdmin", "JobRecordAdmin", "ScheduleAdmin", "ServerLeaseAdmin"]
